"""A small world that tells about itself in Chinese and English, and knows how much information each text holds.

A probabilistic grammar: every choice goes through a `Draw`, which takes one of n options and adds −log2 p to its
bits. No text can come about in two ways, so these bits are exactly −log2 p(text | world), the information that no
model can save; validation loss is drawn against their mean. What the world decides costs nothing: its fixed facts,
where things are in a story, the translation of a sentence, the result of a sum.

    from data.world import documents
    for text, bits in documents(seed=0): ...

Some content is held out of every text, for the questions of `data/world/questions.py`: in a story or a translation a
person never meets a thing (or, in translations, a place) of the same group, and one pair of numbers in ten are
never operands together.
"""

import itertools
import random
from collections.abc import Iterator

from data.world.draw import Draw, Table, coloured, phrases, some, tell, without_number, written
from data.world.stories import GAP, restate, story_count, story_give, story_where
from data.world.words import EN, HELD_PAIRS, LEXICON, OPERANDS, PEOPLE, SIZES, TIMES, TOWNS, ZH

# ---- facts -------------------------------------------------------------------------------------------------------

FACTS = {
    "home": "{a}住在{x}。 | {a} lives in {x}.\n{s}家在{x}。 | {s} home is in {x}.",
    "job": "{a}是一名{x}。 | {a} is {x}.\n{a}的职业是{x}。 | {a} works as {x}.",
    "pet": "{a}养了{x}。 | {a} keeps {x}.\n{s}宠物是{x}。 | {s} pet is {x}.",
    "food": "{a}最喜欢吃{x}。 | {a} likes to eat {x} best.\n{a}最爱的食物是{x}。 | {s} favourite food is {x}.",
    "hobby": "{a}喜欢{x}。 | {a} likes {x}.\n{s}爱好是{x}。 | {s} hobby is {x}.",
    "month": "{a}出生在{x}。 | {a} was born in {x}.\n{s}生日在{x}。 | {s} birthday is in {x}.",
    "colour": "{a}最喜欢{x}。 | {a} likes {x} best.\n{a}最爱的颜色是{x}。 | {s} favourite colour is {x}.",
    "region": "{a}在{x}。 | {a} is in the {x}.\n{a}是{x}的一个小镇。 | {a} is a small town in the {x}.",
    "site": "{a}坐落在{x}。 | {a} lies {x}.\n{a}位于{x}。 | {a} is {x}.",
    "product": "{a}以{x}闻名。 | {a} is famous for its {x}.\n{a}盛产{x}。 | {a} has plenty of {x}.",
}
FACTS = {key: phrases(text) for key, text in FACTS.items()}
PERSON_FACTS, TOWN_FACTS = list(FACTS)[:7], list(FACTS)[7:]
IT, ITS = ("它", "It"), ("它的", "Its")


def names(who) -> tuple[tuple[str, str], tuple[str, str]]:
    """How a person or town is named as subject and as owner."""
    return (who.zh, who.en), (who.zh + "的", who.en + "'s")


def facts(c: Draw, lang: int, who, keys: list[str], pronouns: tuple, count: int) -> None:
    left = list(keys)
    for i in range(count):
        c.say(GAP[lang] if i else "")
        a, s = c.pick((names(who), pronouns)) if i else names(who)
        key = c.pick(left)
        left.remove(key)
        tell(c, lang, c.pick(FACTS[key]), {"a": a, "s": s, "x": who.facts[key]})


def person_facts(c: Draw, lang: int) -> None:
    who = c.pick(PEOPLE)
    he = ("他", "He", "His") if who.pronoun[EN] == "he" else ("她", "She", "Her")
    facts(c, lang, who, PERSON_FACTS, ((he[0], he[1]), (he[0] + "的", he[2])), c.pick((3, 4, 5)))


def town_facts(c: Draw, lang: int) -> None:
    facts(c, lang, c.pick(TOWNS), TOWN_FACTS, (IT, ITS), c.pick((2, 3)))


# ---- translations ------------------------------------------------------------------------------------------------

