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
        self.adapter_down = nn.Linear(dim, size)
        self.adapter_up = nn.Linear(size, dim)
        with torch.no_grad():
            self.adapter_down.weight.copy_(kaiming((size, dim), generator))
            self.adapter_down.bias.zero_()
            self.adapter_up.weight.zero_()
            self.adapter_up.bias.zero_()

    def forward(self, *inputs) -> Tensor:
        """inputs: those of the sublayer. Returns (B, T, C)."""
        y = self.base_layer(*inputs)  # (B, T, C)
        inner = F.gelu(self.adapter_down(y))  # (B, T, size)
        return y + self.adapter_up(inner)
