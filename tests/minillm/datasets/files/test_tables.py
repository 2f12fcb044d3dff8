"""Instructions in tables, and files of other kinds, which are named."""

import csv
import datetime
import errno
import gzip
import io
import json
from decimal import Decimal

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from data.cleaning.reading import raw_documents
from minillm.base.errors import UserError
from minillm.datasets.files.json_rows import open_rows, parse_line
from minillm.datasets.files.text_files import texts_of
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.prompts import PromptRows, prompt_of
from minillm.datasets.questions import read_questions
from tests.minillm.datasets.test_instructions import Numbers, write_jsonl

ROWS = [{"instruction": f"{i} 7", "context": "5 6" * (i % 2), "response": "8 9"} for i in range(9)]
TALKS = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "tools": None}]


def write_csv(path, rows, **form):
    with path.open("w", newline="", encoding=form.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)
    return path


def same_batches(ours: InstructionRows, theirs: InstructionRows) -> None:
    assert ours.summary() == theirs.summary()
    positions = np.arange(theirs.rows_per_epoch)
    for a, b in zip(ours.batch(positions)[:4], theirs.batch(positions)[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [ROWS, TALKS], ids=["pairs", "messages"])
def test_parquet_gives_the_batches_of_the_same_rows_in_jsonl(tmp_path, rows):
    expected = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 32)
    for name in ("rows.parquet", "named otherwise"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        same_batches(InstructionRows(tmp_path / name, Numbers(), 32), expected)
    assert len(read_questions(tmp_path / "rows.parquet")) == len(rows)


def in_binary(value):
    """The value with each text in it as bytes."""
    if isinstance(value, dict):
        return {key: in_binary(item) for key, item in value.items()}
    if isinstance(value, list):
        return [in_binary(item) for item in value]
    return value.encode() if isinstance(value, str) else value


@pytest.mark.parametrize("rows", [ROWS, TALKS], ids=["pairs", "messages"])
def test_columns_of_bytes_are_text_as_spark_writes_it(tmp_path, rows):
    expected = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 32)
    parquet.write_table(pyarrow.Table.from_pylist(in_binary(rows)), tmp_path / "rows.parquet")
    same_batches(InstructionRows(tmp_path / "rows.parquet", Numbers(), 32), expected)


def test_texts_of_bytes_are_read_and_a_wrong_byte_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["你好".encode(), "a 🙂".encode(), b"a\xff"]}), tmp_path / "a.parquet")
    texts = texts_of(tmp_path / "a.parquet", boundary="blank", field="text")
    assert [next(texts)[0], next(texts)[0]] == ["你好", "a 🙂"]
    with pytest.raises(UserError, match=r"record 3: not UTF-8 \(byte 0xFF"):
        next(texts)


@pytest.mark.parametrize("key", ["instruction", "output"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_a_wrong_byte_is_named_in_a_row_of_any_form(tmp_path, form, key):
    """Of a row that is read: a key that is not may hold what it likes, but in JSONL a line is decoded as a whole."""
    path = tmp_path / f"rows.{form}"
    rows = [{"instruction": b"1", "output": b"2", "note": "其余的都是对的。".encode() * 9} for _ in range(3)]
    rows[1][key] = b"7 " + "你好，这是中文的文本。".encode("gbk")
    lines = [b'{"instruction": "%s", "output": "%s", "note": "%s"}' % (*row.values(),) for row in rows]
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        begin, between, end = {"jsonl": (b"", b"\n", b""), "json": (b"[", b",", b"]"), "csv": (b"", b"\n", b"")}[form]
        lines = [b"instruction,output,note", *(b",".join(row.values()) for row in rows)] if form == "csv" else lines
        path.write_bytes(begin + between.join(lines) + end)
    for read in (InstructionRows, PromptRows):
        with pytest.raises(UserError, match=r"row 2: not UTF-8 \(byte 0xC4, column \d+\)") as error:
            read(path, Numbers(), 32)
        assert form not in ("json", "csv") or "it seems to be gb18030: --encoding gb18030" in str(error.value)
        assert read(path, Numbers(), 32, on_bad_line="skip").counts["bad rows"] == 1


def test_numbers_and_dates_of_a_table_are_those_of_json(tmp_path):
    day = datetime.date(2024, 2, 29)
    values = {
        "whole": Decimal("72.00"),
        "half": Decimal("0.50"),
        "exact": Decimal("1234567890123456789.25"),  # no float is it
        "nested": [{"day": day, "time": datetime.datetime(2024, 2, 29, 12), "for": datetime.timedelta(hours=1)}],
        "float": 0.1,
        "flag": True,
        "none": None,
    }
    parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / "a.parquet")
    with open_rows(tmp_path / "a.parquet") as file:
        row = parse_line(file.readline())
    nested = [{"day": "2024-02-29", "for": "1:00:00", "time": "2024-02-29 12:00:00"}]
    others = {"float": 0.1, "flag": True, "none": None}
    assert row == {"whole": 72, "half": 0.5, "exact": "1234567890123456789.25", "nested": nested, **others}
    assert isinstance(row["whole"], int) and prompt_of({"question": "?", "answer": row["whole"]})[1]["answer"] == "72"


@pytest.mark.parametrize("form", ["csv", "CSV", "tsv", "csv.gz", "excel", "gbk"])
def test_csv_gives_the_batches_of_the_same_rows_in_jsonl(tmp_path, form):
    rows = [*ROWS, {"instruction": '1 2\n3 "4', "context": "", "response": "8"}]
    rows[-1]["instruction"] = "1 2\n3"
    expected = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 32)
    path = tmp_path / f"rows.{form if '.' in form or form in ('CSV', 'tsv') else 'csv'}"
    separator = "\t" if form == "tsv" else ","
    write_csv(path, rows, delimiter=separator, encoding="utf-8-sig" if form == "excel" else "utf-8")
    if form == "csv.gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    same_batches(InstructionRows(path, Numbers(), 32, encoding="gbk" if form == "gbk" else "utf-8"), expected)


