"""Instructions with checkable answers, asked about the bundled world in Chinese and English.

Rows are {"instruction", "input", "output", "family", "lang", "check"}; `check` says how an answer is compared:
"exact", or "number" (the last number in it). The held-out split differs in content, never in kind: facts never
asked in training, pairs of numbers that are operands nowhere else, and people among things and places that they
meet nowhere else, in the texts or in the training rows.
"""

import itertools
import random
from collections.abc import Iterator

from data.world.draw import COLOURS_OF, Draw, Table, phrases, some, tell, without_number, written
from data.world.stories import story_count, story_give, story_where
from data.world.texts import (
    FACTS,
    FRAMES,
    PERSON_FACTS,
    SYMBOLS,
    TOWN_FACTS,
    digits,
    names,
    problem,
    sum_operands,
    sum_slots,
    translated,
)
from data.world.words import COLOURS, EN, GROUPS, HELD_PAIRS, PEOPLE, THINGS, TOWNS, ZH

SPLITS = ("train", "heldout")
FAMILIES = ("story", "translate", "arithmetic", "facts", "rewrite", "count", "compare")

FACT_QUESTIONS = {
    "home": """
{a}住在哪里？ | Where does {a} live?
{a}的家在哪里？ | Where is {a}'s home?""",
    "job": """
{a}是做什么的？ | What is {a}'s job?
{a}的职业是什么？ | What does {a} do for a living?""",
    "pet": """
{a}养了什么宠物？ | What pet does {a} keep?
{a}的宠物是什么？ | What is {a}'s pet?""",
    "food": """
{a}最喜欢吃什么？ | What does {a} like to eat best?
{a}最爱吃什么？ | What is {a}'s favourite food?""",
    "hobby": """
{a}喜欢做什么？ | What does {a} like doing?
{a}的爱好是什么？ | What is {a}'s hobby?""",
    "month": """
{a}出生在几月？ | In which month was {a} born?
{a}的生日在几月？ | In which month is {a}'s birthday?""",
    "colour": """
{a}最喜欢什么颜色？ | Which colour does {a} like best?
{a}最爱哪种颜色？ | What is {a}'s favourite colour?""",
    "region": """
{a}在什么地方？ | In which part of the country is {a}?""",
    "site": """
{a}坐落在哪里？ | Where does {a} lie?""",
    "product": """
{a}以什么闻名？ | What is {a} famous for?
{a}盛产什么？ | What does {a} have plenty of?""",
}
FACT_QUESTIONS = {key: phrases(text) for key, text in FACT_QUESTIONS.items()}
STORY_QUESTIONS = {
    "item": """
{x}现在在哪里？ | Where is the {x} now?
{x}在什么地方？ | In which place is the {x}?""",
    "person": """
{a}现在在哪里？ | Where is {a} now?
{a}在什么地方？ | In which place is {a}?""",
    "holder": """
{x}在谁手里？ | Who has the {x}?
现在谁拿着{x}？ | Who is holding the {x} now?""",
    "count": """
{a}现在有几{m}{x}？ | How many {xs} does {a} have now?
{a}有多少{m}{x}？ | How many {xs} does {a} have?""",
}
STORY_QUESTIONS = {key: phrases(text) for key, text in STORY_QUESTIONS.items()}
STORY_ANSWERS = phrases("""
在{p}里。 | In the {p}.
在{p}里。 | In the {p}.
{a}。 | {a}.
{x}。 | {x}.
""")
STORY_ANSWERS = dict(zip(STORY_QUESTIONS, STORY_ANSWERS, strict=True))
INTO_CHINESE = phrases("翻译成中文。 | Translate into Chinese.\n把这句话翻译成中文。 | Put this sentence into Chinese.")
INTO_ENGLISH = phrases("翻译成英文。 | Translate into English.\n把这句话翻译成英文。 | Put this sentence into English.")
SUM_QUESTIONS = [phrases(text) for text in (
    "{a}加{b}等于多少？ | What is {a} plus {b}?\n计算：{a} + {b} | Calculate: {a} + {b}",
    "{a}减{b}等于多少？ | What is {a} minus {b}?\n计算：{a} - {b} | Calculate: {a} - {b}",
    "{a}乘{b}等于多少？ | What is {a} times {b}?\n计算：{a} × {b} | Calculate: {a} × {b}",
)]  # fmt: skip
GREATER, SMALLER, RISING, FALLING = phrases("""
{a}和{b}，哪个大？ | Which is greater, {a} or {b}?
{a}和{b}，哪个小？ | Which is smaller, {a} or {b}?
从小到大排列：{a}、{b}、{c} | Sort from small to large: {a}, {b}, {c}
从大到小排列：{a}、{b}、{c} | Sort from large to small: {a}, {b}, {c}
""")
SEPARATOR = ("、", ", ")
OWNS, WITHOUT, WENT, WILL_GO = phrases("""
{a}有{k}。 | {a} has {k}.
{a}没有{k}。 | {a} does not have {k}.
{time}{a}去了{p}。 | {time} {a} went to the {p}.
明天{a}会去{p}。 | Tomorrow {a} will go to the {p}.
""")
NEGATE, AFFIRM, TOMORROW, RECOLOUR, RENAME = phrases("""
改成否定句。 | Make this sentence negative.
改成肯定句。 | Make this sentence positive.
改成明天的事。 | Say this about tomorrow.
把颜色换成{colour}。 | Change the colour to {colour}.
把{a}换成{b}。 | Replace {a} with {b}.
""")
COUNT = phrases("""
“{x}”出现了几次？ | How many times does “{x}” appear?
数一数有几个“{x}”。 | Count the word “{x}”.
""")


