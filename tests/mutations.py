"""Damage to one file, drawn by a seed: what disks, editors and people with bad intentions leave behind."""

import contextlib
import json
import math
import os
import random
import shutil
from pathlib import Path

DEEP = "@deep@"  # becomes a list of 50,000 levels
LONG = "@long@"  # becomes a whole number of 5,000 digits
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**62, 2**63, 10**9, 10**30, LONG]
VALUES += [0.5, 8.0, 1e300, math.nan, math.inf, -math.inf]
VALUES += ["", "no", "0", "x" * 10_000, "\x1b]52;c;eA==\x07", "../x", "/etc/passwd", "a\0b", "\ud800", "(.+)+Z", DEEP]
VALUES += [[], [1], ["x"], [[]], [None] * 3, {}, {"a": 1}, {"name": "../x"}]


def mutate(path: Path, outside: Path, draw: random.Random) -> str:
    """Damage a file in one way; returns which. outside: a folder that links may lead to."""
    kinds = [_bytes, _bytes, _kind_of_file]
    if path.suffix in (".json", ".jsonl"):
        kinds += [_json] * 7
    if path.suffix == ".safetensors":
        kinds += [_header] * 5
    return draw.choice(kinds)(path, outside, draw)


def _bytes(path: Path, outside: Path, draw: random.Random) -> str:
    """Bytes lost, changed, added."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data) + 1)
    some = draw.randbytes(draw.choice((1, 2, 3, 8, 400)))
    how = draw.choice(("empty", "cut", "changed", "inserted", "appended", "doubled", "zeros", "noise"))
    if how == "empty":
        data = bytearray()
    elif how == "cut":
        del data[place:]
    elif how == "changed":
        data[place : place + len(some)] = some
    elif how == "inserted":
        data[place:place] = some
    elif how == "appended":
        data += some
    elif how == "doubled":
        data += bytes(data)
    elif how == "zeros":
        data[place:] = bytes(len(data) - place)
    else:
        data = bytearray(draw.randbytes(len(data)))
    path.write_bytes(data)
    return f"bytes {how}"


def _kind_of_file(path: Path, outside: Path, draw: random.Random) -> str:
    """Something else under the file's name, or nothing."""
    how = draw.choice(("missing", "folder", "dangling link", "loop of links", "pipe", "link outside"))
    moved = outside / path.name
    path.replace(moved)
    if how == "folder":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to(outside / "nothing")
    elif how == "loop of links":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link outside":
        path.symlink_to(moved)
    return how


def _json(path: Path, outside: Path, draw: random.Random) -> str:
    """A value, name or level of the JSON in a file."""
    lines = [path.read_text(encoding="utf-8")]
    if path.suffix == ".jsonl":
        lines = lines[0].splitlines()
    number = draw.randrange(len(lines))
    value = json.loads(lines[number])
    text, how = changed(value, draw)
    lines[number] = text
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"JSON {how}"


def changed(value, draw: random.Random) -> tuple[str, str]:
    """The JSON text of a value after one change, and which it was."""
    how = draw.choice(("value", "value", "value", "removed", "doubled", "added", "deep", "text"))
    parent, key = _place_in(value, draw)
    if parent is None or how == "text":
        return draw.choice(("NaN", "[" * 50_000, '{"a":' * 50_000, "1" * 5000, '"\\ud800"', "[]", "3")), "text"
    if how == "removed":
        del parent[key]
    elif how == "added" and isinstance(parent, dict):
        parent[draw.choice(("x", "\x1b[2J", "y" * 10_000))] = draw.choice(VALUES)
    elif how == "deep":
        parent[key] = DEEP
    else:
        parent[key] = draw.choice(VALUES)
    text = json.dumps(value)
    if how == "doubled" and text.startswith("{"):
        text = '{"a": 1, "a": 2, ' + text[1:]
    text = text.replace(json.dumps(LONG), "1" * 5000)
    return text.replace(json.dumps(DEEP), "[" * 50_000 + "]" * 50_000), how


def _place_in(value, draw: random.Random) -> tuple:
    """A container inside the value, and one of its keys, all levels being equally likely."""
    parent, key = None, None
    while isinstance(value, dict | list) and value and (parent is None or draw.random() < 0.7):
        parent = value
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = parent[key]
    return parent, key


def _header(path: Path, outside: Path, draw: random.Random) -> str:
    """The header of a safetensors file, its length put right; or numbers that are none."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    how = draw.choice(("type", "not finite", "header", "header", "shape"))
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if how == "type":
        header[name]["dtype"] = draw.choice(("I32", "U32", "F64", "BOOL", "X", "F8_E4M3"))
    elif how == "not finite":
        tensors[:4] = b"\xff\xff\xff\x7f"
    elif how == "shape":
        header[name]["shape"] = draw.choice(([0, 2**62], [2**32, 2**32], [1] * 100, [], [-1]))
    text = changed(header, draw)[0] if how == "header" else json.dumps(header)
    written = text.encode(errors="surrogatepass")
    path.write_bytes(len(written).to_bytes(8, "little") + written + tensors)
    return f"tensors, {how}"


def snapshot(folder: Path) -> dict[str, tuple]:
    """What lies in a folder: of each path its kind, size and contents."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        seen[str(path.relative_to(folder))] = (path.is_dir(), path.is_symlink(), path.read_bytes() if is_file else b"")
    return seen


@contextlib.contextmanager
def copy_of(home: Path, scratch: Path):
    """A copy of a folder to damage, gone afterwards."""
    shutil.copytree(home, scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
