"""Folders trained here mean the same to other tools: transformers' texts, lm-evaluation-harness's log-likelihoods."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.evaluation.answers import answers
from minillm.generation.load import load
from tests import launch

PROMPTS = ["the cat sat on", "a", "", " 猫 \n"]
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who sat on the mat?"}]
TEXTS = ["the cat sat", "on a mat. " * 9, "x", "the dog ran and the cat sat on the mat " * 3]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> SimpleNamespace:
    """A folder with the runs "pretrained" and "taught", of a few steps each."""
    home = tmp_path_factory.mktemp("tools")
    launch.write_corpus(home / "data")
    more = f"--data {home}/data {launch.SMALL} --steps 12"
    launch.finish("pretrain", f"--out {home}/pretrained {more}", home / "log" / "pretrain")
    rows = [{"instruction": f"Who has {n} cats?", "output": f"The dog has {n}."} for n in range(40)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = f"--init_from {home}/pretrained --data {home}/rows.jsonl --steps 6 --device cpu --lr 0.01"
    launch.finish("sft", f"--out {home}/taught {more}", home / "log" / "sft")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return SimpleNamespace(path=home)


def theirs(run: Path):
    """Tokenizer and model of a run's checkpoint, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = run.glob("step-*")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval(), folder


def continued(model, ids: list[int], count: int = 20) -> list[int]:
    """The new ids of transformers' greedy generation, without the eos that ends them."""
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)[0, len(ids) :].tolist()
    return made[:-1] if made[-1] == model.config.eos_token_id else made


@pytest.mark.parametrize("run", ["pretrained", "taught"])
def test_a_text_is_continued_as_transformers_does(home, call, run):
    tokenizer, model, _ = theirs(home.path / run)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        asked = ["generate", "--model", str(home.path / run), "--prompt", prompt, "--temperature", "0"]
        status, out, err = call(*asked, "--max_new_tokens", "20")
        assert status == 0, err
        assert out.removesuffix("\n") == tokenizer.decode(continued(model, ids), skip_special_tokens=True)


def test_a_question_is_answered_as_transformers_does(home):
    tokenizer, model, folder = theirs(home.path / "taught")
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    expected = tokenizer.decode(continued(model, ids), skip_special_tokens=True)
    ours = load(folder, device="cpu", check_kernels=lambda *_: None)
    assert answers(ours.model, ours.tokenizer, [MESSAGES], max_new_tokens=20) == [expected]


def rolling(model, ids: list[int], prefix: int, longest: int) -> float:
    """Nats of these ids by lm-evaluation-harness's rule: windows of `longest` inputs, disjoint in what they predict."""
    nats = 0.0
    done = 0
    while done < len(ids):
        end = min(done + longest, len(ids))
        inputs = ids[end - longest - 1 : end - 1] if done else [prefix, *ids[: end - 1]]
        with torch.no_grad():
            log_p = model(torch.tensor([inputs])).logits[0].log_softmax(-1)
        for place, target in zip(range(len(inputs) - (end - done), len(inputs)), ids[done:end], strict=True):
            nats -= float(log_p[place, target])
        done = end
    return nats


@pytest.mark.parametrize("longest", [32, 100])
def test_texts_alone_cost_what_lm_evaluation_harness_counts(home, call, longest):
    tokenizer, model, _ = theirs(home.path / "pretrained")
    assert model.config.trained_seq_len == 32 and model.config.max_position_embeddings == 512
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert min(map(len, ids)) < 32 < max(map(len, ids))
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    expected = sum(rolling(model, text, prefix, longest) for text in ids)
    after_eos = sum(rolling(model, text, tokenizer.eos_token_id, longest) for text in ids)
    assert abs(expected - after_eos) > 0.1

    more = (
        [] if longest == 32 else ["--seq_len", str(longest)]
    )  # 32 is what it was trained at, though it has room for more
    status, out, err = call(
        "eval", "--model", str(home.path / "pretrained"), "--data", str(home.path / "texts.jsonl"), *more
    )
    assert status == 0, err
    assert f"{longest} tokens{', as it was trained' if longest == 32 else ''}; the context is 512" in out
    nats, bits = map(float, re.search(r"text alone +([\d.]+) nats, ([\d.]+) bits per byte", out).groups())
    assert nats == pytest.approx(expected, abs=2e-3)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert bits == pytest.approx(expected / math.log(2) / n_bytes, abs=1e-3)
