"""Text files of every kind → the same token bins; faults with their line; what is done already."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import tokenize_files
from data.prepare import Config, main, prepare
from minillm.base import files
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.datasets.token_bins import TokenBins
from minillm.tokenizer.tokenizer import Tokenizer

TEXTS = ["One apple.\nTwo  apples.", "你好，世界。", "\ttab and NUL \0 here", "emoji 😀 and ▁", "  last one  "]
ROOT = Path(__file__).parents[2]


def write_lines(path: Path, texts: list[str], end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps({"text": text}) + end for text in texts).encode())
    return path


def many(count: int) -> list[str]:
    return [f"Document {i}: " + "apple 世界 " * (i % 7) for i in range(count)]


def documents(out: Path, kind: str = "train") -> list[str]:
    """The texts in the bins, in order, read by nothing but the format's description."""
    meta = json.loads((out / "meta.json").read_text())
    tok = Tokenizer.load(out)
    found = []
    for file in meta["files"][kind]:
        ids = np.fromfile(out / file["name"], dtype=meta["dtype"])
        assert len(ids) == file["tokens"]
        ends = np.flatnonzero(ids == meta["eos_id"])
        assert len(ends) == file["documents"] and ends[-1] == len(ids) - 1
        found += [tok.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]
    return found


def bins(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.bin"))}


def test_meta_and_bins_by_hand(tok, tok_path, tmp_path):
    meta = prepare(
        [write_lines(tmp_path / "a.jsonl", TEXTS)],
        tmp_path / "out",
        tokenizer=tok_path,
        val_inputs=[write_lines(tmp_path / "b.jsonl", ["v2", "v1"])],
    )
    assert documents(tmp_path / "out") == TEXTS
    assert documents(tmp_path / "out", "val") == ["v2", "v1"]
    ids = [i for text in TEXTS for i in [tok.bos_id, *tok.encode(text), tok.eos_id]]
    assert np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u2").tolist() == ids
    assert meta["wrap"] == "bos_eos" and meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["format"] == 2 and meta["dtype"] == "uint16" and meta["vocab_size"] == 380
    assert meta["tokenizer_sha256"] == tok.sha256 == Tokenizer.load(tmp_path / "out").sha256
    assert (meta["bos_id"], meta["eos_id"], meta["pad_id"]) == (1, 2, 3)
    assert meta["bytes"] == {"train": sum(len(text.encode()) for text in TEXTS), "val": 4}
    assert not (tmp_path / "out" / "progress.json").exists()


def test_every_kind_of_file_gives_the_same_documents(tok_path, tmp_path):
    from pyarrow import parquet, table

    plain = write_lines(tmp_path / "a.jsonl", TEXTS).read_bytes()
    array = json.dumps([{"id": 1, "text": text} for text in TEXTS], ensure_ascii=False).encode()
    kinds = {
        "crlf.jsonl": plain.replace(b"\n", b"\r\n") + b"\r\n\r\n",  # blank lines at the end are no lines
        "bom.jsonl": b"\xef\xbb\xbf" + plain.rstrip(),
        "a.jsonl.gz": gzip.compress(plain),
        "a.json": b"\xef\xbb\xbf \n" + array,
        "pretty.json.gz": gzip.compress(json.dumps(json.loads(array), indent=2).encode()),
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    parquet.write_table(table({"text": TEXTS, "id": list(range(5))}), tmp_path / "a.parquet")
    for name in ["a.jsonl", "a.parquet", *kinds]:
        prepare([tmp_path / name], tmp_path / f"out-{name}", tokenizer=tok_path, val_fraction=0)
        assert documents(tmp_path / f"out-{name}") == TEXTS, name


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        ("blank", ["a\n b", "c", "d\ne"]),
        ("lines", ["a", " b", "c", "d", "e"]),
        ("file", ["a\n b\n\n \nc\n\nd\ne"]),
    ],
)
def test_where_documents_of_a_txt_end(tok_path, tmp_path, boundary, expected):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n b\r\n\r\n \nc\n\nd\ne")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tok_path, boundary=boundary, val_fraction=0)
    found = documents(tmp_path / "out")
    assert found == expected


def test_a_folder_is_read_in_order_of_names(tok_path, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "picture.png", ".hidden/d.txt"):
        (tmp_path / "in" / name).write_text(name)
    prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    assert documents(tmp_path / "out") == ["a.txt", "b.txt", "sub/c.txt"]


