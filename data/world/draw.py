"""How a text of the bundled world is told: by choices of known probability, whose information adds up.

A choice of probability p holds −log2 p bits of information: one of 8 words holds 3 bits, an ending that one story in
four has holds 2. A text is told by choices, one after the other, each of known probability given those before. So the
probability of the text is their product, and its information is the sum of their bits: here 5. (C. E. Shannon, A
Mathematical Theory of Communication, 1948.) `Draw` makes the choices, and keeps this sum in `bits` and the text in
`said`.

Two rules make the sum exact, and every file of this folder keeps them. Nothing is decided except through `Draw.pick`
and `Draw.choose`: a choice made elsewhere would not be counted. And no two ways lead to the same text: else its
probability would be larger than that of the way taken.

Read next: phrases.py, how a choice becomes words.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from data.world.words import ACTORS, PLACES, THINGS, Person, Thing, Word


class Table:
    """Options with unequal probabilities, given as (probability, option)."""

    def __init__(self, *weighted: tuple[float, object]):
        self.probabilities = [probability for probability, _ in weighted]
        self.options = [option for _, option in weighted]
        self.bits = [-math.log2(probability) for probability in self.probabilities]
        # Option i is chosen by a random number from ends[i - 1] up to ends[i]. The last one ends at 1, whatever the
        # sum of the rounded probabilities is.
        self.ends = list(accumulate(self.probabilities))[:-1]


class Draw:
    """Makes the choices of a text by chance, adds up their information, and keeps what is said.

    Some meetings are held out of the corpus: there a person never meets a thing, or a place, of their own group (their
    number in `PEOPLE`, `THINGS` or `PLACES`, modulo `GROUPS`). A draw with `held_out` is for questions about just those
    meetings: all that it names are of one group.

    rng: source of uniform random numbers
    held_out: choose only among the combinations that no text of the corpus shows
    """

    def __init__(self, rng: random.Random, held_out: bool = False):
        self.rng = rng
        self.held_out = held_out
        self.begin()

    def begin(self) -> None:
        """Start a new text."""
        self.bits = 0.0  # the sum of −log2 p over the choices
        self.said: list[str] = []  # the pieces of the text
        self.new_cast()

    def new_cast(self) -> None:
        """Forget who and what has been named, since the next sentence is about others."""
        self.cast: list[Person] = []
        self.person_groups: frozenset[int] = frozenset()  # the groups of the people named so far
        self.word_groups: frozenset[int] = frozenset()  # the groups of the things and places named so far

    def say(self, piece: str) -> None:
        self.said.append(piece)

    def pick(self, options: Sequence):
        """One of the options, all equally likely."""
        self.bits += math.log2(len(options))
        return options[int(self.rng.random() * len(options))]

    def choose(self, table: Table):
        """One of the options of a table."""
        i = bisect_right(table.ends, self.rng.random())
        self.bits += table.bits[i]
        return table.options[i]

    def person(self) -> Person:
        """Somebody of `ACTORS` who is not yet in this text's cast, and now is."""
        candidates = self._candidates("person", self.word_groups)
        someone = self.pick([candidate for candidate in candidates if candidate not in self.cast])
        self.cast.append(someone)
        self.person_groups |= {someone.group}
        return someone

    def word(self, kind: str, other_than: Word | Thing | None = None) -> Word | Thing:
        """A "thing", "food", "item" (a thing that is no food) or "place" that everybody in the cast may meet."""
        candidates = self._candidates(kind, self.person_groups)
        word = self.pick([candidate for candidate in candidates if candidate is not other_than])
        self.word_groups |= {word.group}
        return word

    def _candidates(self, kind: str, met: frozenset[int]) -> list:
        """The words of a kind that may be named now; they would meet words of the groups `met`."""
        if self.held_out:
            return words_within(kind, self.person_groups | self.word_groups)
        return words_outside(kind, met)


WORDS_OF_KIND = {
    "person": ACTORS,
    "thing": THINGS,
    "food": [thing for thing in THINGS if thing.food],
    "item": [thing for thing in THINGS if not thing.food],
    "place": PLACES,
}


@cache
def words_outside(kind: str, groups: frozenset[int]) -> list:
    """The words of a kind that belong to none of these groups."""
    return [word for word in WORDS_OF_KIND[kind] if word.group not in groups]


@cache
def words_within(kind: str, groups: frozenset[int]) -> list:
    """The words of a kind that belong to these groups; all, while nothing has been named and there are none."""
    if not groups:
        return WORDS_OF_KIND[kind]
    return [word for word in WORDS_OF_KIND[kind] if word.group in groups]
