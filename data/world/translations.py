"""Texts in both languages of the bundled world: sentences with their translations, and words with theirs.

A translation is the same phrase with the same slots, in the other language: it costs no information.

Read next: arithmetic.py.
"""

from data.world.draw import Draw, Table
from data.world.phrases import Amount, Phrase, Slots, amount, coloured, phrases, render, tell, without_number
from data.world.words import LEXICON, PAST_TIMES, SIZES

FRAMES = phrases(
    "{who}有{something}。 | {who} has {something}.",
    "{who}买了{something}。 | {who} bought {something}.",
    "{who}丢了{something}。 | {who} lost {something}.",
    "{who}想要{something}。 | {who} wants {something}.",
    "{who}没有{no_item}。 | {who} does not have {no_item}.",
    "{who}给了{other}{something}。 | {who} gave {other} {something}.",
    "{who}喜欢{other}的{item}。 | {who} likes {other}'s {item}.",
    "{who}在{place}里找到了{something}。 | {who} found {something} in the {place}.",
    "{who}在{place}里看见了{something}。 | {who} saw {something} in the {place}.",
    "{who}把{item}放在了{place}里。 | {who} put the {item} in the {place}.",
    "{time}{who}去了{place}。 | {time} {who} went to the {place}.",
    "{time}{who}在{place}里。 | {time} {who} was in the {place}.",
    "{time}{who}买了{something}。 | {time} {who} bought {something}.",
    "{who}和{other}去了{place}。 | {who} and {other} went to the {place}.",
    "{who}在{place}里等{other}。 | {who} is waiting for {other} in the {place}.",
)


# ---- what fills the slots ------------------------------------------------------------------------------------------


def counted_thing(draw: Draw) -> Amount:
    """三个苹果, three apples."""
    thing = draw.word("thing")
    return amount(thing, draw.pick(range(1, 11)), spelled=True)


def sized_food(draw: Draw) -> Amount:
    """两个大梨, two big pears."""
    food = draw.word("food")
    number = draw.pick(range(1, 6))
    return amount(food, number, spelled=True, adjective=draw.pick(SIZES))


NOUN_PHRASES = Table((0.5, counted_thing), (0.35, coloured), (0.15, sized_food))


def noun_phrase(draw: Draw) -> Amount:
    """Three apples, a red ball, or two big pears."""
    choose_words = draw.choose(NOUN_PHRASES)
    return choose_words(draw)


OPEN_SLOTS = {
    "who": Draw.person,
    "other": Draw.person,
    "something": noun_phrase,
    "coloured_item": coloured,  # in questions only
    "no_item": lambda draw: without_number(coloured(draw)),
    "item": lambda draw: draw.word("item"),
    "place": lambda draw: draw.word("place"),
    "time": lambda draw: draw.pick(PAST_TIMES),
}


# ---- the texts -----------------------------------------------------------------------------------------------------


def translated(draw: Draw, lang: int, frames: list[Phrase] = FRAMES) -> tuple[Phrase, Slots]:
    """Say a sentence in `lang`; returns its phrase and slots, which say it in the other language too."""
    draw.new_cast()
    frame = draw.pick(frames)
    slots = OPEN_SLOTS.copy()
    tell(draw, lang, frame, slots)
    return frame, slots


def translations(draw: Draw, lang: int) -> None:
    """Sentences of one language, each followed by its translation."""
    for i in range(draw.pick((2, 3, 4))):
        if i > 0:
            draw.say("\n")
        frame, slots = translated(draw, lang)
        draw.say("\n")
        draw.say(render(1 - lang, frame, slots))


def dictionary(draw: Draw, lang: int) -> None:
    """Words, each with its translation."""
    for i in range(draw.pick((5, 6, 7, 8))):
        if i > 0:
            draw.say("\n")
        word = draw.pick(LEXICON)
        draw.say(f"{word[lang]} = {word[1 - lang]}")
