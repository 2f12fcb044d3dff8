"""Pairs of a right and a wrong answer to one prompt, with the kind of the fault.

Rows are {"prompt", "chosen", "rejected", "kind", "family", "lang", "check"}, and for story requests "wishes" in place
of "check". The chosen answer is right and the rejected one is not, by the world's own reward (`reader.reward`, which
reads these very rows), so a learned reward can be compared with the true one. The prompts are such as a model knows
the answer to after instruction tuning; half of them are story requests.

    wrong_value      one word or number is another one
    contradiction    a sentence of the story contradicts an earlier one, or the end is not so
    wrong_wish       a story without contradiction that misses a wish: end, length, somebody or something
    garbled          a word is missing, or said twice
    other_language   the right answer, in the other language
    other_question   the right answer to another question of the family
    rambling         goes on after the right answer
    cut_short        ends too early

In 12 of 25 rows the wrong answer is to have more characters than the right one, in the others fewer. (A few have as
many, where no fault of the kind has another length, and these would else have fewer.) So whoever takes the longer
answer is right in half of the rows.

Read next: data/bundled.py, which writes them.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.world.draw import Draw, Table
from data.world.instructions import prompt_of
from data.world.phrases import GAP, split_sentences
from data.world.questions import ASK
from data.world.reader import UNREADABLE, read_story, reward_of
from data.world.requests import request, story_carry
from data.world.stories import restate
from data.world.swaps import another_value, other_word_of, units
from data.world.words import ACTORS, EN, LANGUAGES, THINGS, ZH, Person, Thing

LONGER = range(1, 25, 2)  # of 25 rows, those whose wrong answer has more characters; fewer are found less often
TRIES = 8  # at a fault of the wished length, before another prompt is drawn


class Case(NamedTuple):
    """A prompt with its right answer.

    lang: of the answer. translated: the answer in the other language. row: what `reader.reward` needs, and the family
    """

    prompt: str
    answer: str
    lang: int
    translated: str
    row: dict


# ---- prompts -------------------------------------------------------------------------------------------------------

FAMILIES = Table((0.5, "request"), (0.3, "translate"), (0.2, "rewrite"))


def case(draw: Draw, family: str) -> Case:
    """A prompt of a family. It is told twice, by the same random numbers: once in each language."""
    lang = draw.pick((ZH, EN))
    seed = draw.pick(range(1 << 32))
    ask = case_of_request if family == "request" else case_of_question
    return ask(lang, lambda: Draw(random.Random(seed), draw.held_out), family)


def case_of_request(lang: int, new_draw: Callable[[], Draw], family: str) -> Case:
    asked = request(new_draw(), lang)
    other = request(new_draw(), 1 - lang)
    story_lang = LANGUAGES.index(asked.wishes["language"])
    return Case(asked.prompt, asked.story, story_lang, other.story, {"wishes": asked.wishes, "family": family})


def case_of_question(lang: int, new_draw: Callable[[], Draw], family: str) -> Case:
    question, other = ASK[family](new_draw(), lang), ASK[family](new_draw(), 1 - lang)
    answer_lang = ZH if re.search("[一-鿿]", question.answer) else EN
    translated = question.context if family == "translate" else other.answer
    row = {"check": question.check, "family": family}
    return Case(prompt_of(question), question.answer, answer_lang, translated, row)


# ---- faults: a wrong answer, or None where there is none of the kind -----------------------------------------------


def wrong_value(draw: Draw, right: Case, longer: bool) -> str | None:
    return another_value(draw, right.answer, right.lang)


def contradiction(draw: Draw, right: Case, longer: bool) -> str | None:
    """Another story that claims the wished end, or the right one with a word of it in another's place."""
    if draw.pick((True, False)):
        sentences = split_sentences(retold(draw, right))
        story = GAP[right.lang].join([*sentences[:-1], split_sentences(right.answer)[-1]])
    else:
        story = other_word_of(draw, right.answer, right.lang)
    faults = read_story(story, right.lang).faults.values() if story else ()
    return story if faults and UNREADABLE not in faults else None


def wrong_wish(draw: Draw, right: Case, longer: bool) -> str | None:
    """Another story about the same, or nearly."""
    story = retold(draw, right, recast=draw.pick((True, False, False)))
    return None if read_story(story, right.lang).faults else story


def garbled(draw: Draw, right: Case, longer: bool) -> str | None:
    """A word is said twice, or left out."""
    words = units(right.answer, right.lang)
    i = draw.pick(range(len(words)))
    return "".join([*words[: i + 1], *words[i:]] if longer else [*words[:i], *words[i + 1 :]]).strip()


