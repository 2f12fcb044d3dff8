"""Preference pairs: right ones and wrong ones by another reading, every kind of fault, and balanced lengths."""

import itertools
import json
import re
from collections import Counter

import pytest

from data.world.phrases import split_sentences
from data.world.preferences import preferences
from data.world.reader import examine, reward
from tests.data.world.reader import groups, language, words

KINDS = {
    "wrong_value",
    "contradiction",
    "wrong_wish",
    "garbled",
    "other_language",
    "other_question",
    "rambling",
    "cut_short",
}
ROWS = {split: list(itertools.islice(preferences(0, split), 1500)) for split in ("train", "heldout")}
BOTH = ROWS["train"] + ROWS["heldout"]


def of(kind: str) -> list[dict]:
    return [row for row in BOTH if row["kind"] == kind]


def test_chosen_is_right_and_rejected_is_not():
    assert reward([""] * len(BOTH), [row["chosen"] for row in BOTH], BOTH) == [1.0] * len(BOTH)
    assert max(reward([""] * len(BOTH), [row["rejected"] for row in BOTH], BOTH)) < 1


def test_rows_have_their_keys_and_depend_on_the_seed_alone():
    for row in BOTH:
        assert set(row) == {"prompt", "chosen", "rejected", "kind", "family", "lang"} | (
            {"wishes"} if row["family"] == "request" else {"check"}
        )
    assert list(itertools.islice(preferences(0, "train"), 60)) == ROWS["train"][:60]
    assert list(itertools.islice(preferences(1, "train"), 60)) != ROWS["train"][:60]


@pytest.mark.parametrize("split", ROWS)
def test_every_kind_and_family_has_its_part(split):
    kinds = Counter(row["kind"] for row in ROWS[split])
    assert set(kinds) == KINDS and min(kinds.values()) > 75  # a hundred among the 2,000 held out
    families = Counter(row["family"] for row in ROWS[split])
    assert set(families) == {"request", "translate", "rewrite"}
    assert 0.45 < families["request"] / len(ROWS[split]) < 0.55
    assert {row["lang"] for row in ROWS[split]} == {"zh", "en"}


@pytest.mark.parametrize("split", ROWS)
def test_the_longer_one_is_right_in_half_of_the_rows(split):
    signs = [(len(row["chosen"]) > len(row["rejected"])) - (len(row["chosen"]) < len(row["rejected"])) for row in BOTH]
    assert abs(sum(signs)) / len(signs) < 0.04  # 50 ± 2 %, one of equal length counted half
    assert signs.count(0) < 0.15 * len(signs)


def test_kinds_are_what_they_say():
    for row in of("contradiction"):
        verdict = examine(row["wishes"], row["rejected"])
        told = [line for line in verdict.unmet if line.startswith("sentence ")]
        assert told and not any("cannot be read" in line for line in told), row
    for row in of("wrong_wish"):
        verdict = examine(row["wishes"], row["rejected"])
        assert verdict.unmet and not any(line.startswith("sentence ") for line in verdict.unmet), row
    for row in of("other_language"):
        assert language(row["chosen"]) != language(row["rejected"]), row
    for row in of("rambling"):
        assert row["rejected"].startswith(row["chosen"]) and len(row["rejected"]) > len(row["chosen"]), row
    for row in of("cut_short"):
        assert row["chosen"].startswith(row["rejected"].rstrip()) and row["rejected"], row
        assert row["rejected"] != row["chosen"].rstrip(".。")
    for row in of("other_question"):
        assert language(row["chosen"]) == language(row["rejected"])
    for row in of("garbled"):
        assert abs(len(split_sentences(row["chosen"])) - len(split_sentences(row["rejected"]))) <= 1
    for row in of("wrong_value"):
        n = [len(re.findall(r"\S+" if row["lang"] == "en" else ".", text)) for text in (row["chosen"], row["rejected"])]
        assert abs(n[0] - n[1]) <= 4, row


def test_a_wrong_value_is_no_word_that_right_answers_never_say():
    told = set().union(*({name for name, _ in words(row["chosen"])[0]} for row in BOTH))
    for row in of("wrong_value"):
        assert {name for name, _ in words(row["rejected"])[0]} <= told, row


def test_what_is_held_out():
    met = dict.fromkeys(ROWS, 0)
    for split, rows in ROWS.items():
        for row in rows:
            people, things, _ = words(row["chosen"])
            if row["family"] in ("request", "translate"):
                met[split] += bool(groups(people) & groups(things))
    assert met["train"] == 0 < met["heldout"]
    prompts = [{row["prompt"] for row in rows} for rows in ROWS.values()]
    assert not prompts[0] & prompts[1]


def test_rows_are_json():
    assert all(json.loads(json.dumps(row, ensure_ascii=False)) == row for row in BOTH)