@pytest.mark.parametrize("form", ["csv", "json", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("fails_at", ["open", "write", "seek"])
def test_a_full_temporary_folder_is_no_fault_of_the_file(tmp_path, monkeypatch, form, fails_at):
    path = tmp_path / f"rows.{form}"
    if form == "csv":
        write_csv(path, ROWS)
    elif form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(json.dumps(ROWS).encode() if form == "json" else gzip.compress(b'{"a": 1}\n'))

    class FullDisk(io.BytesIO):
        def write(self, line):
            if fails_at == "write":
                raise OSError(errno.ENOSPC, "No space left on device")

        def seek(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    def temporary_file():
        if fails_at == "open":
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
        return FullDisk()

    monkeypatch.setattr("tempfile.TemporaryFile", temporary_file)
    with pytest.raises(UserError, match=rf": no room for an unpacked copy of \S+rows\.{form} \(No .*; set TMPDIR"):
        open_rows(path)


def test_a_row_of_a_csv_with_too_many_fields_can_be_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\n1,2\n3,4,5\n6,7\n")
    rows = InstructionRows(path, Numbers(), 16, on_bad_line="skip")
    assert (rows.counts["rows"], rows.counts["bad rows"]) == (2, 1)
    kinds = [(raw.number, raw.kind, isinstance(raw.value, dict)) for raw in raw_documents(path, "blank")]
    assert kinds == [(1, "row", True), (2, "row", False), (3, "row", True)]


def test_columns_of_one_name_are_refused_and_those_without_are_not(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,,\n1,2,,\n")
    assert InstructionRows(tmp_path / "a.csv", Numbers(), 16).counts["learned"] == 2
    table = pyarrow.Table.from_arrays([["1"], ["2"], ["3"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are named 'output'"):
        InstructionRows(tmp_path / "a.parquet", Numbers(), 16)


def test_what_pandas_writes_for_an_empty_field_is_missing(tmp_path):
    rows = [{"instruction": "1", "input": None, "output": "2"}, {"instruction": "1", "input": "3", "output": "2"}]
    expected = InstructionRows(write_jsonl(tmp_path / "rows.jsonl", rows), Numbers(), 32)
    (tmp_path / "rows.json").write_text(json.dumps(rows).replace("null", "NaN"))
    same_batches(InstructionRows(tmp_path / "rows.json", Numbers(), 32), expected)
    write_csv(tmp_path / "rows.csv", rows)
    same_batches(InstructionRows(tmp_path / "rows.csv", Numbers(), 32), expected)


def test_a_label_in_a_csv_is_read_by_its_text(tmp_path):
    rows = [{"prompt": "1", "completion": "2", "label": label} for label in ("True", "False")]
    with pytest.raises(UserError, match="row 2: 'label' is 'False': a bad answer"):
        InstructionRows(write_csv(tmp_path / "rows.csv", rows), Numbers(), 32)
    assert InstructionRows(tmp_path / "rows.csv", Numbers(), 32, on_bad_line="skip").counts["learned"] == 2


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.csv", b"instruction,output\n1,2,3\n", "row 1: more fields than the 2 names of columns; fix it, or give"),
        ("a.csv", b"output,instruction,output\n1,2,3\n", "2 columns are named 'output'; rename or take out"),
        ("a.csv", b"text\nabc\n", "row 1: its keys are text; known are messages"),
        ("a.csv", b'instruction,output\n1,"2', "after line 1 comes no row of a .csv (unexpected end of data)"),
        ("a.csv", b"", "nothing left to learn from (0 rows"),
        ("a.parquet", b"PAR1 cut", "not a whole parquet file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "packed by zstd; unpack it: zstd -d"),
        ("a.jsonl", b"BZh91AY", "packed by bzip2"),
        ("a.json", b"\xfd7zXZ\x00", "packed by xz"),
        ("a.xlsx", b"PK\x03\x04....", "a zip or an office file; take out the texts, or save it as .csv"),
        ("a.arrow", b"ARROW1\x00\x00", "an Arrow file; save it as .parquet"),
        ("a.jsonl", b"SQLite format 3\x00", "an SQLite database"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words_that_fit_it(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        InstructionRows(tmp_path / name, Numbers(), 16)
    assert reason in str(error.value) and str(error.value).startswith(str(tmp_path / name))
