"""Forms of ops with few calls, for one token a row in fp32 on a CPU, without gradients: a step of generation.

There a call costs more than the arithmetic in it, and the rest of the time goes into reading the weights. `ops.py`
decides where these are used; what each computes is what the op of the same name computes.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def _norm_constants(width: int, eps: float) -> tuple[Tensor, Tensor]:
    """√(Cε) and 1/√C as tensors."""
    return torch.tensor(math.sqrt(width * eps)), torch.tensor(1 / math.sqrt(width))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x w / √(|x|²/C + ε) = x w / (hypot(|x|, √(Cε)) / √C), in five calls; torch's own makes ten."""
    smallest, scale = _norm_constants(x.shape[-1], eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # |x|, (…, 1)
    rms = norm.hypot_(smallest).mul_(scale)  # (…, 1)
    return (x * weight).div_(rms)


def _blocks_are_quicker() -> bool:
    """Whether one row's product with a large matrix is quicker as a batch of products with blocks of the matrix.

    MKL's product of a matrix and a vector reads an AMD processor's memory at half its speed; its batch of them at
    almost all of it, and in several threads. On Intel's processors it is the other way round.
    """
    processor = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processor.exists() and "AuthenticAMD" in processor.read_text()


# From so many numbers on; a smaller matrix (2 MB) may still be in the processor's cache from the step before.
LARGE_MATRIX = 2**19 if _blocks_are_quicker() else math.inf


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), without the cost of calling a module where that does no more than its product."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight.numel() >= LARGE_MATRIX and len(x) == 1 and weight.is_contiguous():
        return linear_by_blocks(x, weight, bias)
    return F.linear(x, weight, bias)


BLOCK = 16  # rows of a matrix; many, so that there are enough for all threads


def linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of one row x (1, 1, C), for which W (K, C) is read in blocks of rows: see `_blocks_are_quicker`."""
    n_whole = len(weight) // BLOCK * BLOCK  # rows in whole blocks
    blocks = weight[:n_whole].view(-1, BLOCK, weight.shape[1])
    column = x.mT.expand(len(blocks), -1, -1)  # (blocks, C, 1); of other strides MKL takes a slow way
    out = torch.bmm(blocks, column).view(1, 1, n_whole)
    if n_whole < len(weight):
        out = torch.cat((out, F.linear(x, weight[n_whole:])), -1)
    return out if bias is None else out + bias