def fact_held_out(index: int, key: str) -> bool:
    """Whether the fact `key` of person or town number `index` is never asked in training."""
    return (index + 3 * list(FACTS).index(key)) % 8 == 0


ASKED_FACTS = [
    [
        (who, key)
        for pool, keys in ((PEOPLE, PERSON_FACTS), (TOWNS, TOWN_FACTS))
        for i, who in enumerate(pool)
        for key in keys
        if fact_held_out(i, key) == held_out
    ]
    for held_out in (False, True)
]
ASKED_SUMS = [sum_operands(held_out)[:3] for held_out in (False, True)]
ASKED_PAIRS = [
    [(a, b) for a in range(100) for b in range(100) if a != b and ((a, b) in HELD_PAIRS) == held_out]
    for held_out in (False, True)
]


def ask_fact(c: Draw, lang: int) -> tuple:
    who, key = c.pick(ASKED_FACTS[c.held_out])
    a, s = names(who)
    return (
        written(lang, c.pick(FACT_QUESTIONS[key]), {"a": a}),
        "",
        written(lang, FACTS[key][0], {"a": a, "s": s, "x": who.facts[key]}),
    )


def ask_story(c: Draw, lang: int) -> tuple:
    states = c.pick((story_where, story_where, story_give, story_count, story_count))(c, lang)
    kind, slots = c.pick(states)
    asked = dict(slots)
    if kind == "count":
        thing = slots["x"].thing
        asked |= {"m": (thing.measure, ""), "x": thing, "xs": (thing.zh, thing.plural)}
    question = written(lang, c.pick(STORY_QUESTIONS[kind]), asked)
    return (
        question,
        "".join(c.said),
        written(lang, STORY_ANSWERS[kind], slots),
        "number" if kind == "count" else "exact",
    )


def ask_translation(c: Draw, lang: int) -> tuple:
    source = c.pick((ZH, EN))
    frame, slots = translated(c, source)
    task = c.pick(INTO_ENGLISH if source == ZH else INTO_CHINESE)
    return written(lang, task, {}), written(source, frame, slots), written(1 - source, frame, slots)


def ask_sum(c: Draw, lang: int) -> tuple:
    if c.pick((True, False, False)):
        return ask_problem(c, lang)
    kinds = 2 if c.held_out else 3  # a product that was never seen cannot be worked out by a small model
    i = c.choose(Table((0.4, 0), (0.4, 1), (0.2, 2))) if kinds == 3 else c.pick((0, 1))
    slots = sum_slots(ASKED_SUMS[c.held_out][i], (1, -1, 0)[i])
    tell(c, lang, SYMBOLS[i], slots)
    return written(lang, c.pick(SUM_QUESTIONS[i]), slots), "", slots["r"][ZH], "number"


def ask_problem(c: Draw, lang: int) -> tuple:
    slots = problem(c, lang)
    thing = slots["r"].thing
    asked = {"a": slots["a"], "m": (thing.measure, ""), "x": thing, "xs": (thing.zh, thing.plural)}
    question = written(lang, c.pick(STORY_QUESTIONS["count"]), asked)
    return question, "".join(c.said), str(slots["r"].n), "number"


