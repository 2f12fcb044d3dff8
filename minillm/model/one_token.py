"""Quicker forms of ops for one token a row in fp32 on a CPU, without gradients: a step of generation.

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


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """The matrix (D, D) that turns queries and keys (…, D) by a product, of cos and sin (1, D/2) of their position:

        (x₁ x₂) [  cos  sin ]  =  (x₁ cos − x₂ sin,  x₂ cos + x₁ sin)          cos and sin as diagonal matrices
                [ −sin  cos ]

    Of cos and sin (B, 1, D/2), one position a row: (B, D, D).
    """
    cos = torch.diag_embed(cos.squeeze(-2))  # (…, D/2, D/2)
    sin = torch.diag_embed(sin.squeeze(-2))
    upper = torch.cat((cos, sin), -1)  # (…, D/2, D)
    lower = torch.cat((-sin, cos), -1)
    return torch.cat((upper, lower), -2)  # (…, D, D)


def _mkl_is_slow() -> bool:
    """Whether torch's usual products are MKL's on an AMD processor, which it does not know well.

    One row's product with a large matrix reads the memory at half its speed; as a batch of products with blocks of the
    matrix at almost all of it, and in several threads. Products of several rows take 1.3 to 2.2 times as long as
    oneDNN's, which torch also has (one thread, AVX-512; 8 rows and more): MKL leaves AVX-512 unused there. With AVX2
    alone MKL takes 0.5 to 0.8 of oneDNN's time for `tiny`'s matrices and as long for `26m`'s. On Intel's processors
    MKL is the quicker one.
    """
    processor = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processor.exists() and "AuthenticAMD" in processor.read_text()


MKL_IS_SLOW = _mkl_is_slow()

# From so many numbers on; a smaller matrix (2 MB) may still be in the processor's cache from the step before.
LARGE_MATRIX = 2**19 if MKL_IS_SLOW else math.inf

# oneDNN is quicker from so many rows and multiplications on; with fewer its call costs more. It keeps code and buffers
# for every number of rows it has seen, some 0.5 MB each, so it is left to steps, whose rows are few.
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
MANY_ROWS = 4 if MKL_IS_SLOW and HAS_AVX512 and torch.backends.mkldnn.is_available() else math.inf
MANY_PRODUCTS = 2**20


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), x (B, 1, C), without the cost of calling a module where that does no more than its product."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    n_rows = len(x)
    if weight.numel() >= LARGE_MATRIX and n_rows == 1 and weight.is_contiguous():
        return linear_by_blocks(x, weight, bias)
    if n_rows >= MANY_ROWS and n_rows * weight.numel() >= MANY_PRODUCTS and weight.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # F.linear by oneDNN
    return F.linear(x, weight, bias)


BLOCK = 16  # rows of a matrix; many, so that there are enough for all threads


def linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of one row x (1, 1, C), for which W (K, C) is read in blocks of rows: see `_mkl_is_slow`."""
    n_whole = len(weight) // BLOCK * BLOCK  # rows in whole blocks
    blocks = weight[:n_whole].view(-1, BLOCK, weight.shape[1])
    column = x.mT.expand(len(blocks), -1, -1)  # (blocks, C, 1); of other strides MKL takes a slow way
    out = torch.bmm(blocks, column).view(1, 1, n_whole)
    if n_whole < len(weight):
        out = torch.cat((out, F.linear(x, weight[n_whole:])), -1)
    return out if bias is None else out + bias
