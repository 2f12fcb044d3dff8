"""Token rewards, advantages, whitening and the KL controller, against numbers of trl 0.11.4's own functions."""

import math

import pytest
import torch

from minillm.alignment.policy_loss import clipped_loss
from minillm.alignment.token_rewards import (
    AdaptiveKL,
    advantages,
    kl_per_token,
    lowered_if_cut,
    moments_of,
    token_rewards,
    whitened,
)

NAN = math.nan
# two answers of 4 and 2 tokens; what stands outside the mask must not matter, so it is NaN
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
LOG_PROBS = torch.tensor([[-0.5, -1, -0.25, -0.75], [-1, -0.5, NAN, NAN]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.75, -1.25, -0.5, -0.5], [-0.75, -0.5, NAN, NAN]], dtype=torch.float64)
VALUES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, NAN, NAN]], dtype=torch.float64)
SCORES = torch.tensor([1.0, -1.0], dtype=torch.float64)
BETA = 0.1


def close(found, expected, within=1e-6):
    assert found == pytest.approx(expected, abs=within)


def rewards(kind="k1"):
    return token_rewards(SCORES, kl_per_token(LOG_PROBS, REFERENCE, MASK, kind), MASK, BETA)


def listed(tensor):
    assert torch.equal(tensor[~MASK], torch.zeros(2, dtype=tensor.dtype))
    return tensor[MASK].tolist()


@pytest.mark.parametrize(
    ("kind", "sums"),
    [("k1", [0.5, -0.25]), ("abs", [1.0, 0.25]), ("k2", [0.125, 0.03125]), ("k3", [0.1204277659, 0.0340254167])],
)
def test_kl_of_an_answer(kind, sums):
    close(kl_per_token(LOG_PROBS, REFERENCE, MASK, kind).sum(1).tolist(), sums)


def test_another_estimate_of_the_kl_is_refused():
    with pytest.raises(ValueError, match=r"k4.*k1, abs, k2, k3"):
        kl_per_token(LOG_PROBS, REFERENCE, MASK, "k4")


def test_the_score_comes_at_the_last_token():
    close(listed(rewards()), [-0.025, -0.025, -0.025, 1.025, 0.025, -1])
    close(listed(rewards("abs")), [-0.025, -0.025, -0.025, 0.975, -0.025, -1])


def test_the_score_comes_at_the_last_token_behind_a_prompt():
    mask = torch.tensor([[False, False, True, True, False], [False, False, False, False, True]])
    found = token_rewards(torch.tensor([2.0, 3.0]), torch.full((2, 5), NAN).masked_fill(mask, 0.5), mask, 0.1)
    assert torch.allclose(found, torch.tensor([[0, 0, -0.05, 1.95, 0], [0, 0, 0, 0, 2.95]]))


def test_an_answer_without_a_token_gets_nothing():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert token_rewards(torch.tensor([5.0]), torch.zeros(1, 3), mask, 0.1).tolist() == [[0, 0, 0]]
    assert advantages(torch.ones(1, 3), torch.ones(1, 3), mask).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, [0.749796875, 0.7103125, 0.66875, 0.625, -1.4125, -1.25]),
        (0.99, 0.9, [0.6356100329, 0.631436625, 0.627875, 0.625, -1.34125, -1.25]),
        (1.0, 1.0, [0.85, 0.775, 0.7, 0.625, -1.475, -1.25]),
    ],
)
def test_advantages(gamma, lam, expected):
    close(listed(advantages(rewards(), VALUES, MASK, gamma, lam)), expected)


def test_returns_are_what_advantages_add_to_values():
    found = advantages(rewards(), VALUES, MASK)
    close((found + VALUES)[MASK].tolist(), [0.849796875, 0.9103125, 0.96875, 1.025, -0.9125, -1])