def ask_rewrite(c: Draw, lang: int) -> tuple:
    """Change one thing in a sentence: not, when, which colour, who."""
    change = c.pick((NEGATE, AFFIRM, TOMORROW, RECOLOUR, RENAME))
    if change is RENAME:
        frame, slots = translated(c, lang, FRAMES)
        other = c.person()
        task = written(lang, RENAME, {"a": slots["a"], "b": other})
        return task, written(lang, frame, slots), written(lang, frame, slots | {"a": other})
    if change is TOMORROW:
        frame, slots = translated(c, lang, [WENT])
        return written(lang, change, {}), written(lang, frame, slots), written(lang, WILL_GO, slots)
    if change is RECOLOUR:
        frame, slots = translated(c, lang, [OWNS])
        thing = slots["k"].thing
        adjective = c.pick([colour for colour in COLOURS_OF if colour[EN] not in slots["k"].en])
        after = written(lang, frame, slots | {"k": some(thing, 1, True, adjective)})
        task = written(lang, change, {"colour": COLOURS[COLOURS_OF.index(adjective)]})
        return task, written(lang, frame, slots), after
    _, slots = translated(c, lang, [OWNS])
    sentences = written(lang, OWNS, slots), written(lang, WITHOUT, slots | {"k": without_number(slots["k"])})
    return written(lang, change, {}), *(sentences if change is NEGATE else sentences[::-1])


def ask_count(c: Draw, lang: int) -> tuple:
    """How often is a word in a list? Held out: lists of things of one group, where training mixes three groups."""
    if c.held_out:
        group = c.pick(range(GROUPS))
        pool = sample(c, [t for t in THINGS if t.group == group], 3)
    else:
        pool = [c.pick([t for t in THINGS if t.group == group]) for group in sample(c, range(GROUPS), 3)]
    listed = [c.pick(pool) for _ in range(c.pick((4, 5, 6, 7)))]
    task = written(lang, c.pick(COUNT), {"x": pool[0]})
    return task, SEPARATOR[lang].join(t[lang] for t in listed), str(listed.count(pool[0])), "number"


def ask_compare(c: Draw, lang: int) -> tuple:
    a, b = c.pick(ASKED_PAIRS[c.held_out])
    change = c.pick((GREATER, SMALLER, RISING, FALLING))
    if change in (GREATER, SMALLER):
        answer = max(a, b) if change is GREATER else min(a, b)
        return written(lang, change, {"a": digits(a), "b": digits(b)}), "", str(answer), "number"
    others = [n for n in range(100) if n not in (a, b) and (c.held_out or not {(a, n), (b, n)} & HELD_PAIRS)]
    numbers = sample(c, [a, b, c.pick(others)], 3)
    answer = SEPARATOR[lang].join(map(str, sorted(numbers, reverse=change is FALLING)))
    return written(lang, change, dict(zip("abc", map(digits, numbers), strict=True))), "", answer


def sample(c: Draw, options, n: int) -> list:
    """n of the options, in any order."""
    left = list(options)
    return [left.pop(left.index(c.pick(left))) for _ in range(n)]


ASK = dict(zip(FAMILIES, (ask_story, ask_translation, ask_sum, ask_fact, ask_rewrite, ask_count, ask_compare),
               strict=True))  # fmt: skip
TRAIN_SHARES = Table(*zip((0.3, 0.3, 0.22, 0.06, 0.05, 0.03, 0.04), FAMILIES, strict=True))


def tasks(seed: int, split: str) -> Iterator[dict[str, str]]:
    """The endless instructions of a seed: `split` "train", or "heldout" with every family equally often.

    Row i depends on (seed, split, i) alone. A row may come again: whoever writes a file leaves out repetitions.
    """
    rng = random.Random()
    c = Draw(rng, held_out=split == "heldout")
    for i in itertools.count():
        rng.seed((2 * seed + c.held_out << 40) + i)
        c.begin()
        family = FAMILIES[i % len(FAMILIES)] if c.held_out else c.choose(TRAIN_SHARES)
        lang = c.pick((ZH, EN))
        instruction, given, output, *check = ASK[family](c, lang)
        yield {"instruction": instruction, "input": given, "output": output, "family": family,
               "lang": ("zh", "en")[lang], "check": check[0] if check else "exact"}  # fmt: skip
