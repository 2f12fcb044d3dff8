"""The bundled corpus as written: its bits lie beside its documents, and it is written once."""

import json
import shutil

import numpy as np
import pytest

from data import bundled
from data.world.texts import documents
from minillm.base.errors import UserError
from minillm.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def small(monkeypatch):
    sizes = {"train_bytes": 150_000, "val_documents": 40, "sft_train": 300, "sft_heldout": 70, "vocab_size": 700}
    sizes |= {"requests_train": 30, "requests_heldout": 20, "preferences_train": 40, "preferences_heldout": 10}
    monkeypatch.setattr(bundled, "SIZES", sizes)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_build(small, tmp_path, capsys):
    folder = tmp_path / "bundled"
    bundled.build(folder)

    val = lines(folder / "text" / "val.jsonl")
    bits = np.load(folder / "val_bits.npy")
    assert bits.dtype == np.float64 and len(bits) == len(val) == 40
    told = documents(bundled.SEEDS["val"])
    for row, exact in zip(val, bits, strict=True):
        assert (row["text"], exact) == next(told) and row["bits"] == pytest.approx(exact, abs=1e-5)
    assert sum(len(row["text"].encode()) for row in lines(folder / "text" / "train.jsonl")) >= 150_000

    meta = json.loads((folder / "meta.json").read_text())
    assert sum(file["documents"] for file in meta["files"]["val"]) == 40
    tokenizer = Tokenizer.load(folder)
    ids = np.fromfile(folder / meta["files"]["val"][0]["name"], dtype=meta["dtype"])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert tokenizer.decode(ids[: ends[0]].tolist()) == val[0]["text"]  # the order of val_bits.npy

    train, held_out = lines(folder / "sft_train.jsonl"), lines(folder / "sft_heldout.jsonl")
    assert (len(train), len(held_out)) == (300, 70)
    questions = {tuple(bundled.texts_of(row)[:-1]) for row in train + held_out}
    assert len(questions) == 370
    for name in ("requests", "preferences"):
        prompts = [row["prompt"] for split in ("train", "heldout") for row in lines(folder / f"{name}_{split}.jsonl")]
        assert len(set(prompts)) == len(prompts) == 50

    capsys.readouterr()
    before = (folder / "meta.json").stat().st_mtime_ns
    bundled.build(folder)
    assert capsys.readouterr().out == "" and (folder / "meta.json").stat().st_mtime_ns == before


def test_an_unfinished_or_older_corpus_is_written_again(small, tmp_path, monkeypatch):
    folder = tmp_path / "bundled"
    bundled.build(folder)
    meta = (folder / "meta.json").read_bytes()
    (folder / "meta.json").unlink()
    assert not bundled.finished(folder)
    bundled.build(folder)
    assert json.loads((folder / "meta.json").read_bytes())["made_from"] == json.loads(meta)["made_from"]
    monkeypatch.setattr(bundled, "SEEDS", {"train": 1, "val": 3})
    assert not bundled.finished(folder)
    bundled.build(folder)
    assert lines(folder / "text" / "val.jsonl")[0]["text"] == next(documents(3))[0]


@pytest.fixture
def generator(tmp_path, monkeypatch):
    """A copy of the generator's source, which `bundled.fingerprint` reads in its place."""
    copy = tmp_path / "world"
    shutil.copytree(bundled.GENERATOR, copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    monkeypatch.setattr(bundled, "GENERATOR", copy)
    return copy


def test_every_file_of_the_generator_is_in_its_fingerprint(generator):
    fingerprints = [bundled.fingerprint()]
    files = sorted(path for path in generator.rglob("*") if path.is_file())
    assert {"words.py", "draw.py", "stories.py", "texts.py", "questions.py"} <= {file.name for file in files}
    for file in files:
        with file.open("a", encoding="utf-8") as source:
            source.write("# another line\n")
        fingerprints.append(bundled.fingerprint())
    assert len(set(fingerprints)) == len(fingerprints) == len(files) + 1


def test_a_file_added_to_the_generator_or_renamed_in_it_changes_the_fingerprint(generator):
    fingerprints = [bundled.fingerprint()]
    (generator / "deeper" / "still").mkdir(parents=True)
    added = generator / "deeper" / "still" / "added.py"
    added.write_text("")
    fingerprints.append(bundled.fingerprint())
    added.write_text("X = 1\n")
    fingerprints.append(bundled.fingerprint())
    added.rename(generator / "deeper" / "added.py")
    fingerprints.append(bundled.fingerprint())
    assert len(set(fingerprints)) == 4


def test_line_endings_and_compiled_files_are_not_in_the_fingerprint(generator):
    fingerprints = []
    for line_end in (b"\n", b"\r\n"):
        for file in generator.rglob("*.py"):
            source = file.read_bytes().replace(b"\r\n", b"\n")
            file.write_bytes(source.replace(b"\n", line_end))
        fingerprints.append(bundled.fingerprint())
    (generator / "__pycache__").mkdir()
    (generator / "__pycache__" / "words.cpython-311.pyc").write_bytes(b"compiled")
    fingerprints.append(bundled.fingerprint())
    assert len(set(fingerprints)) == 1


def test_the_command_line(monkeypatch, tmp_path, capsys):
    built = []
    monkeypatch.setattr(bundled, "build", built.append)
    for words in ([], ["--out", "elsewhere"]):
        monkeypatch.setattr("sys.argv", ["bundled.py", *words])
        bundled.main()
    assert built == [bundled.FOLDER, "elsewhere"]
    monkeypatch.setattr("sys.argv", ["bundled.py", "--ouput", "elsewhere"])
    with pytest.raises(UserError, match=r"--ouput: .*did you mean --out.*see bundled\.py --help"):
        bundled.main()
    assert len(built) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "data/bundled: the bundled corpus is there; next: python train_pretrain.py --data data/bundled"
    assert said[1].startswith("elsewhere: the bundled corpus is there") and len(said) == 2


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no bundled corpus"):
        bundled.build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_older_corpus_goes_and_all_else_stays(small, tmp_path):
    bundled.build(tmp_path / "bundled")
    mine = [tmp_path / "bundled" / name for name in ("notes.txt", "train-mine.bin", "text/draft.md")]
    for path in mine:
        path.write_text("mine")
    (tmp_path / "bundled" / "world.json").unlink()
    bundled.build(tmp_path / "bundled")
    assert bundled.finished(tmp_path / "bundled") and all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "sft_train.jsonl"])
def test_a_corpus_that_training_would_refuse_is_written_again(small, tmp_path, name):
    folder = tmp_path / "bundled"
    bundled.build(folder)
    before = (folder / name).read_bytes()
    if name.endswith(".bin"):
        (folder / name).write_bytes(before + b"\0\0")
    else:
        (folder / name).unlink()
    bundled.build(folder)
    assert (folder / name).read_bytes() == before
