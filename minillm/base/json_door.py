"""The one door for JSON and TOML that others wrote: a file that is no file, too large, too deep or ambiguous stays out.

What it holds is checked elsewhere, by `Contents`, beside each format. Whatever comes in here has at most `DEEPEST`
levels, no name twice, whole numbers of at most `MOST_DIGITS` digits and text that can be written as UTF-8, so that
copying, printing and comparing it are safe. Every fault is one line that names the file.
"""

import json
import math
import os
import re
import reprlib
import stat
import tomllib
from pathlib import Path
from typing import Any

from minillm.base.contents import Contents
from minillm.base.errors import MissingError, UserError

DEEPEST = 64  # levels of lists and objects; a tokenizer.json has 9
MOST_BYTES = 1 << 24  # of a file of settings or an index of weights; parsed, it may take 25 times as much memory
MOST_DIGITS = 100  # of a whole number; tokenizer configs write "no limit" with 31
MOST_TOML_BYTES = 1 << 16
MOST_DOTS = 1000  # in a line of TOML: a name of n parts, a.b.c, costs its reader n² in memory
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character: only pairs of them can be written as UTF-8


# ---- files


def file_size(path: str | Path) -> int:
    """Bytes of a regular file; a pipe or device is neither waited for nor read.

    Raises `MissingError` if there is nothing, PermissionError if one may not look, `UserError` for all else.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{path}: a link to {path.readlink()}, where there is no file; copy it there") from None
        raise MissingError(f"{path}: no such file") from None
    except PermissionError:
        raise
    except (OSError, ValueError) as problem:  # links in a circle, or a NUL in the path
        raise UserError(f"{path}: cannot be read ({_reason(problem)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a file but {_kind_of(status.st_mode)}; a file is needed here")
    return status.st_size


def read_file(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """What a regular file of at most `most_bytes` holds. Raises as `file_size` does, and `UserError` for more."""
    size = file_size(path)
    if size > most_bytes:
        raise UserError(
            f"{path}: {size:,} bytes, more than such a file has (at most {most_bytes:,}); is it the right file?"
        )
    try:
        with Path(path).open("rb") as stream:
            return stream.read(most_bytes)
    except PermissionError:
        raise
    except OSError as problem:  # a bad sector
        raise UserError(f"{path}: cannot be read ({_reason(problem)}); get a whole copy") from None


def _reason(problem: OSError | ValueError) -> str:
    return getattr(problem, "strerror", None) or str(problem)


def _kind_of(mode: int) -> str:
    """What something with this mode is, if it is no regular file."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), "a device")


def path_inside(folder: Path, name: str, source: str | Path) -> Path:
    """Where the file is that another file, `source`, names as one of its own folder.

    Raises `UserError` for a name with a folder in it, and for a link that leads out of the folder. (A download of the
    Hugging Face hub is made of links; theirs lead from snapshots/<revision> to blobs, which is allowed.)
    """
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path)) if "\0" not in name else home.parent
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    is_plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    if not is_plain or not any(target.is_relative_to(place) for place in (home, blobs)):
        raise UserError(f"{source}: {reprlib.repr(name)}: not a file of this folder; refused")
    return path


# ---- JSON and TOML


def read_json(path: str | Path, most_bytes: int = MOST_BYTES) -> Any:
    """The JSON value in a file. Raises as `read_file` and `parse_json` do."""
    return parse_json(read_file(path, most_bytes), str(path))


def read_object(path: str | Path, most_bytes: int = MOST_BYTES) -> Contents:
    """As `read_json`, for a file that holds an object with names."""
    return Contents(read_json(path, most_bytes), str(path))


def parse_json(data: bytes, source: str, *, remedy: str = "get a whole copy") -> Any:
    """The value that a file's bytes say in JSON. Raises `UserError`.

    source: the file, as errors name it; remedy: what they advise.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),  # Windows may put a BOM first
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
        )
        if _is_deeper(value, DEEPEST):
            raise RecursionError
        if SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{source}: damaged: nested deeper than {DEEPEST} levels; {remedy}") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{source}: damaged: byte {problem.start} is not UTF-8; {remedy}") from None
    except UnicodeEncodeError:
        raise UserError(f"{source}: damaged: a text in it has half a character (a lone surrogate)") from None
    except ValueError as problem:
        raise UserError(f"{source}: damaged: not valid JSON ({problem}); {remedy}") from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    """An object. Raises ValueError if a name is there twice: readers differ in which of the values they keep."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"holds twice: {repeated:.80}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits:.40} is too large")
    return number


def _short(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested in more than `most` levels; one level is looked at after another."""
    level = [value]
    for _ in range(most):
        below = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def read_toml(path: str | Path) -> dict:
    """The names and values in a TOML file. Raises as `read_file` does, and `UserError` for what is no TOML."""
    data = read_file(path, MOST_TOML_BYTES)
    if any(line.count(b".") > MOST_DOTS for line in data.splitlines()):
        raise UserError(f"{path}: no TOML of options: a line with more than {MOST_DOTS:,} dots")
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
        if _is_deeper(values, DEEPEST):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{path}: no TOML of options: nested deeper than {DEEPEST} levels") from None
    except ValueError as problem:  # of bytes that are not UTF-8, too
        raise UserError(f"{path}: no TOML: {problem!s:.200}") from None
    return values
