"""Options: dataclasses whose fields say what a value means. `command_line.py` makes command lines of them.

    @dataclass(frozen=True)
    class Config(Options):
        steps: int = option(1500, "optimizer steps of the whole run", at_least=1, group="length")

Help text, range, choices and group are declared once, beside the default. They are checked wherever a value comes from:
the command line, a TOML file, or Python.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from minillm.base.errors import UserError

LARGEST_COUNT = 1 << 40  # no whole number may be larger, unless its own range says so
NONE = "none"  # how a command line or a file spells None


@dataclass(frozen=True)
class Option:
    """The properties of an option besides its name, type and default.

    help: what it means, with its unit; where None is allowed, also what None means, as "none: …".
    choices: the values there are, if they are few.
    group: the heading under which `--help` shows it.
    at_least, at_most: limits that are allowed themselves; above, below: limits that are not.
    only_with: (name of another option, its values) without which this one means nothing; no values: any but none, 0
    and false.
    may_be_blank: whether a text may be empty or of spaces alone.
    positional: given without --name.
    """

    help: str
    choices: tuple | None = None
    group: str = "options"
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    only_with: tuple[str, tuple] | None = None
    may_be_blank: bool = False
    positional: bool = False

    def problem(self, value) -> str | None:
        """What is wrong with a value of the right type, as a rule that it breaks; None if nothing is."""
        if value is None:
            return None
        if isinstance(value, tuple):
            problems = [self.problem(item) for item in value]
            return next((problem for problem in problems if problem), None)
        if self.choices and value not in self.choices:
            return f"choose one of {', '.join(map(str, self.choices))}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not abs(value) < math.inf:  # true of NaN, too
            return "must be a finite number"
        if self.limits() and not self._within(value):
            return f"must be {self.limits()}"
        if is_number and isinstance(value, int) and self.at_most is None and value > LARGEST_COUNT:
            return f"must be at most {LARGEST_COUNT:,}"
        return None

    def _within(self, number: float) -> bool:
        """Whether a number keeps to the limits; raises TypeError for a text where a number belongs."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def limits(self) -> str:
        """The range in words, such as "0 to below 1"; empty if there is none."""
        upper = ""
        if self.at_most is not None:
            upper = f"{self.at_most:,}"
        elif self.below is not None:
            upper = f"below {self.below:,}"

        if self.above is not None:
            return f"above {self.above:,} to {upper}" if upper else f"above {self.above:,}"
        if self.at_least is not None:
            return f"{self.at_least:,} to {upper}" if upper else f"at least {self.at_least:,}"
        return f"at most {upper}" if self.at_most is not None else upper


def option(default=dataclasses.MISSING, help: str = "", choices: tuple | None = None, **rules):
    """A dataclass field that is an option; rules: the other fields of `Option`, such as at_least=1."""
    return field(default=default, metadata={"option": Option(help, choices, **rules)})


def declared(config_class) -> dict[str, Option]:
    """The options of a dataclass (or of an instance) by name; other fields are left out."""
    fields = dataclasses.fields(config_class)
    return {f.name: f.metadata["option"] for f in fields if "option" in f.metadata}


def out_of_range(config, form: str = "--{name} {value}") -> list[str]:
    """What is wrong with single values of an instance, a line each; form: how the line names the value."""
    problems = []
    for name, its in declared(config).items():
        value = getattr(config, name)
        problem = its.problem(value)
        if problem:
            problems.append(f"{form.format(name=name, value=value)}: {problem}")
    return problems


def without_meaning(config) -> list[str]:
    """What is wrong with options that have a value, but not the other option without which they mean nothing."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    problems = []
    for name, its in declared(config).items():
        value = getattr(config, name)
        if its.only_with is None or value == defaults[name]:
            continue
        other, values_needed = its.only_with
        other_value = getattr(config, other)
        is_on = other_value in values_needed if values_needed else bool(other_value)
        if not is_on:
            remedy = f"choose {' or '.join(values_needed)}" if values_needed else f"give another --{other}"
            without = f"--{name} {spelled(value)}: means nothing with --{other} {spelled(other_value) or NONE}"
            problems.append(f"{without}; leave it out, or {remedy}")
    return problems


def unused(config, names: Iterable[str], without: str) -> list[str]:
    """What is wrong with those of these options that were changed, since nothing reads them; a line each.

    without: what they would be of, in words. A value of 0 or false, which switches something off, is not wrong.
    """
    lines = []
    for name in names:
        value = getattr(config, name)
        if value and value != getattr(type(config), name):
            lines.append(f"--{name} {spelled(value)}: means nothing without {without}; leave it out")
    return lines


class Options:
    """The base of a dataclass of options. Making an instance raises one `UserError` that lists all problems."""

    def __post_init__(self):
        problems = [*without_meaning(self), *out_of_range(self), *self.problems()]
        if problems:
            raise UserError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with values that are all within their range, taken together; a line each."""
        return []


