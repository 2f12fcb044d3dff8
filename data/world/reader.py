"""Reads a story of the bundled world, and says which wishes it meets: the exact reward of an answer.

The patterns are made from the phrases that the generator tells with (stories.py), and what is read must be, letter by
letter, what the generator would say. Sentence by sentence a `Scene` is kept: who is where, who has what, how many. A
sentence that does not fit the scene is a contradiction.

    score(wishes, story) = share of sound sentences × share of wishes met

in [0, 1], and 1 exactly if every sentence can be read and fits, and every wish is met. More sentences than wished lower
the first factor, so does a language that was not asked for, and an empty answer has score 0.

    from data.world.reader import examine, reward
    examine(wishes, story).unmet                  # ["sentence 3: Peter takes the ball, which he does not have", …]
    reward(prompts, answers, rows)                # one number each; a row has "wishes", or "answer" and "check"

Read next: requests.py, how stories are asked for.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from data.world.phrases import (
    GAP,
    Amount,
    Phrase,
    Slots,
    amount,
    colour_adjective,
    digits,
    render,
    split_sentences,
)
from data.world.scene import ACTS, INTRODUCTIONS, Contradiction, Scene, check
from data.world.stories import CONNECTORS, ENDINGS, IT_WAS, ON_DAY, STATES, State, named
from data.world.words import COLOURS, DAYS, EN, HOURS, LANGUAGES, PEOPLE, PLACES, THINGS, WEATHERS, ZH, Person, Thing
from minillm.base.errors import UserError
from minillm.datasets.questions import is_right

# ---- words and noun phrases ----------------------------------------------------------------------------------------

# By language: form → the pair. Whom it means is settled by the scene.
HIM, HER = ("他", "he"), ("她", "she")
PRONOUNS = (
    {"他": HIM, "她": HER},
    {"he": HIM, "she": HER, "He": HIM, "She": HER},
)


def forms_of(lang: int) -> dict[str, dict]:
    """What each slot of one word may hold."""
    people = {person[lang]: person for person in PEOPLE}
    places = {place[lang]: place for place in PLACES}
    things = {thing[lang]: thing for thing in THINGS}
    return {
        "who": people,
        "subject": people | PRONOUNS[lang],
        "other": people,
        "place": places,
        "here": places,
        "thing": things,
        "noun": things | {(thing.zh, thing.plural)[lang]: thing for thing in THINGS},
        "weather": {weather[lang]: weather for weather in WEATHERS},
        "hour": {hour[lang]: hour for hour in HOURS},
        "day": {day[lang]: day for day in DAYS},
    }


FORMS = (forms_of(ZH), forms_of(EN))
COLOURED = tuple(
    {
        one[lang]: one
        for thing in THINGS
        for colour in COLOURS
        for one in [amount(thing, 1, spelled=True, adjective=colour_adjective(colour))]
    }
    for lang in (ZH, EN)
)
MEASURED = {thing.measure + thing.zh: thing for thing in THINGS}
TIMES = ("weather", "hour", "day")
NOUN_PHRASES = ("something", "something_else", "amount")


def read_amount(text: str, lang: int) -> Amount | None:
    """3个苹果, 3 apples, or 一个红色的球, a red ball; None if it is neither."""
    if text in COLOURED[lang]:
        return COLOURED[lang][text]
    counted = re.fullmatch(r"([1-9]\d{0,3}) ?(.+)", text)
    if counted is None:
        return None
    nouns = MEASURED if lang == ZH else FORMS[EN]["noun"]
    thing = nouns.get(counted[2])
    return amount(thing, int(counted[1])) if thing else None


# ---- patterns ------------------------------------------------------------------------------------------------------


def pattern_of(wording: Phrase, lang: int, part: str) -> str:
    """A regular expression for a phrase, with a named group for each slot. Only an act is told of a pronoun."""
    expression = ""
    for letters, slot in wording[lang]:
        expression += re.escape(letters)
        if slot is None:
            continue
        if slot in NOUN_PHRASES:
            inside = "[^，。,.]+"
        elif slot == "number":
            inside = r"[1-9]\d{0,3}"
        else:
            forms = FORMS[lang]["subject" if slot == "who" and part == "act" else slot]
            inside = "|".join(sorted(map(re.escape, forms), key=len, reverse=True))
        expression += f"(?P<{slot}>{inside})"
    return expression


def any_beginning(beginnings: list[tuple[str, str]], lang: int) -> str:
    return "|".join(re.escape(pair[lang]) for pair in beginnings)


class Pattern(NamedTuple):
    """How a kind of sentence is read.

    part: "opening", "introduction", "act" or "ending"
    tell: what the sentence does to a scene; None for an opening. Of an ending: the kind of its state
    """

    part: str
    expression: re.Pattern
    wording: Phrase
    tell: Callable | str | None


def patterns_of(lang: int) -> list[Pattern]:
    day = pattern_of(ON_DAY, lang, "opening") + re.escape(GAP[lang])
    connector = any_beginning(CONNECTORS.options, lang)
    ending = any_beginning(ENDINGS.options, lang)
    kinds = [
        ("opening", "", [(IT_WAS, None)]),
        ("introduction", f"(?P<begin>{day})?", INTRODUCTIONS),
        ("act", f"(?P<begin>{connector})", ACTS),
        ("ending", f"(?P<begin>{ending})", [(wording, kind) for kind, wording in STATES.items()]),
    ]
    return [
        Pattern(part, re.compile(begin + pattern_of(wording, lang, part)), wording, tell)
        for part, begin, told in kinds
        for wording, tell in told
    ]


PATTERNS = (patterns_of(ZH), patterns_of(EN))


class Sentence(NamedTuple):
    """A sentence as read: its pattern, what it begins with ("": nothing), and the words in its slots."""

    pattern: Pattern
    begin: str
    slots: Slots


@lru_cache(maxsize=1 << 16)
def read_sentence(text: str, lang: int) -> Sentence | None:
    """A sentence with its full stop; None if the generator does not speak so."""
    for pattern in PATTERNS[lang]:
        match = pattern.expression.fullmatch(text)
        if match is None:
            continue
        groups = match.groupdict()
        begin = groups.pop("begin", None) or ""
        if pattern.part == "opening":
            return Sentence(pattern, begin, {})
        slots = read_slots(groups, lang)
        # a wrong article, plural or measure word, or a small first letter, shows when the sentence is said again
        if slots is not None and begin + said_again(pattern, begin, slots, lang) == text:
            return Sentence(pattern, begin, slots)
    return None


def read_slots(groups: dict[str, str], lang: int) -> Slots | None:
    """What the slots of a sentence mean; None if one should hold a noun phrase and does not."""
    slots: Slots = {}
    for slot, form in groups.items():
        if form is None or slot in TIMES:  # when the story happens changes nothing
            continue
        if slot in NOUN_PHRASES:
            slots[slot] = read_amount(form, lang)
        elif slot == "number":
            slots[slot] = digits(int(form))
        else:
            slots[slot] = FORMS[lang]["subject" if slot == "who" else slot][form]
    if None in slots.values():
        return None
    if "noun" in slots:  # English says {number} more {noun}
        slots["amount"] = amount(slots["noun"], slots["number"].value)
    return slots


def said_again(pattern: Pattern, begin: str, slots: Slots, lang: int) -> str:
    """The sentence as the generator would say it, after how it begins."""
    said = dict(slots)
    if slots.get("who") in (HIM, HER) and not begin:
        said["who"] = (slots["who"][ZH], slots["who"][EN].capitalize())
    if "noun" in slots:
        one = slots["number"].value == 1
        said["noun"] = (slots["noun"].zh, slots["noun"].en if one else slots["noun"].plural)
    return render(lang, pattern.wording, said)


# ---- stories -------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a text says, read as a story in one language.

    n_sentences: how many it has
    faults: number of a sentence from 0 → why it is unsound: it cannot be read, or contradicts what was told before
    people, things: whom and what its readable sentences name, in English
    ending: what its last sentence says of the end, as JSON (`named`); None if that is no ending
    """

    n_sentences: int
    faults: dict[int, str]
    people: set[str]
    things: set[str]
    ending: dict | None


