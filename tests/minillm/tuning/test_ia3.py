import pytest
import torch
from torch import nn

from minillm.tuning.ia3 import Ia3Linear


@pytest.mark.parametrize("on_input", [False, True])
def test_the_formula_and_merging(on_input):
    generator = torch.Generator().manual_seed(0)
    layer, x = Ia3Linear(nn.Linear(5, 7), on_input), torch.randn(4, 5, generator=generator)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.ia3_l.data = torch.randn(layer.ia3_l.shape, generator=generator)
    gain, weight, bias = layer.ia3_l.flatten(), layer.base_layer.weight, layer.base_layer.bias
    wanted = (x * gain) @ weight.T + bias if on_input else (x @ weight.T + bias) * gain
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.merged()(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
