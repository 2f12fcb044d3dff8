"""Tokens that are kept on the disk: the same batches, made once, and never damaged, half written or another's."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.datasets import instruction_tokens, kept_arrays
from minillm.datasets.files import row_files
from minillm.datasets.instructions import InstructionRows
from tests.minillm.datasets.test_instruction_rows import TALKS, tokenizer  # noqa: F401
from tests.minillm.datasets.test_instructions import Numbers, pair, talk, write_jsonl

ROWS = [pair(f"{i} 9", f"{i + 1} " * (i % 5 + 1), note="n") for i in range(20, 60)]
ROWS += [pair("1 " * 40, "2"), pair("1", ""), {"messages": talk("1", "2", "3", "4")}, {"messages": talk("1")}]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The folder of all that is kept, for tests that keep the tokens of the smallest files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(instruction_tokens, "KEPT_FROM", 1)
    return tmp_path / "cache" / "minillm" / "tokens"


@pytest.fixture
def path(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def read(path, seq_len=32, **how) -> InstructionRows:
    return InstructionRows(path, Numbers(), seq_len, **how)


def in_memory(monkeypatch, path, *others, **how) -> InstructionRows:
    """Rows that nothing is kept of."""
    with monkeypatch.context() as patched:
        patched.setattr(instruction_tokens, "KEPT_FROM", 1 << 40)
        return read(path, *others, **how)


def refuse_to_tokenize(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(instruction_tokens, "_tokenized", refuse)


def same(ours: InstructionRows, theirs: InstructionRows) -> None:
    """Whether both give the same batches, bit for bit, and say the same of the files."""
    assert ours.files.findings == theirs.files.findings
    assert list(ours.files.not_used) == list(theirs.files.not_used)
    assert ours.summary().partition("\ntokens ")[0] == theirs.summary()
    positions = np.arange(2 * theirs.rows_per_epoch)
    for one, other in zip(ours.batch(positions), theirs.batch(positions), strict=True):
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


def folders(home: Path) -> list[Path]:
    return sorted(home.iterdir()) if home.exists() else []


@pytest.mark.parametrize("packing", [True, False])
def test_kept_tokens_give_the_batches_of_those_in_memory(monkeypatch, path, home, packing):
    expected = in_memory(monkeypatch, path, packing=packing, seed=5)
    assert expected.where == "" and folders(home) == []
    same(read(path, packing=packing, seed=5), expected)
    refuse_to_tokenize(monkeypatch)
    again = read(path, packing=packing, seed=5)
    same(again, expected)
    assert isinstance(again.ids.base, np.memmap) and again.ids.dtype == np.uint16
    (folder,) = folders(home)
    assert again.summary().endswith(f"\ntokens kept in {folder}")
    read(path, seed=6, packing=not packing)  # an order is not kept


def test_small_files_leave_nothing_on_the_disk(monkeypatch, path, home):
    monkeypatch.setattr(instruction_tokens, "KEPT_FROM", path.stat().st_size + 1)
    read(path)
    assert folders(home) == []


def test_whatever_the_tokens_depend_on_makes_new_ones(monkeypatch, tmp_path, path, home):
    read(path)
    renamed = write_jsonl(tmp_path / "rows.json", ROWS)
    changed = write_jsonl(tmp_path / "changed.jsonl", [*ROWS[:-1], pair("3", "4")])
    changes = [
        lambda: read(path, 31),
        lambda: read(path, template="simple"),
        lambda: read(path, on_bad_line="skip"),
        lambda: read(path, encoding="gbk"),
        lambda: read(path, without_families=frozenset("a")),
        lambda: read([path, path]),
        lambda: read(renamed),
        lambda: read(changed),
        lambda: monkeypatch.setattr(Numbers, "identity", "others") or read(path),
        lambda: monkeypatch.setattr(instruction_tokens.metadata, "version", lambda _: "9") or read(path),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert len(folders(home)) == number
    refuse_to_tokenize(monkeypatch)
    read(path.rename(tmp_path / "moved.jsonl"))  # the same bytes, wherever they lie


def test_another_code_makes_new_ones(monkeypatch, tmp_path, path, home):
    read(path)
    code = tmp_path / "minillm" / "datasets" / "fitting.py"
    code.parent.mkdir(parents=True)
    code.write_text("changed")
    monkeypatch.setattr(instruction_tokens, "__file__", str(code))
    read(path)
    assert len(folders(home)) == 2


@pytest.mark.parametrize("name", ["ids.npy", "learn.npy", "lengths.npy", "about.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_a_damaged_folder_is_made_again(monkeypatch, path, home, name, how):
    expected = in_memory(monkeypatch, path)
    read(path)
    (folder,) = folders(home)
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(data if how == "flipped" else data[:-1])
    same(read(path), expected)
    assert folders(home) == [folder]
    refuse_to_tokenize(monkeypatch)
    same(read(path), expected)


def test_the_folder_of_other_data_is_not_used(monkeypatch, tmp_path, path, home):
    read(path)
    read(write_jsonl(tmp_path / "other.jsonl", ROWS[:9]))
    first, second = folders(home)
    first.rename(home / "a")
    second.rename(first)
    (home / "a").rename(second)
    same(read(path), in_memory(monkeypatch, path))


def test_files_that_change_while_they_are_read(monkeypatch, path, home):
    tokenized = instruction_tokens._tokenized

    def change(*arguments):
        made = tokenized(*arguments)
        write_jsonl(path, ROWS[1:])
        return made

    monkeypatch.setattr(instruction_tokens, "_tokenized", change)
    with pytest.raises(UserError, match=r"rows.jsonl: changed while it was read; start again"):
        read(path)
    assert folders(home) == []


def test_a_bad_row_is_said_as_ever_and_nothing_is_kept(path, home):
    with path.open("a") as file:
        file.write("3\n")
    with pytest.raises(UserError, match=rf"rows.jsonl, row {len(ROWS) + 1}: a row is a JSON object, not a number"):
        read(path)
    assert folders(home) == []
    assert read(path, on_bad_line="skip").counts["bad rows"] == 1
    assert read(path, on_bad_line="skip").counts["bad rows"] == 1


def test_a_place_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path, path, home):
    expected = in_memory(monkeypatch, path)
    (tmp_path / "cache").write_text("a file")
    rows = read(path)
    same(rows, expected)
    assert "\ntokens not kept for the next start (" in rows.summary() and "Not a directory" in rows.summary()
    (tmp_path / "cache").unlink()

    def no_home():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kept_arrays.Path, "home", no_home)
    assert "no home folder" in read(path).where


def test_a_folder_that_may_only_be_read(monkeypatch, path, home):
    read(path)
    open_file = Path.open

    def refuse(file, mode="r", *arguments, **more):
        if mode != "r" and mode != "rb":
            raise PermissionError(13, "Permission denied", str(file))
        return open_file(file, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in read(path, 31).where
    refuse_to_tokenize(monkeypatch)
    assert read(path).where.startswith("kept")


def test_a_disk_that_is_full_stops_nothing(monkeypatch, path, home):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    expected = in_memory(monkeypatch, path)
    monkeypatch.setattr(np, "save", full)
    rows = read(path)
    same(rows, expected)
    assert "No space left on device" in rows.where and folders(home) == []


def write_until_killed(path):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    np.save, kept_arrays.np.save = stop, stop
    instruction_tokens.KEPT_FROM = 1
    read(path)


def test_a_process_that_is_killed_while_it_writes(monkeypatch, path, home):
    process = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [entry.suffix.partition("-")[0] for entry in folders(home)] in ([".lock", ".tmp"], [".tmp", ".lock"])
    same(read(path), in_memory(monkeypatch, path))
    (folder,) = folders(home)
    assert not files.verify_folder(folder)


def read_slowly(path, made):
    tokenized = instruction_tokens._tokenized

    def slowly(*arguments):
        with Path(made).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return tokenized(*arguments)

    instruction_tokens._tokenized = slowly
    instruction_tokens.KEPT_FROM = 1
    rows = read(path)
    with Path(made).open("a") as file:
        file.write(f"batch {rows.batch(np.arange(9)).x.sum()} {rows.where[:4]}\n")


def test_several_processes_at_once_tokenize_once(tmp_path, path, home):
    fork = multiprocessing.get_context("fork")
    readers = [fork.Process(target=read_slowly, args=(path, tmp_path / "made")) for _ in range(3)]
    for process in readers:
        process.start()
    for process in readers:
        process.join()
    lines = (tmp_path / "made").read_text().splitlines()
    assert sum(line.isdigit() for line in lines) == 1
    assert len(set(lines)) == 2 and lines[-1].endswith("kept")
    assert len(folders(home)) == 1


def test_who_waited_in_vain_tokenizes_for_itself(monkeypatch, tmp_path, path, home):
    made = tmp_path / "made"
    monkeypatch.setattr(kept_arrays, "_keep", lambda _folder, _written, found: found)
    fork = multiprocessing.get_context("fork")
    readers = [fork.Process(target=read_slowly, args=(path, made)) for _ in range(2)]
    for process in readers:
        process.start()
    for process in readers:
        process.join()
    assert sum(line.isdigit() for line in made.read_text().splitlines()) == 2
    assert folders(home) == []


def test_what_was_not_used_for_long_is_deleted(path, home):
    read(path)
    read(path, 31)
    old, other = folders(home)
    long_ago = time.time() - (kept_arrays.UNUSED_DAYS + 1) * 24 * 3600
    for folder in (old, other):
        os.utime(folder, (long_ago, long_ago))
    read(path), read(path, 31)  # used again
    os.utime(old, (long_ago, long_ago))
    read(path, 30)
    assert old not in folders(home) and other in folders(home) and len(folders(home)) == 2


# ---- pieces of files


def test_a_file_gives_the_same_in_whatever_pieces(monkeypatch, tmp_path, home, tokenizer):  # noqa: F811
    paths = [
        write_jsonl(
            tmp_path / "a.jsonl", [*TALKS, {"messages": talk("1")}, pair("a b", "c " * 90, note="n"), pair("a", "")]
        ),
        write_jsonl(tmp_path / "b.jsonl", [pair("a", "b", other="o", note="n"), *TALKS[:30]]),
    ]
    with paths[1].open("a") as file:
        file.write("3\n" + json.dumps(TALKS[0]))
    monkeypatch.setattr(row_files, "FIRST_TEXTS", 300)
    monkeypatch.setattr(instruction_tokens, "KEPT_FROM", 1 << 40)
    expected = InstructionRows(paths, tokenizer, 64, on_bad_line="skip")
    monkeypatch.setattr(instruction_tokens, "KEPT_FROM", 1)
    monkeypatch.setattr(instruction_tokens, "PIECE_BYTES", 2000)
    rows = InstructionRows(paths, tokenizer, 64, on_bad_line="skip")
    same(rows, expected)
    with pytest.raises(UserError, match=r"b.jsonl, row 32: a row is a JSON object"):
        InstructionRows(paths, tokenizer, 64)
