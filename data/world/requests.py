"""Requests for a story: these people and things, so many sentences, this end, this language.

A request is made from a story that the generator has told, so the story is a right answer, and what it fulfils is what
is wished. The wishes are also given as JSON, in English words whatever the language of the story:

    {"people": ["Anna", "Peter"], "things": ["ball"], "sentences": 5, "language": "en",
     "ending": {"kind": "item", "thing": "ball", "place": "kitchen"}}

There are far more such stories than any run can read, and many right answers to each request.

Read next: instructions.py, where requests stand beside questions.
"""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from data.world.draw import Draw, Table
from data.world.phrases import (
    GAP,
    Pair,
    amount,
    any_place,
    coloured,
    digits,
    phrase,
    phrases,
    render,
    split_sentences,
    tell,
    without_number,
)
from data.world.reader import read_story
from data.world.stories import (
    IN_WITH,
    STATES,
    Scene,
    State,
    begin_sentence,
    move,
    named,
    opening,
    restate,
    story_count,
    story_give,
    story_where,
)
from data.world.words import EN, LANGUAGES, ZH, Thing

LENGTHS = range(3, 6)  # sentences of a story that is asked for


def story_carry(draw: Draw, lang: int) -> list[State]:
    """Somebody carries a thing about, and may leave it; returns where both are in the end."""
    opening(draw, lang)
    slots = {"who": draw.person(), "place": any_place, "something": coloured}
    tell(draw, lang, IN_WITH, slots)
    who, thing = slots["who"], slots["something"].thing
    scene = Scene({who.index: slots["place"]}, thing, who, None)
    last = None
    for _ in range(draw.pick((1, 2))):
        subject = begin_sentence(draw, lang, who, last)
        move(draw, lang, scene, who, subject)
        last = who
    here = scene.place_of[who.index]
    thing_place = here if scene.holder else scene.thing_place
    return [State("item", {"thing": thing, "place": thing_place}), State("person", {"who": who, "place": here})]


# Most are easy to tell, so that a small model fulfils some; a fifth of them are as hard as those of the corpus.
STORIES = Table(
    (0.5, story_carry),
    (0.3, story_give),
    (0.1, partial(story_where, moves=(1, 2))),
    (0.1, story_count),
)

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
    """A request in language `lang` for a story; one in ten wants it in the other language."""
    story_lang = draw.pick((lang,) * 9 + (1 - lang,))
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
    """A story of at most two people and of `LENGTHS` sentences, whose end is so by what happens last.

    One story after the other is told until one is such.
    """
    while True:
        draw.begin()
        tell_story = draw.choose(STORIES)
        states = tell_story(draw, lang)
        told = restate(draw, lang, states)
        story = "".join(draw.said)
        sentences = split_sentences(story)
        if len(draw.cast) > 2 or len(sentences) not in LENGTHS:
            continue
        without_last_act = GAP[lang].join([*sentences[:-2], sentences[-1]])
        if read_story(without_last_act, lang).faults:
            return story, End(states, told)


def things_of(states: list[State]) -> list[Thing]:
    """The things that a story has decided something about, each once."""
    things = []
    for _, slots in states:
        thing = slots["amount"].thing if "amount" in slots else slots.get("thing")
        if thing and thing not in things:
            things.append(thing)
    return things


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
