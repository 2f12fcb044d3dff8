"""Linear layer and cross-entropy in one, a chunk of rows at a time: the N × V logits never exist together.

Forward, for each row i of z = cap(x Wᵀ), with targets y, z-loss coefficient ζ and row weights m:
    L_i = lse_i − z_i,y + ζ lse_i²        lse_i = log Σ_v exp z_iv        loss = Σ m_i L_i
Backward, with p_iv = exp(z_iv − lse_i) and the soft cap z = c tanh(u / c):
    g_iv = ∂loss/∂u_iv = m_i (p_iv (1 + 2 ζ lse_i) − [v = y_i]) (1 − (z_iv / c)²)
    dx = g W        dW = gᵀ x
(z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.)

The loss is the last thing a model computes, so g is known up to one scalar as soon as z is: a chunk of logits is turned
into its gradient at once, in its own memory, and both gradients are made from it. Backward only multiplies by the
scalar. A chunk takes three matrix products, which torch (cuBLAS) runs at its peak, and between the first and the
others one kernel of ours: a program reads a row once for its log-sum-exp (online: Milakov & Gimelshein 2018,
arXiv:1805.02867), and once more to write the gradient over it, backwards, since the end is what a cache still holds.
By its registers an H100 runs three programs a multiprocessor at V = 32,000, which hold 25 MB of rows of the 50 MB of
its L2 cache, and two at 128,256, 68 MB, of which the last half or so is still there.

What a chunk of R rows costs, on an H100 (132 multiprocessors, 3 TB/s, about 700 TFLOP/s), per 128 × 256 tile of dW:
    memory         2 R V bytes for the chunk
    dW's sums      read and written in fp32 once a chunk, 8 C V bytes: by tile 262 KB, 12 µs at a multiprocessor's share
                   of the bandwidth, against R / 81 µs for the products: as long as they at R = 1,024, half at 2,048
    waves of dx    (R / 128) (C / 256) tiles: at C = 2,048, R = 2,048 makes 128, which fill 97 % of a wave, R = 2,816
                   176, 67 % of two waves (at C = 768 and R = 1,152 only 27: cuBLAS has to split the sum over V)
    waves of z, dW (R / 128) (V / 256) and (V / 128) (C / 256) tiles: 6 waves or more at V = 32,000, 95 % full
So R should be as large as memory allows, down to full waves of dx where it takes more than one. Memory: dW's sums take
4 C V bytes, dx 2 N C, and at the end dW in 16 bits 2 C V more, when the chunk is gone. A chunk of (V + N) C numbers
therefore adds at most the size of dx to a peak that is there anyway: R is below C (1 + N / V). Peak over x and W, in
MiB, with the gradients (H100 rows of 16,384 tokens, 16-bit; counted, not measured):
    C 768, V 32,000: R 1,152, 188        2,048, 32,000: R 2,048, 439
    2,048, 128,256:  R 2,048, 1,567      4,096, 128,256: R 4,096, 3,134
Bytes moved for a logit: written by the first product, read and written here, read by both others, 10 in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch
from kernels.shared.tanh import tanh

IGNORED = -100  # the target of a row that never counts, as in torch
SMALLEST_CHUNK = 1 << 25  # numbers: 64 MiB in 16 bits, 1,024 rows at V = 32,000, however few tokens there are
HEADROOM = 256.0  # fp16: the largest row weight, as the gradient's kernel sees it


@triton.jit
def _logits(Logits, row, column, live, vocabulary, stride, softcap, beyond, CAPPED: tl.constexpr):
    """A block of capped logits in fp32: `beyond` after the vocabulary's end, zeros in rows that do not count."""
    at = Logits + row[:, None] * stride + column[None, :]
    # Rows are padded to `stride`, a multiple of 64: this mask lets the loads stay 16 bytes wide for any vocabulary.
    z = tl.load(at, mask=live[:, None] & (column < stride)[None, :], other=0.0).to(tl.float32)
    if CAPPED:
        z = softcap * tanh(z * (1.0 / softcap), Logits.dtype.element_ty == tl.float32)
    return tl.where((column < vocabulary)[None, :], z, beyond)


