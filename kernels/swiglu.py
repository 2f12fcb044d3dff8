"""SwiGLU's elementwise part in Triton: the gate through SiLU, times up.

Forward, with σ the logistic function, elementwise (Shazeer 2020, arXiv:2002.05202):
    y = g σ(g) u
Backward:
    dg = dy u σ(g) (1 + g (1 − σ(g)))        du = dy g σ(g)

Memory traffic is all there is: forward reads g and u and writes y, backward reads dy, g and u and writes dg and du.
σ(g) is computed again backward, one exponential a number: to store it would be a sixth tensor to move, and to keep.

Tiling: gate and up are matrices whose rows may lie apart (two halves of one projection), so a program takes a block of
some rows by BLOCK columns, 4,096 numbers of each tensor. With 8 warps a thread has two 16-byte loads of each tensor in
flight and few registers, so a multiprocessor is full of threads: 128 KB on their way forward, 192 KB backward. BLOCK
divides the width, or nearly: lanes beyond the last column would have nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch


@triton.jit
def _offsets(row, column, stride):
    return row.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit(do_not_specialize=["n_rows"])  # one binary for all lengths
def _forward(Gate, Up, Y, n_rows, width, g_stride, u_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(width, BLOCK)  # neighbours in a row run side by side
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    gate = tl.load(Gate + _offsets(row, column, g_stride), mask=inside).to(tl.float32)
    up = tl.load(Up + _offsets(row, column, u_stride), mask=inside).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up  # (ROWS, BLOCK)
    tl.store(Y + _offsets(row, column, width), y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(DY, Gate, Up, DGate, DUp, n_rows, width, dy_stride, g_stride, u_stride,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    across = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    dy = tl.load(DY + _offsets(row, column, dy_stride), mask=inside).to(tl.float32)
    gate = tl.load(Gate + _offsets(row, column, g_stride), mask=inside).to(tl.float32)
    up = tl.load(Up + _offsets(row, column, u_stride), mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))  # (ROWS, BLOCK)
    out = _offsets(row, column, width)
    tl.store(DGate + out, dgate.to(DGate.dtype.element_ty), mask=inside)
    tl.store(DUp + out, (dy * gate * sigmoid).to(DUp.dtype.element_ty), mask=inside)


def block_settings(op: str, width: int, device: torch.device) -> dict:
    """Rows and columns of a block: the widest columns, 2,048 to 256, that leave less than a 16th of them idle."""
    padded = {columns: launch.cdiv(width, columns) * columns for columns in (2048, 1024, 512)}
    columns = next((columns for columns in padded if padded[columns] <= width * 17 / 16), 256)
    columns = min(columns, launch.next_power_of_2(width))
    numbers = 65536 if launch.INTERPRETED else 4096  # the interpreter's cost is by program
    return launch.settings(op, (width,), device, {"ROWS": numbers // columns, "BLOCK": columns, "num_warps": 8})


def _run(kernel, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Start a kernel on all blocks: inputs as matrices (N, F), outputs contiguous."""
    matrices = [launch.rows(x) for x in inputs]
    n, width = matrices[0].shape
    strides = [matrix.stride(0) for matrix in matrices]
    settings = block_settings(op, width, matrices[0].device)
    blocks = launch.cdiv(n, settings["ROWS"]) * launch.cdiv(width, settings["BLOCK"])
    if blocks:
        launch.run(kernel, (blocks,), *matrices, *outputs, n, width, *strides, **settings)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y for gate, up (..., F)."""
    y = launch.empty_like(gate)
    _run(_forward, "swiglu_forward", [gate, up], [y])
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) from dy (..., F)."""
    dgate = launch.empty_like(gate)
    dup = launch.empty_like(up)
    _run(_backward, "swiglu_backward", [dy, gate, up], [dgate, dup])
    return dgate, dup


_op = torch.library.custom_op("minillm::swiglu", forward, mutates_args=())
_backward_op = torch.library.custom_op("minillm::swiglu_backward", backward, mutates_args=())


@_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@_backward_op.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu_backward = launch.op(_backward_op, backward)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu = launch.op(_op, forward, _setup, _gradient)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up: see `kernels.reference.swiglu`.

    gate, up: (..., F) of one shape and dtype, fp32, bf16 or fp16, any strides; computed in fp32. Returns gate's shape
    and dtype. Raises ValueError for two shapes.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return _swiglu(gate, up)
