"""The bundled world: its texts against independent readings of them, and its bits against a search of its grammar."""

import hashlib
import itertools
import math
import random
import re
from functools import lru_cache
from operator import add, mul, sub

import pytest

from data.world import arithmetic, instructions, questions, stories, texts, translations
from data.world.draw import Draw, Table
from data.world.texts import KINDS, document, documents
from data.world.words import EN, HELD_PAIRS, LEXICON, ZH
from tests.data.world.reader import (
    NAMES,
    groups,
    is_count_story,
    language,
    operands,
    read_counts,
    read_holders,
    read_where,
    words,
)

TEXTS = [text for text, _ in itertools.islice(documents(seed=7), 4000)]


# ---- bits and derivations


class Open(Exception):
    """The script is at its end; `costs` are the bits of the options now open."""

    def __init__(self, costs):
        self.costs = costs


class Scripted(Draw):
    """Takes its choices from a list of indices, until that ends."""

    def __init__(self, script):
        super().__init__(random.Random())
        self.script = iter(script)

    def take(self, options, costs):
        i = next(self.script, None)
        if i is None:
            raise Open(costs)
        return options[i]

    def pick(self, options):
        return self.take(options, [math.log2(len(options))] * len(options))

    def choose(self, table):
        costs = [-math.log2(probability) for probability in table.probabilities]
        return self.take(table.options, costs)


@lru_cache(maxsize=200_000)
def told(script: tuple) -> tuple[str, list | None]:
    """What is said under a script before the next open choice, and the costs of that choice (None: the text ends)."""
    draw = Scripted(script)
    try:
        return document(draw), None
    except Open as choice:
        return "".join(draw.said), choice.costs


def derivations(text: str) -> list[float]:
    """The bits of every way in which the grammar can tell `text`: tries every script whose text begins like it."""
    bits_of_derivations = []
    open_scripts = [((), 0.0)]
    while open_scripts:
        script, bits = open_scripts.pop()
        beginning, costs = told(script)
        if costs is None:
            if beginning == text:
                bits_of_derivations.append(bits)
        elif text.startswith(beginning):
            open_scripts += [((*script, i), bits + cost) for i, cost in enumerate(costs)]
    return bits_of_derivations


def test_a_text_has_one_derivation_and_its_bits():
    for text, bits in itertools.islice(documents(seed=3), 100):
        assert derivations(text) == [pytest.approx(bits, abs=1e-9)], text


def test_probabilities_sum_to_one():
    modules = (arithmetic, instructions, questions, stories, texts, translations)
    tables = [value for module in modules for value in vars(module).values() if isinstance(value, Table)]
    assert KINDS in tables and len(tables) == 8
    for table in tables:
        assert math.fsum(table.probabilities) == pytest.approx(1, abs=1e-12)


def test_a_document_depends_on_seed_and_number_alone():
    first = list(itertools.islice(documents(5), 60))
    assert list(itertools.islice(documents(5, start=40), 20)) == first[40:]
    assert list(itertools.islice(documents(6), 60)) != first


def test_golden_document():
    """A change here changes everybody's corpus, and the floor of every run."""
    text, bits = next(documents(1))
    assert text == (
        "It was a warm afternoon. Julie was in the hospital with a green coin. Molly was in the market. "
        "Julie took the coin to the theatre. Next Julie carried the coin to the library. Julie carried t"
        "he coin to the bank. Then Molly went to the bathroom. Now the coin is in the bank."
    )
    assert bits == pytest.approx(77.293755866, abs=1e-9)


def test_golden_digest():
    """The first documents of every kind, letter by letter and with their bits."""
    digest = hashlib.sha256()
    for text, bits in itertools.islice(documents(1), 2000):
        digest.update(f"{text}\n{bits:.6f}\n".encode())
    assert digest.hexdigest() == "416562fe62df66ce5b7a78a8a3b114408da451715522b9d38c3ca8ced3160a12"


# ---- what the texts say


def test_words_are_told_apart():
    for lang in (ZH, EN):
        known = [w[lang] for w in LEXICON]
        assert len(set(known)) == len(known)


def test_stories_keep_their_state():
    counts = [text for text in TEXTS if is_count_story(text)]
    gifts = [text for text in TEXTS if re.search(r" (gave|handed) the ", text)]
    walks = [text for text in TEXTS if re.search(r"was in the .*was in the", text) and "\n" not in text]
    assert min(len(counts), len(gifts), len(walks)) > 100
    for read, stories_of_a_kind in ((read_counts, counts), (read_holders, gifts), (read_where, walks)):
        for text in stories_of_a_kind:
            read(text)


def test_sums_are_right():
    sum_line = r"(\d+)(?: ([-+×]) | (plus|minus|times) |([加减乘]))(\d+)(?: = | is |等于)(\d+)[.。]?"
    greater_line = r"(\d+)(?: > |比| is greater than )(\d+)(?:大。|\.)?"
    less_line = r"(\d+)(?: < |比| is less than )(\d+)(?:小。|\.)?"
    problem_line = r"\d\. .* has (\d+) .* and (buys|eats|loses) (\d+) .*Now .* has (\d+) .*"
    operator_of = {
        "+": add,
        "plus": add,
        "加": add,
        "-": sub,
        "minus": sub,
        "减": sub,
        "×": mul,
        "times": mul,
        "乘": mul,
    }
    checked = 0
    for line in (line for text in TEXTS for line in text.split("\n")):
        if match := re.fullmatch(sum_line, line):
            a, symbol, english, chinese, b, result = match.groups()
            assert operator_of[symbol or english or chinese](int(a), int(b)) == int(result), line
        elif match := re.fullmatch(greater_line, line):
            assert int(match[1]) > int(match[2]), line
        elif match := re.fullmatch(less_line, line):
            assert int(match[1]) < int(match[2]), line
        elif match := re.fullmatch(problem_line, line):
            before, verb, change, after = match.groups()
            change = int(change) if verb == "buys" else -int(change)
            assert int(before) + change == int(after), line
        else:
            continue
        checked += 1
    assert checked > 2000


def test_facts_never_contradict_each_other():
    homes = {}
    for text in TEXTS:
        for person, town in re.findall(rf"({NAMES[EN]})(?: lives|'s home is) in (\w+)\.", text):
            homes.setdefault(person, set()).add(town)
    assert len(homes) > 40 and all(len(towns) == 1 for towns in homes.values())


def test_translations_name_the_same_things():
    lines = [line for text in TEXTS if is_translation(text) for line in text.split("\n")]
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    assert len(pairs) > 1000
    for source, target in pairs:
        assert language(source) != language(target) and words(source) == words(target)


def is_translation(text: str) -> bool:
    return "\n" in text and not re.search(r"\d| = ", text)


# ---- what is held out


def test_held_out_combinations_never_meet():
    for line in (line for text in TEXTS for line in text.split("\n") if not re.fullmatch(r"\D+ = \D+", line)):
        people, things, _ = words(line.replace("踢足球", ""))
        assert not groups(people) & groups(things), line
        assert not operands(line) & HELD_PAIRS, line


def test_held_out_places_never_appear_in_translations():
    for line in (line for text in TEXTS if is_translation(text) for line in text.split("\n")):
        people, things, places = words(line)
        assert not groups(people) & (groups(things) | groups(places)), line
