"""LoRA: a frozen layer W gets a product of two narrow matrices added, W + s·BA, and those alone are trained.

s = α/r, or α/√r (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). B (for an embedding A) begins at zero, so training
begins at the base. DoRA gives each row of the sum a trained length m: m · (W + s·BA) / ‖W + s·BA‖. Names of
parameters are those that PEFT saves.

Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.quant import QuantLinear


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as one matrix (out, in) of floats; a quantized layer is multiplied out."""
    return layer.dequantize().weight if isinstance(layer, QuantLinear) else layer.weight


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of torch's own with this weight (out, in) and bias (out,), frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖w_i + s (BA)_i‖ of each row i, (out,) fp32, without ever making BA.

    weight: (out, in), a: (r, in), b: (out, r). By ‖w + sbA‖² = ‖w‖² + 2s (wAᵀ)·b + s² (bAAᵀ)·b. DoRA holds it constant
    in the backward pass (its paper's section 4.3), hence no gradient.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight, a, b = weight.float(), a.float(), b.float() * scaling
        cross = ((weight @ (2 * a).T + b @ (a @ a.T)) * b).sum(1)
        return (torch.linalg.vector_norm(weight, dim=1).square() + cross).sqrt()


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix (out, in) as torch's linear layers begin with: uniform in ±1/√in, which is Kaiming's rule for a = √5."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


class LoraLinear(nn.Module):
    """x → W x + s · B A dropout(x), and with `dora` that by m / ‖W + s·BA‖ for each output; then the bias."""

    def __init__(
        self, base: nn.Module, rank: int, scaling: float, dropout: float, dora: bool, generator: torch.Generator
    ):
        """base: a linear layer, plain or quantized; dropout: share of x; generator: on the CPU, draws A."""
        super().__init__()
        self.base_layer, self.scaling = base, scaling
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(kaiming((rank, self.in_features), generator))
            self.lora_B.weight.zero_()
        lengths = torch.linalg.vector_norm(dense_weight(base).detach().float(), dim=1) if dora else None
        self.lora_magnitude_vector = nn.Parameter(lengths) if dora else None

    def _norms(self) -> Tensor:
        return row_norms(dense_weight(self.base_layer), self.lora_A.weight, self.lora_B.weight, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        rows = x.reshape(-1, self.in_features)  # (N, in): what is added in place below must be no view
        small = F.linear(self.dropout(rows), self.lora_A.weight)  # (N, r)
        out = self.base_layer(rows)
        dora = self.lora_magnitude_vector is not None
        bias = self.base_layer.bias.to(out.dtype) if dora and self.base_layer.bias is not None else None
        if bias is not None:
            out = out - bias
        out.addmm_(small.to(out.dtype), self.lora_B.weight.to(out.dtype).T, alpha=self.scaling)
        if dora:
            out = out * (self.lora_magnitude_vector / self._norms()).to(out.dtype)
        out = out if bias is None else out + bias
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The whole weight (out, in) that the layer multiplies by, in the base's dtype; fp32 arithmetic."""
        base = dense_weight(self.base_layer)
        whole = base.float() + self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / self._norms())[:, None]
        return whole.to(base.dtype)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        return plain_linear(self.weight, self.base_layer.bias)


class LoraEmbedding(nn.Module):
    """Looks up W + s·(BA)ᵀ; with `dora` each of the C columns has a trained length.

    A (r, V) begins at zero, B (C, r) normal. There is no dropout: ids have nothing to drop.
    """

    def __init__(self, base: nn.Embedding, rank: int, scaling: float, dora: bool, generator: torch.Generator):
        super().__init__()
        self.base_layer, self.scaling = base, scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, generator=generator))
        lengths = torch.linalg.vector_norm(base.weight.detach().float(), dim=0) if dora else None
        self.lora_magnitude_vector = nn.Parameter(lengths) if dora else None

    def _norms(self) -> Tensor:
        return row_norms(self.base_layer.weight.T, self.lora_embedding_A, self.lora_embedding_B, self.scaling)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, T, C)."""
        small = F.embedding(ids, self.lora_embedding_A.T) * self.scaling  # (B, T, r)
        out = self.base_layer(ids) + small @ self.lora_embedding_B.T
        return out if self.lora_magnitude_vector is None else out * (self.lora_magnitude_vector / self._norms())

    @property
    def weight(self) -> Tensor:
        """The whole table (V, C), in the base's dtype; fp32 arithmetic."""
        base = self.base_layer.weight
        whole = base.float() + self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / self._norms())
        return whole.to(base.dtype)

    def merged(self) -> nn.Embedding:
        """A plain table that gives the same."""
        return nn.Embedding.from_pretrained(self.weight.detach())