UNREADABLE = "cannot be read"


@lru_cache(maxsize=1 << 12)
def read_story(text: str, lang: int) -> Reading:
    """Read a text sentence by sentence."""
    sentences = split_sentences(text)
    scene = Scene()
    reading = Reading(len(sentences), {}, set(), set(), None)
    for i, text_of_one in enumerate(sentences):
        sentence = read_sentence(text_of_one, lang)
        if sentence is None:
            reading.faults[i] = UNREADABLE
            continue
        name_all(sentence.slots, reading)
        last = i == len(sentences) - 1
        try:
            check_place(sentence, first=i == 0, last=last)
            happen(scene, sentence)
        except Contradiction as problem:
            reading.faults[i] = str(problem)
        if last and sentence.pattern.part == "ending":
            reading = reading._replace(ending=named(State(sentence.pattern.tell, sentence.slots)))
    return reading


def check_place(sentence: Sentence, first: bool, last: bool) -> None:
    """The time of a story is told in its first sentence only, and how it ends only in its last."""
    part = sentence.pattern.part
    check(first or not (part == "opening" or (part == "introduction" and sentence.begin)), "begins a second time")
    check(last or part != "ending", "an end, after which the story goes on")


def happen(scene: Scene, sentence: Sentence) -> None:
    """Let a sentence change the scene, or, if it is an ending, compare it. Raises `Contradiction`."""
    part, tell, slots = sentence.pattern.part, sentence.pattern.tell, sentence.slots
    if part == "act":
        slots = {**slots, "who": scene.settle(slots["who"])}
    if part in ("act", "introduction"):
        tell(scene, **slots)
    if part == "ending":
        check(scene.holds(State(tell, slots)), "the end is not so")


