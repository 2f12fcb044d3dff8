"""Values of files of others: missing and wrong ones are named, and nothing else is called damage."""

import re

import pytest

from minillm.base.contents import WORDS, Contents
from minillm.base.errors import UserError

VALUES = {
    bool: True,
    int: 3,
    float: 0.5,
    str: "x",
    dict: {"a": None},
    list: [None],
    list[str]: ["x", ""],
    list[int]: [1, -2],
    list[float]: [0.5, 1],
    list[dict]: [{"a": 1}, {}],
    dict[str, str]: {"a": "x"},
    dict[str, int]: {"a": 1},
    dict[str, float]: {"a": 0.5},
    dict[str, dict]: {"a": {}},
}


def fits(value_of, kind) -> bool:
    """Whether the example value of one kind is of the other, too."""
    general = {list: "list[", dict: "dict["}
    if kind in general and str(value_of).startswith(general[kind]):
        return True
    return value_of == kind or (kind, value_of) in [
        (float, int),
        (list[float], list[int]),
        (dict[str, float], dict[str, int]),
    ]


@pytest.mark.parametrize("kind", WORDS, ids=str)
def test_a_value_is_of_its_own_kind_alone(kind):
    for other, value in VALUES.items():
        contents = Contents({"name": value}, "some.file")
        if fits(other, kind):
            assert contents.get("name", kind) is value and contents.need("name", kind) is value
            continue
        with pytest.raises(UserError, match=f"^some.file: damaged: name is .*, not {re.escape(WORDS[kind])}$"):
            contents.get("name", kind)


@pytest.mark.parametrize("values", [{}, {"name": None}])
def test_a_missing_value_has_a_default_or_is_named(values):
    contents = Contents(values, "some.file")
    assert contents.get("name", int) is None and contents.get("name", int, 7) == 7
    assert contents.part("name").values == {} and contents.parts("name") == []
    with pytest.raises(UserError, match=r"^some.file: damaged, or of another kind: name is missing$"):
        contents.need("name", int)


@pytest.mark.parametrize(
    ("kind", "value", "limits", "words"),
    [
        (int, 0, {"at_least": 1}, "name is 0: must be at least 1"),
        (int, 1 << 41, {}, "must be at most 1,099,511,627,776"),
        (float, float("nan"), {}, "must be a finite number"),
        (float, float("inf"), {"above": 0}, "must be a finite number"),
        (float, 1.0, {"at_least": 0, "below": 1}, "name is 1.0: must be 0 to below 1"),
        (list[int], [3, -1], {"at_least": 0}, "name is -1: must be at least 0"),
        (str, "x" * 1000, {"choices": ("a", "b")}, "choose one of a, b"),
    ],
)
def test_a_value_out_of_its_range_is_named(kind, value, limits, words):
    contents = Contents({"name": value}, "some.file")
    for read in (contents.get, contents.need):
        with pytest.raises(UserError, match=words) as caught:
            read("name", kind, **limits)
        assert len(str(caught.value)) < 120


def test_an_object_inside_another_is_named_by_its_path():
    contents = Contents({"rope": {"factor": "x"}, "files": [{}, {"tokens": -1}]}, "some.file")
    with pytest.raises(UserError, match=r"^some.file: rope: damaged: factor is 'x', not a number"):
        contents.part("rope").get("factor", float)
    with pytest.raises(UserError, match=r"^some.file: files\[1\]: tokens is -1: must be at least 0"):
        [part.get("tokens", int, at_least=0) for part in contents.parts("files")]


def test_an_empty_list_is_a_list_of_anything_and_a_mixed_one_of_nothing():
    assert Contents({"name": []}, "some.file").need("name", list[str]) == []
    with pytest.raises(UserError, match="not a list of whole numbers"):
        Contents({"name": [1, "x"]}, "some.file").get("name", list[int])


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_has_no_names_is_refused(values):
    with pytest.raises(UserError, match=r"^some.file: damaged: it holds .*, not an object"):
        Contents(values, "some.file")


def test_a_long_value_is_shortened():
    with pytest.raises(UserError) as caught:
        Contents({"name": ["x" * 100] * 100_000}, "some.file").get("name", int)
    assert len(str(caught.value)) < 300
