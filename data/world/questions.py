"""Questions with checkable answers, asked about the bundled world in Chinese and English.

A held-out question differs in content, never in kind: facts never asked in training, pairs of numbers
that are operands nowhere else, and people among things and places that they meet nowhere else, in the texts or in the
training rows.

Each family of questions is a function of a draw and a language. It tells a piece of text as the corpus does (a story,
a sentence to translate, a sum), and asks about what has been decided.

Read next: requests.py, what has many right answers; instructions.py, how questions become rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.world.arithmetic import MINUS, PLUS, TIMES, problem
from data.world.draw import Draw, Table
from data.world.facts import FACTS, PERSON_FACTS, TOWN_FACTS
from data.world.phrases import (
    Amount,
    Slots,
    amount,
    colour_adjective,
    digits,
    phrase,
    phrases,
    render,
    tell,
    without_number,
)
from data.world.stories import story_count, story_give, story_where
from data.world.translations import translated
from data.world.words import COLOURS, EN, GROUPS, HELD_PAIRS, PEOPLE, THINGS, TOWNS, ZH, Person, Town

LIST_COMMA = ("、", ", ")  # between the parts of a list


class Question(NamedTuple):
    """What is asked: the instruction, the text it is about ("": none), the answer, and how an answer is compared."""

    instruction: str
    context: str
    answer: str
    check: str = "exact"


# ---- facts ---------------------------------------------------------------------------------------------------------

FACT_QUESTIONS = {
    "home": phrases(
        "{who}住在哪里？ | Where does {who} live?",
        "{who}的家在哪里？ | Where is {who}'s home?",
    ),
    "job": phrases(
        "{who}是做什么的？ | What is {who}'s job?",
        "{who}的职业是什么？ | What does {who} do for a living?",
    ),
    "pet": phrases(
        "{who}养了什么宠物？ | What pet does {who} keep?",
        "{who}的宠物是什么？ | What is {who}'s pet?",
    ),
    "food": phrases(
        "{who}最喜欢吃什么？ | What does {who} like to eat best?",
        "{who}最爱吃什么？ | What is {who}'s favourite food?",
    ),
    "hobby": phrases(
        "{who}喜欢做什么？ | What does {who} like doing?",
        "{who}的爱好是什么？ | What is {who}'s hobby?",
    ),
    "month": phrases(
        "{who}出生在几月？ | In which month was {who} born?",
        "{who}的生日在几月？ | In which month is {who}'s birthday?",
    ),
    "colour": phrases(
        "{who}最喜欢什么颜色？ | Which colour does {who} like best?",
        "{who}最爱哪种颜色？ | What is {who}'s favourite colour?",
    ),
    "region": phrases(
        "{who}在什么地方？ | In which part of the country is {who}?",
    ),
    "site": phrases(
        "{who}坐落在哪里？ | Where does {who} lie?",
    ),
    "product": phrases(
        "{who}以什么闻名？ | What is {who} famous for?",
        "{who}盛产什么？ | What does {who} have plenty of?",
    ),
}


def fact_held_out(index: int, key: str) -> bool:
    """Whether the fact `key` of person or town number `index` is never asked in training: one in eight."""
    return (index + 3 * list(FACTS).index(key)) % 8 == 0


def asked_facts(held_out: bool) -> list[tuple[Person | Town, str]]:
    """Whose facts are asked, and which."""
    facts = []
    for subjects, keys in ((PEOPLE, PERSON_FACTS), (TOWNS, TOWN_FACTS)):
        for i, subject in enumerate(subjects):
            facts += [(subject, key) for key in keys if fact_held_out(i, key) == held_out]
    return facts


ASKED_FACTS = {held_out: asked_facts(held_out) for held_out in (False, True)}


def ask_fact(draw: Draw, lang: int) -> Question:
    """Where does somebody live? What is a town famous for?"""
    subject, key = draw.pick(ASKED_FACTS[draw.held_out])
    slots = {"who": subject, "what": subject.facts[key]}
    question = draw.pick(FACT_QUESTIONS[key])
    statement = FACTS[key][0]  # the first wording is the answer
    return Question(render(lang, question, slots), "", render(lang, statement, slots))


# ---- stories -------------------------------------------------------------------------------------------------------

# By the kind of a story's state: what is asked about it, and the answer.
STORY_QUESTIONS = {
    "item": phrases(
        "{thing}现在在哪里？ | Where is the {thing} now?",
        "{thing}在什么地方？ | In which place is the {thing}?",
    ),
    "person": phrases(
        "{who}现在在哪里？ | Where is {who} now?",
        "{who}在什么地方？ | In which place is {who}?",
    ),
    "holder": phrases(
        "{thing}在谁手里？ | Who has the {thing}?",
        "现在谁拿着{thing}？ | Who is holding the {thing} now?",
    ),
    "count": phrases(
        "{who}现在有几{measure}{noun}？ | How many {noun} does {who} have now?",
        "{who}有多少{measure}{noun}？ | How many {noun} does {who} have?",
    ),
}
STORY_ANSWERS = {
    "item": phrase("在{place}里。 | In the {place}."),
    "person": phrase("在{place}里。 | In the {place}."),
    "holder": phrase("{who}。 | {who}."),
    "count": phrase("{amount}。 | {amount}."),
}


def ask_story(draw: Draw, lang: int) -> Question:
    """Where, who or how many, at the end of a story?"""
    story = draw.pick((story_where, story_where, story_give, story_count, story_count))
    states = story(draw, lang)
    context = "".join(draw.said)
    kind, slots = draw.pick(states)
    answer = render(lang, STORY_ANSWERS[kind], slots)
    if kind == "count":
        return Question(ask_how_many(draw, lang, slots["who"], slots["amount"]), context, answer, "number")
    question = draw.pick(STORY_QUESTIONS[kind])
    return Question(render(lang, question, slots), context, answer)


def ask_how_many(draw: Draw, lang: int, who: Person, counted: Amount) -> str:
    """The question for a number of things."""
    thing = counted.thing
    slots = {"who": who, "measure": (thing.measure, ""), "noun": (thing.zh, thing.plural)}
    question = draw.pick(STORY_QUESTIONS["count"])
    return render(lang, question, slots)


# ---- translations --------------------------------------------------------------------------------------------------

# By the language of the translation.
TRANSLATE = {
    ZH: phrases(
        "翻译成中文。 | Translate into Chinese.",
        "把这句话翻译成中文。 | Put this sentence into Chinese.",
    ),
    EN: phrases(
        "翻译成英文。 | Translate into English.",
        "把这句话翻译成英文。 | Put this sentence into English.",
    ),
}


def ask_translation(draw: Draw, lang: int) -> Question:
    """A sentence in the other language; the instruction may be in either."""
    source = draw.pick((ZH, EN))
    target = 1 - source
    frame, slots = translated(draw, source)
    task = draw.pick(TRANSLATE[target])
    return Question(render(lang, task, {}), render(source, frame, slots), render(target, frame, slots))


# ---- sums ----------------------------------------------------------------------------------------------------------

SUM_QUESTIONS = {
    PLUS: phrases(
        "{a}加{b}等于多少？ | What is {a} plus {b}?",
        "计算：{a} + {b} | Calculate: {a} + {b}",
    ),
    MINUS: phrases(
        "{a}减{b}等于多少？ | What is {a} minus {b}?",
        "计算：{a} - {b} | Calculate: {a} - {b}",
    ),
    TIMES: phrases(
        "{a}乘{b}等于多少？ | What is {a} times {b}?",
        "计算：{a} × {b} | Calculate: {a} × {b}",
    ),
}
TRAIN_SUMS = Table((0.4, PLUS), (0.4, MINUS), (0.2, TIMES))
HELD_OUT_SUMS = (PLUS, MINUS)  # a product that was never seen cannot be worked out by a small model


def ask_arithmetic(draw: Draw, lang: int) -> Question:
    """A word problem, or, twice as often, a sum."""
    if draw.pick((True, False, False)):
        return ask_problem(draw, lang)
    return ask_sum(draw, lang)


def ask_problem(draw: Draw, lang: int) -> Question:
    """How many does somebody have then?"""
    answer = problem(draw, lang)
    context = "".join(draw.said)
    question = ask_how_many(draw, lang, answer["who"], answer["after"])
    return Question(question, context, str(answer["after"].number), "number")


def ask_sum(draw: Draw, lang: int) -> Question:
    """What is a plus, minus or times b?"""
    kind = draw.pick(HELD_OUT_SUMS) if draw.held_out else draw.choose(TRAIN_SUMS)
    slots = kind.slots(draw.held_out)
    tell(draw, lang, kind.in_symbols, slots)  # chooses the operands and works out the result
    question = draw.pick(SUM_QUESTIONS[kind])
    return Question(render(lang, question, slots), "", str(slots["result"].value), "number")


# ---- rewriting -----------------------------------------------------------------------------------------------------

OWNS = phrase("{who}有{coloured_item}。 | {who} has {coloured_item}.")
OWNS_NOT = phrase("{who}没有{no_item}。 | {who} does not have {no_item}.")
WENT = phrase("{time}{who}去了{place}。 | {time} {who} went to the {place}.")
WILL_GO = phrase("明天{who}会去{place}。 | Tomorrow {who} will go to the {place}.")

NEGATE = phrase("改成否定句。 | Make this sentence negative.")
AFFIRM = phrase("改成肯定句。 | Make this sentence positive.")
TOMORROW = phrase("改成明天的事。 | Say this about tomorrow.")
RECOLOUR = phrase("把颜色换成{colour}。 | Change the colour to {colour}.")
RENAME = phrase("把{old}换成{new}。 | Replace {old} with {new}.")


def ask_rewrite(draw: Draw, lang: int) -> Question:
    """Change one thing in a sentence: not, when, which colour, who."""
    change = draw.pick((negate, affirm, postpone, recolour, rename))
    return change(draw, lang)


def negate(draw: Draw, lang: int) -> Question:
    """Anna has a red ball. → Anna does not have a red ball."""
    with_item, without_item = owning_or_not(draw, lang)
    return Question(render(lang, NEGATE, {}), with_item, without_item)


def affirm(draw: Draw, lang: int) -> Question:
    """Anna does not have a red ball. → Anna has a red ball."""
    with_item, without_item = owning_or_not(draw, lang)
    return Question(render(lang, AFFIRM, {}), without_item, with_item)


def owning_or_not(draw: Draw, lang: int) -> tuple[str, str]:
    """That somebody has something, and that they do not."""
    _, slots = translated(draw, lang, [OWNS])
    slots["no_item"] = without_number(slots["coloured_item"])
    return render(lang, OWNS, slots), render(lang, OWNS_NOT, slots)


def postpone(draw: Draw, lang: int) -> Question:
    """Yesterday Anna went to the park. → Tomorrow Anna will go to the park."""
    _, slots = translated(draw, lang, [WENT])
    return Question(render(lang, TOMORROW, {}), render(lang, WENT, slots), render(lang, WILL_GO, slots))


def recolour(draw: Draw, lang: int) -> Question:
    """Anna has a red ball. → Anna has a blue ball."""
    _, slots = translated(draw, lang, [OWNS])
    before = slots["coloured_item"]
    colour = draw.pick([colour for colour in COLOURS if colour_adjective(colour) != before.adjective])
    after = amount(before.thing, 1, spelled=True, adjective=colour_adjective(colour))
    task = render(lang, RECOLOUR, {"colour": colour})
    return Question(task, render(lang, OWNS, slots), render(lang, OWNS, {**slots, "coloured_item": after}))


def rename(draw: Draw, lang: int) -> Question:
    """Anna bought three apples. → Peter bought three apples."""
    frame, slots = translated(draw, lang)
    newcomer = draw.person()
    task = render(lang, RENAME, {"old": slots["who"], "new": newcomer})
    return Question(task, render(lang, frame, slots), render(lang, frame, {**slots, "who": newcomer}))


# ---- counting words ------------------------------------------------------------------------------------------------

COUNT = phrases(
    "“{word}”出现了几次？ | How many times does “{word}” appear?",
    "数一数有几个“{word}”。 | Count the word “{word}”.",
)
THINGS_OF_GROUP = [[thing for thing in THINGS if thing.group == group] for group in range(GROUPS)]


def ask_count(draw: Draw, lang: int) -> Question:
    """How often is a word in a list? Held out: lists of things of one group, where training mixes three groups."""
    if draw.held_out:
        group = draw.pick(range(GROUPS))
        things = pick_several(draw, THINGS_OF_GROUP[group], 3)
    else:
        groups = pick_several(draw, range(GROUPS), 3)
        things = [draw.pick(THINGS_OF_GROUP[group]) for group in groups]
    length = draw.pick((4, 5, 6, 7))
    listed = [draw.pick(things) for _ in range(length)]
    counted = things[0]
    task = render(lang, draw.pick(COUNT), {"word": counted})
    context = LIST_COMMA[lang].join(thing[lang] for thing in listed)
    return Question(task, context, str(listed.count(counted)), "number")


def pick_several(draw: Draw, options: Sequence, n: int) -> list:
    """n different options, in any order."""
    left = list(options)
    picked = []
    for _ in range(n):
        option = draw.pick(left)
        left.remove(option)
        picked.append(option)
    return picked


# ---- comparing numbers ---------------------------------------------------------------------------------------------

WHICH_GREATER = phrase("{a}和{b}，哪个大？ | Which is greater, {a} or {b}?")
WHICH_SMALLER = phrase("{a}和{b}，哪个小？ | Which is smaller, {a} or {b}?")
RISING = phrase("从小到大排列：{a}、{b}、{c} | Sort from small to large: {a}, {b}, {c}")
FALLING = phrase("从大到小排列：{a}、{b}、{c} | Sort from large to small: {a}, {b}, {c}")


def asked_pairs(held_out: bool) -> list[tuple[int, int]]:
    """Pairs of different numbers that are compared."""
    pairs = [(a, b) for a in range(100) for b in range(100) if a != b]
    return [pair for pair in pairs if (pair in HELD_PAIRS) == held_out]


ASKED_PAIRS = {held_out: asked_pairs(held_out) for held_out in (False, True)}


def ask_compare(draw: Draw, lang: int) -> Question:
    """Which of two numbers is greater or smaller, or three numbers in order."""
    a, b = draw.pick(ASKED_PAIRS[draw.held_out])
    task = draw.pick((WHICH_GREATER, WHICH_SMALLER, RISING, FALLING))

    if task is WHICH_GREATER or task is WHICH_SMALLER:
        answer = max(a, b) if task is WHICH_GREATER else min(a, b)
        return Question(render(lang, task, {"a": digits(a), "b": digits(b)}), "", str(answer), "number")

    # A third number to sort. In training no two of the three may be a held-out pair.
    thirds = [n for n in range(100) if n not in (a, b)]
    if not draw.held_out:
        thirds = [n for n in thirds if (a, n) not in HELD_PAIRS and (b, n) not in HELD_PAIRS]
    numbers = pick_several(draw, [a, b, draw.pick(thirds)], 3)
    slots: Slots = {slot: digits(number) for slot, number in zip("abc", numbers, strict=True)}
    in_order = sorted(numbers, reverse=task is FALLING)
    return Question(render(lang, task, slots), "", LIST_COMMA[lang].join(map(str, in_order)))


# ---- all families --------------------------------------------------------------------------------------------------

ASK = {
    "story": ask_story,
    "translate": ask_translation,
    "arithmetic": ask_arithmetic,
    "facts": ask_fact,
    "rewrite": ask_rewrite,
    "count": ask_count,
    "compare": ask_compare,
}
