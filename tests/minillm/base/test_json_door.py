"""What comes in by the door is a whole, small, unambiguous value; all else is one line that names the file."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from minillm.base import json_door
from minillm.base.errors import MissingError, UserError
from minillm.base.json_door import DEEPEST, parse_json, read_file, read_json, read_object, read_toml


@pytest.fixture
def folder(tmp_path):
    return tmp_path


# ---- values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[1", "not valid JSON"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ('{"a":' * 100_000, "nested deeper than 64 levels"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper than 64 levels"),
        ('{"a": [{"' + "b" * 500 + '": 1, "' + "b" * 500 + '": 2}]}', "holds twice: bbb"),
        ("[NaN]", "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("[-1e999]", "the number -1e999 is too large"),
        ("1" * 5_000, "a whole number of 5,000 digits"),
        (r'{"\uDc00": 1}', "half a character"),
        (b'"\xff"', "byte 1 is not UTF-8"),
    ],
    ids=range(12),
)
def test_what_is_not_one_plain_value_is_refused_in_a_short_line(text, words):
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(UserError) as caught:
        parse_json(data, "some.json")
    line = str(caught.value)
    assert line.startswith("some.json: damaged: ") and words in line and "\n" not in line and len(line) < 300


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, None, True, "é😀"]}, [], "x", 10**30, json.loads("[" * DEEPEST + "]" * DEEPEST)]
)
def test_what_json_writes_is_read_as_it_is(value):
    for ascii_only in (True, False):  # with \ud83d\ude00 for 😀, and without
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8-sig"), "x") == value


def test_an_object_has_names(folder):
    (folder / "a.json").write_text('{"n": 1}')
    (folder / "b.json").write_text("[1]")
    assert read_object(folder / "a.json").need("n", int) == 1
    with pytest.raises(UserError, match=r"b.json: damaged: it holds \[1\], not an object"):
        read_object(folder / "b.json")


def test_a_file_of_brackets_alone_takes_bounded_memory(monkeypatch, folder):
    monkeypatch.setattr(json_door, "MOST_BYTES", 100)
    (folder / "large.json").write_text("[" + "[]," * 100 + "[]]")
    with pytest.raises(UserError, match=r"large.json: 304 bytes, more than such a file has \(at most 100\)"):
        read_json(folder / "large.json", json_door.MOST_BYTES)


# ---- files


def test_a_file_that_is_not_there_is_told_apart(folder):
    (folder / "file").write_text("x")
    for path in (folder / "a.json", folder / "no" / "a.json", folder / "file" / "a.json"):
        with pytest.raises(MissingError, match=r"a\.json: no such file"):
            read_file(path)


@pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")
def test_what_is_no_file_is_refused_at_once(folder, monkeypatch):
    monkeypatch.chdir(folder)  # a socket's path is short
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("to-pipe").symlink_to("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    begun = time.monotonic()
    for name, words in {
        "pipe": "pipe: not a file but a pipe",
        "to-pipe": "to-pipe: not a file but a pipe",
        "folder": "folder: not a file but a folder",
        "dangling": "dangling: a link to nowhere, where there is no file",
        "loop": "loop: cannot be read",
        "socket": "socket: not a file but a socket",
        "/dev/zero": "/dev/zero: not a file but a device",
        "a\0b": "cannot be read",
    }.items():
        for read in (read_file, read_json, read_toml):
            with pytest.raises(UserError, match=words) as caught:
                read(name)
            assert type(caught.value) is UserError
    assert time.monotonic() - begun < 10  # nothing was waited for
    server.close()


def test_a_link_to_a_file_is_a_file(folder):
    (folder / "a.json").write_text("1")
    (folder / "b.json").symlink_to(folder / "a.json")
    assert read_json(folder / "b.json") == 1


# ---- TOML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 5_000, "nested deeper than 64 levels"),
        (".".join(["a"] * 900) + " = 1", "nested deeper than 64 levels"),
        (".".join(["a"] * 20_000) + " = 1", "more than 1,000 dots"),
        ("a", "no TOML: "),
        (b"a = '\xff'", "no TOML: "),
        ("a = " + "1" * 5_000, "no TOML: "),
        ("#" * 70_000, "70,000 bytes"),
    ],
    ids=range(7),
)
def test_toml_that_cannot_be_read_is_one_line(folder, text, words):
    (folder / "a.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as caught:
        read_toml(folder / "a.toml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_toml_is_read_as_it_is(folder):
    (folder / "a.toml").write_text("\ufeffa = 1\nb = ['x', 'y.z']\n", encoding="utf-8")
    assert read_toml(folder / "a.toml") == {"a": 1, "b": ["x", "y.z"]}
