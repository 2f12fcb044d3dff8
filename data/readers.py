"""Documents out of files: .txt, .jsonl, .json (an array), .parquet, and .gz of the first three.

Reading is split in two, so that one process can feed many. `records` walks through a file with flat memory and
cuts out each document's raw form; `text_of` decodes and checks it, in a worker. What is wrong with a single
document is a ValueError there, to be skipped or reported with its line; a file that is broken is a UserError.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from minillm import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
READ = 1 << 20  # bytes read at a time
LONGEST_TEXT = 64 << 20  # bytes; a longer document of a .txt ends with the line that passes this
LONGEST_ITEM = 1 << 30  # characters in one element of a JSON array
BOM = codecs.BOM_UTF8


class Record(NamedTuple):
    """A document as it lies in its file."""

    number: int  # its line (the first of several), its place in an array or its row, from 1
    kind: str  # "text": UTF-8 bytes; "json": one line of JSONL; "value": taken from JSON or parquet already
    raw: object
    position: int  # bytes of the file read so far


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files to read: each file named, and every file of a known kind in each folder named, sorted.

    Raises UserError for a path that does not exist, a kind not known, a folder without any, a file given twice.
    """
    known = ", ".join(SUFFIXES)
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()]
            files += [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not inside:
                raise UserError(f"{path}: the folder holds no file of a known kind ({known})")
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: not a known kind of file ({known}); convert or rename it")
        else:
            files.append(path)
    for path, times in Counter(file.resolve() for file in files).items():
        if times > 1:
            raise UserError(f"{path}: given {times} times; name each file once")
    return files


def records(path: Path, *, split: str, field: str) -> Iterator[Record]:
    """Every document of one file.

    split: where documents of a .txt end: "lines" (each line is one), "blank" (at blank lines), "file" (nowhere,
        but after LONGEST_TEXT, so that memory stays bounded).
    field: the key or column that holds the text, elsewhere.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
            return
        with path.open("rb") as file:
            stream: IO[bytes] = file
            if path.suffix == ".gz":
                stream = io.BufferedReader(gzip.GzipFile(fileobj=file), READ)
            if stream.peek(3)[:3] == BOM:
                stream.read(3)
            if path.name.removesuffix(".gz").endswith(".txt"):
                found = _text(stream, split)
            elif stream.peek(READ).lstrip()[:1] == b"[":
                found = _array(stream, field)
            else:
                found = _lines(stream)
            for number, kind, raw in found:
                yield Record(number, kind, raw, file.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); mend or remove it") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def text_of(kind: str, raw, field: str) -> str:
    """A record's text; raises ValueError saying what is wrong with it."""
    if kind == "value":
        text = raw
    else:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n")
            further = f", {line} lines further on" if line else ""
            raise ValueError(f"not UTF-8 (byte 0x{raw[error.start]:02X}{further})") from None
    if kind == "json":
        text = _field(_parse(text.rstrip()), field)
    if isinstance(text, ValueError):
        raise text
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character, UTF-8 cannot
        raise ValueError(f"lone surrogate U+{ord(text[error.start]):04X} in the text") from None
    return text


def _parse(line: str):
    if not line.strip():
        raise ValueError("empty line")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _field(value, field: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, this is {_type(value)}")
    if field not in value:
        have = ", ".join(list(value)[:8]) or "none"
        raise ValueError(f"key {field!r} is missing (its keys: {have}; choose with --field)")
    if not isinstance(value[field], str):
        raise ValueError(f"key {field!r} holds {_type(value[field])}, not a string")
    return value[field]


def _type(value) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- the kinds of files; each yields (number, kind, raw)


def _text(stream: IO[bytes], split: str) -> Iterator[tuple]:
    lines: list[bytes] = []
    first, size = 1, 0
    for number, line in enumerate(stream, 1):
        if line.endswith(b"\r\n"):
            line = line[:-2] + b"\n"
        between = split != "file" and not line.strip()
        if not between:
            lines.append(line)
            size += len(line)
        if between or split == "lines" or size > LONGEST_TEXT:
            if lines:
                yield first, "text", _joined(lines, split)
            lines, first, size = [], number + 1, 0
    if lines:
        yield first, "text", _joined(lines, split)


def _joined(lines: list[bytes], split: str) -> bytes:
    text = b"".join(lines)
    return text if split == "file" else text.rstrip(b"\n")


def _lines(stream: IO[bytes]) -> Iterator[tuple]:
    blank = 0  # blank lines are handed on only when something follows: a file may end in some
    for number, line in enumerate(stream, 1):
        if not line.strip():
            blank += 1
            continue
        yield from ((number - back, "json", b"") for back in range(blank, 0, -1))
        blank = 0
        yield number, "json", line


def _array(stream: IO[bytes], field: str) -> Iterator[tuple]:
    """The elements of a JSON array, with no more than a few of them in memory."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    scan, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    buffer, at, number, ended = "", 0, 0, False

    def read_on() -> None:
        nonlocal buffer, at, ended
        data = stream.read(max(READ, len(buffer) - at))  # doubling, so that a long element costs no more
        ended = not data
        buffer, at = buffer[at:] + decode(data, ended), 0

    def mark() -> str:
        """The next character that is no space, "" at the end of the file."""
        nonlocal at
        while (at := space.match(buffer, at).end()) == len(buffer) and not ended:
            read_on()
        return buffer[at : at + 1]

    def element():
        nonlocal at
        while True:
            try:
                value, end = scan(buffer, at)
                goes_on = end == len(buffer) or (buffer[end] in ".eE" and end > len(buffer) - 4)
                if ended or not goes_on:  # a number might go on in the next read
                    at = end
                    return value
            except (json.JSONDecodeError, RecursionError) as error:
                wrong, position = getattr(error, "msg", "nested too deeply"), getattr(error, "pos", 0)
                unfinished = wrong.startswith("Unterminated") or position > len(buffer) - 16
                if ended or not unfinished or len(buffer) - at > LONGEST_ITEM:
                    raise ValueError(f"item {number} of the array: not JSON ({wrong}); mend the file") from None
            read_on()

    mark()
    at += 1  # the bracket
    if mark() == "]":
        return
    while True:
        number += 1
        value = element()
        try:
            yield number, "value", _field(value, field)
        except ValueError as problem:
            yield number, "value", problem
        if (follows := mark()) not in ("]", ","):
            found = repr(follows) if follows else "the end of the file"
            raise ValueError(f"after item {number} of the array comes {found}, not ',' or ']'; mend the file")
        at += 1
        if follows == "]":
            return
        mark()


def _parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs pyarrow; pip install -e ".[parquet]"') from None
    size, number = path.stat().st_size, 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"column {field!r} is missing (its columns: {', '.join(names)}; choose with --field)")
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                wrong = ValueError(f"column {field!r} holds {_type(value)}, not a string")
                raw = value if isinstance(value, str) else wrong
                yield Record(number, "value", raw, size * number // file.metadata.num_rows)
    except ArrowException as error:
        raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None
