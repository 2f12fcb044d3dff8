"""Values of files of others: missing and wrong ones are named, and nothing else is called damage."""

import pytest

from minillm.base.contents import WORDS, Contents
from minillm.base.errors import UserError

VALUES = {
    bool: True,
    int: 3,
    float: 0.5,
    str: "x",
    dict: {"a": 1},
    list[str]: ["x", ""],
    list[int]: [1, -2],
    list[float]: [0.5, 1],
}


@pytest.mark.parametrize("kind", WORDS, ids=str)
def test_a_value_is_of_its_own_kind_alone(kind):
    for other, value in VALUES.items():
        contents = Contents({"name": value}, "some.file")
        fits = other == kind or (kind, other) in [(float, int), (list[float], list[int])]
        if fits:
            assert contents.get("name", kind) is value and contents.need("name", kind) is value
            continue
        with pytest.raises(UserError, match=f"^some.file: damaged: name is .*, not {WORDS[kind]}$"):
            contents.get("name", kind)


@pytest.mark.parametrize("values", [{}, {"name": None}])
def test_a_missing_value_has_a_default_or_is_named(values):
    contents = Contents(values, "some.file")
    assert contents.get("name", int) is None and contents.get("name", int, 7) == 7
    with pytest.raises(UserError, match=r"^some.file: damaged, or of another kind: name is missing$"):
        contents.need("name", int)


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