FRAMES = phrases("""
{a}有{x}。 | {a} has {x}.
{a}买了{x}。 | {a} bought {x}.
{a}丢了{x}。 | {a} lost {x}.
{a}想要{x}。 | {a} wants {x}.
{a}没有{none}。 | {a} does not have {none}.
{a}给了{b}{x}。 | {a} gave {b} {x}.
{a}喜欢{b}的{i}。 | {a} likes {b}'s {i}.
{a}在{p}里找到了{x}。 | {a} found {x} in the {p}.
{a}在{p}里看见了{x}。 | {a} saw {x} in the {p}.
{a}把{i}放在了{p}里。 | {a} put the {i} in the {p}.
{time}{a}去了{p}。 | {time} {a} went to the {p}.
{time}{a}在{p}里。 | {time} {a} was in the {p}.
{time}{a}买了{x}。 | {time} {a} bought {x}.
{a}和{b}去了{p}。 | {a} and {b} went to the {p}.
{a}在{p}里等{b}。 | {a} is waiting for {b} in the {p}.
""")
NUMBER_OF, COLOUR_OF, SIZE_OF = range(3)
NOUN_PHRASES = Table((0.5, NUMBER_OF), (0.35, COLOUR_OF), (0.15, SIZE_OF))


def noun_phrase(c: Draw):
    """three apples, a red ball, or two big pears."""
    kind = c.choose(NOUN_PHRASES)
    if kind == COLOUR_OF:
        return coloured(c)
    if kind == SIZE_OF:
        return some(c.named("food"), c.pick(range(1, 6)), True, c.pick(SIZES))
    return some(c.named("thing"), c.pick(range(1, 11)), True)


SLOTS = {
    "a": Draw.person,
    "b": Draw.person,
    "x": noun_phrase,
    "k": coloured,
    "none": lambda c: without_number(coloured(c)),
    "i": lambda c: c.named("item"),
    "p": lambda c: c.named("place"),
    "time": lambda c: c.pick(TIMES),
}


def translated(c: Draw, lang: int, frames=FRAMES) -> tuple[tuple, dict]:
    """Say a sentence in `lang`; returns its phrase and slots, which say it in the other language too."""
    c.new_cast()
    frame, slots = c.pick(frames), SLOTS.copy()
    tell(c, lang, frame, slots)
    return frame, slots


def translations(c: Draw, lang: int) -> None:
    """Sentences of one language, each followed by its translation."""
    for _ in range(c.pick((2, 3, 4))):
        c.say("\n" if c.said else "")
        frame, slots = translated(c, lang)
        c.say("\n" + written(1 - lang, frame, slots))


def dictionary(c: Draw, lang: int) -> None:
    for i in range(c.pick((5, 6, 7, 8))):
        word = c.pick(LEXICON)
        c.say(("\n" if i else "") + word[lang] + " = ")
        c.say(word[1 - lang])


# ---- arithmetic --------------------------------------------------------------------------------------------------


def operands(firsts, second, held_out: bool = False) -> dict[int, list[int]]:
    """For each first operand those second ones, of `second(first)`, that it is seen with (or, `held_out`, is not)."""
    pairs = {a: [b for b in second(a) if ((a, b) in HELD_PAIRS) == held_out] for a in firsts}
    return {a: seconds for a, seconds in pairs.items() if seconds}


def sum_operands(held_out: bool = False) -> list[dict[int, list[int]]]:
    """The operands of +, -, ×, > and <."""
    return [
        operands(range(1, 99), lambda a: [b for b in OPERANDS if a + b < 100], held_out),
        operands(range(1, 100), lambda a: [b for b in OPERANDS if b <= a], held_out),
        operands(range(2, 10), lambda a: range(2, 10), held_out),
        operands(range(2, 100), range, held_out),
        operands(range(98), lambda a: range(a + 1, 100), held_out),
    ]


