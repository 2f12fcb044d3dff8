"""A small world that tells about itself in Chinese and English, and knows how much information each text holds.

A probabilistic grammar: every choice goes through a `Draw`, which takes one of n options and adds −log2 p to its
bits. No text can come about in two ways, so these bits are exactly −log2 p(text | world), the information that no
model can save; validation loss is drawn against their mean. What the world decides costs nothing: its fixed facts,
where things are in a story, the translation of a sentence, the result of a sum.

    from data.world.texts import documents
    for text, bits in documents(seed=0): ...

Some content is held out of every text, for the questions of questions.py: in a story or a translation a person never
meets a thing (or, in translations, a place) of the same group, and one pair of numbers in ten are never operands
together.

This file puts the corpus together; the files that tell its texts are words.py, draw.py, phrases.py, stories.py,
facts.py, translations.py and arithmetic.py, to be read in this order. Read next: questions.py.
"""

import itertools
import random
from collections.abc import Iterator

from data.world.arithmetic import problems, spoken_sums, sums
from data.world.draw import Draw, Table
from data.world.facts import person_facts, town_facts
from data.world.stories import restate, story_count, story_give, story_where
from data.world.translations import dictionary, translations
from data.world.words import EN, ZH


def text_where(draw: Draw, lang: int) -> None:
    restate(draw, lang, story_where(draw, lang))


def text_give(draw: Draw, lang: int) -> None:
    restate(draw, lang, story_give(draw, lang))


def text_count(draw: Draw, lang: int) -> None:
    restate(draw, lang, story_count(draw, lang))


# The kinds of texts in two languages, with their share of the corpus; half of it is Chinese, half is English.
TELLERS = (
    (0.16, text_where),
    (0.08, text_give),
    (0.10, text_count),
    (0.12, person_facts),
    (0.03, town_facts),
    (0.22, translations),
    (0.04, dictionary),
    (0.05, spoken_sums),
    (0.07, problems),
)
# All kinds: sums in symbols are the same in both languages, so they are told once.
KINDS = Table(
    *((share / 2, (teller, lang)) for share, teller in TELLERS for lang in (ZH, EN)),
    (0.13, (sums, ZH)),
)


def document(draw: Draw) -> str:
    """Tell one text; its information is then `draw.bits`."""
    draw.begin()
    teller, lang = draw.choose(KINDS)
    teller(draw, lang)
    return "".join(draw.said)


def documents(seed: int, start: int = 0) -> Iterator[tuple[str, float]]:
    """The endless corpus of a seed, from document number `start` on.

    Yields (text, bits): bits = −log2 of the text's probability given the world. Document i depends on (seed, i) alone.
    """
    rng = random.Random()
    draw = Draw(rng)
    for i in itertools.count(start):
        rng.seed((seed << 40) + i)
        text = document(draw)
        yield text, draw.bits
