"""Reads texts of the bundled world by patterns of its own, knowing its words but not its grammar."""

import re

from data.world.words import EN, PEOPLE, PLACES, THINGS, ZH


def longest_first(words) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


NAMES = [longest_first(p[lang] for p in PEOPLE) for lang in (ZH, EN)]
NOUNS = [longest_first(t.zh for t in THINGS), longest_first(w for t in THINGS for w in (t.en, t.plural))]
ROOMS = [longest_first(p[lang] for p in PLACES) for lang in (ZH, EN)]
WORD = {p[lang]: p for p in (*PEOPLE, *PLACES, *THINGS) for lang in (ZH, EN)} | {t.plural: t for t in THINGS}


def language(text: str) -> int:
    return ZH if re.search(r"[一-鿿]", text) else EN


def words(text: str) -> tuple[set, set, set]:
    """The people, things and places that a text names."""
    lang = language(text)
    edge = r"\b" if lang == EN else ""
    found = [re.findall(f"{edge}(?:{kind[lang]}){edge}", text) for kind in (NAMES, NOUNS, ROOMS)]
    return tuple({WORD[w][:2] for w in group} for group in found)


def groups(pairs: set) -> set[int]:
    return {WORD[en].group for _, en in pairs}


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
        numbers = list(map(int, re.findall(r"\d+", text)))
        pairs |= {(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]}
    return pairs | {pair for pair, _ in read_counts(text)[1]} if is_count_story(text) else pairs


def is_count_story(text: str) -> bool:
    return bool(re.search(r"had \d+|有\d+\w+，(?:" + NAMES[ZH] + r")有\d", text))


def read_counts(text: str) -> tuple[dict[str, int], list]:
    """Who has how many at the end of a story of counts, and [((before, change), ...)] on the way."""
    name, steps = f"({NAMES[language(text)]})", []
    has, last = {}, None
    if language(text) == ZH:
        told = rf"(?:{name}|[他她])(有|又买了|又找到了|吃了|丢了|卖了)(\d+)|{name}给了{name}(\d+)"
    else:
        told = rf"(?:{name}|\b[Hh]e|\b[Ss]he) (had|has|bought|found|ate|lost|sold) (\d+)|{name} gave {name} (\d+)"
    for who, verb, n, giver, taker, given in re.findall(told, text):
        last = who or giver or last
        if given:
            steps += [((has[giver], int(given)), "give"), ((has[taker], int(given)), "get")]
            has[giver] -= int(given)
            has[taker] += int(given)
        elif verb in ("有", "had", "has"):
            assert has.setdefault(last, int(n)) == int(n), text
        else:
            steps.append(((has[last], int(n)), verb))
            has[last] += int(n) if verb in ("又买了", "又找到了", "bought", "found") else -int(n)
    return has, steps


def read_where(text: str) -> dict[str, str]:
    """Where people and the thing of an English story are in the end; fails where the story contradicts itself."""
    name, noun, room = (f"({kind[EN]})" for kind in (NAMES, NOUNS, ROOMS))
    place, holder, last = {}, {}, None
    for told in re.split(r"(?<=\.) ", text):
        if found := re.fullmatch(rf"(?:.*?, |On \w+ \w+ )?{name} was in the {room}(?: with an? \w+ {noun})?\.", told):
            place[found[1]] = found[2]
            if found[3]:
                holder[found[3]] = found[1]
        elif found := re.fullmatch(rf"In the {room} there was an? \w+ {noun}\.", told):
            place[found[2]] = found[1]
        elif found := re.fullmatch(rf"(?:.* )?(?:{name}|[Hh]e|[Ss]he) (\w+) (.*)\.", told):
            who = last = found[1] or last
            thing, rooms = re.search(noun, found[3]), re.findall(room, found[3])
            if found[2] in ("took", "carried"):
                assert holder[thing[0]] == who, text
                place[who] = rooms[0]
            elif found[2] == "left":
                assert holder.pop(thing[0]) == who and rooms[0] == place[who], text
                place[who], place[thing[0]] = rooms[1], rooms[0]
            elif found[2] == "picked" or (thing and found[2] == "went"):
                place[who] = (rooms or [place[who]])[0]
                assert thing[0] not in holder and place.pop(thing[0]) == place[who], text
                holder[thing[0]] = who
            elif found[2] in ("went", "walked"):
                assert who not in holder.values(), text
                place[who] = rooms[0]
            elif found[2] == "is" and not thing:
                assert place[who] == rooms[0], text
    where = place | {thing: place[who] for thing, who in holder.items()}
    if found := re.search(rf"the {noun} is in the {room}\.", text):
        assert where[found[1]] == found[2], text
    return where


def read_holders(text: str) -> dict[str, str]:
    """Who has what at the end of an English story of giving."""
    name, noun = f"({NAMES[EN]})", f"({NOUNS[EN]})"
    has, last = {}, None
    for who, thing in re.findall(rf"{name} had an? \w+ {noun}", text):
        has[thing] = who
    for who, thing, taker in re.findall(rf"(?:{name}|\b[Hh]e|\b[Ss]he) (?:gave|handed) the {noun} to {name}", text):
        last = who or last
        assert has[thing] == last and taker != last, text
        has[thing] = taker
    for who, thing in re.findall(rf"{name} has the {noun}", text):
        assert has[thing] == who, text
    return has