@triton.jit(do_not_specialize=["n_rows"])  # one binary for all lengths
def _loss_and_gradient(Logits, Targets, Weights, Scales, Losses, Penalties, n_rows, vocabulary, stride, softcap, z_loss,
                       CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all that follows
    target = tl.load(Targets + row, mask=row < n_rows, other=-1)
    weight = tl.load(Weights + row, mask=row < n_rows, other=0.0)
    live = weight != 0.0
    row = row.to(tl.int64)

    # The target's logit, read before it is overwritten. NaN where a row counts but has no valid target.
    valid = live & (target >= 0) & (target < vocabulary)
    picked = tl.load(Logits + row * stride + target, mask=valid, other=float("nan")).to(tl.float32)
    if CAPPED:
        picked = softcap * tanh(picked * (1.0 / softcap), Logits.dtype.element_ty == tl.float32)

    # First reading of the rows: log-sum-exp, a block of columns at a time, and with it the loss.
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # Σ exp(z − largest)
    columns = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, vocabulary, 0)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        z = _logits(Logits, row, column, live, vocabulary, stride, softcap, float("-inf"), CAPPED)  # (ROWS, BLOCK)
        larger = tl.maximum(largest, tl.max(z, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger[:, None]), axis=1)
        largest = larger
    largest = tl.where(live, largest, 0.0)
    total = tl.where(live, total, 1.0)
    lse = largest + tl.log(total)
    penalty = z_loss * lse * lse
    tl.static_assert(penalty.dtype == tl.float32)  # Python's floats have come as fp32
    tl.store(Losses + row, tl.where(live, weight * (lse - picked), 0.0), mask=row < n_rows)
    tl.store(Penalties + row, tl.where(live, weight * penalty, 0.0), mask=row < n_rows)

    # Second reading: each logit makes place for its gradient.
    if GRADIENT:
        scale = tl.load(Scales + row, mask=row < n_rows, other=0.0)
        share = (1.0 + 2.0 * z_loss * lse) / total
        blocks = tl.cdiv(stride, BLOCK)
        for block in range(0, blocks):  # backwards: what was read last is most likely still in a cache
            column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            z = _logits(Logits, row, column, live, vocabulary, stride, softcap, 0.0, CAPPED)  # (ROWS, BLOCK)
            g = tl.exp(z - largest[:, None]) * share[:, None]  # closer than exp(z − lse): no rounded logarithm
            g -= tl.where(column[None, :] == target[:, None], 1.0, 0.0)
            if CAPPED:
                t = z * (1.0 / softcap)
                g *= 1.0 - t * t
            g = tl.where(live[:, None] & (column < vocabulary)[None, :], g * scale[:, None], 0.0)
            at = Logits + row[:, None] * stride + column[None, :]
            tl.store(at, g.to(Logits.dtype.element_ty), mask=(row < n_rows)[:, None] & (column < stride)[None, :])


