"""Scores of texts: by a model, by a classifier, and what becomes of texts by them."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data import clean
from data.cleaning import model_score, passes, quality
from data.cleaning.mending import text_hash
from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import save_model
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

WORDS = "老周坐在码头石阶上慢慢地补旧网太阳出来时候雾便散了河水变成金黄色远处传第一声汽笛船还没有港风吹过田野麦子熟孩们"
SALT = "盐糖油酱醋茶锅碗瓢盆灶柴米面葱姜蒜椒"


def story(number: int, words: str = WORDS) -> str:
    """A text that is no near duplicate of another."""
    return "老周说：" + "".join(random.Random(number).choices(words, k=60)) + "。"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([story(i) + " one here" for i in range(40)], 400, folder)
    tokenizer = Tokenizer.load(folder)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=32)
    model = Transformer(config)
    model.init_weights(1)
    with torch.no_grad():
        model.embed_tokens.weight *= 20  # so that texts differ
    save_model(model, folder)
    return folder


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def run(out: Path, texts: str, **options) -> dict:
    return clean.clean(clean.Config(input=(texts,), out=str(out), **{"workers": 1, **options}))


def rows(out: Path, name: str = "kept-00000") -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines()]


# ---- by a model


def test_bits_per_byte_are_those_of_each_text_alone(model_folder):
    model, tokenizer = model_score._loaded(model_folder)
    texts = [story(1), "", "one here", story(2) * 40]
    found = model_score.bits_per_byte(model, tokenizer, texts)
    assert np.isnan(found[1])
    for text, value in zip(texts, found, strict=True):
        if not text:
            continue
        beginning = text[: model_score.BEGINNING]
        tokens = torch.tensor([tokenizer.start_id, *tokenizer.encode(beginning)])
        bits = 0.0
        for begin in range(0, len(tokens) - 1, 32):
            window = tokens[begin : begin + 33]
            with torch.no_grad():
                log_p = model(window[None, :-1])[0].double().log_softmax(-1)
            bits -= float(log_p.gather(1, window[1:, None]).sum()) / math.log(2)
        assert value == pytest.approx(bits / len(beginning.encode()), rel=1e-5)


def test_both_ends_of_a_language_are_dropped(model_folder, tmp_path):
    texts = write(tmp_path / "a.jsonl", [story(i) for i in range(120)] + ["There is one here, and the other is not."])
    result = run(tmp_path / "out", texts, score_model=str(model_folder), score_low=0.1, score_high=0.9)
    assert result["by_reason"]["predictable"]["documents"] == 11  # below the 12th of 120
    assert result["by_reason"]["surprising"]["documents"] == 11
    low, high = (rows(tmp_path / "out", f"dropped/{name}") for name in ("predictable", "surprising"))
    kept = rows(tmp_path / "out")
    bits = [row["cleaning"]["bits_per_byte"] for row in kept if row["text"].startswith("老")]
    assert len(kept) == 99 and kept[-1]["text"].startswith("There is")  # of one English text there are no quantiles
    assert max(row["cleaning"]["value"] for row in low) < min(bits) <= max(bits)
    assert max(bits) < min(row["cleaning"]["value"] for row in high)
    limit = float(low[0]["cleaning"]["limit"].removeprefix("< "))
    assert limit == pytest.approx(min(bits), rel=1e-3)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<b>bits_per_byte</b>" in page and "<h3>surprising (11)</h3>" in page


def test_other_quantiles_score_nothing_again(model_folder, tmp_path, monkeypatch):
    texts = write(tmp_path / "a.jsonl", [story(i) for i in range(120)])
    options = {"score_model": str(model_folder), "near_duplicates": "off"}
    run(tmp_path / "out", texts, **options)
    monkeypatch.setattr(model_score, "bits_per_byte", None)
    again = run(tmp_path / "out", texts, score_high=0.5, dry_run=True, **options)
    assert again["by_reason"]["surprising"]["documents"] > 40


def test_texts_that_another_threshold_leaves_are_scored_and_no_other(model_folder, tmp_path, monkeypatch):
    adverts = [f"{story(i)}加微信abc{i}3456，日赚五百，兼职名额有限，先到先得，当天日结。" for i in range(3)]
    texts = write(tmp_path / "a.jsonl", [story(i) for i in range(5, 15)] + adverts)
    run(tmp_path / "out", texts, score_model=str(model_folder))
    assert len(rows(tmp_path / "out", "dropped/sales")) == 3
    scored = []
    bits_per_byte = model_score.bits_per_byte
    monkeypatch.setattr(model_score, "bits_per_byte", lambda *given: scored.append(given[2]) or bits_per_byte(*given))
    rules = tmp_path / "rules.toml"
    rules.write_text("[sales]\nabove = 100\n")
    run(tmp_path / "out", texts, score_model=str(model_folder), rules=str(rules))
    assert scored == [adverts]
    assert all(row["cleaning"]["bits_per_byte"] > 0 for row in rows(tmp_path / "out"))


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(model_folder, tmp_path, monkeypatch):
    texts = write(tmp_path / "a.jsonl", [story(i) for i in range(120)])
    options = {"score_model": str(model_folder), "near_duplicates": "off"}
    monkeypatch.setattr(passes, "PIECE_BYTES", 20_000)
    run(tmp_path / "one", texts, **options)
    run(tmp_path / "two", texts, workers=2, **options)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


# ---- by a classifier


def test_runs_of_characters_are_counted_once():
    text = "abcabcabX"
    runs = {text.lower()[i : i + n] for n in range(1, 5) for i in range(len(text) - n + 1)}
    assert len(quality.buckets_of(text)) == len(runs)  # no two fall together
    assert set(quality.buckets_of("abc")) <= set(quality.buckets_of(text))
    assert len(quality.buckets_of("好")) == 1


def test_the_area_under_the_curve_is_the_share_of_ordered_pairs():
    scores_of = np.random.default_rng(0).integers(0, 9, 60) / 9  # with ties
    is_good = np.arange(60) % 3 > 0
    held_out = quality._held_out(scores_of, is_good, 0.5)
    pairs = list(itertools.product(scores_of[is_good], scores_of[~is_good]))
    assert held_out.auc == pytest.approx(np.mean([(g > b) + 0.5 * (g == b) for g, b in pairs]))
    assert held_out.kept_good == (scores_of[is_good] >= 0.5).sum()
    assert held_out.dropped_bad == (scores_of[~is_good] < 0.5).sum()


def test_of_many_samples_those_with_the_lowest_hashes_count(monkeypatch):
    monkeypatch.setattr(quality, "MOST", 7)
    texts = [story(i) for i in range(60)]
    lowest = sorted(texts, key=text_hash)[:7]
    assert list(quality._distinct([*texts, " ", *texts]).values()) == lowest


def test_the_classifier_learns_what_differs_and_chance_is_refused():
    good = [story(i) for i in range(80)]
    bad = [story(i, WORDS + SALT) for i in range(1000, 1080)]
    learnt, held_out = quality.train(good, bad, 0.5)
    assert held_out.auc > 0.95 and held_out.n_good == held_out.n_bad == 80
    unseen = learnt.scores([story(7000), story(7001, SALT), ""])
    assert unseen[0] > 0.5 > unseen[1] and np.isnan(unseen[2])
    with pytest.raises(UserError, match="no better than chance"):
        quality.train(good, [story(i) for i in range(100, 180)], 0.5)
    with pytest.raises(UserError, match="--bad: 49 different texts; give at least 50"):
        quality.train(good, [*bad[:49], bad[0]], 0.5)
    with pytest.raises(UserError, match="1 texts are in both"):
        quality.train(good, [*bad, good[3]], 0.5)


def test_texts_of_low_quality_are_dropped_and_say_why(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", [story(i) for i in range(80)])
    bad = write(tmp_path / "bad.jsonl", [story(i, SALT) for i in range(1000, 1080)])
    texts = write(tmp_path / "a.jsonl", [story(500), story(501, SALT), story(502)])
    options = {"good": (good,), "bad": (bad,)}
    result = run(tmp_path / "out", texts, **options)
    assert "80 good and 80 bad, at 0.5: precision 100.0%, recall 100.0%, bad ones dropped" in capsys.readouterr().out
    assert result["held_out"]["auc"] == 1 and [row["text"] for row in rows(tmp_path / "out")] == [
        story(500),
        story(502),
    ]
    (row,) = rows(tmp_path / "out", "dropped/low_quality")
    about = row["cleaning"]
    assert about["rule"] == "low_quality" and about["value"] < 0.5 and about["limit"] == "< 0.5"
    assert rows(tmp_path / "out")[0]["cleaning"]["quality"] > 0.5
    shown = clean.explain(clean.Config(explain=f"{tmp_path / 'a.jsonl'}:2", **options))
    assert f"quality              {about['value']:.4f}" in shown


def test_options_of_scores_without_meaning_are_refused(model_folder, tmp_path):
    for options, message in (
        ({"score_low": 0.1}, "--score_low: means nothing without --score_model"),
        ({"least_quality": 0.1}, "--least_quality: means nothing without --good"),
        ({"good": ("a",)}, "--good and --bad: a classifier needs samples of both"),
        ({"score_model": "m", "score_low": 0.9, "score_high": 0.5}, "--score_low 0.9: must be below --score_high 0.5"),
        ({"score_model": "m", "sft": True}, "--sft: conversations are not scored"),
    ):
        with pytest.raises(UserError, match=message):
            clean.Config(input=("x",), out="y", **options)
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "out", write(tmp_path / "a.jsonl", [story(1)]), score_model=str(tmp_path / "none"))
