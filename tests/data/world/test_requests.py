"""Story requests: what is wished is what the story says, by a reading that does not use the generator's."""

import itertools
import random
import re

import pytest

from data.world.draw import Draw
from data.world.requests import LENGTHS, request, requests
from data.world.words import EN, ZH
from tests.data.world.reader import (
    groups,
    language,
    read_where,
    words,
)


def asked(split: str, count: int):
    """(request, language it is asked in) of a split."""
    rng = random.Random(5)
    draw = Draw(rng, split == "heldout")
    for _ in range(count):
        lang = draw.pick((ZH, EN))
        yield request(draw, lang), lang


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_wishes_are_what_the_story_says(split):
    other_language = 0
    for (prompt, wishes, story), lang in asked(split, 400):
        people, things, _ = ({word[1] for word in found} for found in words(story))
        assert set(wishes["people"]) == people and set(wishes["things"]) == things
        assert len(re.findall(r"[.。]", story)) == wishes["sentences"] in LENGTHS
        assert str(wishes["sentences"]) in prompt
        assert wishes["language"] == ("zh", "en")[language(story)]
        other_language += language(story) != lang
        asked_for = [{word[1] for word in found} for found in words(prompt)]
        # of a text in Chinese the reader's patterns find single words, of an English one too: all are named
        assert asked_for[0] >= people and asked_for[1] >= things
    assert 20 < other_language < 70


def test_the_end_is_so():
    english = [(wishes["ending"], story) for (_, wishes, story), _ in asked("train", 400) if wishes["language"] == "en"]
    for end, story in english:
        assert read_where(story)[end.get("thing") or end["who"]] == end["place"]
    assert len(english) > 150 and {end["kind"] for end, _ in english} == {"item", "person"}


def test_all_lengths_are_asked_for():
    lengths = {wishes["sentences"] for (_, wishes, _), _ in asked("train", 400)}
    assert lengths == set(LENGTHS)


def test_what_is_held_out():
    for split in ("train", "heldout"):
        for (_, _, story), _ in asked(split, 300):
            people, things, _ = words(story)
            assert bool(groups(people) & groups(things)) == (split == "heldout"), story


def test_rows_depend_on_the_seed_alone_and_differ():
    rows = list(itertools.islice(requests(0, "train"), 300))
    assert list(itertools.islice(requests(0, "train"), 40)) == rows[:40]
    assert list(itertools.islice(requests(1, "train"), 40)) != rows[:40]
    assert {frozenset(row) for row in rows} == {frozenset(("prompt", "wishes", "family", "lang"))}
    assert {row["lang"] for row in rows} == {"zh", "en"} and len({row["prompt"] for row in rows}) > 298
