"""Phrases in two languages, and how a draw tells them.

A phrase is written once for both languages, "Chinese | English", with {slots}:

    IN = phrase("{who}在{place}里。 | {who} was in the {place}.")

It is told from left to right in one of the languages. A slot holds a (Chinese, English) pair: a word, or a noun
phrase such as `Amount`. Or it is still open and holds a function of the draw, which is called when the slot is
reached, so that every choice is made just before it is heard:

    slots = {"who": Draw.person, "place": any_place}
    tell(draw, EN, IN, slots)                           # says "Anna was in the park."
    render(ZH, IN, slots)                               # returns "安娜在公园里。"

Since `tell` puts the choice in the slot's place, the slots then know what has been said, and the same in the other
language costs no information.

Read next: stories.py, where such sentences make a story.
"""

import re
from typing import NamedTuple

from data.world.draw import Draw
from data.world.words import COLOURS, EN, NUMBERS, PLACES, ZH, Thing, Word

Pair = tuple[str, str]  # the same in Chinese and English
Slots = dict[str, object]  # slot → a pair, or a function of the draw that chooses one
GAP = ("", " ")  # between two sentences


class Piece(NamedTuple):
    """A stretch of a phrase: letters that are always said, and the slot that follows them (None: the phrase ends)."""

    letters: str
    slot: str | None


class Phrase(NamedTuple):
    """A sentence in both languages, in pieces."""

    zh: list[Piece]
    en: list[Piece]


def phrase(line: str) -> Phrase:
    """Read a line "Chinese | English"."""
    zh, en = line.split(" | ")
    return Phrase(_pieces(zh), _pieces(en))


def phrases(*lines: str) -> list[Phrase]:
    """Several wordings of the same, or a list of sentences."""
    return [phrase(line) for line in lines]


def _pieces(side: str) -> list[Piece]:
    pieces = []
    start = 0
    for match in re.finditer(r"\{(\w+)\}", side):
        pieces.append(Piece(side[start : match.start()], match[1]))
        start = match.end()
    pieces.append(Piece(side[start:], None))
    return pieces


def tell(draw: Draw, lang: int, wording: Phrase, slots: Slots) -> None:
    """Say a phrase, and settle its open slots on the way."""
    for letters, slot in wording[lang]:
        draw.say(letters)
        if slot is None:
            continue
        if callable(slots[slot]):
            slots[slot] = slots[slot](draw)
        draw.say(slots[slot][lang])


def render(lang: int, wording: Phrase, slots: Slots) -> str:
    """A phrase as text; all of its slots are settled."""
    text = ""
    for letters, slot in wording[lang]:
        text += letters
        if slot is not None:
            text += slots[slot][lang]
    return text


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in either language, with their full stops; a last one may lack it."""
    return [sentence for sentence in re.split(r"(?<=。)|(?<=\.) ", text.strip()) if sentence]


# ---- what slots hold -----------------------------------------------------------------------------------------------


class Amount(NamedTuple):
    """Some number of a thing as a noun phrase: 3个苹果, 3 apples."""

    zh: str
    en: str
    thing: Thing
    number: int
    adjective: Pair


NO_ADJECTIVE = ("", "")


def amount(thing: Thing, number: int, *, spelled: bool = False, adjective: Pair = NO_ADJECTIVE) -> Amount:
    """A noun phrase in both languages: 3个苹果, 3 apples; spelled out 三个苹果, three apples, 一个苹果, an apple."""
    noun_en = thing.en if number == 1 else thing.plural
    if adjective[EN]:
        noun_en = f"{adjective[EN]} {noun_en}"

    number_zh = number_en = str(number)
    if spelled:
        number_zh = NUMBERS[number - 1].zh
        number_en = NUMBERS[number - 1].en
        if number == 1:
            number_en = "an" if noun_en[0] in "aeiou" else "a"

    zh = f"{number_zh}{thing.measure}{adjective[ZH]}{thing.zh}"
    en = f"{number_en} {noun_en}"
    return Amount(zh, en, thing, number, adjective)


def without_number(one: Amount) -> Amount:
    """一个红色的球 → 红色的球, without the number and the measure word; English keeps its article."""
    return one._replace(zh=one.zh[2:])


def colour_adjective(colour: Word) -> Pair:
    """红色, red → 红色的, red."""
    return colour.zh + "的", colour.en


def coloured(draw: Draw, other_than: Thing | None = None) -> Amount:
    """One item of some colour: 一个红色的球, a red ball."""
    item = draw.word("item", other_than)
    colour = draw.pick(COLOURS)
    return amount(item, 1, spelled=True, adjective=colour_adjective(colour))


def any_place(draw: Draw) -> Word:
    """Some place, whoever is there."""
    return draw.pick(PLACES)


class Number(NamedTuple):
    """A number in digits, which are the same in both languages."""

    zh: str
    en: str
    value: int


def digits(value: int) -> Number:
    return Number(str(value), str(value), value)
