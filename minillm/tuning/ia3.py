"""IA3: keys, values and the input of the feed-forward network's last layer are each multiplied by a trained vector.

One number per channel, initially 1 (Liu et al. 2022, arXiv:2205.05638). Parameters are named as PEFT saves them.
"""

import torch
from torch import Tensor, nn

from minillm.model.quant import plain_linear
from minillm.tuning.lora import dense_weight


class Ia3Linear(nn.Module):
    """x → (W x + b) · l, or with `on_input` x → W (x · l) + b."""

    def __init__(self, base: nn.Module, on_input: bool):
        """base: a linear layer, plain or quantized."""
        super().__init__()
        self.base_layer = base
        self.on_input = on_input
        self.in_features = base.in_features
        self.out_features = base.out_features
        shape = (1, self.in_features) if on_input else (self.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        gain = self.ia3_l.flatten()
        if self.on_input:
            return self.base_layer(x * gain.to(x.dtype))
        out = self.base_layer(x)
        return out * gain.to(out.dtype)

    def divided_with(self, dim: int) -> dict[str, int]:
        """Its own tensors that are divided where the base's rows (0) or columns (1) are, and in which dimension."""
        return {"ia3_l": dim} if dim == int(self.on_input) else {}

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same; fp32 arithmetic, the base's dtype."""
        base = dense_weight(self.base_layer)  # (out, in)
        scaled = base.float() * self.ia3_l.float()  # l is (1, in) or (out, 1)
        bias = self.base_layer.bias
        if bias is not None and not self.on_input:
            bias = (bias.float() * self.ia3_l.flatten()).to(bias.dtype)
        return plain_linear(scaled.to(base.dtype), bias)
