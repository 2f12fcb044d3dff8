"""How attention's kernels read (rows, D) tiles of (B, T, H, D) tensors, and in which order blocks are computed.

On Hopper and datacenter Blackwell a tile comes by a tensor descriptor: the copy engine computes the addresses. (An
earlier, throw-away version of the forward kernel did so too and was 12 to 24 % faster than FlexAttention on an H100;
this version has not run on a GPU yet.) The tensor is described as a matrix of B·T rows, a head being a range of its
columns. Elsewhere, and for tensors that are no such matrix, a tile comes by pointers.

Rows beyond T are zeros by pointers, by descriptors those of the batch's next sequence, which the kernels multiply by
zeros. So no finite number of one sequence reaches another; but 0 · NaN and 0 · ∞ are NaN: where T is no multiple of
the block, what is not finite in a sequence makes NaN of results of the one before it, too. (A descriptor of three
dimensions would give zeros: with it the kernel of the keys' gradients spills at head size 128, compiled for an H100.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.shared import launch
from kernels.shared.proxy_fence import fence_copies


def describable(width: int, *tensors: Tensor) -> bool:
    """Whether the copy engine can read all of these (B, T, H, D) in tiles of `width` columns."""

    def as_matrix(x: Tensor) -> bool:
        batch, length, heads, size = x.shape
        stride_b, row, stride_h, step = x.stride()
        unit = 16 // x.element_size()  # rows must begin at multiples of 16 bytes
        matrix = step == 1 and row > 0 and (batch == 1 or stride_b == length * row)
        inside_a_row = (heads - 1) * stride_h + size <= row
        return matrix and inside_a_row and size == width and row % unit == 0 and x.data_ptr() % 16 == 0

    # On consumer Blackwell (sm_120) the same blocks spill when they come by descriptors.
    return 90 <= launch.architecture(tensors[0].device) < 120 and all(map(as_matrix, tensors))


def tile_source(x: Tensor, rows: int, tma: bool) -> TensorDescriptor | Tensor:
    """What `load_tile` reads from: a descriptor of x (B, T, H, D) in tiles of (rows, D), or x itself."""
    if not tma:
        return x
    batch, length, heads, size = x.shape
    shape = [batch * length, (heads - 1) * x.stride(2) + size]
    return TensorDescriptor(x, shape, [x.stride(1), 1], [rows, size])


@triton.jit
def load_tile(X, b, row, h, n_rows, stride_b, stride_t, stride_h,
              ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """X[b, row : row + ROWS, h, :] as (ROWS, BLOCK_D), with zeros beyond D."""
    if TMA:
        tile = X.load([b * n_rows + row, h * stride_h])
    else:
        t = row + tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        at = X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64)[:, None] * stride_t + d[None, :]
        inside = (t < n_rows)[:, None]
        if D != BLOCK_D:
            inside = inside & (d < D)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
        fence_copies(X.dtype.element_ty != tl.float32)
    return tile


@triton.jit
def store_tile(X, x, b, row, h, n_rows, heads, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the (ROWS, BLOCK_D) tile x into a contiguous X[b, row : row + ROWS, h, :], without what is outside."""
    t = row + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = X + ((b.to(tl.int64) * n_rows + t[:, None]) * heads + h) * D + d[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(t < n_rows)[:, None] & (d < D)[None, :])


@triton.jit
def place(n_blocks, group, LAST_FIRST: tl.constexpr):
    """The block and the (row of the batch, head), as one number, that this program computes.

    Programs run over the heads of a group first, then over blocks, so that a group shares what it reads.
    """
    program = tl.program_id(0)
    g = program // (group * n_blocks)
    rest = program - g * group * n_blocks
    block = rest // group
    if LAST_FIRST:
        block = n_blocks - 1 - block
    return block, g * group + rest % group


def heads_together(n_blocks: int, n_heads: int, device: torch.device) -> int:
    """Heads in a group: about as many as give each multiprocessor one block, but a divisor of their number."""
    wanted = max(1, min(n_heads, launch.multiprocessors(device) // max(1, n_blocks)))
    return next(n for n in range(wanted, 0, -1) if n_heads % n == 0)


@triton.jit
def scores(a, b, start):
    """a bᵀ + start, fp32 (M, N), for a (M, D) and b (N, D).

    fp32 is multiplied without tensor cores, where Triton holds all D numbers of a row in registers and spills: there D
    is cut into pieces of 16, multiplied as a batch and then added.
    """
    if a.dtype == tl.float32 and a.shape[1] > 16:
        PIECES: tl.constexpr = a.shape[1] // 16
        # (M, D) → (PIECES, M, 16) and (N, D) → (PIECES, 16, N)
        pieces_a = tl.permute(tl.reshape(a, [a.shape[0], PIECES, 16]), (1, 0, 2))
        pieces_b = tl.permute(tl.reshape(b, [b.shape[0], PIECES, 16]), (1, 2, 0))
        out = start + tl.sum(tl.dot(pieces_a, pieces_b, input_precision="ieee"), axis=0)
    else:
        out = tl.dot(a, b.T, start, input_precision="ieee")
    return out
