"""The same tokens whatever the number of processes; stopped or killed, it goes on; long texts, large vocabularies."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import sources, tokenize_files
from data.prepare import prepare
from minillm.tokenizer import sentencepiece_model
from tests.data.test_prepare import bins, documents, many, write_lines

ROOT = Path(__file__).parents[2]


def test_same_bins_whatever_the_number_of_workers(tok_path, tmp_path, monkeypatch):
    inputs = [write_lines(tmp_path / f"{i}.jsonl", many(80 + i)) for i in range(5)]
    monkeypatch.setattr(sources, "SMALL", 25_000)  # bytes
    prepare(inputs, tmp_path / "one", tokenizer=tok_path, val_fraction=0.1, workers=1)
    monkeypatch.setattr(tokenize_files, "POOL_FROM", 0)
    monkeypatch.setattr(tokenize_files, "PIECE_BYTES", 1000)
    prepare(inputs, tmp_path / "few", tokenizer=tok_path, val_fraction=0.1, workers=1)
    prepare(inputs, tmp_path / "two", tokenizer=tok_path, val_fraction=0.1, workers=2)
    assert bins(tmp_path / "two") == bins(tmp_path / "few")
    assert 2 < len(bins(tmp_path / "few")) < 10  # some files in one bin, some not
    assert bins(tmp_path / "one") == bins(tmp_path / "two")


@pytest.mark.parametrize("wrap", ["eos", "bos_eos"])
def test_long_documents_give_the_same_tokens(tok_path, tmp_path, monkeypatch, wrap):
    """They are encoded by themselves: the bins are those of a limit that no document reaches."""
    file = write_lines(tmp_path / "a.jsonl", [*many(30), "▁ 你好 ▁", " apple " * 20_000])
    prepare([file], tmp_path / "usual", tokenizer=tok_path, val_fraction=0.3, wrap=wrap)
    monkeypatch.setattr(tokenize_files, "LONG_TEXT", 20)
    prepare([file], tmp_path / "long", tokenizer=tok_path, val_fraction=0.3, wrap=wrap)
    assert bins(tmp_path / "long") == bins(tmp_path / "usual")


def test_a_long_text_takes_a_few_bytes_a_token(tok, monkeypatch):
    """A list of Python's numbers would take some forty bytes for each."""
    monkeypatch.setattr(sentencepiece_model, "STRETCHES", 1)
    text = "apple 你好 " * 100_000
    tok.pieces.encode_array(text, tok.id_dtype)  # what is made once
    tracemalloc.start()
    ids = tok.pieces.encode_array(text, tok.id_dtype)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ids.dtype == np.uint16 and len(ids) > 200_000
    assert most < 12 * len(ids)


def test_split_by_hash(tok_path, tmp_path):
    texts = [f"text number {i}" for i in range(2000)]
    file = write_lines(tmp_path / "a.jsonl", texts + texts)
    prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0.05)
    train, val = documents(tmp_path / "out"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts + texts)
    assert not set(train) & set(val)  # copies fall on one side
    assert 130 < len(val) < 270  # 200 expected, in pairs: standard deviation 20


def test_stopped_anywhere_it_goes_on(tok_path, tmp_path, monkeypatch):
    inputs = [write_lines(tmp_path / f"{i}.jsonl", many(60 + i)) for i in range(5)]
    monkeypatch.setattr(sources, "SMALL", 1)
    monkeypatch.setattr(tokenize_files, "PIECE_BYTES", 500)
    options = {"tokenizer": tok_path, "val_fraction": 0.1, "workers": 1}
    prepare(inputs, tmp_path / "straight", **options)
    encode_piece = tokenize_files.encode_piece
    out = tmp_path / "out"
    for stop_after in (1, 20, 0, 12):

        def stopping(*args, left=[stop_after]):  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return encode_piece(*args)

        monkeypatch.setattr(tokenize_files, "encode_piece", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, out, **options)
        assert not (out / "meta.json").exists()
        with (out / "train-00000.bin").open("ab") as stream:
            stream.write(b"torn")
    n_whole = len(list((out / "unfinished").glob("*.json")))
    assert 2 < n_whole < 5
    n_calls = [0]

    def counting(*args):
        n_calls[0] += 1
        return encode_piece(*args)

    monkeypatch.setattr(tokenize_files, "encode_piece", counting)
    prepare(inputs, out, **options)
    assert n_calls[0] < 12 * (5 - n_whole)  # a file has about ten pieces: no whole bin is made twice
    assert bins(out) == bins(tmp_path / "straight")


def test_killed_with_workers_it_goes_on(tok_path, tmp_path):
    inputs = [write_lines(tmp_path / f"{i}.jsonl", many(600 + i)) for i in range(5)]
    code = (
        "import sys; from data import prepare, sources, tokenize_files\n"
        "tokenize_files.PIECE_BYTES, tokenize_files.POOL_FROM, sources.SMALL = 2000, 0, 1\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(sys.argv[2:], sys.argv[1], train_tokenizer=365, workers=2)\n"
    )
    (tmp_path / "script.py").write_text(code)

    def start(out: str) -> subprocess.Popen:
        arguments = [sys.executable, tmp_path / "script.py", tmp_path / out, *inputs]
        return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)

    assert start("straight").wait(60) == 0
    killed = start("killed")
    while killed.poll() is None:
        if len(list((tmp_path / "killed" / "unfinished").glob("*.json"))) >= 2:
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert killed.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "meta.json").exists()
    assert start("killed").wait(60) == 0
    assert bins(tmp_path / "killed") == bins(tmp_path / "straight")
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_large_vocabulary_takes_uint32(tok, tmp_path):
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(tok.model.data)
    for i in range(66_000):
        model.pieces.add(piece=f"<<{i}>>", score=0, type=model.pieces[0].USER_DEFINED)
    (tmp_path / "big.model").write_bytes(model.SerializeToString())
    file = write_lines(tmp_path / "a.jsonl", ["a<<65999>>"])
    meta = prepare([file], tmp_path / "out", tokenizer=tmp_path / "big.model", val_fraction=0)
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u4")
    assert meta["dtype"] == "uint32" and ids.tolist()[-2:] == [380 + 65_999, 2]
    assert documents(tmp_path / "out") == ["a<<65999>>"]


def test_a_long_line(tok_path, tmp_path):
    text = "One apple 世界 " * 100_000
    file = write_lines(tmp_path / "a.jsonl", ["before", text, "after"])
    prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    assert documents(tmp_path / "out") == ["before", text, "after"]
