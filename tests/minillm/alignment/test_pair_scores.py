"""The loss of pairs against trl's values and autograd in fp64, and what is measured of scores, by hand."""

import math

import numpy as np
import pytest
import torch

from minillm.alignment.pair_scores import (
    PairScores,
    accuracy_lines,
    calibration_error,
    early_pair_loss,
    length_correlation,
    measures,
    noise_floor,
    pair_loss,
    summary_lines,
)
from minillm.datasets.batch import Batch
from minillm.datasets.preferences import Answers


def pairs_of(chosen: list[int], rejected: list[int], margin=None, weight=None) -> Answers:
    """Pairs of rows, each of its own prompt unless weights say otherwise."""
    n = len(chosen)
    return Answers(
        batch=None,
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        weight=torch.tensor(weight or [1.0] * n),
        margin=torch.tensor(margin or [0.0] * n),
        label=None,
        number=torch.arange(2 * n),
        kinds=[""] * n,
    )


SCORES = torch.tensor([1.0, 0.2, -0.5, 0.5, 0.6, -1.5])  # three chosen, three rejected


@pytest.mark.parametrize(
    ("margin", "center", "expected"),
    [
        (None, 0.0, 0.5667846414),
        ([1.0, 0.0, 1 / 3], 0.0, 0.7671541078),
        (None, 0.01, 0.5897513080),
    ],
)
def test_the_loss_is_that_of_trl(margin, center, expected):
    answers = pairs_of([0, 1, 2], [3, 4, 5], margin)
    assert float(pair_loss(SCORES.double(), answers, center)) / 3 == pytest.approx(expected, abs=1e-6)
    assert float(pair_loss(SCORES, answers, center)) / 3 == pytest.approx(expected, abs=1e-6)


def test_its_gradient_is_that_of_the_formula():
    scores = SCORES.double().requires_grad_()
    pair_loss(scores, pairs_of([0, 1, 2], [3, 4, 5], [1.0, 0.0, 0.5]), 0.0).backward()
    difference = SCORES.double()[:3] - SCORES.double()[3:] - torch.tensor([1.0, 0.0, 0.5])
    by_hand = -torch.sigmoid(-difference)
    torch.testing.assert_close(scores.grad, torch.cat((by_hand, -by_hand)), atol=1e-12, rtol=0)


def test_all_pairs_of_a_ranking_weigh_one():
    """Three ranked answers, best first: the mean over their three pairs, as one element of a batch."""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    ranked = pairs_of([0, 0, 1], [1, 2, 2], weight=[1 / 3] * 3)
    by_hand = (
        sum(math.log1p(math.exp(-float(scores[better] - scores[worse]))) for better, worse in ((0, 1), (0, 2), (1, 2)))
        / 3
    )
    assert float(pair_loss(scores, ranked, 0.0)) == pytest.approx(by_hand, abs=1e-7)


