"""`python -m minillm vocab …` as a user types it."""

import sys

import pytest

from minillm import UserError
from minillm import __main__ as commands
from minillm.tokenizer import Tokenizer

ENGLISH = "the cat sat on the mat and the dog sat on the log\n\nhello hello world\n\n" * 60
CHINESE = "床前明月光，疑是地上霜。\n\n举头望明月，低头思故乡。\n\n" * 60


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en.txt").write_text(ENGLISH, encoding="utf-8")
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["minillm", "vocab", *arguments])
        assert commands.main() == 0
        return capsys.readouterr().out

    return call


def test_train_merge_inspect_prune(call, tmp_path):
    said = call("train", "--input", "en.txt", "--vocab_size", "390", "--out", "en")
    assert "en: 390 pieces" in said and "characters per token" in said
    said = call("train", "--input", "zh.txt", "--vocab_size", "400", "--out", "zh", "--compare", "en")
    assert said.count("characters per token") == 2
    said = call("merge", "--base", "en", "--add", "zh", "--out", "both", "--corpus", "en.txt", "zh.txt")
    assert "0 of these changed" in said and "can never arise 0" in said
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
    pieces = {p.piece: p.type for p in made._proto.pieces}
    assert pieces["龘"] == 1 and pieces["<tool>"] == 4 and pieces["<|end|>"] == 3
    assert "<tool>" in [made._proto.pieces[i].piece for i in made.encode("a <tool> b")]
    assert not made._proto.trainer_spec.split_digits


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
