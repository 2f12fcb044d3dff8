"""The thresholds: which documents are dropped or flagged, by their features."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cleaning.text.features import NAMES
from minillm.base.errors import UserError
from minillm.base.json_door import read_toml

DEFAULTS = Path(__file__).with_name("rules.toml")
ACTIONS = ("drop", "flag", "nothing")
OF_LANGUAGE = {"ja": "kana", "ko": "hangul", "ru": "cyrillic", "other": "other_script"}  # language → its rule


@dataclass(frozen=True)
class Rule:
    """A document is dropped (or flagged) where `feature` is above or below a limit; one of the two is None."""

    name: str
    feature: str
    above: float | None
    below: float | None
    do: str

    def column(self) -> int:
        """The place of its feature in a table of features."""
        return NAMES.index(self.feature)

    def holds(self, table: np.ndarray) -> np.ndarray:
        """For which documents, (n,) bool; table: their features, (n, len(NAMES)), NaN where one says nothing."""
        values = table[:, self.column()]
        return values > self.above if self.above is not None else values < self.below

    def limit(self) -> str:
        """The limit in words."""
        return f"> {self.above:g}" if self.above is not None else f"< {self.below:g}"


def read_rules(path: str | Path | None = None, languages: tuple[str, ...] = ("zh", "en")) -> list[Rule]:
    """The rules in their order: the defaults, changed by those of a file.

    languages: those that are wanted; rules against them do nothing.
    Raises UserError for a rule, key or value that is not known.
    """
    tables = read_toml(DEFAULTS)
    for name, changes in (read_toml(path) if path else {}).items():
        if name not in tables:
            nearest = difflib.get_close_matches(name, tables, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(tables)}"
            raise UserError(f"{path}: no rule is named {name!r}; {hint}")
        if not isinstance(changes, dict):
            raise UserError(f"{path}: {name} = {changes!r} stands alone; write it below a line [{name}]")
        tables[name] = _changed(tables[name], changes, f"{path}, [{name}]")
    rules = [_rule(name, table) for name, table in tables.items()]

    # A wanted language is not dropped; where Latin letters of any language are, English words are not asked for.
    switched_off = {OF_LANGUAGE[language] for language in languages if language in OF_LANGUAGE}
    switched_off |= {"english_words"} if "other" in languages else set()
    return [rule for rule in rules if rule.do != "nothing" and rule.name not in switched_off]


def _changed(table: dict, changes: dict, place: str) -> dict:
    """A rule's table with a user's changes; a limit of the other direction takes the place of the old one."""
    for key, value in changes.items():
        if key in ("above", "below"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{place}: {key} is {value!r}; give a number")
            table = {k: v for k, v in table.items() if k not in ("above", "below")}
        elif key == "do":
            if value not in ACTIONS:
                raise UserError(f"{place}: do is {value!r}; choose one of {', '.join(ACTIONS)}")
        else:
            raise UserError(f"{place}: {key!r} is not known; a rule has above, below and do")
        table = table | {key: value}
    return table


def _rule(name: str, table: dict) -> Rule:
    feature = table.get("feature", name)
    return Rule(name, feature, table.get("above"), table.get("below"), table.get("do", "drop"))


def decide(rules: list[Rule], table: np.ndarray) -> np.ndarray:
    """The number of the first rule that drops each document, −1 where none does, (n,) int16."""
    first = np.full(len(table), -1, np.int16)
    for number, rule in reversed(list(enumerate(rules))):
        if rule.do == "drop":
            first[rule.holds(table)] = number
    return first
