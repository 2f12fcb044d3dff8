"""Names and values in a file that others wrote, each checked where it is read.

A value that is missing or of the wrong kind is named in one line. So only faults of the file are called damage: a
mistake in our own code still ends in a traceback.
"""

import reprlib
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from minillm.base.errors import UserError

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "an object with names and values",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
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

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value under this name, of a kind in `WORDS`; `default` if it is missing or null. Raises `UserError`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not is_of_kind(value, kind):
            raise UserError(f"{self.source}: damaged: {name} is {reprlib.repr(value)}, not {WORDS[kind]}")
        return value

    def need(self, name: str, kind: type) -> Any:
        """As `get`, for a value that must be there."""
        if self.values.get(name) is None:
            raise UserError(f"{self.source}: damaged, or of another kind: {name} is missing")
        return self.get(name, kind)


def is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value is of a kind in `WORDS`. A whole number counts as a number; true and false do not."""
    if get_origin(kind) is list:
        (element,) = get_args(kind)
        return isinstance(value, list) and all(is_of_kind(item, element) for item in value)
    if kind is float:
        return isinstance(value, float) or (is_of_kind(value, int) and abs(value) < LARGEST)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
