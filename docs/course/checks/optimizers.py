"""Whether the exercises of lesson 6 are solved."""

import pytest
import torch


def test_two_steps_that_can_be_computed_by_hand(answers):
    w, m, grad = (
        torch.tensor(numbers, dtype=torch.float64) for numbers in ([2.0, 1.0, -3.0], [0.0] * 3, [5.0, -0.01, 0])
    )
    w, m = answers.lion(w, grad, m, lr=0.1, weight_decay=0.5)
    # a large gradient and a small one lead equally far, and decay knows no sign
    torch.testing.assert_close(w, torch.tensor([2 - 0.1 * 2, 1 + 0.1 - 0.05, -3 + 0.15], dtype=torch.float64))
    torch.testing.assert_close(m, torch.tensor([0.05, -0.0001, 0.0], dtype=torch.float64))
    # 0.9 · 0.05 − 0.1 · 0.4 > 0: the direction is still that of the first gradient
    after, m = answers.lion(w, torch.tensor([-0.4, 0.0, 0.0], dtype=torch.float64), m, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(after - w, torch.tensor([-0.1, 0.1, 0.0], dtype=torch.float64))
    assert float(m[0]) == pytest.approx(0.99 * 0.05 - 0.004)


def test_what_is_given_stays(answers):
    given = [torch.ones(2), torch.ones(2), torch.ones(2)]
    answers.lion(*given, lr=0.1, weight_decay=0.1)
    assert all(bool((tensor == 1).all()) for tensor in given)


def test_predictions_on_the_size_of_the_loss(answers, experiment):
    torch.manual_seed(0)
    grads = [torch.randn(6, 8, dtype=torch.float64) for _ in range(3)]

    def last_step(optimizer, factor: float) -> float:
        state: dict = {}
        steps = [optimizer(factor * grad, state, number) for number, grad in enumerate(grads, start=1)]
        return float(steps[-1].norm())

    for optimizer, given in (
        (experiment.sgd, answers.SGD_STEP),
        (experiment.adam, answers.ADAMW_STEP),
        (experiment.muon, answers.MUON_STEP),
    ):
        ratio = last_step(optimizer, 1000) / last_step(optimizer, 1)
        assert {"stays": 1.0, "× 1000": 1000.0}[given] == pytest.approx(ratio, rel=1e-3)


def test_prediction_on_a_rare_token(answers):
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for gradient in [0.0] * 100 + [3.0]:
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert float(answers.FIRST_GRADIENT_LATE) == round(-float(w.detach()), 2)
