"""How the texts of the bundled world are told: choices with known probabilities, and phrases in two languages."""

import itertools
import math
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from data.world.words import ACTORS, COLOURS, EN, NUMBERS, PLACES, THINGS, ZH, Person, Thing

LOG2 = [0.0] + [math.log2(n) for n in range(1, 10_000)]


class Table:
    """Options with unequal probabilities, given as (p, option)."""

    def __init__(self, *weighted: tuple[float, object]):
        self.p = [p for p, _ in weighted]
        self.options = [option for _, option in weighted]
        self.upper = list(itertools.accumulate(self.p))[:-1]
        self.cost = [-math.log2(p) for p in self.p]


class Draw:
    """Makes the choices of a text by chance, adds up their information, and keeps what is said.

    rng: source of uniform numbers; held_out: choose only among the combinations that no text of the corpus shows.
    """

    def __init__(self, rng: random.Random, held_out: bool = False):
        self.random = rng.random
        self.held_out = held_out
        self.begin()

    def begin(self) -> None:
        """Start a new text."""
        self.bits = 0.0  # sum of -log2 p over the choices
        self.said: list[str] = []  # the pieces of the text
        self.say = self.said.append
        self.new_cast()

    def new_cast(self) -> None:
        self.cast: list[Person] = []
        self.who = self.what = 0  # bit g is set when somebody, or something, of group g has been named

    def pick(self, options: Sequence):
        """One of the options, all equally likely."""
        n = len(options)
        self.bits += LOG2[n]
        return options[int(self.random() * n)]

    def choose(self, table: Table):
        """One of the options of a table."""
        i = bisect_right(table.upper, self.random())
        self.bits += table.cost[i]
        return table.options[i]

    def person(self) -> Person:
        """Somebody of `ACTORS` who is not yet in this text's cast, and now is."""
        pool = pool_of("person", self.what | self.who if self.held_out else self.what, self.held_out)
        if self.cast:
            pool = pool.copy()
            for known in self.cast:
                pool.remove(known)
        someone = self.pick(pool)
        self.cast.append(someone)
        self.who |= 1 << someone.group
        return someone

    def named(self, kind: str, other_than=None):
        """A thing, food, item or place that everybody in the cast may meet."""
        pool = pool_of(kind, self.what | self.who if self.held_out else self.who, self.held_out)
        word = self.pick([w for w in pool if w is not other_than] if other_than else pool)
        self.what |= 1 << word.group
        return word


@cache
def pool_of(kind: str, groups: int, held_out: bool = False) -> list:
    """The words of a kind that may be named beside words of the other kind from `groups` (a bit set)."""
    foods, items = [t for t in THINGS if t.food], [t for t in THINGS if not t.food]
    words = {"person": ACTORS, "thing": THINGS, "food": foods, "item": items, "place": PLACES}[kind]
    return [w for w in words if bool(groups >> w.group & 1) == held_out] if groups else words


# A phrase is written once for both languages, "Chinese | English", with {slots}. It is told from left to right:
# the value of a slot is a (Chinese, English) pair, or a function of the draw, called when the slot is reached.


def phrases(text: str) -> list[tuple]:
    def parse(side: str) -> list[tuple[str, str | None]]:
        parts = [*re.split(r"\{(\w+)\}", side), None]
        return [(literal, slot) for literal, slot in zip(parts[::2], parts[1::2], strict=True) if literal or slot]

    return [tuple(parse(side) for side in line.split(" | ")) for line in text.strip("\n").split("\n")]


def tell(c: Draw, lang: int, phrase: tuple, slots: dict) -> None:
    """Say a phrase; slots that hold a function are settled on the way."""
    say = c.say
    for literal, slot in phrase[lang]:
        say(literal)
        if slot:
            value = slots[slot]
            if callable(value):
                value = slots[slot] = value(c)
            say(value[lang])


def written(lang: int, phrase: tuple, slots: dict) -> str:
    """A phrase as text; its slots are all settled."""
    return "".join([literal + (slots[slot][lang] if slot else "") for literal, slot in phrase[lang]])


class Some(NamedTuple):
    zh: str
    en: str
    thing: Thing
    n: int


def some(thing: Thing, n: int, words: bool = False, adjective: Sequence[str] = ("", "")) -> Some:
    """n of a thing in both languages: 3个苹果, 3 apples; with `words` 三个苹果, three apples."""
    count = str(n)
    zh, en = NUMBERS[n - 1][:2] if words else (count, count)
    space = " " if adjective[EN] else ""
    if words and n == 1:
        en = "an" if (adjective[EN] or thing.en)[0] in "aeiou" else "a"
    noun = thing.en if n == 1 else thing.plural
    return Some(f"{zh}{thing.measure}{adjective[ZH]}{thing.zh}", f"{en} {adjective[EN]}{space}{noun}", thing, n)


COLOURS_OF = [(colour.zh + "的", colour.en) for colour in COLOURS]


def without_number(phrase: Some) -> Some:
    """一个红色的球 → 红色的球; English keeps its article."""
    return phrase._replace(zh=phrase.zh[2:])


def coloured(c: Draw, other_than: Thing | None = None) -> Some:
    """One item of some colour: 一个红色的球, a red ball."""
    thing = c.named("item", other_than)
    return some(thing, 1, True, c.pick(COLOURS_OF))
