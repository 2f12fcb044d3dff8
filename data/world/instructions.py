"""The instructions of the bundled world as rows: questions, story requests, and conversations with a follow-up.

A row is {"instruction", "input", "output", "family", "lang", "check"}, or, of two turns, {"messages", "family", "lang",
"check"}: the second question cannot be answered without the first. `check` says how the last answer is compared:
"exact", or "number" (the last number in it). Held-out rows differ in content, see questions.py. Story requests have
many right answers; they are in the training split alone, and rows of their own (`requests.requests`) are held out.

Read next: data/bundled.py, which writes texts and rows into a folder.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from data.world.arithmetic import MINUS, PLUS, Sum
from data.world.draw import Draw, Table
from data.world.facts import FACTS
from data.world.phrases import (
    amount,
    colour_adjective,
    digits,
    phrase,
    phrases,
    render,
    without_number,
)
from data.world.questions import (
    ASK,
    ASKED_FACTS,
    FACT_QUESTIONS,
    OWNS,
    OWNS_NOT,
    STORY_ANSWERS,
    STORY_QUESTIONS,
    SUM_QUESTIONS,
    TRANSLATE,
    Question,
    ask_how_many,
)
from data.world.requests import request
from data.world.stories import story_count, story_give, story_where
from data.world.translations import translated
from data.world.words import COLOURS, EN, LANGUAGES, ZH, Person

SPLITS = ("train", "heldout")


class Turns(NamedTuple):
    """A question with its answer, and a second question about it."""

    first: Question
    second: Question


# ---- follow-ups ----------------------------------------------------------------------------------------------------

NOW_NEGATE = phrases(
    "改成否定句呢？ | And in the negative?",
    "它的否定句是什么？ | What is the negative of that?",
)
NOW_COLOUR = phrases(
    "颜色换成{colour}呢？ | And if the colour is {colour}?",
    "请把它的颜色换成{colour}。 | Now change its colour to {colour}.",
)


def follow_translation(draw: Draw, lang: int) -> Turns:
    """Translate a sentence; and in the negative, or with another colour?"""
    source = draw.pick((ZH, EN))
    target = 1 - source
    _, slots = translated(draw, source, [OWNS])
    item = slots["coloured_item"]
    task = render(lang, draw.pick(TRANSLATE[target]), {})
    first = Question(task, render(source, OWNS, slots), render(target, OWNS, slots))

    if draw.pick((True, False)):
        slots["no_item"] = without_number(item)
        return Turns(first, Question(render(lang, draw.pick(NOW_NEGATE), {}), "", render(target, OWNS_NOT, slots)))
    colour = draw.pick([colour for colour in COLOURS if colour_adjective(colour) != item.adjective])
    slots["coloured_item"] = amount(item.thing, 1, spelled=True, adjective=colour_adjective(colour))
    task = render(lang, draw.pick(NOW_COLOUR), {"colour": colour})
    return Turns(first, Question(task, "", render(target, OWNS, slots)))


AND_WHERE = {
    "item": phrase("{thing}呢？ | And where is the {thing}?"),
    "person": phrase("{who}呢？ | And where is {who}?"),
    "holder": phrase("{thing}呢？ | And who has the {thing}?"),
    "count": phrase("{who}呢？ | And {who}?"),
}


def follow_story(draw: Draw, lang: int) -> Turns:
    """Where, who or how many, at the end of a story? And of somebody or something else?"""
    story = draw.pick((story_where, story_give, story_count))
    states = story(draw, lang)
    context = "".join(draw.said)
    first = draw.pick(states)
    second = draw.pick([state for state in states if state is not first])
    kind, slots = first
    check = "number" if kind == "count" else "exact"
    if kind == "count":
        asked = ask_how_many(draw, lang, slots["who"], slots["amount"])
    else:
        asked = render(lang, draw.pick(STORY_QUESTIONS[kind]), slots)
    answers = [render(lang, STORY_ANSWERS[state.kind], state.slots) for state in (first, second)]
    asked_next = render(lang, AND_WHERE[second.kind], second.slots)
    return Turns(Question(asked, context, answers[0], check), Question(asked_next, "", answers[1], check))


MORE = phrases("再加{b}等于多少？ | And plus {b}?", "给它加上{b}。 | Add {b} to that.")
LESS = phrases("再减{b}等于多少？ | And minus {b}?", "从中减去{b}。 | Take {b} from that.")
NEXT_SUMS = ((PLUS, MORE), (MINUS, LESS))


def follow_sum(draw: Draw, lang: int) -> Turns:
    """A sum or difference, and one more step from its result."""
    kind, (next_kind, wordings) = draw.pick((PLUS, MINUS)), draw.pick(NEXT_SUMS)
    seconds = next_kind.operands[draw.held_out]
    a, b, result = sum_before(draw, kind, seconds)
    task = render(lang, draw.pick(SUM_QUESTIONS[kind]), {"a": digits(a), "b": digits(b)})
    first = Question(task, "", str(result), "number")
    change = draw.pick(seconds[result])
    task = render(lang, draw.pick(wordings), {"b": digits(change)})
    return Turns(first, Question(task, "", str(next_kind.result(result, change)), "number"))


def sum_before(draw: Draw, kind: Sum, results: dict) -> tuple[int, int, int]:
    """Operands of a sum, and their result, which is one of `results`."""
    operands = kind.operands[draw.held_out]
    while True:
        a = draw.pick(list(operands))
        b = draw.pick(operands[a])
        if kind.result(a, b) in results:
            return a, b, kind.result(a, b)


def follow_fact(draw: Draw, lang: int) -> Turns:
    """A fact about somebody, and another one about them, asked by a pronoun. Held out is the second one alone."""
    subject, other_key = draw.pick(FOLLOWED_FACTS[draw.held_out])
    key = draw.pick([key for key in AND_FACT if (subject.en, key) in FIRST_FACTS and key != other_key])
    first = render(lang, draw.pick(FACT_QUESTIONS[key]), {"who": subject})
    second = render(lang, AND_FACT[other_key], {"who": subject.pronoun, "whose": POSSESSIVE[subject.pronoun]})
    answers = [render(lang, FACTS[k][0], {"who": subject, "what": subject.facts[k]}) for k in (key, other_key)]
    return Turns(Question(first, "", answers[0]), Question(second, "", answers[1]))


POSSESSIVE = {("他", "he"): ("他的", "his"), ("她", "she"): ("她的", "her")}
AND_FACT = {
    "home": phrase("{who}住在哪里？ | And where does {who} live?"),
    "job": phrase("{whose}职业是什么？ | And what is {whose} job?"),
    "pet": phrase("{whose}宠物是什么？ | And what is {whose} pet?"),
    "food": phrase("{who}最喜欢吃什么？ | And what is {whose} favourite food?"),
    "hobby": phrase("{whose}爱好是什么？ | And what is {whose} hobby?"),
    "month": phrase("{whose}生日在几月？ | And in which month is {whose} birthday?"),
    "colour": phrase("{who}最喜欢什么颜色？ | And what is {whose} favourite colour?"),
}
FOLLOWED_FACTS = {
    held_out: [(subject, key) for subject, key in facts if isinstance(subject, Person)]
    for held_out, facts in ASKED_FACTS.items()
}
FIRST_FACTS = {(subject.en, key) for subject, key in FOLLOWED_FACTS[False]}
FOLLOW = (follow_translation, follow_story, follow_sum, follow_fact)


# ---- rows ----------------------------------------------------------------------------------------------------------

FAMILIES = (*ASK, "follow_up", "request")
HELD_OUT_FAMILIES = (*ASK, "follow_up")
TRAIN_SHARES = Table(
    (0.237, "story"),
    (0.237, "translate"),
    (0.1738, "arithmetic"),
    (0.0474, "facts"),
    (0.0395, "rewrite"),
    (0.0237, "count"),
    (0.0316, "compare"),
    (0.04, "follow_up"),
    (0.17, "request"),
)


def instructions(seed: int, split: str) -> Iterator[dict]:
    """The endless instructions of a seed: `split` "train", or "heldout" with every family equally often.

    Row i depends on (seed, split, i) alone. A row may come again: whoever writes a file leaves out repetitions.
    """
    held_out = split == "heldout"
    rng = random.Random()
    draw = Draw(rng, held_out)
    for i in itertools.count():
        rng.seed(((2 * seed + held_out) << 40) + i)
        draw.begin()
        family = HELD_OUT_FAMILIES[i % len(HELD_OUT_FAMILIES)] if held_out else draw.choose(TRAIN_SHARES)
        lang = draw.pick((ZH, EN))
        yield row_of(draw, lang, family)


def row_of(draw: Draw, lang: int, family: str) -> dict:
    """A row of a family."""
    if family == "follow_up":
        turns = draw.pick(FOLLOW)(draw, lang)
        return {"messages": messages(turns), "family": family, "lang": LANGUAGES[lang], "check": turns.second.check}
    if family == "request":
        asked = request(draw, lang)
        question = Question(asked.prompt, "", asked.story)
    else:
        question = ASK[family](draw, lang)
    return {
        "instruction": question.instruction,
        "input": question.context,
        "output": question.answer,
        "family": family,
        "lang": LANGUAGES[lang],
        "check": question.check,
    }


def prompt_of(question: Question) -> str:
    """A question with the text it is about, as one message."""
    return f"{question.instruction}\n{question.context}" if question.context else question.instruction


def messages(turns: Turns) -> list[dict[str, str]]:
    """A conversation of two turns."""
    said = []
    for question in turns:
        said.append({"role": "user", "content": prompt_of(question)})
        said.append({"role": "assistant", "content": question.answer})
    return said
