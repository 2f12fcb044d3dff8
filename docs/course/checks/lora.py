"""Whether the exercises of lesson 10 are solved."""

import torch

from minillm.model import Transformer, preset
from minillm.tuning import TuningConfig, attach


def test_two_adapters_by_hand(answers):
    a1, b1 = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0], [0.0]])
    a2, b2 = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [0.0], [5.0]])
    a, b = answers.joined(a1, b1, 3.0, a2, b2, 0.1)
    torch.testing.assert_close(b @ a, torch.tensor([[6.0, 0.0], [0.0, 0.0], [0.0, 0.5]]))


def test_ranks_add_up(answers):
    draw = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(shape, generator=draw) for shape in ((3, 50), (40, 3), (5, 50), (40, 5)))
    a, b = answers.joined(a1, b1, 2.0, a2, b2, 0.5)
    assert (a.shape, b.shape) == ((8, 50), (40, 8))
    x = torch.randn(50, generator=draw)
    torch.testing.assert_close(b @ (a @ x), 2.0 * (b1 @ (a1 @ x)) + 0.5 * (b2 @ (a2 @ x)))


def test_predictions(answers):
    def who_has_a_gradient(*, a_is_zero: bool) -> str:
        model = Transformer(preset("tiny", vocab_size=64, n_layers=1))
        model.init_weights(seed=0)
        parameters = attach(model, TuningConfig(tune="lora", lora_rank=2)).parameters()
        if a_is_zero:
            for name, parameter in parameters.items():
                if "lora_A" in name:
                    parameter.data.zero_()
        tokens = torch.arange(9)[None]
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        moving = {name.split("lora_")[1][0] for name, parameter in parameters.items() if parameter.grad.any()}
        return {0: "none", 1: "".join(moving), 2: "both"}[len(moving)]

    assert who_has_a_gradient(a_is_zero=False) == answers.FIRST_GRADIENT
    assert who_has_a_gradient(a_is_zero=True) == answers.BOTH_ZERO