SYMBOLS = phrases("""
{a} + {b} = {r} | {a} + {b} = {r}
{a} - {b} = {r} | {a} - {b} = {r}
{a} × {b} = {r} | {a} × {b} = {r}
{a} > {b} | {a} > {b}
{a} < {b} | {a} < {b}
""")
SPOKEN = phrases("""
{a}加{b}等于{r}。 | {a} plus {b} is {r}.
{a}减{b}等于{r}。 | {a} minus {b} is {r}.
{a}乘{b}等于{r}。 | {a} times {b} is {r}.
{a}比{b}大。 | {a} is greater than {b}.
{a}比{b}小。 | {a} is less than {b}.
""")
SUMS = list(zip(sum_operands(), (1, -1, 0, 0, 0), SYMBOLS, SPOKEN, strict=True))
CHANGES = [operands(range(10, 60), lambda n: range(1, 10), held_out) for held_out in (False, True)]
SUM_KINDS = Table(*zip((0.4, 0.4, 0.06, 0.07, 0.07), SUMS, strict=True))
HAS, BUYS, EATS, LOSES, LEFT = phrases("""
{a}有{x}， | {a} has {x} and
又买了{d}。 | buys {n} more.
吃了{d}。 | eats {n} of them.
丢了{d}。 | loses {n} of them.
现在{a}有{r}。 | Now {a} has {r}.
""")


def digits(n: int) -> tuple[str, str]:
    return str(n), str(n)


def sum_slots(seconds: dict[int, list[int]], sign: int) -> dict:
    """The slots of a sum: its operands, chosen one after the other, and its result."""
    firsts = list(seconds)
    slots = {"a": lambda c: digits(c.pick(firsts)), "b": lambda c: digits(c.pick(seconds[int(slots["a"][0])]))}

    def result(c):
        a, b = int(slots["a"][0]), int(slots["b"][0])
        return digits(a + sign * b if sign else a * b)

    slots["r"] = result
    return slots


def sums(c: Draw, lang: int, spoken: bool = False) -> None:
    """Lines of sums and comparisons, in symbols or in words."""
    for i in range(c.pick((4, 5, 6))):
        c.say("\n" if i else "")
        seconds, sign, *forms = c.choose(SUM_KINDS)
        tell(c, lang, forms[spoken], sum_slots(seconds, sign))


def spoken_sums(c: Draw, lang: int) -> None:
    sums(c, lang, spoken=True)


def problem(c: Draw, lang: int) -> dict:
    """Say a word problem; returns the slots of its answer."""
    c.new_cast()
    changes = CHANGES[c.held_out]
    slots = {"a": c.person(), "x": lambda c: some(c.named("thing"), c.pick(list(changes)))}
    tell(c, lang, HAS, slots)
    c.say(GAP[lang])
    thing, n = slots["x"].thing, slots["x"].n
    act = c.pick((BUYS, LOSES, EATS) if thing.food else (BUYS, LOSES))
    d = c.pick(changes[n])
    r = some(thing, n + d if act is BUYS else n - d)
    tell(c, lang, act, {"d": (f"{d}{thing.measure}", ""), "n": digits(d)})
    return {"a": slots["a"], "r": r}


def problems(c: Draw, lang: int) -> None:
    """Numbered word problems with their answers."""
    for i in range(c.pick((2, 3))):
        c.say(("\n" if i else "") + f"{i + 1}. ")
        answer = problem(c, lang)
        c.say(GAP[lang])
        tell(c, lang, LEFT, answer)


# ---- documents ---------------------------------------------------------------------------------------------------


def told(story):
    """The document of a story: the story, then one of its consequences."""
    return lambda c, lang: restate(c, lang, story(c, lang))


KINDS = Table(
    *((p / 2, (tell_document, lang)) for p, tell_document in (
        (0.16, told(story_where)), (0.08, told(story_give)), (0.10, told(story_count)), (0.12, person_facts),
        (0.03, town_facts), (0.22, translations), (0.04, dictionary), (0.05, spoken_sums), (0.07, problems),
    ) for lang in (ZH, EN)),
    (0.13, (sums, ZH)),
)  # fmt: skip


def document(c: Draw) -> str:
    """Tell one text; its information is then `c.bits`."""
    c.begin()
    tell_document, lang = c.choose(KINDS)
    tell_document(c, lang)
    return "".join(c.said)


def documents(seed: int, start: int = 0) -> Iterator[tuple[str, float]]:
    """The endless corpus of a seed, from document number `start` on.

    Yields (text, bits): bits = −log2 of the text's probability given the world. Document i depends on (seed, i) alone.
    """
    rng = random.Random()
    c = Draw(rng)
    for i in itertools.count(start):
        rng.seed((seed << 40) + i)
        text = document(c)
        yield text, c.bits
