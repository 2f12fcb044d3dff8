"""Reads texts of the bundled world by patterns of its own, knowing its words but not its grammar.

So the tests don't take the generator's word for what its texts say.
"""

import re
from collections.abc import Iterable

from data.world.words import EN, PEOPLE, PLACES, THINGS, ZH


def any_of(words: Iterable[str]) -> str:
    """A pattern for one of the words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


# Patterns, by language.
NAMES = [any_of(person[lang] for person in PEOPLE) for lang in (ZH, EN)]
NOUNS = [any_of(thing.zh for thing in THINGS), any_of(noun for thing in THINGS for noun in (thing.en, thing.plural))]
ROOMS = [any_of(place[lang] for place in PLACES) for lang in (ZH, EN)]

# Every form in which a word may be written → the word.
WORD = {word[lang]: word for word in (*PEOPLE, *PLACES, *THINGS) for lang in (ZH, EN)}
WORD |= {thing.plural: thing for thing in THINGS}


def language(text: str) -> int:
    return ZH if re.search(r"[一-鿿]", text) else EN


def words(text: str) -> tuple[set, set, set]:
    """The people, things and places that a text names, as (Chinese, English)."""
    lang = language(text)
    edge = r"\b" if lang == EN else ""

    def read(patterns: list[str]) -> set:
        return {WORD[form][:2] for form in re.findall(f"{edge}(?:{patterns[lang]}){edge}", text)}

    return read(NAMES), read(NOUNS), read(ROOMS)


def groups(pairs: set) -> set[int]:
    return {WORD[en].group for _, en in pairs}


# ---- numbers


OPERANDS = [
    r"(\d+) [-+×<>] (\d+)",
    r"(\d+) (?:plus|minus|times|is greater than|is less than) (\d+)",
    r"(\d+)[加减乘比](\d+)",
    r"has (\d+) [a-z]+ and (?:buys|eats|loses) (\d+)",
    r"有(\d+)\w+，(?:又买了|吃了|丢了)(\d+)",
    r"(?:greater|smaller), (\d+) or (\d+)",
    r"(\d+)和(\d+)，哪个",
]


def operands(text: str) -> set[tuple[int, int]]:
    """The pairs of numbers that a text adds, subtracts, multiplies, compares or sorts."""
    pairs = {(int(a), int(b)) for pattern in OPERANDS for a, b in re.findall(pattern, text)}
    if "Sort" in text or "排列" in text:
        numbers = [int(digits) for digits in re.findall(r"\d+", text)]
        pairs |= {(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]}
    if is_count_story(text):
        _, steps = read_counts(text)
        pairs |= {pair for pair, _ in steps}
    return pairs


def is_count_story(text: str) -> bool:
    return bool(re.search(r"had \d+|有\d+\w+，(?:" + NAMES[ZH] + r")有\d", text))


def read_counts(text: str) -> tuple[dict[str, int], list]:
    """Who has how many at the end of a story of counts, and [((before, change), verb), ...] on the way."""
    name = f"({NAMES[language(text)]})"
    if language(text) == ZH:
        told = rf"(?:{name}|[他她])(有|又买了|又找到了|吃了|丢了|卖了)(\d+)|{name}给了{name}(\d+)"
    else:
        told = rf"(?:{name}|\b[Hh]e|\b[Ss]he) (had|has|bought|found|ate|lost|sold) (\d+)|{name} gave {name} (\d+)"

    has = {}
    steps = []
    last = None  # whom a pronoun means
    for who, verb, number, giver, taker, number_given in re.findall(told, text):
        last = who or giver or last
        if number_given:
            n = int(number_given)
            steps += [((has[giver], n), "give"), ((has[taker], n), "get")]
            has[giver] -= n
            has[taker] += n
            continue
        n = int(number)
        if verb in ("有", "had", "has"):  # at the beginning, and once more at the end
            assert has.setdefault(last, n) == n, text
            continue
        steps.append(((has[last], n), verb))
        has[last] += n if verb in ("又买了", "又找到了", "bought", "found") else -n
    return has, steps


# ---- places and things


def read_where(text: str) -> dict[str, str]:
    """Where people and the thing of an English story are in the end; fails where the story contradicts itself."""
    name, noun, room = (f"({patterns[EN]})" for patterns in (NAMES, NOUNS, ROOMS))
    place = {}  # of people, and of the thing while nobody holds it
    holder = {}  # of the thing
    last = None  # whom a pronoun means
    for sentence in re.split(r"(?<=\.) ", text):
        at_first = re.fullmatch(rf"(?:.*?, |On \w+ \w+ )?{name} was in the {room}(?: with an? \w+ {noun})?\.", sentence)
        there_was = re.fullmatch(rf"In the {room} there was an? \w+ {noun}\.", sentence)
        act = re.fullmatch(rf"(?:.* )?(?:{name}|[Hh]e|[Ss]he) (\w+) (.*)\.", sentence)
        if at_first:
            who, where, thing = at_first.groups()
            place[who] = where
            if thing:
                holder[thing] = who
        elif there_was:
            where, thing = there_was.groups()
            place[thing] = where
        elif act:
            who, verb, rest = act.groups()
            who = last = who or last
            things = re.findall(noun, rest)
            rooms = re.findall(room, rest)
            if verb in ("took", "carried"):
                assert holder[things[0]] == who, text
                place[who] = rooms[0]
            elif verb == "left":
                assert holder.pop(things[0]) == who and rooms[0] == place[who], text
                place[things[0]], place[who] = rooms
            elif verb == "picked" or (things and verb == "went"):
                if rooms:
                    place[who] = rooms[0]
                assert things[0] not in holder and place.pop(things[0]) == place[who], text
                holder[things[0]] = who
            elif verb in ("went", "walked"):
                assert who not in holder.values(), text
                place[who] = rooms[0]
            elif verb == "is" and not things:
                assert place[who] == rooms[0], text

    where = place | {thing: place[who] for thing, who in holder.items()}
    last_sentence = re.search(rf"the {noun} is in the {room}\.", text)
    if last_sentence:
        thing, told = last_sentence.groups()
        assert where[thing] == told, text
    return where


def read_holders(text: str) -> dict[str, str]:
    """Who has what at the end of an English story of giving."""
    name, noun = f"({NAMES[EN]})", f"({NOUNS[EN]})"
    has = {thing: who for who, thing in re.findall(rf"{name} had an? \w+ {noun}", text)}
    last = None  # whom a pronoun means
    for who, thing, taker in re.findall(rf"(?:{name}|\b[Hh]e|\b[Ss]he) (?:gave|handed) the {noun} to {name}", text):
        last = who or last
        assert has[thing] == last and taker != last, text
        has[thing] = taker
    for who, thing in re.findall(rf"{name} has the {noun}", text):
        assert has[thing] == who, text
    return has
