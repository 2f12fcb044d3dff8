"""Dataclasses as command lines.

A script has one frozen dataclass; each field has a help text and a default, and `parse` turns
`--name value` (or `--config file.toml`) into an instance.
"""

import argparse
import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from dataclasses import field
from pathlib import Path

from minillm.base.errors import UserError


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field with help text (name the unit) and, if there are few, its choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


def parse(config_class: type, description: str, argv: list[str] | None = None):
    """An instance of `config_class` from the command line.

    Values come from the defaults, then `--config file.toml`, then `--name value`. An unknown name
    is a `UserError` that suggests the nearest; a value of the wrong type names what is expected.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="TOML file of the options below")
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    for name, f in fields.items():
        kind, _ = _value_type(hints[name])
        shown = "none" if f.default is None else str(f.default).lower() if kind is bool else f.default
        words = f"{f.metadata['help']} (default {shown})".replace("%", "%%")
        extra = dict(nargs="?", const="true", metavar="BOOL") if kind is bool else dict(metavar=kind.__name__.upper())
        if f.metadata.get("choices"):
            extra = dict(metavar="|".join(f.metadata["choices"]))
        parser.add_argument(f"--{name}", help=words, default=None, **extra)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        _refuse_unknown(word.split("=")[0].lstrip("-"), fields, f"argument {word}")
    given = {key: value for key, value in vars(known).items() if value is not None}
    source = _read_toml(given.pop("config"), fields) if "config" in given else {}
    values = {k: _convert(fields[k], hints[k], v, f"{known.config}: ") for k, v in source.items() if k not in given}
    return config_class(**values, **{k: _convert(fields[k], hints[k], v) for k, v in given.items()})


def show(config) -> str:
    """The effective configuration, one `name = value` a line, for the top of a run's output."""
    pairs = dataclasses.asdict(config).items()
    return "\n".join(f"  {name} = {value}" for name, value in pairs)


def _value_type(hint) -> tuple[type, bool]:
    """The type that a field's hint names, and whether None is allowed beside it."""
    if isinstance(hint, types.UnionType):  # "int | None"
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def _convert(f: dataclasses.Field, hint, value, where: str = ""):
    """`value`, text or what TOML gave, as the type that the field's hint names; where: begins an error's line."""
    name, choices = f.name, f.metadata.get("choices")
    kind, optional = _value_type(hint)
    if isinstance(value, str) and value.lower() == "none" and optional:
        return None
    if choices and value not in choices:
        raise UserError(f"{where}--{name} {value}: choose one of {', '.join(choices)}")
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if isinstance(value, bool | list | dict) or (kind is str and not str(value).strip()):
            raise ValueError  # a TOML file's true is no number, and its list no text, though Python could make it one
        if kind is int and not isinstance(value, int):
            number = float(value)  # so that 1e6 is a number of steps
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        expected += " (several go into one, with commas between)" * (kind is str and isinstance(value, list))
        raise UserError(f"{where}--{name} {value or repr(value)}: expected {expected}") from None


def _read_toml(path: str, fields) -> dict:
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows may put a BOM first
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or f"no TOML: {problem}"
        raise UserError(f"--config {path}: {reason}; give a file of lines NAME = VALUE") from None
    for name, value in values.items():
        if name in fields:
            continue
        if isinstance(value, dict):
            raise UserError(f"{path}: [{name}]: sections and dotted names are not used; give lines NAME = VALUE alone")
        _refuse_unknown(name, fields, f"{path}: {name}")
    return values


def _refuse_unknown(name: str, known, shown: str):
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean --{near[0]}?" if near else ""
    raise UserError(f"{shown}: no such option{hint} ({Path(sys.argv[0]).name} --help lists them)")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in a command line like every other `UserError`: one line, status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")
