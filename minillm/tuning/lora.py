"""LoRA: the product of two narrow matrices is added to a frozen weight, W + s·BA, and only A and B are trained.

s = α/r, or α/√r (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). B (for an embedding A) starts at zero, so training
starts from the base. DoRA gives each row of the sum a trained length m: m · (W + s·BA) / ‖W + s·BA‖. Parameters are
named as PEFT saves them.

Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model import ops
from minillm.model.quant import QuantLinear, plain_linear


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as a floating matrix (out, in); a quantized layer is dequantized."""
    return layer.dequantize().weight if isinstance(layer, QuantLinear) else layer.weight


@torch.no_grad()
def row_norms(square: Tensor, wa: Tensor, aa: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖w_i + s (BA)_i‖ of each row i, (out,) fp32, without computing BA.

    square: ‖w_i‖² (out,); wa: W Aᵀ (out, r); aa: A Aᵀ (r, r), both fp32; b: (out, r). By
    ‖w + sbA‖² = ‖w‖² + 2s (wAᵀ)·b + s² (bAAᵀ)·b. DoRA treats it as a constant in the backward pass (its paper's
    section 4.3), hence no gradient.
    """
    with torch.autocast(b.device.type, enabled=False):
        b = b.float() * scaling
        update = (2 * wa + b @ aa) * b  # (out, r): what BA adds to the squares
        return (square + update.sum(1)).sqrt()


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix (out, in) initialized like torch's linear layers: uniform in ±1/√in, Kaiming's rule with a = √5."""
    uniform = torch.rand(shape, generator=generator) * 2 - 1  # in ±1
    return uniform / math.sqrt(shape[1])


class _Lora(nn.Module):
    """Base of both classes: its buffer `square`, ‖w_i‖² of each frozen row for `dora`, is never cast from fp32."""

    def _apply(self, fn, recurse: bool = True):
        """Called by .to(), .half() and the like with the function that changes each tensor."""
        square = self.square
        super()._apply(fn, recurse)
        if square is not None:
            self.square = square.to(fn(square[:0]).device)
        return self


class LoraLinear(_Lora):
    """x → W x + s · B A dropout(x), with `dora` each output times m / ‖W + s·BA‖; then the bias."""

    # completes a sum over the inputs where each rank has a part of them (minillm/distributed/slices.py)
    added_up = staticmethod(lambda total: total)

    def __init__(
        self, base: nn.Module, rank: int, scaling: float, dropout: float, dora: bool, generator: torch.Generator
    ):
        """base: a linear layer, plain or quantized; dropout: share of x; generator: on the CPU, draws A."""
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(kaiming((rank, self.in_features), generator))
            self.lora_B.weight.zero_()

        # DoRA: the length of each row of W, trained, and its square, frozen
        lengths = torch.linalg.vector_norm(dense_weight(base).detach().float(), dim=1) if dora else None  # (out,)
        self.lora_magnitude_vector = nn.Parameter(lengths) if dora else None
        self.register_buffer("square", lengths.square() if dora else None, persistent=False)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """The length of each row of W + s·BA, (out,) fp32."""
        base = self.base_layer
        a = self.lora_A.weight.float()  # (r, in)
        with torch.autocast(a.device.type, enabled=False):
            quantized = isinstance(base, QuantLinear)
            aw = ops.quant_matmul(a, base.quantized) if quantized else a @ base.weight.float().T  # (r, out)
            aw, aa = self.added_up(aw), self.added_up(a @ a.T)
        return row_norms(self.square, aw.T, aa, self.lora_B.weight, self.scaling)

    def divided_with(self, dim: int) -> dict[str, int]:
        """Its own tensors that are divided where the base's rows (0) or columns (1) are, and in which dimension."""
        return {"lora_B.weight": 0, "lora_magnitude_vector": 0, "square": 0} if dim == 0 else {"lora_A.weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        rows = x.reshape(-1, self.in_features)  # (N, in), since `joined` adds in place, which a view would not allow
        small = F.linear(self.dropout(rows), self.lora_A.weight)  # (N, r)
        out = self.base_layer(rows)  # (N, out)
        if self.lora_magnitude_vector is not None and self.base_layer.bias is not None:
            out = out - self.base_layer.bias.to(out.dtype)
        return self.joined(out, small).view(*x.shape[:-1], self.out_features)

    def matrices(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """For `ops.linears`: W and A, if x goes into their products and nothing else (such as dropout)."""
        base, a = ops.matrices(self.base_layer), ops.matrices(self.lora_A)
        drops = self.training and self.dropout.p
        if base is None or a is None or drops:
            return None
        if self.lora_magnitude_vector is None:
            return [*base, *a]
        weight, _ = base[0]
        return [(weight, None), *a]  # the bias comes after the lengths

    def joined(self, out: Tensor, small: Tensor) -> Tensor:
        """The output (N, out). out: W x + b, or with `dora` W x, (N, out), overwritten; small: A x, (N, r)."""
        out.addmm_(small.to(out.dtype), self.lora_B.weight.to(out.dtype).T, alpha=self.scaling)
        if self.lora_magnitude_vector is None:
            return out
        out = out * (self.lora_magnitude_vector / self._norms()).to(out.dtype)
        bias = self.base_layer.bias
        return out if bias is None else out + bias.to(out.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) with the update added, computed in fp32, in the base's dtype."""
        base = dense_weight(self.base_layer)
        update = self.lora_B.weight.float() @ self.lora_A.weight.float()  # (out, in)
        whole = base.float() + self.scaling * update
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / self._norms())[:, None]
        return whole.to(base.dtype)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        return plain_linear(self.weight, self.base_layer.bias)


class LoraEmbedding(_Lora):
    """Looks up W + s·(BA)ᵀ; with `dora` each of the C columns has a trained length.

    A (r, V) starts at zero, B (C, r) from N(0, 1). There is no dropout, since the input is ids.
    """

    def __init__(self, base: nn.Embedding, rank: int, scaling: float, dora: bool, generator: torch.Generator):
        """base: the table (V, C); generator: on the CPU, draws B."""
        super().__init__()
        self.base_layer = base
        self.scaling = scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, generator=generator))
        lengths = torch.linalg.vector_norm(base.weight.detach().float(), dim=0) if dora else None  # (C,)
        self.lora_magnitude_vector = nn.Parameter(lengths) if dora else None
        self.register_buffer("square", lengths.square() if dora else None, persistent=False)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """The length of each column of the sum, (C,) fp32."""
        a = self.lora_embedding_A.float()  # (r, V)
        with torch.autocast(a.device.type, enabled=False):
            aw = a @ self.base_layer.weight.float()  # (r, C)
            return row_norms(self.square, aw.T, a @ a.T, self.lora_embedding_B, self.scaling)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 → (B, T, C)."""
        small = F.embedding(ids, self.lora_embedding_A.T) * self.scaling  # (B, T, r)
        out = self.base_layer(ids) + small @ self.lora_embedding_B.T  # (B, T, C)
        if self.lora_magnitude_vector is None:
            return out
        return out * (self.lora_magnitude_vector / self._norms())

    @property
    def weight(self) -> Tensor:
        """The table (V, C) with the update added, computed in fp32, in the base's dtype."""
        base = self.base_layer.weight
        update = (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T  # (V, C)
        whole = base.float() + self.scaling * update
        if self.lora_magnitude_vector is not None:
            whole = whole * (self.lora_magnitude_vector / self._norms())
        return whole.to(base.dtype)

    def merged(self) -> nn.Embedding:
        """A plain table that gives the same."""
        return nn.Embedding.from_pretrained(self.weight.detach())
