"""Each loss against values computed by another library in fp64, and its gradient against the formula written out."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from minillm.alignment.preferences import losses
from minillm.alignment.preferences.losses import (
    DIVERGENCES,
    LOSSES,
    LossOptions,
    Pairs,
    kto,
    kto_reference_point,
    log_odds,
)

# two pairs: log-probabilities of the tokens by policy and reference
POLICY_CHOSEN = ([-0.5, -1, -0.25], [-1, -0.5])
POLICY_REJECTED = ([-2, -1.5], [-0.25, -0.5, -1, -0.75])
REF_CHOSEN = ([-0.75, -1.25, -0.5], [-0.75, -0.5])
REF_REJECTED = ([-1.5, -1.25], [-0.5, -0.75, -1, -1])

VALUES = {
    "sigmoid": 0.6826768539,
    "cdpo": 0.6851768539,
    "robust": 0.6795518539,
    "hinge": 0.9750000000,
    "ipo": 23.6816406250,
    "ipo_sum": 24.1250000000,
    "sigmoid_norm": 0.6856398141,
    "exo_pair": 2.7202604131,
    "nca_pair": 1.3809816537,
    "bco_pair": 1.3748878630,
    "sppo_hard": 48.3750000000,
    "apo_zero": 0.9937542293,
    "apo_down": 1.0000204418,
    "aot": 0.6810377222,
    "aot_unpaired": 0.6808034143,
    "discopop": 0.8183697926,
    "cpo": 0.6269335454,
    "simpo": 0.8679458032,
    "orpo": 0.0490547936,
    "sft": 0.0,
}


def pairs(dtype=torch.float64) -> Pairs:
    def sums(tokens):
        return torch.tensor([sum(row) for row in tokens], dtype=dtype)

    def counts(tokens):
        return torch.tensor([len(row) for row in tokens], dtype=dtype)

    chosen, rejected = sums(POLICY_CHOSEN).requires_grad_(), sums(POLICY_REJECTED).requires_grad_()
    lengths = counts(POLICY_CHOSEN), counts(POLICY_REJECTED)
    return Pairs(chosen, rejected, sums(REF_CHOSEN), sums(REF_REJECTED), *lengths)


def value_of(name: str, options: LossOptions | None = None, dtype=torch.float64) -> float:
    loss = LOSSES[name]
    return loss.of_pairs(pairs(dtype), options or loss.defaults).mean().item()


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    assert value_of(name) == pytest.approx(VALUES[name], abs=1e-9)
    assert value_of(name, dtype=torch.float32) == pytest.approx(VALUES[name], rel=1e-6)


def test_every_loss_of_pairs_has_a_value_here():
    assert set(VALUES) == {name for name, loss in LOSSES.items() if loss.of_pairs}


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("sigmoid", LossOptions(divergence="forward_kl"), 0.6744230566),
        ("sigmoid", LossOptions(divergence="js"), 0.6858458495),
        ("cpo", LossOptions(label_smoothing=0.1), 0.6406835454),
        ("simpo", LossOptions(beta=0.1, gamma=0.5), 0.9424732986),
        ("sigmoid", LossOptions(beta=0.5), 0.6804739951),
    ],
)
def test_values_with_options(name, options, value):
    assert value_of(name, options) == pytest.approx(value, abs=1e-9)


def sigmoid_of(x):
    return 1 / (1 + torch.exp(-x))


def nll(x):
    """−log σ(x), by another function than the code's."""
    return softplus(-x)


B = 0.1  # beta
# the formulas once more, from (s_w, s_l, u_w, u_l, n_w, n_l)
WRITTEN_OUT = {
    "sigmoid": lambda sw, sl, uw, ul, nw, nl: nll(B * (uw - ul)),
    "cdpo": lambda sw, sl, uw, ul, nw, nl: 0.9 * nll(B * (uw - ul)) + 0.1 * nll(B * (ul - uw)),
    "robust": lambda sw, sl, uw, ul, nw, nl: (0.9 * nll(B * (uw - ul)) - 0.1 * nll(B * (ul - uw))) / 0.8,
    "hinge": lambda sw, sl, uw, ul, nw, nl: (1 - B * (uw - ul)).clamp(min=0),
    "ipo": lambda sw, sl, uw, ul, nw, nl: (uw / nw - ul / nl - 5) ** 2,
    "ipo_sum": lambda sw, sl, uw, ul, nw, nl: (uw - ul - 5) ** 2,
    "sigmoid_norm": lambda sw, sl, uw, ul, nw, nl: nll(B * (uw / nw - ul / nl)),
    "exo_pair": lambda sw, sl, uw, ul, nw, nl: _exo(sigmoid_of(B * (uw - ul)), 0.001),
    "nca_pair": lambda sw, sl, uw, ul, nw, nl: nll(B * uw) + (nll(-B * uw) + nll(-B * ul)) / 2,
    "bco_pair": lambda sw, sl, uw, ul, nw, nl: nll(B * uw) + nll(-B * ul),
    "sppo_hard": lambda sw, sl, uw, ul, nw, nl: (uw - 5) ** 2 + (ul + 5) ** 2,
    "apo_zero": lambda sw, sl, uw, ul, nw, nl: 1 - sigmoid_of(B * uw) + sigmoid_of(B * ul),
    "apo_down": lambda sw, sl, uw, ul, nw, nl: sigmoid_of(B * uw) + 1 - sigmoid_of(B * (uw - ul)),
    "discopop": lambda sw, sl, uw, ul, nw, nl: _discopop(B * (uw - ul), 0.05),
    "cpo": lambda sw, sl, uw, ul, nw, nl: nll(B * (sw - sl)),
    "simpo": lambda sw, sl, uw, ul, nw, nl: nll(2 * (sw / nw - sl / nl) - 1),
    "orpo": lambda sw, sl, uw, ul, nw, nl: B * nll(_odds(sw / nw) - _odds(sl / nl)),
}