def other_language(draw: Draw, right: Case, longer: bool) -> str | None:
    return right.translated


def other_question(draw: Draw, right: Case, longer: bool) -> str | None:
    other = case(draw, right.row["family"])
    return other.answer if other.lang == right.lang else other.translated


def rambling(draw: Draw, right: Case, longer: bool) -> str | None:
    """After the answer comes its last sentence once more, or a sentence of another answer."""
    if draw.pick((True, False)):
        more = split_sentences(right.answer)[-1]
    else:
        more = draw.pick(split_sentences(other_question(draw, right, longer)))
    return right.answer + GAP[right.lang] + more


def cut_short(draw: Draw, right: Case, longer: bool) -> str | None:
    """The last words are missing, or the last sentences of a story."""
    sentences = split_sentences(right.answer)
    if len(sentences) > 1 and draw.pick((True, False)):
        return GAP[right.lang].join(sentences[: draw.pick(range(1, len(sentences)))])
    words = units(right.answer, right.lang)
    if words[-1] == "。":  # more is to be missing than the full stop
        words.pop()
    if len(words) < 2:
        return None
    return "".join(words[: draw.pick(range((len(words) + 2) // 3, len(words)))]).strip()


class Retelling(Draw):
    """Tells a story of a given person and thing."""

    def __init__(self, rng: random.Random, who: Person, thing: Thing):
        super().__init__(rng)
        self.given = {"person": who, "item": thing}

    def _candidates(self, kind: str, met: frozenset[int]) -> list:
        return [self.given[kind]] if kind in self.given else super()._candidates(kind, met)


PERSON = {person.en: person for person in ACTORS}
ITEM = {thing.en: thing for thing in THINGS if not thing.food}


def retold(draw: Draw, right: Case, recast: bool = False) -> str:
    """Another story of the person and the thing that are wished, with its own course and end.

    recast: one of them is exchanged for another
    """
    (who,), (thing,) = right.row["wishes"]["people"], right.row["wishes"]["things"]
    cast = [PERSON[who], ITEM[thing]]
    if recast:
        i = draw.pick((0, 1))
        others = (PERSON, ITEM)[i].values()
        cast[i] = draw.pick([one for one in others if one is not cast[i]])
    retelling = Retelling(draw.rng, *cast)
    states = story_carry(retelling, right.lang)
    restate(retelling, right.lang, states)
    return "".join(retelling.said)


# ---- rows ----------------------------------------------------------------------------------------------------------

# The kinds of faults; None: `rambling` where the wrong answer is to be longer, else `cut_short`.
STORY_FAULTS = Table(
    (0.34, contradiction),
    (0.28, wrong_wish),
    (0.12, garbled),
    (0.05, other_language),
    (0.07, other_question),
    (0.14, None),
)
ANSWER_FAULTS = Table(
    (0.40, wrong_value),
    (0.12, garbled),
    (0.12, other_language),
    (0.14, other_question),
    (0.22, None),
)


def preferences(seed: int, split: str) -> Iterator[dict]:
    """The endless pairs of a seed, as rows; `split`: "train" or "heldout". Row i depends on (seed, split, i) alone."""
    rng = random.Random()
    draw = Draw(rng, held_out=split == "heldout")
    for i in itertools.count():
        rng.seed(f"preference {seed} {split} {i}")
        draw.begin()
        yield pair(draw, longer=i % 25 in LONGER)


def pair(draw: Draw, longer: bool) -> dict:
    """A row; longer: whether the wrong answer has more characters than the right one."""
    family = draw.choose(FAMILIES)
    fault = draw.choose(STORY_FAULTS if family == "request" else ANSWER_FAULTS)
    fault = fault or (rambling if longer else cut_short)
    while True:
        right = case(draw, family)
        wrong = rejected(draw, right, fault, longer)
        if wrong is not None:
            break
    return {
        "prompt": right.prompt,
        "chosen": right.answer,
        "rejected": wrong,
        "kind": fault.__name__,
        "lang": LANGUAGES[right.lang],
        **right.row,
    }


def rejected(draw: Draw, right: Case, fault: Callable, longer: bool) -> str | None:
    """A wrong answer of the wished length; after `TRIES` one that is as long as the right one, if there was one."""
    equally_long = None
    for _ in range(TRIES):
        wrong = fault(draw, right, longer)
        if not wrong or reward_of(wrong, {**right.row, "chosen": right.answer}) == 1:
            continue
        if (len(wrong) > len(right.answer)) == longer and len(wrong) != len(right.answer):
            return wrong
        if len(wrong) == len(right.answer):
            equally_long = wrong
    return equally_long
