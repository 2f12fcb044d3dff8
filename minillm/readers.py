"""Reading a user's files: documents, or rows of instructions.

Documents (`find_files`, `texts_of`) come from .txt, .jsonl, .json with an array, .gz of these, or .parquet.
Reading has two parts, so that one process can feed many: `records` goes through a file in constant memory and cuts out
each document's raw form; `text_of` decodes and checks it, perhaps in a worker.

Rows (`open_rows`, `numbered_lines`, `parse_line`) come from JSONL or a JSON array, gzipped or not, whatever the file's
name; they can be read again at their offset.

A fault in one document or row is a UserError with the reason alone: the caller, who knows the place, reports or skips
it. A file that is broken is a UserError that names the file.
"""

import codecs
import gzip
import io
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minillm import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
TXT_SPLITS = ("blank", "lines", "file")  # where documents of a .txt may end: see `records`
READ = 1 << 20  # bytes of a JSON array read at a time
WINDOW = 1 << 16  # bytes that gzip unpacks at a time
LONGEST_TEXT = 64 << 20  # bytes; a longer document of a .txt is ended after the line that exceeds this
LONGEST_ITEM = 1 << 30  # characters in one element of a JSON array
BOM, GZIP = codecs.BOM_UTF8, b"\x1f\x8b"


# ---- Documents.


class Record(NamedTuple):
    """A document in its raw form, as in the file."""

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

    split: where documents of a .txt end: "lines" (each line is one), "blank" (at blank lines), "file" (only after
        LONGEST_TEXT, so that memory stays bounded).
    field: the key or column that holds the text, elsewhere.
    """
    with _naming(path):
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
            return
        with path.open("rb") as file:
            stream = _unpacked(file, path.suffix == ".gz")
            if path.name.removesuffix(".gz").endswith(".txt"):
                found = _texts(stream, split)
            elif _opens_array(stream):
                found = ((number, "value", _field(value, field)) for number, value in _items(stream))
            else:
                found = ((number, "json", line) for number, _, line in numbered_lines(stream))
            for number, kind, raw in found:
                yield Record(number, kind, raw, file.tell())


def text_of(kind: str, raw, field: str) -> str:
    """A record's text; raises UserError saying what is wrong with it."""
    text = raw
    if kind == "text":
        text = _decoded(raw)
    elif kind == "json":
        text = _field(parse_line(raw), field)
    if isinstance(text, UserError):
        raise text
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate, UTF-8 cannot encode it
        code = ord(text[error.start])
        if kind == "value" and 0xDC80 <= code <= 0xDCFF:  # how `_items` passes on a byte that is not UTF-8
            raise UserError(f"not UTF-8 (byte 0x{code - 0xDC00:02X})") from None
        raise UserError(f"lone surrogate U+{code:04X} in the text") from None
    return text


def texts_of(path: Path, *, split: str, field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read so far) of each document of a file. Raises UserError naming file and record."""
    for record in records(path, split=split, field=field):
        try:
            text = text_of(record.kind, record.raw, field)
        except UserError as problem:
            raise UserError(f"{path}, record {record.number}: {problem}") from None
        yield text, record.position


def _field(value, field: str) -> str | UserError:
    """The text in a JSON value, or the error: it is found in the reading process, but reported by a worker."""
    if not isinstance(value, dict):
        return UserError(f"a JSON object is needed, this is {_type(value)}")
    if field not in value:
        have = ", ".join(list(value)[:8]) or "none"
        return UserError(f"key {field!r} is missing (its keys: {have}; choose with --field)")
    if not isinstance(value[field], str):
        return UserError(f"key {field!r} holds {_type(value[field])}, not a string")
    return value[field]


def _type(value) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _texts(stream: BinaryIO, split: str) -> Iterator[tuple]:
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
                if not isinstance(value, str):
                    value = UserError(f"column {field!r} holds {_type(value)}, not a string")
                yield Record(number, "value", value, size * number // file.metadata.num_rows)
    except ArrowException as error:
        raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None


# ---- Rows.


def open_rows(path: Path) -> BinaryIO:
    """The file as seekable JSONL: itself, or for a .gz or a JSON array an unnamed temporary copy, one item per line.

    Raises UserError for a file that is broken.
    """
    with _naming(path):
        file = path.open("rb")
        stream = _unpacked(file)
        array = _opens_array(stream)
        if stream is file and not array:
            file.seek(0)
            return file
        with file:
            copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows are read
            copy.writelines((json.dumps(value).encode() + b"\n" for _, value in _items(stream)) if array else stream)
            copy.seek(0)
            return copy


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte offset, line) of each line; blank ones are b"", and left out at the end of the file."""
    offset = blank = 0  # blank: lines that are yielded only if something follows
    for number, line in enumerate(file, 1):
        if line.strip():
            yield from ((number - back, offset, b"") for back in range(blank, 0, -1))
            blank = 0
            yield number, offset, line
        else:
            blank += 1
        offset += len(line)