def _exo(q, noise):
    return q * torch.log(q / (1 - noise)) + (1 - q) * torch.log((1 - q) / noise)


def _discopop(z, tau):
    share = sigmoid_of(z / tau)
    return (1 - share) * nll(z) + share * torch.exp(-z)


def _odds(mean):
    return torch.log(torch.exp(mean) / (1 - torch.exp(mean)))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_gradients_are_those_of_the_formula_written_out(name):
    ours = pairs()
    loss = LOSSES[name]
    found = torch.autograd.grad(
        loss.of_pairs(ours, loss.defaults).mean(), (ours.chosen, ours.rejected), allow_unused=True
    )
    other = pairs()
    uw, ul = other.chosen - other.ref_chosen, other.rejected - other.ref_rejected
    formula = WRITTEN_OUT[name](other.chosen, other.rejected, uw, ul, other.n_chosen, other.n_rejected)
    wanted = torch.autograd.grad(formula.mean(), (other.chosen, other.rejected), allow_unused=True)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*VALUES} - {"sft"}))
def test_gradients_are_finite_far_from_zero_and_right_by_differences(name):
    loss = LOSSES[name]
    lengths = torch.tensor([3.0, 5.0], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)

    def of(chosen, rejected):
        return loss.of_pairs(Pairs(chosen, rejected, zeros - 3.0, zeros - 2.0, lengths, lengths), loss.defaults)

    near = torch.tensor([-1.0, -3.5], dtype=torch.float64), torch.tensor([-4.0, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(of, [tensor.requires_grad_() for tensor in near])
    divergences = DIVERGENCES if "divergence" in loss.knows else ("reverse_kl",)
    for beta, divergence in itertools.product((loss.defaults.beta, 1.0), divergences):
        far = torch.tensor([-900.0, -1e-7, -900.0]), torch.tensor([-1e-7, -900.0, -950.0])
        chosen, rejected = (tensor.requires_grad_() for tensor in far)
        options = dataclasses.replace(loss.defaults, beta=beta, divergence=divergence)
        found = loss.of_pairs(
            Pairs(chosen, rejected, *[torch.full((3,), -3.0)] * 2, *[torch.tensor([3.0, 5.0, 5.0])] * 2), options
        )
        found.sum().backward()
        assert found.isfinite().all() and chosen.grad.norm().isfinite() and rejected.grad.norm().isfinite()


def test_policy_equal_to_the_reference_gives_log_2():
    equal = pairs()._replace(ref_chosen=pairs().chosen.detach(), ref_rejected=pairs().rejected.detach())
    for name in ("sigmoid", "cdpo", "robust", "sigmoid_norm", "aot", "aot_unpaired"):
        assert LOSSES[name].of_pairs(equal, LOSSES[name].defaults).mean().item() == pytest.approx(
            math.log(2), abs=1e-12
        )


def test_orpo_where_a_probability_reaches_one():
    odds = log_odds(torch.tensor([0.0, -1e-9, -0.6931471, -0.7, -60.0], requires_grad=True))
    assert odds.isfinite().all()
    torch.testing.assert_close(odds[2:], torch.tensor([0.0, -0.0137, -60.0]), atol=2e-4, rtol=1e-5)


def all_answers():
    """The four answers, w1 w2 l1 l2, as u and whether each is good."""
    both = pairs()
    u = torch.cat([both.u_chosen, both.u_rejected])
    return u, torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("z", "weights", "value"),
    [(0.1875, (1.0, 1.0), 0.4968788517), (0.1875, (1.33, 1.0), 0.5791212011), (0.0, (1.0, 1.0), 0.4968771147)],
)
def test_kto(z, weights, value):
    u, is_good = all_answers()
    found = kto(u, is_good, torch.tensor(z, dtype=torch.float64), weights, 0.1).mean()
    assert found.item() == pytest.approx(value, abs=1e-9)


def test_kto_gradient():
    u, is_good = all_answers()
    leaf = u.detach().requires_grad_()
    kto(leaf, is_good, torch.tensor(0.1875, dtype=torch.float64), (1.33, 1.0), 0.1).sum().backward()
    other = u.detach().requires_grad_()
    good = 1.33 * (1 - 1 / (1 + torch.exp(-0.1 * (other[:2] - 0.1875))))
    bad = 1 - 1 / (1 + torch.exp(-0.1 * (0.1875 - other[2:])))
    (good.sum() + bad.sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_the_reference_point_of_kto_is_not_below_zero_and_has_no_gradient():
    mean = torch.tensor(-0.3, requires_grad=True)
    assert kto_reference_point(mean).item() == 0 and not kto_reference_point(mean).requires_grad
    assert kto_reference_point(torch.tensor(0.1875)).item() == 0.1875


def test_losses_say_what_they_know():
    assert losses.losses_knowing("gamma") == ("simpo",)
    assert "sigmoid" not in losses.losses_knowing("label_smoothing")
    assert logsigmoid(torch.zeros(())).item() == pytest.approx(-math.log(2))
