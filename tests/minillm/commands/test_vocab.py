"""`python -m minillm vocab …` as a user types it."""

import json
import random
import re
import sys

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from minillm import __main__
from minillm.base.errors import UserError
from minillm.tokenizer.tokenizer import Tokenizer

ENGLISH = "the cat sat on the mat and the dog sat on the log\n\nhello hello world\n\n" * 60
CHINESE = "床前明月光，疑是地上霜。\n\n举头望明月，低头思故乡。\n\n" * 60


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en.txt").write_text(ENGLISH, encoding="utf-8")
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["minillm", "vocab", *arguments])
        assert __main__.main() == 0
        return capsys.readouterr().out

    return call


def test_train_merge_inspect_prune(call, tmp_path):
    said = call("train", "--input", "en.txt", "--vocab_size", "390", "--out", "en")
    assert "en: 390 pieces" in said and "characters per token" in said
    assert said.endswith("  python -m minillm vocab merge --base MODEL --add en --out DIR\n")
    said = call("train", "--input", "zh.txt", "--vocab_size", "400", "--out", "zh", "--compare", "en")
    assert said.count("characters per token") == 2
    said = call("merge", "--base", "en", "--add", "zh", "--out", "both", "--corpus", "en.txt", "zh.txt")
    assert "0 of these changed" in said and "unreachable 0" in said
    assert said.endswith("\nnext: python -m minillm resize --model MODEL --tokenizer both --out DIR\n")
    said = call("merge", "--base", "en", "--add", "zh", "--out", "again")
    assert "the pieces of both vocabularies" in said and "0 of these changed" in said and "characters per token" in said
    said = call("inspect", "both", "--text", "明月 the", "--corpus", "zh.txt")
    assert "明月" in said and "bpe" in said and "100.000% covered" in said
    said = call("prune", "--base", "both", "--corpus", "en.txt", "--out", "small")
    assert "0 changed" in said
    assert Tokenizer.load("small").vocab_size < Tokenizer.load("both").vocab_size
    assert (tmp_path / "small" / "id_map.json").exists() and (tmp_path / "both" / "id_map.json").exists()


def test_the_same_input_gives_the_same_file(call):
    for out in ("a", "b"):
        call("train", "--input", "zh.txt", "en.txt", "--vocab_size", "400", "--out", out, "--seed", "3")
    assert Tokenizer.load("a").sha256 == Tokenizer.load("b").sha256


def test_options_of_training(call):
    asked = ["--required_chars", "龘é", "--user_defined", "<tool>", "--control", "<|end|>", "--keep_digits_together"]
    call("train", "--input", "en.txt", "--vocab_size", "400", "--out", "en", *asked)
    made = Tokenizer.load("en")
    pieces = {p.piece: p.type for p in made.model.proto.pieces}
    assert pieces["龘"] == 1 and pieces["<tool>"] == 4 and pieces["<|end|>"] == 3
    assert "<tool>" in [made.model.proto.pieces[i].piece for i in made.encode("a <tool> b")]
    assert not made.model.proto.trainer_spec.split_digits


def test_faults_are_named_and_nothing_is_written(call, tmp_path):
    with pytest.raises(UserError, match="vocab_size 100: at least"):
        call("train", "--input", "en.txt", "--vocab_size", "100", "--out", "en")
    with pytest.raises(UserError, match=r"nothing\.txt"):
        call("train", "--input", "nothing.txt", "--vocab_size", "400", "--out", "en")
    with pytest.raises(UserError, match="--max_memory 0"):
        call("train", "--input", "en.txt", "--vocab_size", "400", "--out", "en", "--max_memory", "0")
    assert not (tmp_path / "en").exists()
    call("train", "--input", "en.txt", "--vocab_size", "390", "--out", "en")
    with pytest.raises(UserError, match="--out en: is there already"):
        call("train", "--input", "en.txt", "--vocab_size", "390", "--out", "en")
    (tmp_path / "broken.model").write_bytes((tmp_path / "en" / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"broken\.model .*damaged"):
        call("merge", "--base", "en", "--add", "broken.model", "--out", "both")
    assert not (tmp_path / "both").exists()


def test_duplicate_pieces_and_empty_corpora_are_named(call, tmp_path):
    call("train", "--input", "en.txt", "--vocab_size", "390", "--out", "en")
    model = proto.ModelProto.FromString((tmp_path / "en" / "tokenizer.model").read_bytes())
    model.pieces.add(piece=model.pieces[-1].piece, score=-1, type=1)
    (tmp_path / "twice.model").write_bytes(model.SerializeToString())
    (tmp_path / "empty.txt").write_bytes(b"\n \n")
    for arguments, said in (
        (("merge", "--base", "en", "--add", "twice.model"), r"twice\.model: SentencePiece refuses .* already defined"),
        (("merge", "--base", "en", "--add", "en", "--corpus", "empty.txt"), "--corpus: holds no text"),
        (("prune", "--base", "en", "--corpus", "empty.txt"), "--corpus: holds no text"),
        (("train", "--input", "empty.txt", "--vocab_size", "390"), "no text to train"),
    ):
        with pytest.raises(UserError, match=said):
            call(*arguments, "--out", "new")
        assert not (tmp_path / "new").exists()


def test_one_long_line_is_learnt_from_and_held_out(call, tmp_path):
    """Half a megabyte without a line end, of which each half has its own words."""
    rng = random.Random(0)
    words = [["".join(rng.choice(letters) for _ in range(3)) for _ in range(9)] for letters in ("天地玄黄", "宇宙洪荒")]
    line = "".join(rng.choice(half) for half in words for _ in range(30_000))
    (tmp_path / "line.txt").write_text(line, encoding="utf-8")
    said = call("train", "--input", "line.txt", "--vocab_size", "400", "--out", "new", "--max_memory", "8")
    held_out = int(re.search(r"on ([\d,]+) held-out", said)[1].replace(",", ""))
    assert 1_000 < held_out < 0.05 * len(line) and held_out % 4000 == 0
    made = Tokenizer.load("new")
    assert all(len(made.encode(line[at : at + 3000])) < 2000 for at in (0, 100_000))  # neither half was dropped


def test_little_text_is_counted_on_itself(call, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello world\r\n\r\nagain hello world\r\n")
    said = call("train", "--input", "bom.txt", "--vocab_size", "366", "--out", "new")
    assert "on 28 characters that were learnt from" in said and "characters per token" in said
    described = json.loads((tmp_path / "new" / "id_map.json").read_text())
    assert described["new_id_of_old"] == list(range(366)) and described["new_sha256"] == Tokenizer.load("new").sha256


def test_pieces_kept_by_name(call):
    call("train", "--input", "en.txt", "--vocab_size", "400", "--out", "en")
    call("prune", "--base", "en", "--corpus", "zh.txt", "--keep", " cat", "--out", "small")
    small = Tokenizer.load("small")
    assert [small.model.proto.pieces[i].piece for i in small.encode(" cat")] == ["▁cat"]
