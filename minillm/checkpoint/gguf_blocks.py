"""Weights in blocks of 32, as GGUF keeps them in 8 or 4 bits: a scale in 16 bits for each block, and steps of it.

    Q8_0   34 bytes: scale d, then 32 steps of 8 bits, −127 to 127                weight = d · step
    Q4_0   18 bytes: scale d, then 32 steps of 4 bits, 0 to 15, two in a byte     weight = d · (step − 8)

The formulas are those of `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` in llama.cpp's ggml-quants.c; the result
has the same bits.
"""

import torch
from torch import Tensor

from minillm.base.errors import UserError

BLOCK = 32  # weights of a scale: consecutive ones of a row
HALF = BLOCK // 2


def pack_q8_0(weights: Tensor) -> Tensor:
    """Weights (…, N), N a multiple of 32 → bytes (…, N / 32 · 34), uint8."""
    blocks = weights.float().view(-1, BLOCK)  # (n, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127  # (n, 1)
    steps = blocks * _inverse(scale)

    # to the nearest step, halves away from zero
    whole = steps.abs().floor()
    whole += (steps.abs() - whole >= 0.5).float()
    steps = steps.sign() * whole
    return _joined(scale, steps.to(torch.int8).view(torch.uint8), weights)


def pack_q4_0(weights: Tensor) -> Tensor:
    """Weights (…, N), N a multiple of 32 → bytes (…, N / 32 · 18), uint8.

    The weight of largest magnitude, with its sign, becomes step −8: there are steps −8 to 7, and so that none is left
    over the scale may be negative.
    """
    blocks = weights.float().view(-1, BLOCK)  # (n, 32)
    largest = blocks.abs().argmax(1, keepdim=True)  # (n, 1), the first of several
    scale = blocks.gather(1, largest) / -8
    steps = (blocks * _inverse(scale) + 8.5).to(torch.uint8).clamp_max_(15)  # (n, 32)

    # two in a byte: number i of a block in bits 0 to 3, number i + 16 in bits 4 to 7
    pairs = steps[:, :HALF] | steps[:, HALF:] << 4  # (n, 16)
    return _joined(scale, pairs, weights)


PACK = {"Q8_0": pack_q8_0, "Q4_0": pack_q4_0}  # GGML's name → function


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for the scale 0 of a block of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _joined(scale: Tensor, steps: Tensor, weights: Tensor) -> Tensor:
    """Each block's scale (n, 1) in float16, then its steps (n, S) uint8, in rows like those of `weights`.

    Raises `UserError` for a scale that float16 does not hold.
    """
    stored = scale.half()
    if not stored.isfinite().all():
        raise UserError(f"weights up to {weights.abs().max():.3g} are beyond the scales of a block; choose --dtype")
    return torch.cat((stored.view(torch.uint8), steps), 1).view(*weights.shape[:-1], -1)
