"""Rows of JSON: JSONL or a JSON array, gzipped or not, whatever the file's name; each can be read again by its offset.

A fault in one row is a UserError with the reason alone: the caller, who knows the place, reports or skips it. A file
that is broken is a UserError that names the file.
"""

import codecs
import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minillm.base.errors import UserError

READ = 1 << 20  # bytes of a JSON array read at a time
WINDOW = 1 << 16  # bytes that gzip unpacks at a time
LONGEST_ITEM = 1 << 30  # characters in one element of a JSON array
BOM, GZIP = codecs.BOM_UTF8, b"\x1f\x8b"


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
