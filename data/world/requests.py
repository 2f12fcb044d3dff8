"""Requests for a story: these people and things, so many sentences, this end, this language.

A request is made from a story that the generator has told, so the story is a right answer, and what it fulfils is what
is wished. The wishes are also given as JSON, in English words whatever the language of the story:

    {"people": ["Anna", "Peter"], "things": ["ball"], "sentences": 5, "language": "en",
     "ending": {"kind": "item", "thing": "ball", "place": "kitchen"}}

There are far more such stories than any run can read, and many right answers to each request.

Read next: instructions.py, where requests stand beside questions; reader.py, which says what a story fulfils.
"""

import itertools
import random
import re
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from data.world.draw import Draw
from data.world.phrases import GAP, Pair, amount, digits, phrase, phrases, render, without_number
from data.world.stories import STATES, State, restate, story_count, story_give, story_where
from data.world.words import EN, ZH, Thing

LANGUAGES = ("zh", "en")  # as rows name them
LENGTHS = range(3, 7)  # sentences of a story that is asked for
STORIES = (partial(story_where, moves=(1, 2)), story_give, story_count)

REQUESTS = phrases(
    "用{number}句话讲一个故事，里面有{people}，还有{things}。最后{ending} | "
    "Tell a story of {number} sentences with {people}, and with {things}. In the end {ending}",
    "讲一个关于{people}还有{things}的故事，一共{number}句，结尾是：{ending} | "
    "Tell a story about {people} and {things} in {number} sentences that ends like this: {ending}",
    "写一个故事。人物：{people}。东西：{things}。长度：{number}句。结局：{ending} | "
    "Write a story. People: {people}. Things: {things}. Length: {number} sentences. End: {ending}",
)
# Said where the story is wished in the other language, by that language.
IN_LANGUAGE = (phrase("用中文写。 | Write it in Chinese."), phrase("用英文写。 | Write it in English."))


class Request(NamedTuple):
    """What is asked, what is wished by it, and a story that fulfils it."""

    prompt: str
    wishes: dict
    story: str


def request(draw: Draw, lang: int) -> Request:
    """A request in language `lang` for a story; one in six wants it in the other language."""
    story_lang = draw.pick((lang,) * 5 + (1 - lang,))
    story, end = short_story(draw, story_lang)
    things = things_of(end.states)
    wishes = {
        "people": [person.en for person in draw.cast],
        "things": [thing.en for thing in things],
        "sentences": len(split_sentences(story)),
        "language": LANGUAGES[story_lang],
        "ending": named(end.told),
    }

    # the words of the request
    counted = end.told.kind == "count"
    slots = {
        "people": listed(draw.cast),
        "things": listed([some(thing, counted) for thing in things]),
        "number": digits(wishes["sentences"]),
        "ending": tuple(render(side, STATES[end.told.kind], end.told.slots) for side in (ZH, EN)),
    }
    prompt = render(lang, draw.pick(REQUESTS), slots)
    if story_lang != lang:
        prompt += GAP[lang] + render(lang, IN_LANGUAGE[story_lang], {})
    return Request(prompt, wishes, story)


class End(NamedTuple):
    """What a story has decided, and which of it is told in its last sentence."""

    states: list[State]
    told: State


def short_story(draw: Draw, lang: int) -> tuple[str, End]:
    """A story of `LENGTHS` sentences: one after the other is told until one has this length."""
    while True:
        draw.begin()
        tell_story = draw.pick(STORIES)
        states = tell_story(draw, lang)
        told = restate(draw, lang, states)
        story = "".join(draw.said)
        if len(split_sentences(story)) in LENGTHS:
            return story, End(states, told)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in either language, with their full stops; a last one may lack it."""
    return [sentence for sentence in re.split(r"(?<=。)|(?<=\.) ", text.strip()) if sentence]


def things_of(states: list[State]) -> list[Thing]:
    """The things that a story has decided something about, each once."""
    things = []
    for _, slots in states:
        thing = slots["amount"].thing if "amount" in slots else slots.get("thing")
        if thing and thing not in things:
            things.append(thing)
    return things


def named(state: State) -> dict[str, str | int]:
    """A state as JSON: its kind, and the English names of what it is about."""
    names: dict[str, str | int] = {"kind": state.kind}
    for slot, value in state.slots.items():
        if slot == "amount":
            names |= {"thing": value.thing.en, "number": value.number}
        else:
            names[slot] = value.en
    return names


def some(thing: Thing, counted: bool) -> Pair:
    """球, a ball, or, in a story that counts, 苹果, apples."""
    if counted:
        return thing.zh, thing.plural
    return without_number(amount(thing, 1, spelled=True))[:2]


def listed(pairs: list[Pair]) -> Pair:
    """安娜、彼得和玛丽; Anna, Peter and Mary."""
    sides = []
    for lang, comma, conjunction in ((ZH, "、", "和"), (EN, ", ", " and ")):
        words = [pair[lang] for pair in pairs]
        before_last = comma.join(words[:-1])
        sides.append(before_last + conjunction + words[-1] if before_last else words[-1])
    return sides[0], sides[1]


def requests(seed: int, split: str) -> Iterator[dict]:
    """The endless requests of a seed, as rows; `split`: "train" or "heldout".

    Rows are {"prompt", "wishes", "family", "lang"}; lang is that of the story. Row i depends on (seed, split, i) alone,
    and differs from those of `instructions` in its random numbers.
    """
    held_out = split == "heldout"
    rng = random.Random()
    draw = Draw(rng, held_out)
    for i in itertools.count():
        rng.seed(f"request {seed} {split} {i}")
        asked = request(draw, draw.pick((ZH, EN)))
        yield {
            "prompt": asked.prompt,
            "wishes": asked.wishes,
            "family": "request",
            "lang": asked.wishes["language"],
        }
