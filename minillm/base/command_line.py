"""Command lines of dataclasses of options: `--name value`, `--config file.toml`, and `--help` in groups."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Collection

from minillm.base.errors import UserError
from minillm.base.json_door import read_toml
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

    # the words of the command line, then the file that they may name
    arguments, unknown_words = parser.parse_known_args(argv)
    if unknown_words:
        word = unknown_words[0]
        name = word.split("=")[0].lstrip("-")
        raise UserError(f"argument {word}: no such option{_nearest(name, options)} (see {parser.prog} --help)")
    from_words = {name: value for name, value in vars(arguments).items() if value is not None}
    path = from_words.pop("config", None)
    from_file = {}
    if path is not None:
        from_file = _read_toml(path, options, parser.prog)
        from_file = {name: value for name, value in from_file.items() if name not in from_words}  # the words win

    # values of the right type and range, and all problems in one message
    hints = typing.get_type_hints(config_class)
    values = {}
    problems = []
    for source, prefix in ((from_file, f"{path}: "), (from_words, "")):
        for name, value in source.items():
            try:
                values[name] = convert(name, options[name], hints[name], value)
            except UserError as problem:
                problems.append(f"{prefix}{problem}")
    for field in dataclasses.fields(config_class):
        is_needed = field.default is dataclasses.MISSING
        if is_needed and field.name not in from_file and field.name not in from_words:
            problems.append(f"--{field.name} is needed: {options[field.name].help}")
    if problems:
        raise UserError("; ".join(problems))
    return config_class(**values)


def _build_parser(config_class: type, description: str, program: str | None) -> Parser:
    """argparse's parser of these options, in their groups."""
    parser = Parser(
        prog=program,
        usage=_usage(config_class),
        description=description,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options = declared(config_class)
    titles = dict.fromkeys(its.group for its in options.values())  # in the order of their first options
    groups = {title: parser.add_argument_group(title) for title in titles}

    # all values stay texts here: `convert` makes numbers of them
    hints = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, its in options.items():
        kind, _ = value_type(hints[name])
        has_many = is_list(kind)
        placeholder = "|".join(map(str, its.choices)) if its.choices else PLACEHOLDER.get(kind, "TEXT")
        add = groups[its.group].add_argument
        text = _help(its, defaults[name])
        if its.positional:
            add(name, help=text, metavar=name.upper(), nargs="+" if has_many else None)
        elif kind is bool:  # --name alone means true
            add(f"--{name}", help=text, metavar=placeholder, nargs="?", const="true")
        elif has_many:
            add(f"--{name}", help=text, metavar=placeholder, nargs="+", action="extend")
        else:
            add(f"--{name}", help=text, metavar=placeholder)

    general = parser.add_argument_group("general")
    general.add_argument("--help", "-h", action="help", help="show this and exit")
    general.add_argument("--config", metavar="FILE", help="TOML file of the options above, in lines NAME = VALUE")
    return parser


def _usage(config_class: type) -> str:
    """The first line of --help: the options that are needed, and that there are others."""
    words = ["%(prog)s"]
    options = declared(config_class)
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            continue
        words.append(field.name.upper() if options[field.name].positional else f"--{field.name} …")
    return " ".join([*words, "[--name value …]", "[--config FILE]"])


def _help(its: Option, default) -> str:
    """An option's help text with its range and default."""
    notes = []
    if its.only_with:
        other, values = its.only_with
        notes.append(f"with --{other} {'|'.join(values)}".rstrip())
    if its.limits():
        notes.append(its.limits())
    if default is dataclasses.MISSING and not its.positional:
        notes.append("needed")
    if default is not dataclasses.MISSING and default != ():
        notes.append(f"default {spelled(default)}")
    text = f"{its.help} ({', '.join(notes)})" if notes else its.help
    return text.replace("%", "%%")  # argparse reads a single % as the beginning of a name


def _read_toml(path: str, options: Collection[str], program: str) -> dict:
    """The values in a TOML file, by name; raises `UserError` for a name that is no option of the program."""
    try:
        values = read_toml(path)
    except UserError as problem:
        raise UserError(f"--config {problem}; give a file of lines NAME = VALUE") from None
    for name, value in values.items():
        if name in options:
            continue
        if isinstance(value, dict):
            raise UserError(f"{path}: [{name}]: sections and dotted names are not used; give lines NAME = VALUE alone")
        raise UserError(f"{path}: {name}: no such option{_nearest(name, options)} (see {program} --help)")
    return values


def _nearest(name: str, options: Collection[str]) -> str:
    """A question for the option whose name is close to this one; empty if none is."""
    matches = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean --{matches[0]}?" if matches else ""
