"""Signatures against exact sets of shingles, and which texts are joined."""

import random

import numpy as np
import pytest

from data.cleaning import near_duplicates
from data.cleaning.near_duplicates import BANDS, ENTRIES, clusters, kept, signatures, times

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def chinese(draw: random.Random, n: int) -> list[str]:
    return draw.choices(HAN, k=n)


def exact(one: list[str], other: list[str], length: int = 5) -> float:
    """J of two texts of single-character tokens, by sets."""
    sets = [{tuple(text[i : i + length]) for i in range(len(text) - length + 1)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def chance_found(similarity: float) -> float:
    """With which two texts of this J share a band of 8 entries, by the formula."""
    return 1 - (1 - similarity ** (ENTRIES // BANDS)) ** BANDS


def changed(draw: random.Random, text: list[str], share: float) -> list[str]:
    """The text with its end written anew."""
    n = round(len(text) * share)
    return text[: len(text) - n] + chinese(draw, n)


def test_signatures_agree_in_the_share_that_two_sets_have_in_common():
    draw = random.Random(0)
    errors = []
    for _ in range(400):
        one = chinese(draw, draw.randrange(60, 900))
        other = changed(draw, one, draw.random())
        a, b = signatures(["".join(one), "".join(other)])
        errors.append((a == b).mean() - exact(one, other))
    assert abs(np.mean(errors)) < 0.01  # standard error 0.002
    assert np.std(errors) < 1.25 * np.sqrt(0.25 / ENTRIES)  # at most √(J (1 − J) / n), and J is often not ½


def test_case_punctuation_and_the_order_of_texts_do_not_count():
    texts = ["Tom saw the old red cat, twice.", "tom SAW the old red cat twice", "今天天气很好，我们去公园。"]
    found = signatures(texts)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(signatures(texts[::-1])[::-1], found)
    assert (found[0] == found[2]).mean() == 0


def test_unrelated_english_texts_have_nothing_in_common():
    draw = random.Random(1)
    words = ["the", "a", "of", "and", "to", *(f"w{i}" for i in range(2000))]
    one, other = (" ".join(draw.choices(words, k=3000)) for _ in range(2))
    a, b = signatures([one, other])
    assert (a == b).mean() < 0.02


def test_pages_of_one_template_are_not_copies():
    draw = random.Random(2)
    template = chinese(draw, 150)
    pages = ["".join(template + chinese(draw, 100)) for _ in range(300)]
    found = signatures(pages)
    shared_bands = [len(np.unique(found[:, band * 8 : band * 8 + 8], axis=0)) < len(pages) for band in range(BANDS)]
    assert any(shared_bands)  # whoever joins by bands alone joins some of them
    np.testing.assert_array_equal(clusters(found), np.arange(len(pages)))


def test_copies_are_found_as_often_as_the_formula_says():
    draw = random.Random(3)
    for share, wanted in ((0.05, 0.9), (0.1, 0.8)):
        pairs = []
        for _ in range(300):
            one = chinese(draw, 400)
            pairs += [one, changed(draw, one, share)]
        similar = np.mean([exact(*pairs[i : i + 2]) for i in range(0, len(pairs), 2)])
        assert similar == pytest.approx(wanted, abs=0.03)
        first = clusters(signatures(["".join(text) for text in pairs]), least=0.0)
        n_found = sum(first[i] == first[i + 1] for i in range(0, len(pairs), 2))
        assert n_found / 300 == pytest.approx(chance_found(similar), abs=0.05)


def test_a_chain_of_near_texts_is_one_cluster_named_by_its_first():
    draw = random.Random(4)
    one = chinese(draw, 400)
    two = changed(draw, one, 0.05)
    three = chinese(draw, 20) + two[20:]
    texts = ["".join(text) for text in (chinese(draw, 400), three, chinese(draw, 300), one, two)]
    first = clusters(signatures(texts), least=0.75)
    assert first.tolist() == [0, 1, 2, 1, 1]
    assert kept(first, np.array([9, 5, 9, 7, 7])).tolist() == [0, 3, 2, 3, 3]


def test_texts_without_tokens_and_short_ones():
    first = clusters(signatures(["", "…", "公园", "公园。", "家", "Tom"]))
    assert first.tolist() == [0, 1, 2, 2, 4, 5]
    assert clusters(signatures([])).tolist() == [] and kept(np.array([], dtype=np.int64), np.array([])).tolist() == []


def test_a_group_with_many_strangers_ends(monkeypatch):
    same_band = np.arange(200 * ENTRIES, dtype=np.uint32).reshape(200, ENTRIES)
    same_band[:, :8] = 7
    same_band[150] = same_band[20]
    assert clusters(same_band)[150] == 20  # found in other bands, however few are compared in the first
    monkeypatch.setattr(near_duplicates, "MOST_LEADERS", 1)
    assert clusters(same_band)[150] == 20


@pytest.mark.parametrize("size, n", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (99, 5), (100, 8), (999, 8), (1000, 1)])
def test_repeats_by_size(size, n):
    assert times(size) == n


@pytest.mark.parametrize("similarity, wanted", [(0.5, 0.053), (0.7, 0.565), (0.8, 0.924), (0.9, 0.9996)])
def test_the_chance_to_be_found(similarity, wanted):
    assert chance_found(similarity) == pytest.approx(wanted, abs=6e-4)
