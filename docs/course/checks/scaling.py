"""Whether the exercises of lesson 15 are solved."""

import pytest
import torch

from minillm.model import Transformer, preset


def test_compute_optimal_of_chinchilla(answers):
    # Hoffmann et al. 2022: 70 G parameters and 1.4 T tokens, which are 5.88e23 operations
    n_parameters, n_tokens = answers.compute_optimal(5.88e23)
    assert n_parameters == pytest.approx(70e9, rel=1e-3)
    assert n_tokens == pytest.approx(1.4e12, rel=1e-3)
    assert 6 * n_parameters * n_tokens == pytest.approx(5.88e23)


def test_a_hundred_times_the_budget_is_a_ten_times_larger_model(answers):
    small, large = answers.compute_optimal(1e20), answers.compute_optimal(1e22)
    assert large == (pytest.approx(10 * small[0]), pytest.approx(10 * small[1]))


@pytest.mark.parametrize(
    "n, gpu, activations, n_gpus",
    [(1e9, 16e9, 0.0, 1), (1e9, 15e9, 0.0, 2), (8e9, 80e9, 40e9, 4), (70e9, 72e9, 30e9, 27)],
)
def test_fewest_gpus(answers, n, gpu, activations, n_gpus):
    assert answers.fewest_gpus(n, gpu, activations) == n_gpus


def test_predictions(answers, experiment):
    shape = preset("tiny", vocab_size=256)
    model = Transformer(shape)
    model.init_weights(seed=0)

    def a_token(length: int) -> float:
        n_flops, _ = experiment.trained_once(model, torch.zeros(1, length + 1, dtype=torch.int64))
        return n_flops / length

    # a + b T of attention: three lengths say whether a is constant, and how b T grows
    short, middle, long = a_token(32), a_token(64), a_token(128)
    of_attention = middle - short  # b · 32
    grows = "twice" if long - middle == pytest.approx(2 * of_attention) else "same"
    rest = [short - of_attention, middle - 2 * of_attention]
    assert grows == answers.OF_ATTENTION
    assert ("same" if rest[0] == pytest.approx(rest[1]) else "twice") == answers.OF_6_N
