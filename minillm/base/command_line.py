"""Command lines of dataclasses of options: `--name value`, `--config file.toml`, and `--help` in groups."""

import argparse
import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Collection
from pathlib import Path

from minillm.base.errors import UserError
from minillm.base.options import Option, convert, declared, is_list, spelled, value_type

PLACEHOLDER = {int: "N", float: "X", str: "TEXT", bool: "true|false"}  # of a value in --help


class Parser(argparse.ArgumentParser):
    """Reports a mistake in a command line like every other `UserError`: one line, status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(config_class: type, description: str, argv: list[str] | None = None, program: str | None = None):
    """An instance of `config_class` from the command line; program: what `--help` calls it.

    Values come from the defaults, then `--config file.toml`, then `--name value`. Raises `UserError`: for an unknown
    name it suggests the nearest, and it lists all values of a wrong type or out of range.
    """
    parser = _build_parser(config_class, description, program)
    options = declared(config_class)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0].lstrip("-")
        raise UserError(f"argument {word}: no such option{_nearest(name, options)} (see {parser.prog} --help)")
    given = {name: value for name, value in vars(known).items() if value is not None}
    path = given.pop("config", None)
    from_file = {} if path is None else _read_toml(path, options, parser.prog)

    # what the command line gives counts before what the file says
    hints = typing.get_type_hints(config_class)
    values, problems = {}, []
    for source, where in ((from_file, f"{path}: "), (given, "")):
        for name, value in source.items():
            if source is from_file and name in given:
                continue
            try:
                values[name] = convert(name, options[name], hints[name], value)
            except UserError as problem:
                problems.append(f"{where}{problem}")
    for field in dataclasses.fields(config_class):
        if field.default is dataclasses.MISSING and not {field.name} & {*from_file, *given}:
            problems.append(f"--{field.name} is needed: {options[field.name].help}")
    if problems:
        raise UserError("; ".join(problems))
    return config_class(**values)


def _build_parser(config_class: type, description: str, program: str | None) -> Parser:
    parser = Parser(
        prog=program,
        usage=_usage(config_class),
        description=description,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(config_class)
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    options = declared(config_class)
    titles = dict.fromkeys(its.group for its in options.values())  # in the order of their first options
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, its in options.items():
        kind, _ = value_type(hints[name])
        many = is_list(kind)
        placeholder = "|".join(map(str, its.choices)) if its.choices else PLACEHOLDER.get(kind, "TEXT")
        add, words = groups[its.group].add_argument, _help(its, defaults[name])
        if its.positional:
            add(name, help=words, metavar=name.upper(), nargs="+" if many else None)
        elif kind is bool:
            add(f"--{name}", help=words, metavar=placeholder, nargs="?", const="true")
        elif many:
            add(f"--{name}", help=words, metavar=placeholder, nargs="+", action="extend")
        else:
            add(f"--{name}", help=words, metavar=placeholder)
    general = parser.add_argument_group("general")
    general.add_argument("--help", "-h", action="help", help="show this and exit")
    general.add_argument("--config", metavar="FILE", help="TOML file of the options above, in lines NAME = VALUE")
    return parser


def _usage(config_class: type) -> str:
    """The first line of --help: what must be given, and that options may be."""
    words = ["%(prog)s"]
    for field in dataclasses.fields(config_class):
        if field.default is dataclasses.MISSING:
            words.append(field.name.upper() if declared(config_class)[field.name].positional else f"--{field.name} …")
    return " ".join([*words, "[--name value …]", "[--config FILE]"])


def _help(its: Option, default) -> str:
    """An option's help text with its range and default."""
    notes = [f"with --{its.only_with[0]} {'|'.join(its.only_with[1])}" if its.only_with else "", its.limits()]
    if default is dataclasses.MISSING:
        notes.append("" if its.positional else "needed")
    elif default != ():
        notes.append(f"default {spelled(default)}")
    notes = ", ".join(filter(None, notes))
    words = f"{its.help} ({notes})" if notes else its.help
    return words.replace("%", "%%")


def _read_toml(path: str, options: Collection[str], program: str) -> dict:
    """The values in a TOML file, by name; raises `UserError` for a name that is no option of the program."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows may put a BOM first
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or f"no TOML: {problem}"
        raise UserError(f"--config {path}: {reason}; give a file of lines NAME = VALUE") from None
    for name, value in values.items():
        if name in options:
            continue
        if isinstance(value, dict):
            raise UserError(f"{path}: [{name}]: sections and dotted names are not used; give lines NAME = VALUE alone")
        raise UserError(f"{path}: {name}: no such option{_nearest(name, options)} (see {program} --help)")
    return values


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean --{near[0]}?" if near else ""
