"""Files of every kind and in every state of repair; the whole way from text to bins is in test_prepare.py."""

import gzip
import json
import os
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import UserError
from minillm.datasets.files import json_rows
from minillm.datasets.files.json_rows import numbered_lines, open_rows, parse_line
from minillm.datasets.files.text_files import find_files, records, text_of


def values_of(path) -> list:
    with open_rows(path) as file:
        return [parse_line(line) for _, _, line in numbered_lines(file)]


def texts_of(path) -> list[str]:
    return [text_of(record.kind, record.raw, "text") for record in records(path, boundary="blank", field="text")]


def test_json_array_however_it_is_spaced(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "READ_AT_ONCE", 1)
    values = [{"text": 'a "quoted" ] , [ \\ text 😀'}, 12345, {"text": "b", "more": [1, {"x": []}]}, None, [], "s", 1.5]
    for file, spaces in (("a.json", None), ("b.json", 3)):
        (tmp_path / file).write_text(json.dumps(values, indent=spaces, ensure_ascii=False))
        found = list(records(tmp_path / file, boundary="blank", field="text"))
        assert [record.raw for record in found[:3:2]] == [values[0]["text"], "b"]
        assert [record.number for record in found] == list(range(1, 8))
        kinds = ["a number", "null", "an array", "a string", "a number"]
        assert [str(found[i].raw).rsplit("is ")[-1] for i in (1, 3, 4, 5, 6)] == kinds
        assert values_of(tmp_path / file) == values
    (tmp_path / "none.json").write_text(" [ ] ")
    assert not list(records(tmp_path / "none.json", boundary="blank", field="text"))
    assert not values_of(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=5), st.integers(1, 40), st.sampled_from([None, 0, 30]), st.booleans())
@settings(deadline=None, max_examples=200)
def test_an_array_is_what_json_says_however_it_is_read(tmp_path_factory, values, read, spaces, ascii_only):
    path = tmp_path_factory.mktemp("array") / "a"
    path.write_bytes(json.dumps(values, indent=spaces, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "READ_AT_ONCE", read)
        assert values_of(path) == json.loads(path.read_bytes())


@pytest.mark.parametrize("read", [1, 1 << 20])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"text": "a"}', "after item 1 of the array comes the end of the file"),
        (b'[{"text": "a"} {"text": "b"}]', "after item 1 of the array comes '{', not ',' or ']'"),
        (b'[{"text": "a"}; 1]' + b" " * 100, "after item 1 of the array comes ';', not ',' or ']'"),
        (b'[{"text": "a"},]', "item 2 of the array: not JSON"),
        (b'[{"text": "a"}, {"text": "b', "item 2 of the array: not JSON (Unterminated string"),
        (b'[{"text": oops}' + b" " * 100, "item 1 of the array: not JSON (Expecting value)"),
        (b"[1, " + b"[" * 100_000, "item 2 of the array: not JSON (nested too deeply)"),
        (b"[1, " + b"1" * 5000 + b"]" + b" " * 100, "item 2 of the array: not JSON (Exceeds the limit"),
        (b"[", "item 1 of the array: not JSON (Expecting value)"),
        (b"[1]\n[2]", "more text follows the end of the array"),
        (b"[1] \xff", "more text follows the end of the array"),
    ],
)
def test_broken_arrays_are_named(tmp_path, monkeypatch, data, reason, read):
    if len(data) < 1000:
        monkeypatch.setattr(json_rows, "READ_AT_ONCE", read)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    for read_all in (values_of, lambda path: list(records(path, boundary="blank", field="text"))):
        with pytest.raises(UserError) as error:
            read_all(path)
        assert str(error.value).startswith(f"{path}: {reason}")


def test_an_array_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'[{"text": "a"}]'))
    monkeypatch.setattr(json_rows, "LARGEST_ARRAY", 14)  # bytes after the bracket
    assert values_of(path) == [{"text": "a"}]
    monkeypatch.setattr(json_rows, "LARGEST_ARRAY", 13)
    for read_all in (values_of, texts_of):
        with pytest.raises(
            UserError, match=r"a\.json\.gz: a JSON array of more than 13 bytes, .* convert it to \.jsonl"
        ):
            read_all(path)


