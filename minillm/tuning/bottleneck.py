"""Bottleneck adapters: a small network after each attention and each feed-forward network.

Houlsby et al. 2019, arXiv:1902.00751. It is not linear, so it cannot be merged into the base's weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.tuning.lora import kaiming


class Bottleneck(nn.Module):
    """y → y + up(gelu(down(y))) on a sublayer's output y; up starts at zero, so training starts from the base."""

    def __init__(self, base: nn.Module, dim: int, size: int, generator: torch.Generator):
        """base: a sublayer whose output has `dim` channels; size: width of the bottleneck; generator: on the CPU."""
        super().__init__()
        self.base_layer = base
        self.adapter_down, self.adapter_up = nn.Linear(dim, size), nn.Linear(size, dim)
        with torch.no_grad():
            self.adapter_down.weight.copy_(kaiming((size, dim), generator))
            for zero in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
                zero.zero_()

    def forward(self, *inputs) -> Tensor:
        y = self.base_layer(*inputs)  # (B, T, C)
        return y + self.adapter_up(F.gelu(self.adapter_down(y)))
