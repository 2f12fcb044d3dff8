"""Whether the exercises of lesson 3 are solved."""

import math

import pytest
import torch


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windowed_attention_is_torchs_with_that_mask(answers, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    seen = torch.tensor([[0 <= t - s < window for s in range(9)] for t in range(9)])
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(answers.windowed_attention(q, k, v, window), wanted[0].transpose(0, 1))


def test_what_order_means_without_positions(answers, experiment):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 16, dtype=torch.float64) for _ in range(3))
    order = torch.cat([torch.randperm(11), torch.tensor([11])])
    last, shuffled = (experiment.attention(q[o], k[o], v[o])[0][-1] for o in (torch.arange(12), order))
    assert ("stays" if torch.allclose(last, shuffled) else "changes") == answers.SHUFFLED


def test_what_the_scale_is_for(answers, experiment):
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 128, dtype=torch.float64) for _ in range(3))

    def entropy(scale: float) -> float:
        _, weights = experiment.attention(scale * q, k, v)
        return float(torch.special.entr(weights[-1]).sum())

    before, after = entropy(1), entropy(math.sqrt(128))
    assert (
        "falls" if after < before - 0.1 else "rises" if after > before + 0.1 else "stays"
    ) == answers.ENTROPY_WITHOUT_SCALE