def test_folders_are_read_through_links_in_any_case_and_what_is_left_out_is_counted(tok_path, tmp_path, capsys):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for place in (folder / "sub", folder / ".git", elsewhere):
        place.mkdir(parents=True)
    for name in ("a.txt", "B.TXT", "c.Txt", "d.md", "e.jsonl.zst", "f.csv", "g.CSV", "README", ".h.txt", ".git/i.txt"):
        (folder / name).write_text(name)
    (elsewhere / "z.txt").write_text("z.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "above").symlink_to(folder)  # a circle
    (folder / "sub" / "again").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "h.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "h"}'))
    prepare([folder], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    assert documents(tmp_path / "out") == ["B.TXT", "a.txt", "c.Txt", "h", "z.txt"]
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "left out of the folders" in line)
    counts = {".csv": 2, ".md": 1, ".zst": 1, "without an ending": 1, "hidden files": 1, "hidden folders": 1}
    counts |= {"folders linked again": 2, "links to nothing, pipes and the like": 1}
    assert all(f"{kind} {count}" in said for kind, count in counts.items())
    assert said.startswith(f"{sum(counts.values())} left out of the folders: ")
    for name in (folder / "B.TXT", folder / "h.Jsonl.GZ"):
        prepare([name], tmp_path / "one", tokenizer=tok_path, val_fraction=0)


def test_a_folder_of_other_kinds_says_what_it_holds(tok_path, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("a")
    with pytest.raises(UserError, match=r"holds no file of a known kind .*, but \.md 1"):
        prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tok_path)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_file_name_may_be_any_bytes(tok_path, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / os.fsdecode("庙.txt".encode("gbk"))  # no UTF-8
    path.write_bytes(b"one\n\ntwo")
    for _ in range(2):
        meta = prepare([folder], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    assert documents(tmp_path / "out") == ["one", "two"]
    assert meta["bins"][0]["sources"][0]["file"] == rf"{folder}/\xc3\xed.txt"
    path.write_bytes(b"one\n\ntwo\n\nthree")
    prepare([folder], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    said = capsys.readouterr().out
    assert "text changed: " in said and r"\xc3\xed.txt" in said
    path.write_bytes(b"one\n\ntwo\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare([folder], tmp_path / "out", tokenizer=tok_path, val_fraction=0)


def test_another_encoding_gives_the_same_tokens_and_is_part_of_what_determines_them(tok_path, tmp_path):
    text = "山上有一座庙。\n\n庙里有个老和尚，他在讲故事。\n"
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "gbk"), ("c.txt", "utf-16")):
        (tmp_path / name).write_text(text, encoding=encoding)
        meta = prepare([tmp_path / name], tmp_path / name[0], tokenizer=tok_path, val_fraction=0, encoding=encoding)
        assert documents(tmp_path / name[0]) == text.strip().split("\n\n")
        assert meta["bytes"]["train"] == len(text.strip().encode()) - 2
    assert (
        "encoding" not in prepare([tmp_path / "a.txt"], tmp_path / "a", tokenizer=tok_path, val_fraction=0)["options"]
    )
    assert meta["options"]["encoding"] == "utf-16"
    with pytest.raises(
        UserError, match=r"b\.txt: not UTF-8 but, as it seems, GB18030 \(or GBK\); read it by --encoding"
    ):
        prepare([tmp_path / "b.txt"], tmp_path / "b", tokenizer=tok_path, val_fraction=0)
    with pytest.raises(UserError, match="--encoding gbkk: no known encoding"):
        prepare([tmp_path / "b.txt"], tmp_path / "b", tokenizer=tok_path, encoding="gbkk")


BAD = {
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 (byte 0xFF, column 11)"),
    "not JSON": (b'{"text": ', "not JSON (Expecting value, column 9); a file is one object a line, or one array"),
    "missing key": (b'{"txt": "a"}', "key 'text' is missing (its keys: txt; choose with --field)"),
    "wrong type": (b'{"text": 5}', "key 'text' holds a number, not a string"),
    "no object": (b'"hello"', "a JSON object is needed, this is a string"),
    "empty line": (b" ", "empty line"),
    "surrogate": (b'{"text": "a\\ud800"}', "lone surrogate U+D800 in the text"),
    "deep": (b"[" * 100_000, "not JSON (nested too deeply); a file is one object a line, or one array"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_or_skipped(tok_path, tmp_path, name):
    line, reason = BAD[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": ""}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError) as error:
        prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    assert str(error.value).startswith(f"{file}, line 3: {reason}")
    meta = prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0, on_bad_line="skip")
    assert documents(tmp_path / "out") == ["one", "two"]
    assert (meta["bad_lines"], meta["empty_documents"]) == (1, 1)
    assert meta["first_bad"] == [f"{file}, line 3: {reason}"]


def test_what_was_left_out_is_told_where_nothing_is_left(tok_path, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n\nth\xe9\n")
    with pytest.raises(UserError, match=r"no document is left to train on .2 bad lines left out, the first: .*latin"):
        prepare([tmp_path / "latin.txt"], tmp_path / "out", tokenizer=tok_path, on_bad_line="skip")


def test_bad_utf8_in_a_text_names_the_line_in_the_document(tok_path, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"a\.txt, line 3: not UTF-8 \(byte 0xE9, 1 lines further on, column 4\)"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tok_path, val_fraction=0)


def test_bad_items_of_an_array_are_named_or_skipped(tok_path, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'[{"text": "one"}, {"text": "\xff"}, 5, {"text": "two"}]')
    with pytest.raises(UserError, match=r"a\.json, item 2: not UTF-8 \(byte 0xFF, column 1\); fix it, or leave"):
        prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0)
    meta = prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=0, on_bad_line="skip")
    assert documents(tmp_path / "out") == ["one", "two"]
    assert meta["first_bad"][1] == f"{file}, item 3: a JSON object is needed, this is a number"


def test_a_broken_file_cannot_be_skipped(tok_path, tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    for name, reason in {"a.json": "after item 1 of the array", "b.jsonl.gz": "cannot be read"}.items():
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            prepare([tmp_path / name], tmp_path / "out", tokenizer=tok_path, on_bad_line="skip")


def test_a_share_for_validation_beside_files_for_it_is_refused():
    files = ["--input", "a.txt", "--out", "b", "--tokenizer", "t", "--val_input", "c.txt"]
    assert parse(Config, "", files).val_input == ("c.txt",)
    with pytest.raises(UserError, match=r"--val_fraction 0.5: means nothing with --val_input"):
        parse(Config, "", [*files, "--val_fraction", "0.5"])


def test_finished_is_told_and_bins_from_elsewhere_are_refused(tok_path, tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    first = prepare([file], out, tokenizer=tok_path, val_fraction=0)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert prepare([file], out, tokenizer=tok_path, val_fraction=0, workers=3) == first
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "lock"} == {
        path: when for path, when in before.items() if path.name != "lock"
    }
    (tmp_path / "theirs").mkdir()
    for name in ("train-00000.bin", "meta.json", "tokenizer.model"):
        (tmp_path / "theirs" / name).write_bytes(b"precious")
    for kind in ({"tokenizer": tok_path}, {"train_tokenizer": 380}):
        with pytest.raises(UserError, match="choose another --out"):
            prepare([file], tmp_path / "theirs", val_fraction=0, **kind)
    found = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir() if path.name != "lock"}
    assert found == dict.fromkeys(("train-00000.bin", "meta.json", "tokenizer.model"), b"precious")


def test_texts_that_moved_or_are_read_by_other_options_give_the_same_data(tok_path, tmp_path):
    """A run that goes on compares what identifies its data, and so do the machines of a run."""
    out = tmp_path / "out"
    names = [TEXTS[0], TEXTS[1], "a bad line follows"]
    file = write_lines(tmp_path / "a.jsonl", names)
    bad = tmp_path / "b.jsonl"
    bad.write_text("{")
    how = dict(val_fraction=0, on_bad_line="skip")
    prepare([file, bad], out, tokenizer=tok_path, **how)
    before = TokenBins(out, "train").identity()
    (tmp_path / "elsewhere").mkdir()
    moved = [path.rename(tmp_path / "elsewhere" / path.name) for path in (file, bad)]
    again = prepare(moved, out, tokenizer=tok_path, boundary="lines", **how)  # of a .txt, of which there is none
    assert "elsewhere" in again["source"][0] and "elsewhere" in again["first_bad"][0]
    assert TokenBins(out, "train").identity() == before

    # on another machine; by an option that changes tokens; from other texts
    identities = []
    for name, more in {"machine": {}, "wrapped": {"wrap": "eos"}, "changed": {}}.items():
        if name == "changed":
            write_lines(moved[0], names[::-1])
        prepare(moved, tmp_path / name, tokenizer=tok_path, **how, **more)
        identities.append(TokenBins(tmp_path / name, "train").identity())
    assert identities[0] == before and before not in identities[1:]


def test_a_run_gives_the_tokenizer_of_its_newest_checkpoint(tok, tmp_path):
    for step in (1, 12):
        folder = tmp_path / "run" / f"step-{step:08d}"
        files.write_folder(folder, lambda folder: tok.save(folder))
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    meta = prepare([file], tmp_path / "out", tokenizer=tmp_path / "run", val_fraction=0)
    assert meta["tokenizer_sha256"] == tok.sha256


def test_documents_begin_with_bos_unless_they_never_did(tok, tok_path, tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    without = [i for text in TEXTS for i in [*tok.encode(text), tok.eos_id]]

    def ids(out) -> list[int]:
        return np.fromfile(out / "train-00000.bin", dtype="<u2").tolist()

    # asked for: as every folder was before bos became the default
    out = tmp_path / "out"
    meta = prepare([file], out, tokenizer=tok_path, val_fraction=0, wrap="eos")
    assert "its model knows texts that begin with bos" in capsys.readouterr().out
    assert meta["wrap"] == "eos" and ids(out) == without and documents(out) == TEXTS
    assert Tokenizer.load(out).prompt_ids("a") == [tok.eos_id, *tok.encode("a")]

    # not asked for: as the folder was prepared, or as the tokenizer's model knows texts
    more = write_lines(tmp_path / "b.jsonl", ["more"])
    assert prepare([file, more], out, tokenizer=tok_path, val_fraction=0)["wrap"] == "eos"
    assert ids(out) == [*without, *tok.encode("more"), tok.eos_id]
    assert prepare([file], tmp_path / "its", tokenizer=out, val_fraction=0)["wrap"] == "eos"
    assert ids(tmp_path / "its") == without
    again = prepare([file], out, tokenizer=out, val_fraction=0, wrap="bos_eos")
    assert again["wrap"] == "bos_eos" and Tokenizer.load(out).prompt_ids("a") == [tok.bos_id, *tok.encode("a")]
    learn = {"train_tokenizer": 380, "val_fraction": 0}
    texts = write_lines(tmp_path / "c.jsonl", many(100))
    for wrap in ("eos", "bos_eos"):
        assert prepare([texts], tmp_path / wrap, wrap=wrap, **learn)["wrap"] == wrap
        assert prepare([texts, file], tmp_path / wrap, **learn)["wrap"] == wrap


def test_a_byte_level_tokenizer_in_place_of_another_kind(tok_path, tmp_path, monkeypatch):
    from tests.minillm.tokenizer.test_byte_bpe import train

    (tmp_path / "level").mkdir()
    theirs = train("gpt-2")
    theirs.save(str(tmp_path / "level" / "tokenizer.json"))
    (tmp_path / "level" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    file, out = write_lines(tmp_path / "a.jsonl", many(50)), tmp_path / "out"
    prepare([file], out, tokenizer=tok_path, val_fraction=0)
    monkeypatch.setattr(tokenize_files, "POOL_FROM", 0)
    prepare([file], out, tokenizer=tmp_path / "level", val_fraction=0, workers=2)
    eos = theirs.token_to_id("<|end|>")
    ids = [i for text in many(50) for i in [*theirs.encode(text).ids, eos]]
    assert np.fromfile(out / "train-00000.bin", dtype="<u2").tolist() == ids
    assert documents(out) == many(50)
    before = (out / "meta.json").stat().st_mtime_ns
    prepare([file], out, tokenizer=tmp_path / "level", val_fraction=0)
    assert (out / "meta.json").stat().st_mtime_ns == before


@pytest.mark.skipif(os.name == "nt", reason="Windows sets no limit on a file's size")
def test_a_full_disk_is_named_and_survived(tok_path, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", many(2000))
    arguments = f"--input {file} --tokenizer {tok_path} --val_fraction 0 --workers 1 --out".split()
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *arguments, str(tmp_path / "out")]
    limited = subprocess.run(["bash", "-c", 'ulimit -f 30; exec "$@"', "-", *command], capture_output=True, text=True)
    last = limited.stderr.splitlines()[-1]
    assert limited.returncode == 2 and last.startswith(f"error: {tmp_path}/out/unfinished/")
    assert ".train.bin: writing " in last and "make room, then run the same command again" in last
    assert "Traceback" not in limited.stderr and not (tmp_path / "out" / "meta.json").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "2,000 documents" in again.stdout
    assert documents(tmp_path / "out") == many(2000)


def test_help_names_every_option():
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("input", "out", "tokenizer", "train_tokenizer", "val_input", "split", "field", "on_bad_line"):
        assert f"--{name} " in text


def test_options_that_mean_nothing(tok_path, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", TEXTS)
    for wrong, message in {
        "boundary": "--split wrong: choose one of blank, lines, file",
        "on_bad_line": "--on_bad_line wrong: choose one of error, skip",
        "wrap": "--wrap wrong: choose one of eos, bos_eos",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare([file], tmp_path / "out", tokenizer=tok_path, **{wrong: "wrong"})
    with pytest.raises(UserError, match=r"--val_fraction 1\.5"):
        prepare([file], tmp_path / "out", tokenizer=tok_path, val_fraction=1.5)
    for wrong, least in {"workers": 1, "train_tokenizer": 360}.items():
        given = {"tokenizer": tok_path} if wrong != "train_tokenizer" else {}
        with pytest.raises(UserError, match=f"--{wrong} 0: at least {least} is needed"):
            prepare([file], tmp_path / "out", **given, **{wrong: 0})
    monkeypatch.setattr("sys.argv", ["prepare.py", "--splitt", "lines"])
    with pytest.raises(UserError, match=r"--splitt: .*did you mean --split.*see prepare\.py --help"):
        main()
    with pytest.raises(UserError, match="either --tokenizer PATH or --train_tokenizer N"):
        prepare([file], tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.jsonl: given 2 times"):
        prepare([file], tmp_path / "out", tokenizer=tok_path, val_inputs=[file])
    with pytest.raises(UserError, match="lies inside the input"):
        prepare([tmp_path], tmp_path / "out", tokenizer=tok_path)
    assert not (tmp_path / "out").exists()


def test_texts_of_control_pieces_are_counted_before_they_become_letters(tok, tmp_path, capsys):
    piece = "<|user|>"
    (tmp_path / "t.txt").write_text(f"{piece}hello\n{piece}good day </s>\nmore\n" * 20)
    tok.save(tmp_path / "tok")
    prepare([tmp_path / "t.txt"], tmp_path / "out", tokenizer=tmp_path / "tok", boundary="lines", val_fraction=0)
    assert f"encoded as letters like any other text: {piece} 40, </s> 20" in capsys.readouterr().out


def test_an_empty_file_of_validation_is_said_to_be_so(tok_path, tmp_path):
    train = write_lines(tmp_path / "a.jsonl", ["one apple", "two apples"])
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"--val_input \S+b\.jsonl: no document is in it"):
        prepare([train], tmp_path / "out", tokenizer=tok_path, val_inputs=[tmp_path / "b.jsonl"])


def test_no_copy_of_a_document_of_val_input_is_trained_on(tok_path, tmp_path):
    train = write_lines(tmp_path / "a.jsonl", ["one apple", "held apple", "two apples", "held apple"])
    val = write_lines(tmp_path / "b.jsonl", ["held apple"])
    meta = prepare([train], tmp_path / "out", tokenizer=tok_path, val_inputs=[val])
    assert meta["copies_of_validation"] == 2
    assert [sum(file["documents"] for file in meta["files"][split]) for split in ("train", "val")] == [2, 1]

    # other validation documents: the training file's tokens are made again
    write_lines(val, ["two apples"])
    meta = prepare([train], tmp_path / "out", tokenizer=tok_path, val_inputs=[val])
    assert meta["copies_of_validation"] == 1 and meta["files"]["train"][0]["documents"] == 3


@pytest.mark.parametrize("of_a_model", [False, True])
def test_the_next_command_trains_on_what_was_prepared(tmp_path, monkeypatch, capsys, of_a_model):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("a.jsonl"), many(20))
    prepare(["a.jsonl"], "model", train_tokenizer=380)
    capsys.readouterr()
    if of_a_model:
        Path("model/config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--input", "a.jsonl", "--tokenizer", "model", "--out", "my bins"])
    main()
    init = "--init_from model " if of_a_model else ""
    command = f"python train_pretrain.py --data 'my bins' {init}--out 'out/my bins'"
    assert capsys.readouterr().out.endswith(f"\nmy bins: next: {command}\n")
