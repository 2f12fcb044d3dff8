"""The reader of stories: every story that is told has score 1, and every damage is found and named."""

import random

import pytest

from data.world.draw import Draw
from data.world.phrases import split_sentences
from data.world.reader import examine, reward, score
from data.world.requests import request
from data.world.stories import named, restate, story_count, story_give, story_where
from data.world.words import EN, LANGUAGES, ZH
from minillm.base.errors import UserError


def asked(count: int, held_out: bool = False):
    rng = random.Random(11)
    draw = Draw(rng, held_out)
    return [request(draw, draw.pick((ZH, EN))) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_every_story_meets_its_wishes(held_out):
    for _, wishes, story in asked(1000, held_out):
        assert examine(wishes, story) == (1.0, []), story


@pytest.mark.parametrize("lang", [ZH, EN])
@pytest.mark.parametrize("story", [story_where, story_give, story_count])
def test_long_stories_of_the_corpus_too(lang, story):
    draw = Draw(random.Random(3))
    for _ in range(200):
        draw.begin()
        end = restate(draw, lang, story(draw, lang))
        text = "".join(draw.said)
        things = {end.slots[key].en for key in ("thing",) if key in end.slots}
        wishes = {"people": [], "things": list(things), "sentences": len(split_sentences(text))}
        verdict = examine({**wishes, "language": LANGUAGES[lang], "ending": named(end)}, text)
        assert not [line for line in verdict.unmet if "sentence " in line or "ending" in line], (text, verdict)


STORY = (
    "On Monday morning Anna was in the park with a red ball. Peter was in the garden. "
    "Then Anna took the ball to the kitchen. She left the ball in the kitchen and went to the office. "
    "Now the ball is in the kitchen."
)
WISHES = {
    "people": ["Anna", "Peter"],
    "things": ["ball"],
    "sentences": 5,
    "language": "en",
    "ending": {"kind": "item", "thing": "ball", "place": "kitchen"},
}


def test_the_story_of_these_tests_is_sound():
    assert examine(WISHES, STORY) == (1.0, [])
    assert score(WISHES, f"  {STORY}\n") == 1


DAMAGES = {  # what is replaced, by what: what the reader says
    "a place": (("took the ball to the kitchen", "took the ball to the hotel"), "Anna is not in the kitchen"),
    "goes where she is": (("to the kitchen. She", "to the park. She"), "Anna is in the park already"),
    "another's thing": (("Then Anna took", "Then Peter took"), "Peter does not have the ball"),
    "a stranger": (("Then Anna took", "Then Mary took"), "Mary was not introduced"),
    "his pronoun": (("She left", "He left"), "he is said of nobody before"),
    "a wrong end": (("Now the ball is in the kitchen", "Now Anna is in the kitchen"), "the end is not so"),
    "another end": (("Now the ball is in the kitchen", "Now Anna is in the office"), "ending: another one"),
    "no end": (("Now the ball is in the kitchen", "Peter went to the kitchen"), "ending: none"),
    "a double": (("Peter was in the garden", "Anna was in the garden"), "it was said where Anna is"),
    "a wrong article": (("a red ball", "an red ball"), "cannot be read"),
    "a small letter": (("She left", "she left"), "cannot be read"),
    "a capital": (("Then Anna took", "Then She took"), "cannot be read"),
    "two spaces": ((". Then", ".  Then"), "cannot be read"),
    "no full stop": (("is in the kitchen.", "is in the kitchen"), "cannot be read"),
    "a word too many": (("Then Anna took", "Then Anna Anna took"), "cannot be read"),
    "an end too early": (("Peter was in the garden.", "Now Anna is in the park."), "after which the story goes on"),
    "a second beginning": (("Peter was", "On Monday morning Peter was"), "begins a second time"),
    "another thing": (("a red ball", "a red hat"), "things: hat was not wished"),
    "a person is missing": (("Peter was in the garden. ", ""), "people: no Peter"),
    "a sentence is missing": (("Peter was in the garden. ", ""), "sentences: 4 in place of 5"),
    "goes on": (("is in the kitchen.", "is in the kitchen. Now the ball is in the kitchen."), "the story goes on"),
    "too long": (("Then Anna took", "Peter went to the bank. Then Anna took"), "sentences: 6 in place of 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_and_named(damage):
    (old, new), reason = DAMAGES[damage]
    assert old in STORY
    verdict = examine(WISHES, STORY.replace(old, new))
    assert verdict.score < 1 and any(reason in line for line in verdict.unmet), verdict


CONTRADICTIONS = {
    "Anna had a red ball, and Peter had a blue hat. Peter gave the ball to Anna.": "Peter does not have the ball",
    "Anna had a red ball, and Peter had a blue hat. Anna gave the ball to Anna.": "Anna gives to Anna",
    "Anna had a red ball, and Peter had a blue hat. Anna gave the ball to Mary.": "Mary was not introduced",
    "Anna had a red ball, and Peter had a blue ball.": "there is a ball already",
    "Anna had 3 apples, and Peter had 5 hats. Anna lost 4 apples.": "Anna has only 3 apples",
    "Anna had 3 apples, and Peter had 5 hats. Anna lost 2 hats.": "Anna has only 0 hats",
    "Anna had 3 apples, and Peter had 5 hats. Anna bought 2 more hats.": "it was not said how many hats Anna had",
    "Anna had 3 apples, and Peter had 5 hats. Peter ate 2 hats.": "Peter eats hats",
    "Anna had 3 apples, and Peter had 5 hats. Anna went to the park.": "it was not said where Anna was",
    "Anna had 3 apples, and Peter had 5 hats. Peter had nothing.": "Peter was introduced before",
    "Anna had 3 apples, and Peter had 5 hats. Now Peter has 3 hats.": "the end is not so",
    "Anna had 1 apples, and Peter had 5 hats.": "cannot be read",
    "Anna had 03 apples, and Peter had 5 hats.": "cannot be read",
    "安娜有3个苹果，彼得有5顶帽子。安娜又买了2顶帽子。": "it was not said how many hats Anna had",
    "安娜有3个苹果，彼得有5个帽子。": "cannot be read",
    "安娜在公园里。彼得在花园里。厨房里有一个红色的球。他拿起了球。": "he is said of nobody before",
    "安娜在公园里。彼得在花园里。厨房里有一个红色的球。彼得拿起了球。": "the ball is not in the garden",
    "安娜在公园里，手里拿着一个红色的球。彼得在花园里。彼得到公园里拿起了球。": "Anna has the ball",
}


@pytest.mark.parametrize("story", CONTRADICTIONS)
def test_a_contradiction_is_found_and_named(story):
    language = "en" if story.isascii() else "zh"
    verdict = examine({**WISHES, "language": language}, story)
    assert any(CONTRADICTIONS[story] in line for line in verdict.unmet), verdict


def test_what_is_no_story_scores_low():
    assert score(WISHES, "") == score(WISHES, "In the kitchen.") == score(WISHES, "." * 500) == 0
    assert score({**WISHES, "language": "zh"}, STORY) == 0
    repeated = " ".join([STORY] * 4)
    assert score(WISHES, repeated) < 0.4
    assert score(WISHES, " ".join(["Anna was in the park."] * 5)) < 0.2


def test_a_story_that_is_cut_or_told_backwards_never_meets_its_wishes():
    for _, wishes, story in asked(100):
        sentences = split_sentences(story)
        gap = " " if wishes["language"] == "en" else ""
        for n in range(len(sentences)):
            assert score(wishes, gap.join(sentences[:n])) < 1
        assert score(wishes, gap.join(sentences[::-1])) < 1


def test_the_reward_of_rows():
    rows = [
        {"wishes": WISHES},
        {"answer": "In the park.", "check": "exact"},
        {"answer": "7", "check": "number"},
        {"answer": "7", "check": "number"},
        {"chosen": "In the park.", "rejected": "In the garden."},
    ]
    answers = [STORY, "In the park", "It is 7.", "8", "In the garden."]
    assert reward([""] * 5, answers, rows) == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r"keys prompt.*needs wishes or an answer"):
        reward([""], [""], [{"prompt": ""}])
