"""Each loss has the value that trl computes, and the gradient that autograd finds of the formula in fp64."""

import math

import pytest
import torch

from minillm.alignment.policy_loss import CLIPS, Experience, PolicyLoss, Watched, clipped_loss
from minillm.datasets.batch import Batch

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
JUNK = 7.0  # outside the mask: must never be seen


def filled(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[*row, *[JUNK] * (4 - len(row))] for row in rows], dtype=torch.float64)


NEW = filled([-0.5, -1, -0.25], [-1, -0.5], [-2, -1.5, -0.5, -0.25], [-0.75])
OLD = NEW - filled([0.5, 0, 0.25], [-0.25, 0.25], [-0.5, 0, 0.5, 0], [-0.25])
REFERENCE = filled([-0.75, -1.25, -0.5], [-0.75, -0.5], [-1.5, -1.75, -0.5, -0.5], [-1])
SAMPLER = OLD + filled([0.5, -1.5, 0], [0, 0.25], [0, 0, -0.5, 0.1], [0])
ADVANTAGES = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)


def experience(old=OLD, mask=MASK, advantages=ADVANTAGES) -> Experience:
    batch = Batch(torch.zeros(4, 4), torch.zeros(4, 4), mask)
    return Experience(batch, advantages, SAMPLER, REFERENCE, old)


def policy_loss(kind: str, **options) -> PolicyLoss:
    low, high = CLIPS[kind] if kind not in ("dapo",) else (0.2, 0.2)
    return PolicyLoss(kind, **dict(clip_low=low, clip_high=high, max_new_tokens=8) | options)


def mean(loss: PolicyLoss, rows: Experience, new=NEW) -> float:
    return float(loss(new, rows)) / loss.count(rows.batch.mask)


@pytest.mark.parametrize(
    "kind, options, value",
    [
        ("grpo", {}, -0.0557258717),
        ("grpo", dict(beta=0.04), -0.0544639219),
        ("grpo", dict(beta=0.04, kl="k3_ratio"), -0.0546220080),
        ("bnpo", {}, -0.1433626656),
        ("dapo", {}, -0.1433626656),
        ("dapo", dict(beta=0.04), -0.1419404601),
        ("dapo", dict(beta=0.04, kl="k3_ratio"), -0.1421226622),
        ("dapo", dict(clip_high=0.28), -0.1673626656),
        ("dr_grpo", {}, -0.0448008330),
        ("dr_grpo", dict(beta=0.04), -0.0443563938),
        ("dr_grpo", dict(beta=0.04, kl="k3_ratio"), -0.0444133319),
        ("grpo", dict(two_sided=1.5), -0.0603734115),
        ("cispo", dict(clip_high=5.0), 0.0321882468),
        ("cispo", dict(clip_high=0.2), -0.0125),
        ("gspo", dict(clip_low=0.2, clip_high=0.2), -0.1),
        ("gspo", {}, -0.0001875),
        ("dapo", dict(correction="token_truncate"), -0.3380195564),
        ("dapo", dict(correction="token_mask"), 0.1119804436),
        ("dapo", dict(correction="sequence_mask"), -0.9333360880),
        ("dapo", dict(correction="sequence_mask", correction_cap=2.0), 0.4529876446),
    ],
)
def test_the_value_is_that_of_trl(kind, options, value):
    assert mean(policy_loss(kind, **options), experience()) == pytest.approx(value, abs=1e-6)