def parse_line(line: bytes) -> object:
    """The JSON value on one line (a BOM or CRLF is ignored). Raises UserError with the reason."""
    text = _decoded(line.removeprefix(BOM)).rstrip()
    if not text:
        raise UserError("empty line")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"not JSON ({_fault_of(error)}{column}); a file is one object a line, or one array"
        raise UserError(reason) from None


# ---- Shared by both.


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns whatever a broken file raises into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({why}); fix it or give another") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def _unpacked(file: BinaryIO, named_gz: bool = False) -> BinaryIO:
    """The contents of an open file, without a BOM; unpacked if it is gzip, or named .gz."""
    stream = file
    if named_gz or file.peek(2)[:2] == GZIP:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file), WINDOW)
    if stream.peek(3)[:3] == BOM:
        stream.read(3)
    return stream


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        lines, column = before.count("\n"), len(before) - before.rfind("\n")
        further = f"{lines} lines further on, " if lines else ""
        raise UserError(f"not UTF-8 (byte 0x{raw[error.start]:02X}, {further}column {column})") from None


def _fault_of(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _opens_array(stream: BinaryIO) -> bool:
    """Whether a JSON array begins; the stream is then just after its bracket."""
    head = stream.peek()
    bracket = len(head) - len(head.lstrip())
    return head[bracket : bracket + 1] == b"[" and bool(stream.read(bracket + 1))


def _items(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of each item of a JSON array after its bracket, in little more memory than one item needs.

    A byte that is not UTF-8 becomes the surrogate U+DC00 + byte, so that other items are still read.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    text, at, number, ended = "", 0, 1, False
    while True:
        at = space.match(text, at).end()
        try:
            value, end = scan(text, at)
            end = space.match(text, end).end()
            fault = ""
            if text[end : end + 1] not in (",", "]"):
                found = repr(text[end]) if end < len(text) else "the end of the file"
                fault = f"after item {number} of the array comes {found}, not ',' or ']'"
        except (ValueError, RecursionError) as error:
            if number == 1 and text[at : at + 1] == "]":  # an empty array
                end = at
                break
            fault, end = f"item {number} of the array: not JSON ({_fault_of(error)})", getattr(error, "pos", at)
        if fault:  # or the item only continues beyond the text read so far
            unfinished = end > len(text) - 16 or "Unterminated" in fault
            if ended or not unfinished or len(text) - at > LONGEST_ITEM:
                raise ValueError(f"{fault}; fix the file")
            data = stream.read(max(READ, len(text) - at))  # doubling, so that a long item is parsed only a few times
            text, at, ended = text[at:] + decode(data, not data), 0, not data
            continue
        yield number, value
        if text[end] == "]":
            break
        at, number = end + 1, number + 1
    if text[end + 1 :].strip() or any(line.strip() for line in stream):
        raise ValueError("more text follows the end of the array; fix the file")