def name_all(slots: Slots, reading: Reading) -> None:
    """Add the people and things of a sentence to those that a reading names."""
    for value in slots.values():
        if isinstance(value, Person):
            reading.people.add(value.en)
        elif isinstance(value, Thing):
            reading.things.add(value.en)
        elif isinstance(value, Amount):
            reading.things.add(value.thing.en)


# ---- wishes and the reward -----------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How a text meets its wishes: its score in [0, 1], and what is wrong with it: nothing exactly if that is 1."""

    score: float
    unmet: list[str]


def examine(wishes: dict, text: str) -> Verdict:
    """Read a text, and compare it with what is wished (`requests.py`)."""
    reading = read_story(text, LANGUAGES.index(wishes["language"]))
    unmet = [f"sentence {i + 1}: {reason}" for i, reason in reading.faults.items()]
    people, things = set(wishes["people"]), set(wishes["things"])
    n_wished = wishes["sentences"]

    # each wish is met in full or, of people and things, by the share that both have in common
    met = []
    for what, wished, told in (("people", people, reading.people), ("things", things, reading.things)):
        met.append(len(wished & told) / len(wished | told))
        unmet += [f"{what}: no {name}" for name in sorted(wished - told)]
        unmet += [f"{what}: {name} was not wished" for name in sorted(told - wished)]
    met.append(reading.n_sentences == n_wished)
    if reading.n_sentences != n_wished:
        unmet.append(f"sentences: {reading.n_sentences} in place of {n_wished}")
    met.append(reading.ending == wishes["ending"])
    if reading.ending != wishes["ending"]:
        unmet.append("ending: another one" if reading.ending else "ending: none")

    n_sound = reading.n_sentences - len(reading.faults)
    return Verdict(n_sound / max(reading.n_sentences, n_wished) * sum(met) / len(met), unmet)


def score(wishes: dict, text: str) -> float:
    return examine(wishes, text).score


def reward(prompts: list[str], answers: list[str], rows: list[dict]) -> list[float]:
    """The true reward of each answer, in [0, 1]: by the row's "wishes", else 1 if it is right.

    Right is what equals the row's "answer", or "chosen", by the rule in "check" (exact, if there is none).
    Raises UserError if a row has none of them.
    """
    return [reward_of(answer, row) for answer, row in zip(answers, rows, strict=True)]


def reward_of(answer: str, row: dict) -> float:
    if "wishes" in row:
        return score(row["wishes"], answer)
    expected = row.get("answer", row.get("chosen"))
    if expected is None:
        raise UserError(f"a row with the keys {', '.join(row)}: the bundled world's reward needs wishes or an answer")
    right = {"check": row.get("check", "exact"), "messages": [{"role": "assistant", "content": expected}]}
    return float(is_right(right, answer))
