"""Whether training and validation each get a document is known before anything is tokenized."""

import pytest

from data import prepare as prepare_module
from data import splits
from data.held_out import document_hash
from data.prepare import prepare
from minillm.base.errors import UserError
from tests.data.test_prepare import documents, many, write_lines

SHARE = 1e-6  # no document of these falls below


@pytest.fixture
def no_tokens(monkeypatch):
    """The tokenizer is neither learnt nor used."""

    def refuse(*_):
        raise AssertionError("the long work has begun")

    for name in ("learnt_tokenizer", "tokenize"):
        monkeypatch.setattr(prepare_module, name, refuse)


def test_of_a_small_corpus_one_document_is_for_validation(tok_path, tmp_path, capsys):
    texts = many(9)
    file = write_lines(tmp_path / "a.jsonl", texts + texts)
    for _ in range(2):
        meta = prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=SHARE)
    said = capsys.readouterr().out
    assert "none of 18 documents falls below --val_fraction 1e-06: raised to " in said and "nothing to do" in said
    lowest = min(texts, key=lambda text: document_hash(text.encode()))
    others = [text for text in texts if text != lowest]
    assert documents(tmp_path / "out", "val") == [lowest, lowest]
    assert documents(tmp_path / "out") == others + others
    share = meta["options"]["val_fraction"]
    assert document_hash(lowest.encode()) < share * 2**64 < min(document_hash(text.encode()) for text in others)

    # the share that is written down gives the same; and with text of which more falls below, the wish counts
    again = prepare([file], tmp_path / "again", tokenizer=tok_path, val_fraction=share)
    assert again["bins"] == meta["bins"] and "falls below" not in capsys.readouterr().out
    meta = prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0.5)
    assert meta["options"]["val_fraction"] == 0.5


def test_two_documents_are_enough(tok_path, tmp_path):
    for texts in (["one", "two"], ["apple", "world"], ["a", "b"]):
        file = write_lines(tmp_path / "a.jsonl", texts)
        prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=SHARE)
        assert sorted(documents(tmp_path / "out") + documents(tmp_path / "out", "val")) == sorted(texts)


def test_no_more_is_read_than_it_takes(tok_path, tmp_path, monkeypatch):
    n_read = 0
    text_of = splits.text_of

    def counting(*arguments):
        nonlocal n_read
        n_read += 1
        return text_of(*arguments)

    monkeypatch.setattr(splits, "text_of", counting)
    file = write_lines(tmp_path / "a.jsonl", many(2000))
    for share, most in ((0.1, 100), (0, 1)):
        n_read = 0
        meta = prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=share)
        assert meta["options"]["val_fraction"] == share and 0 < n_read <= most


@pytest.mark.parametrize("how", ["given", "learnt"])
def test_a_split_without_a_document_is_said_before_the_work(tok_path, tmp_path, no_tokens, how):
    tokenizer = {"tokenizer": tok_path} if how == "given" else {"train_tokenizer": 380}

    def refused(message: str, texts: list[str], **options) -> None:
        with pytest.raises(UserError, match=message):
            prepare([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "out", **tokenizer, **options)

    val = write_lines(tmp_path / "val.jsonl", ["x", "y"])
    empty = write_lines(tmp_path / "empty.jsonl", [""])
    refused("there is one document only, or copies of one, so none is left for validation", ["x"], val_fraction=SHARE)
    refused("one document only, or copies of one", ["x", "x", ""], val_fraction=SHARE)
    refused("all documents fell into the validation split; choose a lower one", ["x", "y"], val_fraction=0.999999)
    for options in ({}, {"val_fraction": 0}, {"val_inputs": [val]}):
        refused("--input: no document is left to train on; give", ["", ""], **options)
    refused("--input: no document is left to train on; give", ["y", "x"], val_inputs=[val])  # copies of validation
    refused(r"--val_input \S+empty\.jsonl: no document is in it; give", ["x"], val_inputs=[empty])


@pytest.mark.parametrize("of", ["input", "val_input"])
def test_a_missing_field_is_named_before_a_tokenizer_is_learnt(tmp_path, no_tokens, of):
    good = write_lines(tmp_path / "good.jsonl", many(9))
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one", "id": 1}\n' * 9)
    inputs = {"inputs": [file]} if of == "input" else {"inputs": [good], "val_inputs": [file]}
    reason = r"a\.jsonl, line 1: key 'text' is missing \(its keys: body, id; choose with --field\)"
    for on_bad_line in ("error", "skip"):
        with pytest.raises(UserError, match=reason):
            prepare(**inputs, out=tmp_path / "out", train_tokenizer=380, on_bad_line=on_bad_line)


def test_a_bad_line_further_on_is_said_before_a_tokenizer_is_learnt(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", many(300))
    with file.open("a") as lines:
        lines.write('{"body": "one"}\n')
    monkeypatch.setattr(prepare_module.train, "_learn", None)
    with pytest.raises(UserError, match=r"a\.jsonl, line 301: key 'text' is missing \(its keys: body"):
        prepare([file], tmp_path / "out", train_tokenizer=380)
