"""Lesson 14: a kernel is a program for a block of the tensor, and softmax can be had block by block.

    python docs/course/blocks.py

Triton's interpreter runs the kernels on the CPU: slowly, but with the numbers that a GPU would have.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import lesson
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.shared.pipes import need_triton

if __name__ == "__main__":
    need_triton()

import triton
import triton.language as tl

EPS = 1e-5


@triton.jit
def rms_norm_kernel(X, W, Y, width, BLOCK: tl.constexpr):
    """y = x / √(mean(x²) + ε) · w, for one row of X (N, C): program n takes row n."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # BLOCK is a power of 2, the width need not be
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside, other=0.0)  # the only time that x is read
    r = tl.rsqrt(tl.sum(x * x) / width + 1e-5)
    w = tl.load(W + column, mask=inside, other=0.0)
    tl.store(Y + row * width + column, x * r * w, mask=inside)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel, started once for each row of x (N, C) fp32."""
    n_rows, width = x.shape
    y = torch.empty_like(x)
    rms_norm_kernel[(n_rows,)](x, weight, y, width, BLOCK=triton.next_power_of_2(width))
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """softmax(q kᵀ / √D) v, reading `block` keys at a time: no more than (Tq, block) scores exist at once.

    q: (Tq, D); k, v: (Tk, D); returns (Tq, D).
    """
    n_queries, size = q.shape
    top = q.new_full((n_queries, 1), float("-inf"))  # the largest score so far
    total = q.new_zeros(n_queries, 1)  # Σ e^(score − top)
    out = q.new_zeros(n_queries, size)  # Σ e^(score − top) v
    for begin in range(0, len(k), block):
        scores = q @ k[begin : begin + block].T / size**0.5  # (Tq, block)
        new_top = torch.maximum(top, scores.amax(1, keepdim=True))
        shrink = torch.exp(top - new_top)  # what was summed so far had a smaller top
        p = torch.exp(scores - new_top)  # (Tq, block)
        total = total * shrink + p.sum(1, keepdim=True)
        out = out * shrink + p @ v[begin : begin + block]
        top = new_top
    return out / total


class NumbersMoved(TorchDispatchMode):
    """Counts what torch's ops read and write: each op is a kernel, which has its tensors in memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(tensor.numel() for tensor in (*args, out) if isinstance(tensor, Tensor))
        return out


def main() -> None:
    chosen = lesson.options(__doc__, with_corpus=False)
    n_rows, n_keys = (4, 64) if chosen.quick else (64, 1024)
    torch.manual_seed(0)

    # RMSNorm, a program for each row; a width that is no power of 2
    x, weight = torch.randn(n_rows, 384), torch.rand(384)
    error = (rms_norm(x, weight) - F.rms_norm(x, (384,), weight, EPS)).abs().max()
    print(f"RMSNorm of {n_rows} × 384: largest difference from torch {error:.0e}")
    with NumbersMoved() as moved:
        _ = x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS) * weight
    fused = 2 * x.numel() + weight.numel()  # x read, y written
    print(f"numbers moved: {moved.count:,} op by op, {fused:,} in one kernel, {moved.count / fused:.1f} times fewer")

    # attention, whose result does not depend on the blocks
    q, k, v = (torch.randn(n_keys, 32, dtype=torch.float64) for _ in range(3))
    whole = F.scaled_dot_product_attention(q, k, v)
    for block in (n_keys, n_keys // 4, 17, 1):
        error = (attention(q, k, v, block) - whole).abs().max()
        print(f"attention, {block:4} keys a block: {n_keys * block:9,} scores at once, largest difference {error:.0e}")

    # what the running maximum is for
    large = 400 * q
    naive = torch.exp(large @ k.T / 32**0.5)
    naive = naive / naive.sum(1, keepdim=True) @ v
    error = (attention(large, k, v, 17) - F.scaled_dot_product_attention(large, k, v)).abs().max()
    lost = naive.isnan().any(1).double().mean()
    print(f"scores of thousands: {lost:.0%} of rows are NaN without a maximum; with it, largest difference {error:.0e}")


if __name__ == "__main__":
    lesson.run(main)