@triton.jit
def _scaled(From, Factor, To, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(Factor).to(tl.float32)
    values = tl.load(From + index, mask=index < size).to(tl.float32)
    tl.store(To + index, (values * factor).to(To.dtype.element_ty), mask=index < size)


def chunk_rows(n: int, width: int, vocabulary: int, multiprocessors: int) -> int:
    """Rows of a chunk, in tiles of 128: logits of as many numbers as both gradients, but full waves (see above)."""
    numbers = max((vocabulary + n) * width, SMALLEST_CHUNK)
    tiles = max(1, numbers // vocabulary // 128)  # of 128 rows
    tiles_across = launch.cdiv(width, 256)  # of dx, whose tiles are 128 x 256
    waves = tiles * tiles_across // multiprocessors
    if tiles * tiles_across > multiprocessors:
        tiles = max(1, waves * multiprocessors // tiles_across)
    n_chunks = max(1, launch.cdiv(n, 128 * tiles))
    return 128 * launch.cdiv(n, 128 * n_chunks)  # the same for every chunk


def kernel_settings(vocabulary: int, capped: bool, device: torch.device) -> dict:
    """Numbers at a time and warps of the kernel between the products, a row a program.

    16 numbers a thread, 8 with a soft cap, which needs more registers for each. Few, large programs, so that most of
    the rows being read stay in the L2 cache (see above).
    """
    largest = 8192 if vocabulary <= 65536 else 16384
    block = max(128, min(launch.next_power_of_2(vocabulary), largest))
    warps = min(32, max(4, block // 512))
    if capped:
        block = max(128, block // 2)
    default = {"ROWS": 1, "BLOCK": block, "num_warps": warps}
    if launch.INTERPRETED:  # its cost is by program
        default["ROWS"] = max(1, min(64, 65536 // default["BLOCK"]))
    return launch.settings("linear_cross_entropy", (vocabulary, capped), device, default)


def waiting_dtype(own: torch.dtype, product: torch.dtype) -> torch.dtype:
    """What a gradient waits in for backward: its tensor's own dtype if the products have that too, else fp32.

    fp16 ends at 65,504, and no loss scale reaches the sums over rows before backward: there it is fp32 as well.
    """
    return torch.float32 if own != product or own == torch.float16 else own


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """out ← beta out + a b in place; out in a's dtype or in fp32. With beta 0, what was there is not read.

    In place, so that autocast, which would round the sums, does not step in.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.device.type != "cuda":  # there torch has no product of 16-bit matrices in fp32
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
    else:  # sums in fp32 are taken since pytorch#167931, which is older than torch 2.11, the oldest we run on
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, softcap: float | None, z_loss: float,
    dtype: torch.dtype, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the z-loss in it, and the loss's gradients by x and weight, in `waiting_dtype`, empty unless needed."""
    n, width = x.shape
    vocabulary = weight.shape[0]
    device = x.device
    w = weight.to(dtype)  # (V, C)
    targets = targets.contiguous()
    weights, scales, unit = row_weights(targets, mask, dtype)

    # What the chunks are written to: the gradients, and each row's cross-entropy and z-loss.
    rows_a_chunk = min(n, chunk_rows(n, width, vocabulary, launch.multiprocessors(device)))
    dx = torch.empty((n, width) if need_x else 0, dtype=waiting_dtype(x.dtype, dtype), device=device)
    # One chunk needs no sum over chunks; no chunk at all writes nothing.
    dw_dtype = waiting_dtype(weight.dtype, dtype) if rows_a_chunk == n else torch.float32
    make = torch.empty if n else torch.zeros
    dw = make((vocabulary, width) if need_weight else 0, dtype=dw_dtype, device=device)
    losses = torch.empty(n, dtype=torch.float32, device=device)
    penalties = torch.empty_like(losses)

    # One buffer for the logits of each chunk in turn, rows padded so that they begin at multiples of 128 bytes.
    stride = launch.cdiv(vocabulary, 64) * 64
    logits = torch.empty(rows_a_chunk, stride, dtype=dtype, device=device)
    settings = kernel_settings(vocabulary, softcap is not None, device)

    for begin in range(0, n, max(1, rows_a_chunk)):
        part = slice(begin, min(n, begin + rows_a_chunk))
        x_part = x[part].to(dtype)  # (R, C)
        z = logits[: part.stop - begin, :vocabulary]  # (R, V)
        _add_product(z, x_part, w.T, 0.0)
        launch.run(
            _loss_and_gradient, (launch.cdiv(len(z), settings["ROWS"]),),
            logits, targets[part], weights[part], scales[part], losses[part], penalties[part], len(z), vocabulary,
            stride, float(softcap or 1.0), float(z_loss),
            CAPPED=softcap is not None, GRADIENT=need_x or need_weight, **settings,
        )  # fmt: skip
        # z now holds the gradient of the logits
        if need_x:
            _add_product(dx[part], z, w, 0.0)
        if need_weight:
            _add_product(dw, z.T, x_part, 1.0 if begin else 0.0)

    logits = x_part = z = None  # all that holds the chunk, before dW in its own dtype needs as much
    if unit is not None:
        dx = dx.mul_(unit)
        dw = dw.mul_(unit)
    penalty = penalties.sum()
    return losses.sum() + penalty, penalty, dx, dw.to(waiting_dtype(weight.dtype, dtype))


def row_weights(targets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each row's weight (N,) fp32, that weight as the gradient's kernel sees it, and the unit of the second.

    fp16 knows nothing below 6e-8, and a probability times 1 / (number of tokens) is easily less. So there the kernel
    gets weights up to HEADROOM, and the gradients are multiplied by the unit at the end; otherwise the unit is None.
    """
    if mask is None:
        weights = torch.ones(len(targets), dtype=torch.float32, device=targets.device)
    else:
        weights = mask.to(torch.float32).contiguous()
    weights = weights.masked_fill(targets == IGNORED, 0.0)
    if dtype != torch.float16 or not len(targets):
        return weights, weights, None
    unit = weights.abs().amax().clamp_min(1e-30) / HEADROOM
    return weights, weights / unit, unit


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor in `dtype`, in one pass; the product is made in fp32. factor: one number."""
    out = launch.empty_like(gradient, dtype)
    block = 65536 if launch.INTERPRETED else 8192
    if out.numel():
        launch.run(_scaled, (launch.cdiv(out.numel(), block),), gradient, factor, out, out.numel(), BLOCK=block,
                   num_warps=8)  # fmt: skip
    return out


def backward(
    grad_loss: Tensor, dx: Tensor, dw: Tensor, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both gradients that `forward` kept, times the loss's own, in their tensors' dtypes."""
    return scaled(dx, grad_loss, x_dtype), scaled(dw, grad_loss, weight_dtype)


_op = torch.library.custom_op("minillm::linear_cross_entropy", forward, mutates_args=())
_backward_op = torch.library.custom_op("minillm::linear_cross_entropy_backward", backward, mutates_args=())


@_op.register_fake
def _(x, weight, targets, mask, softcap, z_loss, dtype, need_x, need_weight):
    dx = x.new_empty(x.shape if need_x else 0, dtype=waiting_dtype(x.dtype, dtype))
    dw = weight.new_empty(weight.shape if need_weight else 0, dtype=waiting_dtype(weight.dtype, dtype))
    return x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.float32), dx, dw


@_backward_op.register_fake
def _(grad_loss, dx, dw, x_dtype, weight_dtype):
    return dx.new_empty(dx.shape, dtype=x_dtype), dw.new_empty(dw.shape, dtype=weight_dtype)


_loss_backward = launch.op(_backward_op, backward)


def _setup(ctx, inputs, output):
    _, penalty, dx, dw = output
    ctx.mark_non_differentiable(penalty, dx, dw)
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.needs = inputs[-2:]
    ctx.save_for_backward(dx, dw)


def _gradient(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # dx and dw are numbers here: a second derivative would lack what they depend on
        raise RuntimeError("linear_cross_entropy has no second derivative (create_graph=True): use the reference")
    dx, dw = _loss_backward(grad_loss, *ctx.saved_tensors, *ctx.dtypes)
    need_x, need_weight = ctx.needs
    no_gradient = [None] * 7  # of the other arguments
    return dx if need_x else None, dw if need_weight else None, *no_gradient


_loss = launch.op(_op, forward, _setup, _gradient)


def _check(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    """Raise `ValueError` for what the kernels cannot take."""
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x (N, C) and weight (V, C): got {tuple(x.shape)} and {tuple(weight.shape)}")
    for name, rows in (("targets", targets), ("mask", mask)):
        if rows is not None and rows.shape != x.shape[:1]:
            raise ValueError(f"{name} {tuple(rows.shape)}: one for each row of x, ({x.shape[0]},); flatten both")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: the kernels take float32, float16 or bfloat16; cast it")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.reference.linear_cross_entropy`, in memory for one chunk of logits and both gradients.

    x: (N, C), weight: (V, C), fp32, bf16 or fp16, any strides; targets: (N,) int64; mask: (N,) bool or float.
    Under autocast the products run in its dtype; the loss, log-sum-exp and sums over rows are in fp32. Scalars are in
    fp32, NaN if a row that counts has a target outside 0…V − 1; raises `ValueError` for other shapes, dtypes.
    """
    _check(x, weight, targets, mask)
    dtype = launch.product_dtype(x)
    training = torch.is_grad_enabled()
    need_x = training and x.requires_grad
    need_weight = training and weight.requires_grad
    loss, penalty, *_ = _loss(x, weight, targets, mask, softcap, z_loss or 0.0, dtype, need_x, need_weight)
    return loss if z_loss is None else (loss, penalty)
