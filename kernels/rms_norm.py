"""RMSNorm in Triton, alone and joined with the residual addition before it.

Forward, for each row of x (N, C):
    r = 1 / √(mean(x²) + ε)        y = x r w
and with a residual branch: s = x + delta, then y from s. Both s and y are returned.

Backward, with g = dy w:
    dx = r g − x r³ mean(g x)       dw = Σ_rows dy x r

Memory traffic is all there is: forward reads x and writes y (with the branch: reads two, writes two), backward reads
x and dy and writes dx (twice, if delta has another dtype, as under autocast: 2 bytes more, in place of 6 for a cast).
Everything else is kept in registers, so a row is read once. r is kept (4 bytes a row).

Tiling: a program takes as many whole rows as make about 8,192 numbers, so that each thread has several independent
16-byte loads in flight, and the sum over a row never leaves the block. Backward, a few programs for each
multiprocessor walk over all rows and add up dw in registers; each writes its part once, and the parts are summed in
a second, tiny pass: no atomics, the same bits each time. Rows wider than 8,192 would not fit the registers that way:
there a program walks over one row twice, in blocks of 8,192 columns, first for mean(g x), then for dx, finding x and
dy in the cache; and dw is a pass of its own over blocks of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch

FUSED_WIDTH = 8192  # up to here one backward kernel computes dx and dw


@triton.jit(do_not_specialize=["n_rows"])  # one binary for all lengths
def _forward(X, Delta, W, Sum, Y, R, n_rows, width, x_stride, d_stride, eps,
             ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    if ADD:
        x += tl.load(Delta + row[:, None] * d_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(Sum.dtype.element_ty)
        tl.store(Sum + row[:, None] * width + column[None, :], rounded, mask=inside)
        x = rounded.to(tl.float32)  # what backward will read
    r = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)  # (ROWS,)
    y = x * r[:, None] * w[None, :]
    tl.store(Y + row[:, None] * width + column[None, :], y.to(Y.dtype.element_ty), mask=inside)
    tl.store(R + row, r, mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(DY, DSum, X, W, R, DX, DDelta, DW, n_rows, width, dy_stride, ds_stride, x_stride,
              ADD: tl.constexpr, DELTA: tl.constexpr, WEIGHT: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)  # of this program's rows, added up at the end
    for begin in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n_rows)[:, None] & (column < width)[None, :]
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(R + row, mask=row < n_rows, other=0.0)[:, None]
        normed = x * r
        if WEIGHT:
            dw += dy * normed
        g = dy * w[None, :]
        dx = r * (g - normed * (tl.sum(g * normed, axis=1) / width)[:, None])
        if ADD:
            dx += tl.load(DSum + row[:, None] * ds_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        out = row[:, None] * width + column[None, :]
        tl.store(DX + out, dx.to(DX.dtype.element_ty), mask=inside)
        if DELTA:
            tl.store(DDelta + out, dx.to(DDelta.dtype.element_ty), mask=inside)
    if WEIGHT:
        part = DW + tl.program_id(0).to(tl.int64) * width + column
        tl.store(part, tl.sum(dw, axis=0), mask=column < width)


@triton.jit
def _backward_wide(DY, DSum, X, W, R, DX, DDelta, width, dy_stride, ds_stride, x_stride,
                   ADD: tl.constexpr, DELTA: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(R + row)

    # First walk over the row: mean(g n).
    products = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        products += dy * tl.load(W + column, mask=inside, other=0.0).to(tl.float32) * x
    mean = tl.sum(products, axis=0) * r / width

    # Second walk: dx.
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = dy * tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
        dx = r * (g - x * r * mean)
        if ADD:
            dx += tl.load(DSum + row * ds_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * width + column, dx.to(DX.dtype.element_ty), mask=inside)
        if DELTA:
            tl.store(DDelta + row * width + column, dx.to(DDelta.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_weight(DY, X, R, DW, n_rows, width, dy_stride, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dw alone, for rows too wide for `_backward`."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n_rows)[:, None] & (column < width)[None, :]
        dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dw += dy * x * tl.load(R + row, mask=row < n_rows, other=0.0)[:, None]
    part = DW + tl.program_id(0).to(tl.int64) * width + column
    tl.store(part, tl.sum(dw, axis=0), mask=column < width)


def forward_settings(width: int, device: torch.device) -> dict:
    """Rows and warps of the forward kernel: about 8,192 numbers a program, 32 a thread."""
    block = launch.next_power_of_2(width)
    numbers = 65536 if launch.INTERPRETED else 8192  # the interpreter's cost is by program
    rows = max(1, numbers // block)
    warps = min(32, max(4, rows * block // 1024))
    return launch.settings("rms_norm_forward", (width,), device, {"ROWS": rows, "num_warps": warps})


def backward_settings(width: int, two_dtypes: bool, device: torch.device) -> dict:
    """Rows and warps of the backward kernel, and programs for each multiprocessor.

    Four vectors of 16 numbers a thread fit in 96 registers, so 20 warps share a multiprocessor, and no more are
    started: the others would run after them, on a multiprocessor that is no longer full. Without the limit ptxas
    spills a few bytes to stay below 80.
    """
    block = launch.next_power_of_2(width)
    numbers = 65536 if launch.INTERPRETED else 2048
    rows = max(1, numbers // block)
    warps = min(16, max(4, rows * block // 512))
    default = {"ROWS": rows, "num_warps": warps, "PROGRAMS": 20 // warps, "maxnreg": 96}
    if two_dtypes:  # the gradient goes to two tensors: 16 registers more, or it spills
        default |= {"PROGRAMS": max(1, 16 // warps), "maxnreg": 112}
    return launch.settings("rms_norm_backward", (width, two_dtypes), device, default)


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, r) for x, delta (..., C): s and x alike, y in `dtype`, r (N,) fp32; s is empty without a delta."""
    matrix = launch.rows(x)  # (N, C)
    branch = matrix if delta is None else launch.rows(delta)
    n, width = matrix.shape
    y = launch.empty_like(x, dtype)
    s = x.new_empty(0) if delta is None else launch.empty_like(x)
    r = torch.empty(n, dtype=torch.float32, device=x.device)
    settings = forward_settings(width, x.device)
    if n:
        launch.run(
            _forward, (launch.cdiv(n, settings["ROWS"]),),
            matrix, branch, weight.contiguous(), s, y, r, n, width, matrix.stride(0), branch.stride(0), eps,
            ADD=delta is not None, BLOCK=launch.next_power_of_2(width), **settings,
        )  # fmt: skip
    return s, y, r


def backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, r: Tensor, need_weight: bool,
    delta_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dx in `delta_dtype`, dw) from dy (..., C), and ds where the sum itself was used.

    The second is empty without such a dtype, the third unless it is needed.
    """
    grad = launch.rows(dy)  # (N, C), as the next two
    matrix = launch.rows(x)
    sum_grad = grad if ds is None else launch.rows(ds)
    n, width = matrix.shape
    dx = launch.empty_like(x)
    ddelta = x.new_empty(0) if delta_dtype is None else launch.empty_like(x, delta_dtype)
    flags = dict(ADD=ds is not None, DELTA=delta_dtype is not None)
    weight = weight.contiguous()
    strides = grad.stride(0), sum_grad.stride(0), matrix.stride(0)

    # As many programs as run at once, or as have rows; each writes one part (C,) of dw.
    settings = dict(backward_settings(width, delta_dtype is not None, x.device))
    resident = settings.pop("PROGRAMS") * launch.multiprocessors(x.device)
    programs = min(resident, max(1, launch.cdiv(n, settings["ROWS"])))
    parts = torch.empty(programs if need_weight else 0, width, dtype=torch.float32, device=x.device)

    if width <= FUSED_WIDTH:
        launch.run(
            _backward, (programs,), grad, sum_grad, matrix, weight, r, dx, ddelta, parts, n, width, *strides,
            **flags, WEIGHT=need_weight, BLOCK=launch.next_power_of_2(width), **settings,
        )  # fmt: skip
    elif n:
        launch.run(
            _backward_wide, (n,), grad, sum_grad, matrix, weight, r, dx, ddelta, width, *strides,
            **flags, BLOCK=FUSED_WIDTH, num_warps=16,
        )  # fmt: skip
    if need_weight and width > FUSED_WIDTH:
        launch.run(
            _backward_weight, (programs, launch.cdiv(width, 1024)),
            grad, matrix, r, parts, n, width, grad.stride(0), matrix.stride(0), ROWS=2, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    dw = parts.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)
    return dx, ddelta, dw


_op = torch.library.custom_op("minillm::rms_norm", forward, mutates_args=())
_backward_op = torch.library.custom_op("minillm::rms_norm_backward", backward, mutates_args=())


@_op.register_fake
def _(x, delta, weight, eps, dtype):
    rows = x.numel() // x.shape[-1]
    s = x.new_empty(0 if delta is None else x.shape)
    return s, x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.float32)


@_backward_op.register_fake
def _(dy, ds, x, weight, r, need_weight, delta_dtype=None):
    ddelta = x.new_empty(0 if delta_dtype is None else x.shape, dtype=delta_dtype or x.dtype)
    return x.new_empty(x.shape), ddelta, weight.new_empty(weight.shape if need_weight else 0)


_rms_norm_backward = launch.op(_backward_op, backward)


def _setup(ctx, inputs, output):
    x, delta, weight, _, _ = inputs
    s, _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)
    ctx.delta_dtype = None if delta is None else delta.dtype
    normed = x if delta is None else s
    ctx.save_for_backward(normed, weight, r)


def _gradient(ctx, ds, dy, _):
    x, weight, r = ctx.saved_tensors
    if dy is None:  # only the sum was used
        ddelta = None if ctx.delta_dtype is None or ds is None else ds.to(ctx.delta_dtype)
        return ds, ddelta, None, None, None

    need_weight = ctx.needs_input_grad[2]
    if ctx.delta_dtype is None:  # a norm alone
        dx, _, dw = _rms_norm_backward(dy, None, x, weight, r, need_weight, None)
        ddelta = None
    elif ctx.delta_dtype == x.dtype:  # dx serves both
        dx, _, dw = _rms_norm_backward(dy, ds, x, weight, r, need_weight, None)
        ddelta = dx
    else:
        dx, ddelta, dw = _rms_norm_backward(dy, ds, x, weight, r, need_weight, ctx.delta_dtype)
    return dx, ddelta, dw if need_weight else None, None, None


_rms_norm = launch.op(_op, forward, _setup, _gradient)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) · weight over the last dimension: see `kernels.reference.rms_norm`.

    x: (..., C) fp32, bf16 or fp16, any strides, C ≤ 32,768; weight: (C,). Sums in fp32. Returns x's shape, in
    `dtype` (default: x's own). Raises ValueError for a weight of another shape.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} needs a weight ({x.shape[-1]},), not {tuple(weight.shape)}")
    return _rms_norm(x, None, weight, eps, dtype or x.dtype)[1]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm(x + delta)) in one pass: see `kernels.reference.add_rms_norm`.

    x, delta: (..., C), their dtypes may differ; the sum has x's dtype, the normed one `dtype` (default: x's).
    Raises ValueError for shapes that do not go together.
    """
    if delta.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: x {tuple(x.shape)}, delta {tuple(delta.shape)}, weight {tuple(weight.shape)}; one shape "
            "(..., C) and (C,) are needed"
        )
    s, y, _ = _rms_norm(x, delta, weight, eps, dtype or x.dtype)
    return s, y
