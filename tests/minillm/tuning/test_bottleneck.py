import torch
from torch import nn

from minillm.tuning.bottleneck import Bottleneck


def test_the_formula():
    generator = torch.Generator().manual_seed(0)
    layer, x = Bottleneck(nn.Linear(5, 7), 7, 3, generator), torch.randn(4, 5, generator=generator)
    y = layer.base_layer(x)
    assert torch.equal(layer(x), y)  # up is zero
    down, up = layer.adapter_down, layer.adapter_up
    up.weight.data = torch.randn(7, 3, generator=generator)
    up.bias.data = torch.randn(7, generator=generator)
    inner = y @ down.weight.T + down.bias
    torch.testing.assert_close(layer(x), y + nn.functional.gelu(inner) @ up.weight.T + up.bias)
