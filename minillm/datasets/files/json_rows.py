"""Rows of objects: JSONL or a JSON array, gzipped or not, parquet or csv; each can be read again by its offset.

What a file is, its first bytes say, whatever its name; a .csv (or .tsv) has no such bytes, so its name does.

A fault in one row is a UserError with the reason alone: the caller, who knows the place, reports or skips it. A file
that is broken is a UserError that names the file.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minillm.base.errors import UserError
from minillm.base.json_door import file_size
from minillm.datasets.files import encodings, tables

LARGEST_ARRAY = 1 << 30  # bytes of a JSON array, unpacked: it is read as a whole and takes 2 to 5 times this in memory
READ_AT_ONCE = 1 << 20  # bytes
UNPACKED_AT_ONCE = 1 << 16  # bytes that gzip unpacks at a time
BOM, GZIP = codecs.BOM_UTF8, b"\x1f\x8b"
OTHER_KINDS = {  # the first bytes of files that are not read
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it: zstd -d",
    b"BZh": "packed by bzip2; unpack it: bunzip2",
    b"\xfd7zXZ": "packed by xz; unpack it: unxz",
    b"PK\x03\x04": "a zip or an office file; take out the texts, or save it as .csv",
    b"ARROW1": "an Arrow file; save it as .parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as .parquet",
    b"%PDF-": "a PDF; take out the text",
    b"SQLite format 3": "an SQLite database; save a table as .csv",
}
FAULT = "\0fault: "  # begins the line of a row that could not be read; JSON never begins so
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Reading:
    """How rows are read. on_bad_line: "error", or "skip" and count. encoding: of the files."""

    on_bad_line: str = "error"
    encoding: str = encodings.UTF_8

    def __post_init__(self):
        encodings.check_encoding(self.encoding)
        if self.on_bad_line not in ("error", "skip"):
            raise UserError(f"on_bad_line is {self.on_bad_line!r}; choose error or skip")


# ---- Rows.


def open_rows(path: Path, encoding: str = encodings.UTF_8) -> BinaryIO:
    """The file as seekable JSONL: itself, or for all but plain JSONL an unnamed temporary copy, one item per line.

    Raises UserError for a file that is broken, or an array larger than LARGEST_ARRAY.
    """
    with naming_file(path):
        file_size(path)  # is it a file at all
        file = path.open("rb")
        is_parquet = file.peek(4).startswith(tables.PARQUET)
        stream = file if is_parquet else unpacked(file, encoding=encoding)
        separator = tables.SEPARATORS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
        if is_parquet:
            rows = (row for row, _ in tables.parquet_rows(path))
        elif separator:
            rows = tables.csv_rows(stream, separator)
        elif opens_array(stream):
            rows = (value for _, value in array_items(stream))
        elif stream is file:
            file.seek(0)
            return file
        else:
            rows = None
        lines = stream if rows is None else map(_as_line, rows)
        with file:
            return _copy_of(lines, path)


def _copy_of(lines: Iterable[bytes], path: Path) -> BinaryIO:
    """An unnamed temporary file of these lines, at its beginning. Raises UserError if there is no room for it."""
    with _naming_full_disk(path):
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows are read
    for line in lines:  # what reading them raises is the file's fault
        with _naming_full_disk(path):
            copy.write(line)
    with _naming_full_disk(path):
        copy.seek(0)
    return copy


@contextlib.contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "temporary files"
        reason = error.strerror or error
        raise UserError(
            f"{place}: no room for an unpacked copy of {path} ({reason}); set TMPDIR, or unpack it"
        ) from None


def _as_line(row: object) -> bytes:
    """A row, or what is wrong with it, as `parse_line` reads it."""
    return (FAULT + str(row) if isinstance(row, UserError) else json.dumps(row)).encode() + b"\n"


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte offset, line) of each line; blank ones are b"", and left out at the end of the file."""
    offset = 0
    n_blank = 0  # blank lines that are yielded only if something follows
    for number, line in enumerate(file, 1):
        if line.strip():
            for blank_number in range(number - n_blank, number):
                yield blank_number, offset, b""
            n_blank = 0
            yield number, offset, line
        else:
            n_blank += 1
        offset += len(line)