def test_rloo_has_the_value_of_trl():
    rows = experience(advantages=torch.tensor([1, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64))
    assert mean(policy_loss("rloo"), rows) == pytest.approx(-0.0666666667, abs=1e-9)


def test_on_policy_the_value_is_that_of_trl():
    for old in (NEW, None):  # None: the first update, whose ratio is 1 by construction
        assert mean(policy_loss("grpo"), experience(old)) == pytest.approx(0, abs=1e-12)
        assert mean(policy_loss("dapo"), experience(old)) == pytest.approx(-0.1, abs=1e-12)


def test_a_masked_answer_stays_in_the_count_of_answers_and_leaves_that_of_tokens():
    mask = MASK.clone()
    mask[2] = False
    assert mean(policy_loss("grpo"), experience(mask=mask)) == pytest.approx(-0.1947484115, abs=1e-6)
    assert mean(policy_loss("dapo"), experience(mask=mask)) == pytest.approx(-0.6096645486, abs=1e-6)
    nothing = experience(mask=torch.zeros_like(MASK))
    for kind in CLIPS:  # all answers masked: 0, not 0/0
        assert float(policy_loss(kind)(NEW, nothing)) == 0


# ---- gradients


def gradient(loss: PolicyLoss, rows: Experience) -> torch.Tensor:
    new = NEW.clone().requires_grad_()
    value = loss(new, rows) / loss.count(rows.batch.mask)
    return torch.autograd.grad(value, new)[0]


def test_the_gradient_of_dapo_is_that_of_the_table():
    expected = torch.tensor([[0, -0.15, 0, 0], [0, 0.0642012708, 0, 0], [0, 0.05, 0.0824360635, 0.05], [0, 0, 0, 0]])
    assert torch.allclose(gradient(policy_loss("dapo"), experience()), expected.double(), atol=1e-9)
    on_policy = torch.where(MASK, -ADVANTAGES[:, None] / 10, 0.0)
    assert torch.allclose(gradient(policy_loss("dapo"), experience(None)), on_policy, atol=1e-12)


def test_the_gradient_of_the_kl_terms():
    d = torch.where(MASK, NEW - REFERENCE, 0.0)
    at_zero = experience(None, advantages=torch.zeros(4, dtype=torch.float64))
    plain = gradient(policy_loss("dapo", beta=1.0), at_zero)
    assert torch.allclose(plain, (1 - torch.exp(-d)) / 10)  # .2212 at d = .25
    by_ratio = gradient(policy_loss("dapo", beta=1.0, kl="k3_ratio"), at_zero)
    assert torch.allclose(by_ratio, d / 10)


def written_out(kind: str, new: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The mean loss, answer by answer and token by token."""
    answers, n_tokens = [], int(MASK.sum())
    for row in range(4):
        n = int(MASK[row].sum())
        logs = [new[row, t] - OLD[row, t] for t in range(n)]
        a = ADVANTAGES[row]
        if kind == "gspo":
            logs = [sum(logs) / n] * n
        if kind == "rloo":
            logs = [sum(logs)] * n
        if kind == "cispo":
            ls = [-min(math.exp(float(x.detach())), high) * a * new[row, t] for t, x in enumerate(logs)]
        else:
            ls = [-torch.min(x.exp() * a, x.exp().clamp(1 - low, 1 + high) * a) for x in logs]
        answers.append((sum(ls), n))
    if kind in ("grpo", "gspo", "rloo"):
        return sum(total / n for total, n in answers) / 4
    return sum(total for total, _ in answers) / (32 if kind == "dr_grpo" else n_tokens)


@pytest.mark.parametrize("kind", list(CLIPS))
def test_value_and_gradient_are_those_of_the_formula(kind):
    loss = policy_loss(kind)
    new = NEW.clone().requires_grad_()
    expected = written_out(kind, new, loss.clip_low, loss.clip_high)
    (expected_gradient,) = torch.autograd.grad(expected, new)
    assert mean(loss, experience()) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(gradient(loss, experience()), expected_gradient, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in CLIPS if kind != "bnpo"])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_a_batch_in_parts_has_the_same_gradient(kind, n_rows):
    loss = policy_loss(kind, beta=0.04)
    new = NEW.clone().requires_grad_()
    total = loss.count(MASK)
    parts = [slice(begin, begin + n_rows) for begin in range(0, 4, n_rows)]
    assert sum(loss.count(MASK[part]) for part in parts) == total
    for part in parts:
        (loss(new[part], experience().rows(part)) / total).backward()
    assert torch.allclose(new.grad, gradient(loss, experience()), atol=1e-12)


# ---- what the clip held back


def test_the_clip_shares_are_those_of_trl():
    counts = policy_loss("dapo").clip_counts(NEW, experience())
    assert (counts.n_tokens, counts.clipped_low, counts.clipped_high) == (10, 3, 2)
    assert policy_loss("dapo").clip_counts(NEW, experience(None))[1:] == (0, 0)


def test_the_first_pass_is_noted_as_the_old_policy():
    watched = Watched(policy_loss("dapo"), experience(None))
    leaf = OLD.clone().requires_grad_()
    watched(leaf)
    assert watched.clip_counts == (10, 0, 0)
    assert torch.equal(watched.experience.old, OLD) and not watched.experience.old.requires_grad
    again = Watched(policy_loss("dapo"), watched.experience)
    assert float(again(NEW)) / 10 == pytest.approx(-0.1433626656, abs=1e-6)
    assert again.clip_counts == (10, 3, 2) and torch.equal(again.experience.old, OLD)


@pytest.mark.parametrize("kind", list(CLIPS))
def test_parts_of_like_length_have_the_loss_of_the_whole(kind):
    loss = policy_loss(kind, beta=0.04)
    whole = loss(NEW, experience())
    parts = experience().split(1)
    assert [part.batch.mask.shape[1] for part in parts] == [1, 2, 3, 4]
    new = [NEW[row : row + 1, :width] for row, width in ((3, 1), (1, 2), (0, 3), (2, 4))]
    apart = sum(loss(log_probs, part) for log_probs, part in zip(new, parts, strict=True))
    assert kind == "bnpo" or float(apart) == pytest.approx(float(whole), abs=1e-12)
    silent = experience().silent()
    assert float(loss(NEW[:1], silent)) == 0 and len(silent.advantages) == 1


def test_ppo_takes_the_same_clipped_loss():
    """PPO's loss as trl 0.11.4 computes it: 0.1034084020, clip share 1/6."""
    advantages = torch.tensor([0.70289105, 0.66510949, 0.62533942, 0.5834762, -1.36615407, -1.21066209])
    change = torch.tensor([0.5, -0.25, 0.1, -0.5, 0.25, 0.05])
    assert float(clipped_loss(change.exp(), advantages, 0.2, 0.2).mean()) == pytest.approx(0.1034084020, abs=1e-6)
