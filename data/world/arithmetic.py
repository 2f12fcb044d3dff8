"""Texts of the bundled world that calculate: sums and comparisons in symbols or in words, and word problems.

The operands are chosen, the result follows and costs nothing. A pair of numbers from `HELD_PAIRS` is never chosen in
a text; the held-out questions (questions.py) are about exactly those, by the same functions with `held_out`.

Read next: texts.py, where all kinds of texts make the corpus.
"""

import operator
from collections.abc import Callable, Iterable

from data.world.draw import Draw, Table
from data.world.phrases import GAP, Phrase, Slots, amount, digits, phrase, tell
from data.world.words import HELD_PAIRS, OPERANDS

# ---- operands ------------------------------------------------------------------------------------------------------

Operands = dict[int, list[int]]  # first operand → the second ones it may have


def operands_of(firsts: Iterable[int], seconds: Callable[[int], Iterable[int]], held_out: bool) -> Operands:
    """For each first operand the second ones that texts show beside it, or, with `held_out`, those they never show."""
    operands = {}
    for a in firsts:
        allowed = [b for b in seconds(a) if ((a, b) in HELD_PAIRS) == held_out]
        if allowed:
            operands[a] = allowed
    return operands


# ---- sums and comparisons ------------------------------------------------------------------------------------------


class Sum:
    """A kind of sum or comparison.

    firsts: its first operands
    seconds: the second operands that one of these may have
    result: what the operands give; None: a comparison, which has no result
    """

    def __init__(
        self,
        firsts: Iterable[int],
        seconds: Callable[[int], Iterable[int]],
        result: Callable[[int, int], int] | None,
        in_symbols: Phrase,
        in_words: Phrase,
    ):
        self.operands = {held_out: operands_of(firsts, seconds, held_out) for held_out in (False, True)}
        self.result = result
        self.in_symbols = in_symbols
        self.in_words = in_words

    def slots(self, held_out: bool = False) -> Slots:
        """All open: the operands will be chosen one after the other, and the result worked out."""
        operands = self.operands[held_out]
        slots = {
            "a": lambda draw: digits(draw.pick(list(operands))),
            "b": lambda draw: digits(draw.pick(operands[slots["a"].value])),
            "result": lambda draw: digits(self.result(slots["a"].value, slots["b"].value)),
        }
        return slots


PLUS = Sum(
    firsts=range(1, 99),
    seconds=lambda a: [b for b in OPERANDS if a + b < 100],
    result=operator.add,
    in_symbols=phrase("{a} + {b} = {result} | {a} + {b} = {result}"),
    in_words=phrase("{a}加{b}等于{result}。 | {a} plus {b} is {result}."),
)
MINUS = Sum(
    firsts=range(1, 100),
    seconds=lambda a: [b for b in OPERANDS if b <= a],
    result=operator.sub,
    in_symbols=phrase("{a} - {b} = {result} | {a} - {b} = {result}"),
    in_words=phrase("{a}减{b}等于{result}。 | {a} minus {b} is {result}."),
)
TIMES = Sum(
    firsts=range(2, 10),
    seconds=lambda a: range(2, 10),
    result=operator.mul,
    in_symbols=phrase("{a} × {b} = {result} | {a} × {b} = {result}"),
    in_words=phrase("{a}乘{b}等于{result}。 | {a} times {b} is {result}."),
)
GREATER = Sum(
    firsts=range(2, 100),
    seconds=lambda a: range(a),
    result=None,
    in_symbols=phrase("{a} > {b} | {a} > {b}"),
    in_words=phrase("{a}比{b}大。 | {a} is greater than {b}."),
)
LESS = Sum(
    firsts=range(98),
    seconds=lambda a: range(a + 1, 100),
    result=None,
    in_symbols=phrase("{a} < {b} | {a} < {b}"),
    in_words=phrase("{a}比{b}小。 | {a} is less than {b}."),
)
SUM_KINDS = Table((0.4, PLUS), (0.4, MINUS), (0.06, TIMES), (0.07, GREATER), (0.07, LESS))


def sums(draw: Draw, lang: int, in_words: bool = False) -> None:
    """Lines of sums and comparisons, in symbols or in words."""
    for i in range(draw.pick((4, 5, 6))):
        if i > 0:
            draw.say("\n")
        kind = draw.choose(SUM_KINDS)
        tell(draw, lang, kind.in_words if in_words else kind.in_symbols, kind.slots())


def spoken_sums(draw: Draw, lang: int) -> None:
    sums(draw, lang, in_words=True)


# ---- word problems -------------------------------------------------------------------------------------------------

HAS = phrase("{who}有{before}， | {who} has {before} and")
BUYS = phrase("又买了{change}。 | buys {change} more.")
EATS = phrase("吃了{change}。 | eats {change} of them.")
LOSES = phrase("丢了{change}。 | loses {change} of them.")
NOW_HAS = phrase("现在{who}有{after}。 | Now {who} has {after}.")

# How many somebody has at first, with the changes that this number may see: those of the texts, and those held out.
CHANGES = {held_out: operands_of(range(10, 60), lambda before: range(1, 10), held_out) for held_out in (False, True)}


def problem(draw: Draw, lang: int) -> Slots:
    """Say a word problem; returns the slots of its answer, `NOW_HAS`."""
    draw.new_cast()
    changes = CHANGES[draw.held_out]
    person = draw.person()
    slots = {
        "who": person,
        "before": lambda draw: amount(draw.word("thing"), draw.pick(list(changes))),
    }
    tell(draw, lang, HAS, slots)
    draw.say(GAP[lang])

    thing = slots["before"].thing
    before = slots["before"].number
    act = draw.pick((BUYS, LOSES, EATS) if thing.food else (BUYS, LOSES))
    change = draw.pick(changes[before])
    tell(draw, lang, act, {"change": (f"{change}{thing.measure}", str(change))})

    after = before + change if act is BUYS else before - change
    return {"who": person, "after": amount(thing, after)}


def problems(draw: Draw, lang: int) -> None:
    """Numbered word problems with their answers."""
    for i in range(draw.pick((2, 3))):
        if i > 0:
            draw.say("\n")
        draw.say(f"{i + 1}. ")
        answer = problem(draw, lang)
        draw.say(GAP[lang])
        tell(draw, lang, NOW_HAS, answer)
