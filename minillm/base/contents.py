"""Names and values in a file that others wrote, each checked where it is read.

A value that is missing, of the wrong kind or out of range is named in one line. So only faults of the file are called
damage: a mistake in our own code still ends in a traceback.
"""

import reprlib
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from minillm.base.errors import UserError
from minillm.base.options import Option

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "an object with names and values",
    list: "a list",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    list[dict]: "a list of objects",
    dict[str, str]: "an object of names and texts",
    dict[str, int]: "an object of names and whole numbers",
    dict[str, float]: "an object of names and numbers",
    dict[str, dict]: "an object of names and objects",
}

LARGEST = 1 << 64  # no file means a whole number from here on, and a float may not hold it


@dataclass(frozen=True)
class Contents:
    """Names and values, as JSON or a header gives them. source: the file, as errors name it.

    Raises `UserError` if `values` is no object with names.
    """

    values: Any
    source: str

    def __post_init__(self):
        if not isinstance(self.values, dict):
            raise UserError(f"{self.source}: damaged: it holds {reprlib.repr(self.values)}, not {WORDS[dict]}")

    def get(self, name: str, kind: Any, default: Any = None, **limits) -> Any:
        """The value under this name, of a kind in `WORDS`; `default` if it is missing or null.

        limits: of a number, or of each in a list: at_least, at_most, above, below; of a text: choices. Raises
        `UserError` for a value of another kind, out of range, or not finite.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not is_of_kind(value, kind):
            raise UserError(f"{self.source}: damaged: {name} is {reprlib.repr(value)}, not {WORDS[kind]}")
        rule = Option("", **limits)
        for number in value if kind in (list[int], list[float]) else [value]:
            if problem := rule.problem(number):
                raise UserError(f"{self.source}: {name} is {reprlib.repr(number)}: {problem}")
        return value

    def need(self, name: str, kind: Any, **limits) -> Any:
        """As `get`, for a value that must be there."""
        if self.values.get(name) is None:
            raise UserError(f"{self.source}: damaged, or of another kind: {name} is missing")
        return self.get(name, kind, **limits)

    def part(self, name: str) -> "Contents":
        """The object under this name, which may be missing: it is then empty."""
        return Contents(self.get(name, dict, {}), f"{self.source}: {name}")

    def parts(self, name: str) -> list["Contents"]:
        """The objects in the list under this name, which may be missing."""
        items = self.get(name, list[dict], [])
        return [Contents(item, f"{self.source}: {name}[{number}]") for number, item in enumerate(items)]


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind in `WORDS`. A whole number counts as a number; true and false do not."""
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return isinstance(value, list) and all(is_of_kind(item, element) for item in value)
    if get_origin(kind) is dict:
        _, element = get_args(kind)
        return isinstance(value, dict) and all(is_of_kind(item, element) for item in value.values())
    if kind is float:
        return isinstance(value, float) or (is_of_kind(value, int) and abs(value) < LARGEST)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
