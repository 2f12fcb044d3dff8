"""Whether the exercises of lesson 5 are solved."""

import math

import pytest
import torch
import torch.nn.functional as F


def drawn():
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 5, dtype=torch.float64)
    return logits, torch.tensor([0, 4, 2, 2, 1, 3]), torch.tensor([True, True, False, True, False, True])


def test_a_loss_that_can_be_computed_by_hand(answers):
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)  # p = 3/4, 1/4 and 1/2, 1/2
    loss, gradient = answers.smoothed_loss(logits, torch.tensor([0, 1]), torch.tensor([True, True]), 0.0)
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert gradient.tolist() == [pytest.approx([-1 / 8, 1 / 8]), pytest.approx([1 / 4, -1 / 4])]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_and_the_gradient_that_of_finite_differences(answers, smoothing):
    logits, targets, mask = drawn()

    def torchs(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[mask], targets[mask], label_smoothing=smoothing)

    loss, gradient = answers.smoothed_loss(logits, targets, mask, smoothing)
    torch.testing.assert_close(loss, torchs(logits))
    for place in [(0, 0), (1, 3), (2, 2), (5, 1)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        measured = (torchs(logits + step) - torchs(logits - step)) / 2e-6
        torch.testing.assert_close(gradient[place], measured, atol=1e-8, rtol=1e-6)


def test_logits_of_thousands(answers):
    logits = torch.tensor([[5000.0, 0.0, -5000.0]], dtype=torch.float64)
    loss, gradient = answers.smoothed_loss(logits, torch.tensor([2]), torch.tensor([True]), 0.0)
    assert float(loss) == 10_000 and gradient.tolist() == [[1.0, 0.0, -1.0]]


def test_predictions(answers):
    logits, targets, _ = drawn()
    change = float(F.cross_entropy(logits + 10, targets) - F.cross_entropy(logits, targets))
    assert ("rises" if change > 1e-9 else "falls" if change < -1e-9 else "stays") == answers.LOSS_WITH_CONSTANT
    # every target has the same logits, so that the gradients differ only by how much a target counts
    logits = torch.zeros(1010, 2, dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(logits, torch.zeros(1010, dtype=torch.int64), reduction="none")
    (losses[:10].mean() + losses[10:].mean()).backward()
    ratio = round(float(logits.grad[0, 0] / logits.grad[-1, 0]), 6)
    assert {"as much": 1, "100 times as much": 100, "a hundredth": 0.01}[answers.TARGET_OF_THE_SHORT] == ratio