def test_a_bad_byte_spoils_no_other_item(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "one"}, {"text": "tw\xe9"}, {"text": "three"}]')
    first, second, third = records(tmp_path / "a.json", boundary="blank", field="text")
    assert (first.raw, third.raw) == ("one", "three")
    with pytest.raises(UserError, match=r"^not UTF-8 \(byte 0xE9, column 3\)$"):
        text_of(second.kind, second.raw, "text")
    assert [value["text"] for value in values_of(tmp_path / "a.json")] == ["one", "tw\udce9", "three"]


def test_a_fault_travels_between_processes(tmp_path):
    (tmp_path / "a.json").write_text("[5]")
    (record,) = records(tmp_path / "a.json", boundary="blank", field="text")
    record = pickle.loads(pickle.dumps(record))
    with pytest.raises(UserError, match="a JSON object is needed, this is a number"):
        text_of(record.kind, record.raw, "text")


LINES = b'{"text": "a"}\r\n{"text": "b"}\n'


@pytest.mark.parametrize("data", [LINES, b"\xef\xbb\xbf" + LINES, b'[{"text": "a"},\n{"text": "b"}]\n'])
@pytest.mark.parametrize("packed", [False, True])
def test_gzip_is_known_by_its_first_bytes(tmp_path, data, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert texts_of(path) == ["a", "b"]
    assert values_of(path) == [{"text": "a"}, {"text": "b"}]
    with open_rows(path) as file:  # again, from the middle
        *_, (_, offset, line) = numbered_lines(file)
        file.seek(offset)
        assert file.read(len(line)) == line


def test_lines_are_numbered_with_the_blank_ones(tmp_path):
    (tmp_path / "a").write_bytes(b"\n1\n \r\n\n22\n\n\n")
    with open_rows(tmp_path / "a") as file:
        found = list(numbered_lines(file))
    assert [(number, line) for number, _, line in found] == [(1, b""), (2, b"1\n"), (3, b""), (4, b""), (5, b"22\n")]
    assert [offset for _, offset, line in found if line] == [1, 7]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b" \r\n", "empty line"),
        (b'{"a": \n', "not JSON (Expecting value, column 6); a file is one object a line, or one array"),
        (b"[" * 100_000, "not JSON (nested too deeply); a file"),
        (b"1" * 5000, "not JSON (Exceeds the limit"),
        ('{"世": "'.encode() + b"\xff", "not UTF-8 (byte 0xFF, column 8)"),
    ],
)
def test_a_line_that_is_none(line, reason):
    with pytest.raises(UserError) as error:
        parse_line(line)
    assert str(error.value).startswith(reason)


def test_broken_files(tmp_path):
    from pyarrow import parquet, table

    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "no.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    parquet.write_table(table({"body": ["a"]}), tmp_path / "key.parquet")
    reasons = {
        "cut.jsonl.gz": "cannot be read .Compressed file ended",
        "no.jsonl.gz": "cannot be read .Not a gzipped file",
        "no.parquet": "not a whole parquet file",
        "key.parquet": "column 'text' is missing .its columns: body",
        "a.pdf": "not a known kind of file",
        "none.txt": "no such file",
        "empty": "holds no file of a known kind",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"{name}: .*{reason}"):
            [texts_of(file) for file in find_files([tmp_path / name])]
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        open_rows(tmp_path / "cut.jsonl.gz")
    with pytest.raises(UserError, match=r"none: no such file"):
        open_rows(tmp_path / "none")


def test_the_way_to_a_folder_is_looked_up_once_for_all_its_files(tmp_path, monkeypatch):
    """On a network disk each step of a way is a question to the server."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(50):
            (tmp_path / name / f"{number}.txt").write_text("text")
    (tmp_path / "b" / "again.txt").symlink_to(tmp_path / "a" / "7.txt")
    asked = []
    plain = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **how: asked.append(path) or plain(path, **how))
    left_out = Counter()
    assert len(find_files([tmp_path], left_out)) == 100 and left_out == {"files linked again": 1}
    assert len(asked) < 20
    with pytest.raises(UserError, match=r"a/7\.txt: given 2 times"):
        find_files([tmp_path / "a", tmp_path / "b" / "again.txt"])
