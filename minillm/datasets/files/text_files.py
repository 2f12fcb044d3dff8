"""Reading a user's texts: .txt, .jsonl, .json with an array, .gz of these, or .parquet.

Reading has two parts, so that one process can feed many: `records` goes through a file in constant memory (a JSON array
is read as a whole) and cuts out each document's raw form; `text_of` decodes and checks it, perhaps in a worker. A fault
in one document is a UserError with the reason alone: the caller, who knows the place, reports or skips it. A file that
is broken is a UserError that names the file.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minillm.base.errors import UserError, naming
from minillm.base.json_door import file_size, read_json
from minillm.base.printing import visible
from minillm.datasets.files import encodings, tables
from minillm.datasets.files.json_rows import (
    array_items,
    decoded,
    naming_file,
    numbered_lines,
    opens_array,
    parse_line,
    refuse_wrong_bytes,
    unpacked,
)

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
CLEANED = ".cleaning"  # the working folder inside one that data/clean.py wrote; people delete it
REPORT = "report.json"  # stays beside what was kept, and says whether all of it is there
LARGEST_REPORT = 1 << 30  # bytes
BOUNDARIES = ("blank", "lines", "file")  # where documents of a .txt may end: see `records`
LONGEST_TEXT = 64 << 20  # bytes; a longer document of a .txt is ended after the line that exceeds this


# ---- Files.


def find_files(
    inputs: Iterable[str | Path], left_out: Counter[str] | None = None, suffixes: tuple[str, ...] = SUFFIXES
) -> list[Path]:
    """The files to read: each file named, and every file of a known kind in each folder named, sorted.

    A folder that `data/clean.py` wrote holds more than texts to read: of it, only what was kept counts.

    left_out: counts the files in the folders that are not read, by ending (see `print_left_out`). suffixes: the kinds
    that are known.
    Raises UserError for a path that does not exist, a kind not known, a folder without any, a file given twice.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += _files_in(path, Counter() if left_out is None else left_out, suffixes)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not ending(path, suffixes):
            raise UserError(f"{path}: not a known kind of file ({_named(suffixes)}); convert or rename it")
        else:
            refuse_unfinished(path)
            files.append(path)
    for path, times in Counter(_own_places(files)).items():
        if times > 1:
            raise UserError(f"{path}: given {times} times; name each file once")
    return files


def ending(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Which of the suffixes a file's name ends with, in any case; "" if none."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), "")


def _named(suffixes: tuple[str, ...]) -> str:
    """The kinds of files in words, each once, and what they may be packed by."""
    packed = [suffix for suffix in suffixes if suffix.count(".") > 1]
    packings = dict.fromkeys("." + suffix.rpartition(".")[2] for suffix in packed)
    return f"{', '.join(suffix for suffix in suffixes if suffix not in packed)}, or packed as {' '.join(packings)}"


def is_cleaned(folder: Path) -> bool:
    """Whether data/clean.py wrote this folder, or the one whose `val` this is, by the form of its report.

    Raises UserError for one that is not whole: its last file may end anywhere.
    """
    if folder.name == "val" and is_cleaned(folder.parent):
        return False  # nothing in it but what was kept
    try:
        report = read_json(folder / REPORT, LARGEST_REPORT)
    except (UserError, OSError):
        report = None
    is_report = isinstance(report, dict) and {"by_reason", "written_bytes"} <= report.keys()
    if not is_report and not (folder / CLEANED).is_dir():
        return False
    if not is_report or report["written_bytes"] is None:
        raise UserError(f"{folder}: data/clean.py has not finished this folder; run the same command again")
    return True


def refuse_unfinished(path: Path) -> None:
    """Raises UserError if a file is one that data/clean.py kept, in a folder that is not whole."""
    if path.name.startswith("kept-"):
        is_cleaned(path.parent)


def is_txt(path: Path) -> bool:
    """Whether a file is plain text, packed or not."""
    return ending(path).startswith(".txt")


def print_left_out(left_out: Counter[str], suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Print in one line how many files in the folders are not read. suffixes: the kinds that are known."""
    if left_out:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in left_out.most_common())
        print(visible(f"{left_out.total():,} left out of the folders: {kinds}; read are {_named(suffixes)}"))


def _files_in(folder: Path, left_out: Counter[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Every file of a known kind under a folder, sorted, through links too; nothing hidden, nor in a hidden folder."""

    def refuse(problem: OSError) -> None:
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror}); fix it or give another")

    files: list[Path] = []
    visited = {os.path.realpath(folder)}  # folders by their own place, so that links in a circle end
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if is_cleaned(Path(place)):
            left_out["reports and dropped texts of a cleaned folder"] += len(folders) + len(names)
            names = [name for name in names if name.endswith(".jsonl")]
            left_out["reports and dropped texts of a cleaned folder"] -= len(names)
            folders.clear()
        for name in sorted(folders):
            own_place = os.path.realpath(Path(place, name))
            if name.startswith("."):
                left_out["hidden folders"] += 1
            elif own_place in visited:
                left_out["folders linked again"] += 1
            else:
                visited.add(own_place)
                continue
            folders.remove(name)
        folders.sort()
        for path in (Path(place, name) for name in names):
            if path.name.startswith("."):
                left_out["hidden files"] += 1
            elif not path.is_file():
                left_out["links to nothing, pipes and the like"] += 1
            elif ending(path, suffixes):
                files.append(path)
            else:
                left_out[path.suffix.lower() or "without an ending"] += 1
    if not files:
        found = ", ".join(f"{kind} {count:,}" for kind, count in left_out.most_common())
        kinds = _named(suffixes)
        raise UserError(f"{folder}: the folder holds no file of a known kind ({kinds}){found and f', but {found}'}")
    return sorted(_each_once(files, left_out))


