"""Requests for a story: this person and thing, so many sentences, this end, this language.

A request is made from a story that the generator has told, so the story is a right answer, and what it fulfils is what
is wished. The wishes are also given as JSON, in English words whatever the language of the story:

    {"people": ["Anna"], "things": ["ball"], "sentences": 5, "language": "en",
     "ending": {"kind": "item", "thing": "ball", "place": "kitchen"}}

There are far more such stories than any run can read, and many right answers to each request. A longer one is harder,
since each sentence may contradict one before it; none is beyond a small model that has seen some.

Read next: instructions.py, where requests stand beside questions.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from data.world.draw import Draw
from data.world.phrases import (
    GAP,
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
from data.world.stories import IN_WITH, STATES, Scene, State, begin_sentence, move, named, opening, restate
from data.world.words import EN, LANGUAGES, ZH, Thing

LENGTHS = range(3, 8)  # sentences of a story that is asked for
MOVES = (1, 2, 3, 4)  # of them, those in which something happens


def story_carry(draw: Draw, lang: int) -> list[State]:
    """Somebody carries a thing about, and may leave it; returns where both are in the end."""
    opening(draw, lang)
    slots = {"who": draw.person(), "place": any_place, "something": coloured}
    tell(draw, lang, IN_WITH, slots)
    who, thing = slots["who"], slots["something"].thing
    scene = Scene({who.index: slots["place"]}, thing, who, None)
    last = None
    for _ in range(draw.pick(MOVES)):
        subject = begin_sentence(draw, lang, who, last)
        move(draw, lang, scene, who, subject)
        last = who
    here = scene.place_of[who.index]
    thing_place = here if scene.holder else scene.thing_place
    return [State("item", {"thing": thing, "place": thing_place}), State("person", {"who": who, "place": here})]


REQUESTS = phrases(
    "用{number}句话讲一个故事，里面有{who}，还有{thing}。最后{ending} | "
    "Tell a story of {number} sentences with {who}, and with {thing}. In the end {ending}",
    "讲一个关于{who}还有{thing}的故事，一共{number}句，结尾是：{ending} | "
    "Tell a story about {who} and {thing} in {number} sentences that ends like this: {ending}",
    "写一个故事。人物：{who}。东西：{thing}。长度：{number}句。结局：{ending} | "
    "Write a story. Person: {who}. Thing: {thing}. Length: {number} sentences. End: {ending}",
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
    story, thing, end = short_story(draw, story_lang)
    (who,) = draw.cast
    wishes = {
        "people": [who.en],
        "things": [thing.en],
        "sentences": len(split_sentences(story)),
        "language": LANGUAGES[story_lang],
        "ending": named(end),
    }
    slots = {
        "who": who,
        "thing": without_number(amount(thing, 1, spelled=True))[:2],  # 球, a ball
        "number": digits(wishes["sentences"]),
        "ending": tuple(render(side, STATES[end.kind], end.slots) for side in (ZH, EN)),
    }
    prompt = render(lang, draw.pick(REQUESTS), slots)
    if story_lang != lang:
        prompt += GAP[lang] + render(lang, IN_LANGUAGE[story_lang], {})
    return Request(prompt, wishes, story)


def short_story(draw: Draw, lang: int) -> tuple[str, Thing, State]:
    """A story of `LENGTHS` sentences whose end is so by what happens last, the thing in it, and its end.

    One story after the other is told until one is such.
    """
    while True:
        draw.begin()
        states = story_carry(draw, lang)
        end = restate(draw, lang, states)
        story = "".join(draw.said)
        sentences = split_sentences(story)
        without_last_act = GAP[lang].join([*sentences[:-2], sentences[-1]])
        if len(sentences) in LENGTHS and read_story(without_last_act, lang).faults:
            return story, states[0].slots["thing"], end


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