def test_equal_answers_teach_nothing_and_cost_log_2():
    scores = torch.tensor([0.7, 0.7], requires_grad=True)
    loss = pair_loss(scores, pairs_of([0], [1]), 0.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    one = torch.tensor([0.7], requires_grad=True)  # one answer, compared with itself
    pair_loss(one, pairs_of([0], [0]), 0.0).backward()
    assert one.grad.tolist() == [0.0]


def test_a_rank_without_a_pair_still_has_a_gradient():
    scores = torch.tensor([0.7], requires_grad=True)
    loss = pair_loss(scores, pairs_of([], []), 0.01)
    loss.backward()
    assert loss.item() == 0.0 and scores.grad.tolist() == [0.0]


# ---- what is measured


def scored(chosen: list[float], rejected: list[float], kinds: list[str], longer=None) -> PairScores:
    n = len(chosen)
    scores = np.array([*chosen, *rejected])
    lengths = np.arange(2 * n)
    return PairScores(np.array(chosen), np.array(rejected), np.array(longer or [0.5] * n), kinds, scores, lengths)


def test_measures_are_those_by_hand():
    found = measures(scored([2.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], ["a"] * 4, [1.0, 0.0, 0.5, 1.0]))
    assert found["heldout_accuracy"] == 0.5  # a tie is wrong
    nats = [math.log1p(math.exp(-d)) for d in (2.0, -1.0, 0.0, 1.0)]
    assert found["heldout_nll"] == pytest.approx(sum(nats) / 4, abs=1e-12)
    assert found["longer_wins"] == 0.625


def test_calibration_error_is_that_by_hand():
    # σ(2) = .881 in the eighth bin, σ(1) = .731 in the fifth: right; right and wrong
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    by_hand = 1 / 3 * abs(p - 1) + 2 / 3 * abs(q - 0.5)
    assert calibration_error(np.array([2.0, 1.0, -1.0])) == pytest.approx(by_hand, abs=1e-12)


def test_scores_of_the_true_probabilities_are_calibrated():
    draw = np.random.default_rng(0)
    difference = draw.normal(size=200_000) * 2
    labels = draw.random(200_000) < 1 / (1 + np.exp(-difference))  # whether the first one is preferred
    assert calibration_error(np.where(labels, difference, -difference)) < 0.01
    assert calibration_error(3 * np.where(labels, difference, -difference)) > 0.1


@pytest.mark.parametrize(("noise", "floor"), [(0.0, 0.0), (0.1, 0.3250829734), (0.5, math.log(2))])
def test_the_floor_is_the_entropy_of_the_noise(noise, floor):
    assert noise_floor(noise) == pytest.approx(floor, abs=1e-9)


def test_one_who_knows_the_labels_before_noise_reaches_the_floor_and_no_more():
    draw = np.random.default_rng(0)
    flipped = draw.random(200_000) < 0.1
    best = math.log(9)  # σ(log 9) = 0.9
    difference = np.where(flipped, -best, best)
    found = measures(scored(difference.tolist(), [0.0] * 200_000, ["a"] * 200_000))
    assert found["heldout_nll"] == pytest.approx(noise_floor(0.1), abs=2e-3)
    assert found["heldout_accuracy"] == pytest.approx(0.9, abs=2e-3) and found["ece"] < 2e-3


def test_accuracy_is_told_by_kind_with_its_error():
    pairs = scored([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], ["wrong value", "", "wrong value", "wrong value"])
    lines = accuracy_lines(pairs)
    assert [line.split()[0] for line in lines] == ["not", "wrong", "all"]
    assert "66.7% ± 27.2%   (2/3)" in lines[1] and "75.0% ± 21.7%   (3/4)" in lines[2]
    text = "\n".join(summary_lines(pairs, 0.1))
    assert "floor 0.3251 at --label_noise 0.1" in text and "the longer one would win 50.0%" in text


def test_length_is_told_apart_from_quality():
    assert length_correlation(scored([0.0, 1.0], [2.0, 3.0], ["", ""])) == pytest.approx(1.0)
    assert math.isnan(length_correlation(scored([1.0], [1.0], [""])))


def early_by_hand(scores, tokens, first, length, pair) -> float:
    """The mean over the tokens from the first difference on, in loops."""
    chosen, rejected = pair
    terms = []
    seen_difference = False
    for t in range(min(length[chosen], length[rejected])):
        seen_difference |= tokens[chosen][t] != tokens[rejected][t]
        if seen_difference and t >= first:
            terms.append(math.log1p(math.exp(-(scores[chosen][t] - scores[rejected][t]))))
    return sum(terms) / len(terms) if terms else 0.0


def test_the_loss_of_early_tokens_begins_where_the_answers_differ():
    # two prompt tokens, then answers of which 0 and 1 share their first token, and 3 is the beginning of 2
    tokens = [[7, 8, 1, 2, 3, 9], [7, 8, 1, 5, 9, 0], [7, 8, 4, 4, 6, 9], [7, 8, 4, 9, 0, 0]]
    length = [6, 5, 6, 4]
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.tensor(tokens)
    place = torch.arange(1, 6)
    mask = (place >= 2) & (place < torch.tensor(length)[:, None])  # (4, 5), of y
    answers = pairs_of([0, 2], [1, 3], weight=[1.0, 0.5])._replace(batch=Batch(rows[:, :-1], rows[:, 1:], mask))
    by_hand = [early_by_hand(scores.tolist(), tokens, 2, length, pair) for pair in ((0, 1), (2, 3))]
    assert float(early_pair_loss(scores, answers)) == pytest.approx(by_hand[0] + 0.5 * by_hand[1], abs=1e-12)

    # what stands before the difference, and after an answer's end, changes nothing
    elsewhere = scores.clone()
    elsewhere[:, :3] += 5.0
    elsewhere[3, 4:] -= 5.0
    elsewhere[2, 2], elsewhere[3, 2] = scores[2, 2], scores[3, 2]
    assert float(early_pair_loss(elsewhere, answers)) == pytest.approx(float(early_pair_loss(scores, answers)))