def _each_once(files: list[Path], left_out: Counter[str]) -> list[Path]:
    """The files without links to others of them."""
    seen: set[str] = set()
    different = []
    files = sorted(files, key=lambda path: (path.is_symlink(), path))  # a link after what it may lead to
    for path, own_place in zip(files, _own_places(files), strict=True):
        if own_place in seen:
            left_out["files linked again"] += 1
        else:
            seen.add(own_place)
            different.append(path)
    return different


def _own_places(files: Iterable[Path]) -> Iterator[str]:
    """Where each file lies itself, through whatever links. The way to a folder is looked up once for all its files: to
    look at every step of a hundred thousand ways takes long, on a network disk most of all.
    """
    place_of = cache(os.path.realpath)
    for file in files:
        yield place_of(file) if file.is_symlink() else f"{place_of(file.parent)}{os.sep}{file.name}"


# ---- Documents.


class Record(NamedTuple):
    """A document in its raw form, as in the file."""

    number: int  # its line (the first of several), its place in an array or its row, from 1
    kind: str  # "text": UTF-8 bytes; "json": one line of JSONL; "value": taken from JSON or parquet already
    raw: object
    position: int  # bytes of the file read so far


def records(path: Path, *, boundary: str, field: str, encoding: str = encodings.UTF_8) -> Iterator[Record]:
    """Every document of one file.

    boundary: where documents of a .txt end: "lines" (each line is one), "blank" (at blank lines), "file" (only after
        LONGEST_TEXT, so that memory stays bounded).
    field: the key or column that holds the text, elsewhere.
    encoding: of the text; parquet has its own.
    """
    with naming_file(path):
        if ending(path) == ".parquet":
            yield from _parquet(path, field)
            return
        file_size(path)  # is it a file at all
        with path.open("rb") as file:
            stream = unpacked(file, ending(path).endswith(".gz"), encoding)
            if is_txt(path):
                documents = cut_text(stream, boundary)
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
        if kind == "value":
            refuse_wrong_bytes(text)
        raise UserError(f"lone surrogate U+{ord(text[error.start]):04X} in the text") from None
    return text


def texts_of(path: Path, *, boundary: str, field: str, encoding: str = encodings.UTF_8) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read so far) of each document of a file. Raises UserError naming file and record."""
    for record in records(path, boundary=boundary, field=field, encoding=encoding):
        with naming(f"{path}, record {record.number}"):
            text = text_of(record.kind, record.raw, field)
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


def cut_text(stream: BinaryIO, boundary: str) -> Iterator[tuple[int, str, bytes]]:
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
    size = path.stat().st_size
    for number, (row, share) in enumerate(tables.parquet_rows(path, field), 1):
        value = row[field]
        if not isinstance(value, str):
            value = UserError(f"column {field!r} holds {_type(value)}, not a string")
        yield Record(number, "value", value, int(size * share))