def test_advantages_are_the_double_sum_of_their_definition():
    """A_t = Σ_k (γλ)^k δ_{t+k}, written out, for answers behind prompts of other lengths."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 9)
    reward, value = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    begins, ends = [0, 3, 8, 2, 4], [9, 7, 9, 3, 4]  # the last answer has no token
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        mask[row, begin:end] = True
    found = advantages(reward.masked_fill(~mask, NAN), value.masked_fill(~mask, NAN), mask, 0.9, 0.8)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for t in range(begin, end):
            total = 0.0
            for k in range(t, end):
                next_value = value[row, k + 1] if k + 1 < end else 0.0
                total += (0.9 * 0.8) ** (k - t) * (reward[row, k] + 0.9 * next_value - value[row, k])
            assert float(found[row, t]) == pytest.approx(float(total), abs=1e-12)
    assert torch.equal(found[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


def test_whitened_advantages():
    found = whitened(advantages(rewards(), VALUES, MASK), MASK)
    close(listed(found), [0.70289105, 0.66510949, 0.62533942, 0.5834762, -1.36615407, -1.21066209])


def test_whitening():
    numbers = torch.tensor([[1, 2, 3, NAN], [5, 7, NAN, NAN]], dtype=torch.float64)
    mask = ~numbers.isnan()
    expected = [-1.07959124, -0.66436384, -0.24913644, 0.58131836, 1.41177316]
    close(whitened(numbers, mask)[mask].tolist(), expected)
    assert whitened(numbers, mask)[~mask].tolist() == [0, 0, 0]


def test_whitening_over_ranks_is_whitening_of_all():
    numbers = torch.tensor([[1, 2, 3, NAN], [5, 7, NAN, NAN]], dtype=torch.float64)
    mask = ~numbers.isnan()
    moments = moments_of(numbers[:1], mask[:1]) + moments_of(numbers[1:], mask[1:])
    rows = [whitened(numbers[i : i + 1], mask[i : i + 1], moments) for i in range(2)]
    assert torch.allclose(torch.cat(rows), whitened(numbers, mask))


def test_one_token_alone_has_no_advantage():
    mask = torch.tensor([[True, False]])
    assert whitened(torch.tensor([[3.0, 9.0]]), mask).tolist() == [[0, 0]]


def test_an_answer_that_never_ended_is_worth_less():
    scores, ended = torch.tensor([0.5, 0.5]), torch.tensor([True, False])
    assert lowered_if_cut(scores, ended, "subtract", 2.0).tolist() == [0.5, -1.5]
    assert lowered_if_cut(scores, ended, "replace", 1.0).tolist() == [0.5, -1.0]
    with pytest.raises(ValueError, match="subtract or replace"):
        lowered_if_cut(scores, ended, "forget")


def test_the_strength_of_the_kl_follows_its_target():
    controller = AdaptiveKL(0.2, target=6, horizon=10_000)
    found = [controller.update(kl, 256) for kl in (12, 6, 3, 7)]
    assert found[:2] == pytest.approx([0.201024, 0.201024], abs=1e-12)
    close(found[2:], [0.19999475712, 0.200848068084], 1e-10)


def test_the_strength_stays_positive_with_a_horizon_shorter_than_a_step():
    controller = AdaptiveKL(0.2, target=6, horizon=10)
    assert controller.update(0, 64) == pytest.approx(0.16) and controller.update(60, 64) == pytest.approx(0.192)


def test_without_a_target_the_strength_stays():
    assert AdaptiveKL(0.2, target=None).update(1000, 256) == 0.2


def test_policy_loss_of_whitened_advantages():
    """PPO's clipped loss on the advantages above: 0.1034084020, a sixth of the tokens without a gradient."""
    change = torch.tensor([[0.5, -0.25, 0.1, -0.5], [0.25, 0.05, NAN, NAN]], dtype=torch.float64)
    weights = whitened(advantages(rewards(), VALUES, MASK), MASK)
    log_probs = (LOG_PROBS + change).requires_grad_()
    ratio = (log_probs - LOG_PROBS).exp()
    losses = clipped_loss(ratio, weights, 0.2, 0.2)
    loss = losses.masked_fill(~MASK, 0.0).sum() / 6
    close(loss.item(), 0.1034084020, 1e-9)
    loss.backward()
    is_free = [False, True, True, True, True, True]  # the first rose by more than a fifth, and is wanted
    expected = [-float(a * r) / 6 * f for a, r, f in zip(weights[MASK], ratio.detach()[MASK], is_free, strict=True)]
    close(log_probs.grad[MASK].tolist(), expected, 1e-12)
