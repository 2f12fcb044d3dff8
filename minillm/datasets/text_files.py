"""Reading a user's texts: .txt, .jsonl, .json with an array, .gz of these, or .parquet.

Reading has two parts, so that one process can feed many: `records` goes through a file in constant memory (a JSON array
is read as a whole) and cuts out each document's raw form; `text_of` decodes and checks it, perhaps in a worker. A fault
in one document is a UserError with the reason alone: the caller, who knows the place, reports or skips it. A file that
is broken is a UserError that names the file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minillm.base.errors import UserError
from minillm.base.json_door import file_size
from minillm.datasets.json_rows import (
    array_items,
    decoded,
    naming_file,
    numbered_lines,
    opens_array,
    parse_line,
    unpacked,
)

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
KNOWN = ", ".join(SUFFIXES)
BOUNDARIES = ("blank", "lines", "file")  # where documents of a .txt may end: see `records`
LONGEST_TEXT = 64 << 20  # bytes; a longer document of a .txt is ended after the line that exceeds this


# ---- Files.


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files to read: each file named, and every file of a known kind in each folder named, sorted.

    Raises UserError for a path that does not exist, a kind not known, a folder without any, a file given twice.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += _files_in(path)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: not a known kind of file ({KNOWN}); convert or rename it")
        else:
            files.append(path)
    for path, times in Counter(file.resolve() for file in files).items():
        if times > 1:
            raise UserError(f"{path}: given {times} times; name each file once")
    return files


def _files_in(folder: Path) -> list[Path]:
    """Every file of a known kind under a folder, sorted; nothing hidden, nor in a hidden folder."""
    known = [path for path in sorted(folder.rglob("*")) if path.name.endswith(SUFFIXES) and path.is_file()]
    if not known:
        raise UserError(f"{folder}: the folder holds no file of a known kind ({KNOWN})")
    return [path for path in known if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


# ---- Documents.


class Record(NamedTuple):
    """A document in its raw form, as in the file."""

    number: int  # its line (the first of several), its place in an array or its row, from 1
    kind: str  # "text": UTF-8 bytes; "json": one line of JSONL; "value": taken from JSON or parquet already
    raw: object
    position: int  # bytes of the file read so far


def records(path: Path, *, boundary: str, field: str) -> Iterator[Record]:
    """Every document of one file.

    boundary: where documents of a .txt end: "lines" (each line is one), "blank" (at blank lines), "file" (only after
        LONGEST_TEXT, so that memory stays bounded).
    field: the key or column that holds the text, elsewhere.
    """
    with naming_file(path):
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
            return
        file_size(path)  # is it a file at all
        with path.open("rb") as file:
            stream = unpacked(file, path.suffix == ".gz")
            if path.name.removesuffix(".gz").endswith(".txt"):
                documents = _texts(stream, boundary)
            elif opens_array(stream):
                documents = ((number, "value", _field(value, field)) for number, value in array_items(stream))
            else:
                documents = ((number, "json", line) for number, _, line in numbered_lines(stream))
            for number, kind, raw in documents:
                yield Record(number, kind, raw, file.tell())


def text_of(kind: str, raw, field: str) -> str:
    """A record's text; raises UserError saying what is wrong with it."""
    text = raw
    if kind == "text":
        text = decoded(raw)
    elif kind == "json":
        text = _field(parse_line(raw), field)
    if isinstance(text, UserError):
        raise text
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate, UTF-8 cannot encode it
        code = ord(text[error.start])
        if kind == "value" and 0xDC80 <= code <= 0xDCFF:  # how `array_items` passes on a byte that is not UTF-8
            raise UserError(f"not UTF-8 (byte 0x{code - 0xDC00:02X})") from None
        raise UserError(f"lone surrogate U+{code:04X} in the text") from None
    return text


def texts_of(path: Path, *, boundary: str, field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read so far) of each document of a file. Raises UserError naming file and record."""
    for record in records(path, boundary=boundary, field=field):
        try:
            text = text_of(record.kind, record.raw, field)
        except UserError as problem:
            raise UserError(f"{path}, record {record.number}: {problem}") from None
        yield text, record.position


# ---- JSON.


def _field(value, field: str) -> str | UserError:
    """The text in a JSON value, or the error: it is found in the reading process, but reported by a worker."""
    if not isinstance(value, dict):
        return UserError(f"a JSON object is needed, this is {_type(value)}")
    if field not in value:
        keys = ", ".join(list(value)[:8]) or "none"
        return UserError(f"key {field!r} is missing (its keys: {keys}; choose with --field)")
    if not isinstance(value[field], str):
        return UserError(f"key {field!r} holds {_type(value[field])}, not a string")
    return value[field]


def _type(value) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- Plain text.


def _texts(stream: BinaryIO, boundary: str) -> Iterator[tuple[int, str, bytes]]:
    """(number of its first line, "text", UTF-8 bytes) of each document."""
    lines: list[bytes] = []  # of the document that is being read
    first_line = 1
    size = 0  # bytes
    for number, line in enumerate(stream, 1):
        if line.endswith(b"\r\n"):
            line = line[:-2] + b"\n"
        is_between = boundary != "file" and not line.strip()
        if not is_between:
            lines.append(line)
            size += len(line)
        if is_between or boundary == "lines" or size > LONGEST_TEXT:
            if lines:
                yield first_line, "text", _joined(lines, boundary)
            lines = []
            first_line = number + 1
            size = 0
    if lines:
        yield first_line, "text", _joined(lines, boundary)


def _joined(lines: list[bytes], boundary: str) -> bytes:
    text = b"".join(lines)
    return text if boundary == "file" else text.rstrip(b"\n")


# ---- Parquet.


def _parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs pyarrow; pip install -e ".[parquet]"') from None
    size = path.stat().st_size
    number = 0
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"column {field!r} is missing (its columns: {', '.join(columns)}; choose with --field)")
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                if not isinstance(value, str):
                    value = UserError(f"column {field!r} holds {_type(value)}, not a string")
                yield Record(number, "value", value, size * number // file.metadata.num_rows)
    except ArrowException as error:
        raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None
