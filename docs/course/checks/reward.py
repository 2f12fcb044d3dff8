"""Whether the exercises of lesson 11 are solved."""

import math

import pytest
import torch


def test_best_scale_by_hand(answers):
    # three of four pairs right, all by 2: σ(2 s) should say 3/4, so s = ln 3 / 2
    found = answers.best_scale(torch.tensor([2.0, 2.0, 2.0, -2.0], dtype=torch.float64))
    assert found == pytest.approx(math.log(3) / 2, rel=1e-4)


def test_no_other_scale_fits_better(answers, experiment):
    draw = torch.Generator().manual_seed(0)
    difference = 6 * torch.randn(400, generator=draw, dtype=torch.float64) + 3
    found = answers.best_scale(difference)
    least = min(experiment.nats(float(scale) * difference) for scale in torch.linspace(0, 3, 301))
    assert experiment.nats(found * difference) <= least + 1e-9


def test_scores_of_half_the_size_need_twice_the_scale(answers):
    difference = torch.tensor([0.1, 3.0, -1.0, 2.0], dtype=torch.float64)
    assert answers.best_scale(difference / 2) == pytest.approx(2 * answers.best_scale(difference), rel=1e-4)


def test_predictions(answers, experiment):
    draw = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 100, generator=draw)

    def change(before: float, after: float) -> str:
        return "falls" if after < before - 1e-4 else "rises" if after > before + 1e-4 else "stays"

    def accuracy(better: torch.Tensor, worse: torch.Tensor) -> float:
        return float((better > worse).float().mean())

    shifted = experiment.nats((chosen + 5) - (rejected + 5))
    assert change(experiment.nats(chosen - rejected), shifted) == answers.LOSS_OF_SHIFTED
    assert change(accuracy(chosen, rejected), accuracy(2 * chosen, 2 * rejected)) == answers.ACCURACY_OF_DOUBLED