def parse_line(line: bytes) -> object:
    """The JSON value on one line (a BOM or CRLF is ignored). Raises UserError with the reason."""
    text = decoded(line.removeprefix(BOM)).rstrip()
    if not text:
        raise UserError("empty line")
    if text.startswith(FAULT):
        raise UserError(text.removeprefix(FAULT))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"not JSON ({_fault_of(error)}{column}); a file is one object a line, or one array"
        raise UserError(reason) from None


# ---- Parts of it that reading texts needs too.


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns whatever a broken file raises into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); fix it or give another") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def unpacked(file: BinaryIO, named_gz: bool = False, encoding: str = encodings.UTF_8) -> BinaryIO:
    """The text in an open file as UTF-8, without a BOM; unpacked if it is gzip, or named .gz.

    Raises ValueError for a file of another kind, or in another encoding.
    """
    stream = file
    if named_gz or file.peek(2)[:2] == GZIP:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file), UNPACKED_AT_ONCE)
    head = stream.peek()
    for magic, kind in OTHER_KINDS.items():
        if head.startswith(magic):
            raise ValueError(kind)
    if encodings.is_utf_8(encoding):
        encodings.refuse_other_encoding(head)
    else:
        stream = encodings.recoded(stream, encoding)
    if stream.peek(3)[:3] == BOM:
        stream.read(3)
    return stream


def decoded(raw: bytes) -> str:
    """UTF-8 bytes as text. Raises UserError with the byte that is wrong and its place."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        n_lines = before.count("\n")
        column = len(before) - before.rfind("\n")
        further = f"{n_lines} lines further on, " if n_lines else ""
        name = encodings.guess(raw[error.start :][:READ_AT_ONCE])
        hint = f"; it seems to be {name}: --encoding {name}" if name else ""
        raise UserError(f"not UTF-8 (byte 0x{raw[error.start]:02X}, {further}column {column}){hint}") from None


def refuse_wrong_bytes(text: str) -> None:
    """Raises UserError, as `decoded` does, for a byte that was not UTF-8 and stands in the text as U+DC00 + byte."""
    if encodings.ESCAPED.search(text):
        with contextlib.suppress(UnicodeEncodeError):  # beside it half a character, which JSON can escape
            decoded(text.encode("utf-8", "surrogateescape"))


def opens_array(stream: BinaryIO) -> bool:
    """Whether a JSON array begins here; the stream is then just after its bracket."""
    head = stream.peek()
    n_spaces = len(head) - len(head.lstrip())
    if head[n_spaces : n_spaces + 1] != b"[":
        return False
    stream.read(n_spaces + 1)
    return True


def array_items(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of each item of a JSON array after its bracket.

    The text is read as a whole, the values one after another, so that a fault can be named by the item's number. A byte
    that is not UTF-8 becomes the surrogate U+DC00 + byte, so that other items are still read. Raises ValueError.
    """
    text = _whole(stream).decode("utf-8", "surrogateescape")
    parse_value = json.JSONDecoder().raw_decode  # (text, start) → value, end

    position = _after_spaces(text, 0)
    if text.startswith("]", position):  # an empty array
        _refuse_more(text, position + 1)
        return
    for number in itertools.count(1):
        try:
            value, end = parse_value(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"item {number} of the array: not JSON ({_fault_of(error)}); fix the file") from None
        end = _after_spaces(text, end)
        if text[end : end + 1] not in (",", "]"):
            found = repr(text[end]) if end < len(text) else "the end of the file"
            raise ValueError(f"after item {number} of the array comes {found}, not ',' or ']'; fix the file")
        yield number, value
        if text[end] == "]":
            _refuse_more(text, end + 1)
            return
        position = _after_spaces(text, end + 1)


def _whole(stream: BinaryIO) -> bytearray:
    data = bytearray()
    while piece := stream.read(READ_AT_ONCE):
        data += piece
        if len(data) > LARGEST_ARRAY:
            raise ValueError(
                f"a JSON array of more than {LARGEST_ARRAY:,} bytes, which would have to fit into memory; convert it "
                "to .jsonl: jq -cn --stream 'fromstream(1|truncate_stream(inputs))' FILE.json > FILE.jsonl"
            )
    return data


def _after_spaces(text: str, position: int) -> int:
    return SPACE.match(text, position).end()


def _refuse_more(text: str, position: int) -> None:
    if _after_spaces(text, position) < len(text):
        raise ValueError("more text follows the end of the array; fix the file")


def _fault_of(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", str(error))