def optional_copy(config_class: type, group: str, leave_out: tuple[str, ...] = ()) -> type:
    """A dataclass with the options of another, where each may also be None, which is its default.

    group: the heading of all of them. leave_out: names of options that the copy does not have.
    """
    hints = typing.get_type_hints(config_class)
    fields = []
    for name, its in declared(config_class).items():
        if name in leave_out:
            continue
        its_copy = dataclasses.replace(its, group=group)
        fields.append((name, hints[name] | None, field(default=None, metadata={"option": its_copy})))
    return dataclasses.make_dataclass(f"Optional{config_class.__name__}", fields, bases=(Options,), frozen=True)


def part(config, config_class: type):
    """An instance of a dataclass from the values that a larger one has under the same names."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config_class)}
    return config_class(**values)


# ---- values


def value_type(hint) -> tuple[type, bool]:
    """The type that a field's hint names, and whether None is allowed beside it."""
    if isinstance(hint, types.UnionType):  # "int | None"
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def is_list(kind) -> bool:
    """Whether a type is that of an option with several values: tuple[str, ...]."""
    return typing.get_origin(kind) is tuple


EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def convert(name: str, its: Option, hint, value):
    """`value`, text or what TOML gave, as the type that the field's hint names; its: the option's rules.

    Raises `UserError` that names option, value and what is expected.
    """
    kind, none_is_allowed = value_type(hint)
    if isinstance(value, str) and value.lower() == NONE and none_is_allowed:
        return None
    if is_list(kind):
        item_type = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [value]
        if item_type is not str:  # "1,4" as well as "1 4": no number has a comma
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return tuple(convert(name, its, item_type, item) for item in items)
    if its.choices and kind is str and value not in its.choices:
        raise UserError(f"--{name} {value}: {its.problem(str(value))}")
    try:
        converted = _read(kind, value, its.may_be_blank)
    except (KeyError, ValueError, TypeError, OverflowError):
        expected = EXPECTED[kind]
        if kind is str and isinstance(value, list):
            expected += " (several go into one, with commas between)"
        raise UserError(f"--{name} {value or repr(value)}: expected {expected}") from None
    problem = its.problem(converted)
    if problem:
        raise UserError(f"--{name} {converted}: {problem}")
    return converted


def _read(kind: type, value, may_be_blank: bool):
    """`value` as this type; raises ValueError, KeyError, TypeError or OverflowError if it does not spell one."""
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    if isinstance(value, bool | list | dict):
        raise ValueError  # Python would take a TOML file's true for a number, and its list for a text
    if kind is str and not may_be_blank and not str(value).strip():
        raise ValueError
    if kind is int and not isinstance(value, int):
        return _whole(value)
    return kind(value)


def _whole(value: str | float) -> int:
    """The whole number that a text or a float spells, also as 1e6; raises as `_read` does.

    Digit by digit: a float has room for 53 bits, and would make another seed of 9007199254740993.
    """
    if not math.isfinite(float(value)):  # else a few letters could ask for a billion digits
        raise ValueError
    number = Decimal(value)
    if number != number.to_integral_value():
        raise ValueError
    return int(number)


def spelled(value) -> str:
    """A value as it is typed on a command line."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(spelled, value))
    return str(value)


# ---- a whole configuration as text


def differences(config) -> str:
    """The options whose values are not the defaults, "name = value" with commas between."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    differing = [name for name in declared(config) if getattr(config, name) != defaults[name]]
    return ", ".join(f"{name} = {spelled(getattr(config, name))}" for name in differing)


def to_toml(config) -> str:
    """All options of a configuration as a TOML file that `--config` reads back, in their groups.

    TOML has no None: such a value is written as the text "none", which a command line also takes for it.
    """
    groups: dict[str, list[str]] = {}
    for name, its in declared(config).items():
        line = f"{name} = {_toml_value(getattr(config, name))}"
        groups.setdefault(its.group, []).append(line)
    blocks = [f"# {group}\n" + "\n".join(lines) for group, lines in groups.items()]
    return "\n\n".join(blocks) + "\n"


def write_toml(config, path: Path) -> None:
    """Write `to_toml`; bytes of a path that are not UTF-8 become escapes, which no TOML reader takes for a name."""
    head = f'# All options of a run, as --config reads them; "{NONE}": not set.\n\n'
    path.write_text(head + to_toml(config), encoding="utf-8", errors="backslashreplace", newline="\n")


def _toml_value(value) -> str:
    """A value as TOML spells it."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    return spelled(value)
