"""Rotary position embedding in Triton, on queries and keys in one launch, alone or after QK-norm.

Forward, for each head x = (x₁, x₂) of D numbers in two halves, with the cos and sin of its token (D/2 numbers each):
    y₁ = x₁ cos − x₂ sin        y₂ = x₂ cos + x₁ sin
With QK-norm (Qwen3), x above is n w, where n = x r and r = 1 / √(mean(x²) + ε) over the head's D numbers.

Backward a rotation is undone by the opposite one, the same kernel with −sin. With QK-norm, dy turned back is the
gradient h of n w, and with g = h w:
    dx = r (g − n mean(g n))        dw = Σ_{tokens, heads} h n
r is computed again: x has to be read anyway, and n is needed whole.

Memory traffic is all there is: forward reads q and k and writes both; backward the same, with QK-norm it reads q and k
and their gradients and writes gradients. cos and sin are read once a token, for all of its heads.

Tiling: a program takes all heads of a few tokens, of q and of k, which have the angles in common, as two blocks
(tokens, heads, D/2) for each of q and k, the two halves of the heads: what is to be paired lies in one thread, nothing
is exchanged. It loads all it needs first, 24 to 48 numbers a thread in 16-byte loads, then computes and stores. A
token with very many heads is shared among programs. Backward with QK-norm, a few programs for each multiprocessor walk
over all tokens and add up dw in registers; each writes its part once, and the parts are summed in a second, tiny
pass: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch


@triton.jit
def _heads(token, tokens, length, n_heads, b_stride, t_stride, h_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Offsets (TOKENS, HEADS, BLOCK) of this program's heads' first halves, and which of them exist."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    begin = (token // length).to(tl.int64) * b_stride + (token % length).to(tl.int64) * t_stride
    offset = begin[:, None] + head.to(tl.int64)[None, :] * h_stride
    inside = ((token < tokens)[:, None] & (head < n_heads)[None, :])[:, :, None] & (column < HALF)[None, None, :]
    return offset[:, :, None] + column[None, None, :], inside


@triton.jit
def _load(X, token, tokens, length, n_heads, b_stride, t_stride, h_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """The heads' two halves."""
    offset, inside = _heads(token, tokens, length, n_heads, b_stride, t_stride, h_stride, HEADS, HALF, BLOCK)
    first = tl.load(X + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(X + offset + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second  # (TOKENS, HEADS, BLOCK) each


@triton.jit
def _store(X, token, tokens, n_heads, first, second, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Store two halves into X, which is contiguous."""
    row = n_heads * 2 * HALF
    offset, inside = _heads(token, tokens, 1, n_heads, row, row, 2 * HALF, HEADS, HALF, BLOCK)
    tl.store(X + offset, first.to(X.dtype.element_ty), mask=inside)
    tl.store(X + offset + HALF, second.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _angles(Cos, Sin, token, tokens, length, b_stride, BACK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of the tokens' angles, (TOKENS, 1, BLOCK), or of the opposite angles: from contiguous tables."""
    column = tl.arange(0, BLOCK)
    row = (token // length).to(tl.int64) * b_stride + (token % length).to(tl.int64) * HALF
    inside = (token < tokens)[:, None] & (column < HALF)[None, :]
    cos = tl.load(Cos + row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(Sin + row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    cos = cos[:, None, :]
    sin = sin[:, None, :]
    if BACK:
        sin = -sin
    return cos, sin


@triton.jit
def _weight(W, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The two halves of a norm's weight, (1, 1, BLOCK) each."""
    column = tl.arange(0, BLOCK)[None, None, :]
    first = tl.load(W + column, mask=column < HALF, other=0.0).to(tl.float32)
    second = tl.load(W + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _norm(first, second, eps, HALF: tl.constexpr):
    """n in two halves, and r (TOKENS, HEADS, 1), which is finite for zeros even if eps is 0: padded heads stay 0."""
    square = tl.sum(first * first + second * second, axis=2, keep_dims=True) / (2 * HALF)
    r = tl.rsqrt(tl.maximum(square + eps, 1e-37))
    return first * r, second * r, r


@triton.jit(do_not_specialize=["tokens", "length"])  # one binary for all lengths
def _forward(Q, K, Cos, Sin, QWeight, KWeight, QOut, KOut, tokens, length, q_heads, k_heads, qb, qt, qh, kb, kt, kh,
             table_stride, eps, NORM: tl.constexpr, BACK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
             TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr):  # fmt: skip
    # All loads first: q and k (TOKENS, heads, BLOCK) in halves 1 and 2, and the angles (TOKENS, 1, BLOCK).
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    q1, q2 = _load(Q, token, tokens, length, q_heads, qb, qt, qh, Q_HEADS, HALF, BLOCK)
    k1, k2 = _load(K, token, tokens, length, k_heads, kb, kt, kh, K_HEADS, HALF, BLOCK)
    cos, sin = _angles(Cos, Sin, token, tokens, length, table_stride, BACK, HALF, BLOCK)
    if NORM:
        w1, w2 = _weight(QWeight, HALF, BLOCK)
        v1, v2 = _weight(KWeight, HALF, BLOCK)
        q1, q2, _ = _norm(q1, q2, eps, HALF)
        k1, k2, _ = _norm(k1, k2, eps, HALF)
        q1 = q1 * w1
        q2 = q2 * w2
        k1 = k1 * v1
        k2 = k2 * v2
    q1, q2 = _turn(q1, q2, cos, sin)
    _store(QOut, token, tokens, q_heads, q1, q2, Q_HEADS, HALF, BLOCK)
    k1, k2 = _turn(k1, k2, cos, sin)
    _store(KOut, token, tokens, k_heads, k1, k2, K_HEADS, HALF, BLOCK)


@triton.jit
def _norm_gradient(h1, h2, x1, x2, w1, w2, eps, HALF: tl.constexpr):
    """dx and each head's part of dw, in halves, from h, the gradient of n w."""
    n1, n2, r = _norm(x1, x2, eps, HALF)
    g1, g2 = h1 * w1, h2 * w2
    mean = tl.sum(g1 * n1 + g2 * n2, axis=2, keep_dims=True) / (2 * HALF)
    return r * (g1 - n1 * mean), r * (g2 - n2 * mean), h1 * n1, h2 * n2


@triton.jit(do_not_specialize=["tokens", "length"])  # one binary for all lengths
def _backward_norm(DQOut, DKOut, Q, K, Cos, Sin, QWeight, KWeight, DQ, DK, DW, tokens, length, q_heads, k_heads,
                   dqb, dqt, dqh, dkb, dkt, dkh, qb, qt, qh, kb, kt, kh, table_stride, eps,
                   HALF: tl.constexpr, BLOCK: tl.constexpr,
                   TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr):  # fmt: skip
    w1, w2 = _weight(QWeight, HALF, BLOCK)
    v1, v2 = _weight(KWeight, HALF, BLOCK)
    # Gradients of q's weight w and of k's weight v, added up over all tokens of this program.
    dw1 = tl.zeros([TOKENS, Q_HEADS, BLOCK], tl.float32)
    dw2 = tl.zeros([TOKENS, Q_HEADS, BLOCK], tl.float32)
    dv1 = tl.zeros([TOKENS, K_HEADS, BLOCK], tl.float32)
    dv2 = tl.zeros([TOKENS, K_HEADS, BLOCK], tl.float32)
    for begin in range(tl.program_id(0) * TOKENS, tokens, tl.num_programs(0) * TOKENS):
        token = begin + tl.arange(0, TOKENS)
        h1, h2 = _load(DQOut, token, tokens, length, q_heads, dqb, dqt, dqh, Q_HEADS, HALF, BLOCK)
        q1, q2 = _load(Q, token, tokens, length, q_heads, qb, qt, qh, Q_HEADS, HALF, BLOCK)
        i1, i2 = _load(DKOut, token, tokens, length, k_heads, dkb, dkt, dkh, K_HEADS, HALF, BLOCK)
        k1, k2 = _load(K, token, tokens, length, k_heads, kb, kt, kh, K_HEADS, HALF, BLOCK)
        cos, sin = _angles(Cos, Sin, token, tokens, length, table_stride, True, HALF, BLOCK)
        h1, h2 = _turn(h1, h2, cos, sin)  # h: the gradient of n w, for q
        q1, q2, part1, part2 = _norm_gradient(h1, h2, q1, q2, w1, w2, eps, HALF)
        dw1 += part1
        dw2 += part2
        _store(DQ, token, tokens, q_heads, q1, q2, Q_HEADS, HALF, BLOCK)
        i1, i2 = _turn(i1, i2, cos, sin)  # the same for k
        k1, k2, part1, part2 = _norm_gradient(i1, i2, k1, k2, v1, v2, eps, HALF)
        dv1 += part1
        dv2 += part2
        _store(DK, token, tokens, k_heads, k1, k2, K_HEADS, HALF, BLOCK)

    # This program's part of the weights' gradients: w in halves, v in halves.
    column = tl.arange(0, BLOCK)
    part = DW + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 4 * HALF + column
    tl.store(part, tl.sum(tl.sum(dw1, axis=0), axis=0), mask=column < HALF)
    tl.store(part + HALF, tl.sum(tl.sum(dw2, axis=0), axis=0), mask=column < HALF)
    tl.store(part + 2 * HALF, tl.sum(tl.sum(dv1, axis=0), axis=0), mask=column < HALF)
    tl.store(part + 3 * HALF, tl.sum(tl.sum(dv2, axis=0), axis=0), mask=column < HALF)


def block_settings(op: str, q_heads: int, k_heads: int, size: int, device: torch.device) -> dict:
    """Tokens, heads of q and k, and warps of a program: 3,072 to 6,144 numbers for 4 warps, 24 to 48 a thread.

    Half as many backward with QK-norm, where x, its gradient and dw are held at the same time: up to 128 registers,
    and so 16 warps a multiprocessor, no more of which are started. Heads are shared among programs where those of q
    alone, padded to a power of two, exceed two thirds of it.
    """
    norm_backward = op == "rope_norm_backward"
    most = 3072 if norm_backward else 6144  # numbers
    if launch.INTERPRETED:
        most = 98304  # its cost is by program

    # Heads: all of them, or what q alone may take; k's are shared among as many programs as q's.
    width = 2 * launch.next_power_of_2(size // 2)
    q_tile = min(launch.next_power_of_2(q_heads), launch.last_power_of_2(most * 2 // 3 // width))
    parts = launch.cdiv(q_heads, q_tile)
    k_tile = launch.next_power_of_2(launch.cdiv(k_heads, parts))

    # Tokens: as many as there is room for, one at least.
    numbers = (q_tile + k_tile) * width
    tokens = launch.last_power_of_2(max(1, most // numbers))
    warps = 4 if numbers <= most else 8
    default = {"TOKENS": tokens, "Q_HEADS": q_tile, "K_HEADS": k_tile, "num_warps": warps}
    if norm_backward:
        default["PROGRAMS"] = 16 // warps
    return launch.settings(op, (q_heads, k_heads, size), device, default)


def _side_by_side(x: Tensor) -> Tensor:
    """x (B, T, H, D) with the numbers of a head side by side: itself or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(op: str, q: Tensor, k: Tensor, cos: Tensor) -> tuple[tuple[int, ...], int, tuple[int, int], dict]:
    """What all kernels share: sizes, the stride of the tables' batch, the grid over all tokens and heads, settings."""
    batch, length, q_heads, size = q.shape
    k_heads = k.shape[2]
    half = size // 2
    sizes = batch * length, length, q_heads, k_heads
    table_stride = 0 if cos.dim() == 2 else length * half  # 0: all rows of the batch share the tables
    settings = dict(block_settings(op, q_heads, k_heads, size, q.device))
    settings |= {"HALF": half, "BLOCK": launch.next_power_of_2(half)}
    parts = max(launch.cdiv(q_heads, settings["Q_HEADS"]), launch.cdiv(k_heads, settings["K_HEADS"]))
    grid = launch.cdiv(batch * length, settings["TOKENS"]), parts
    return sizes, table_stride, grid, settings


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, back: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k, normed where there are weights, and turned; back: by the opposite angles."""
    q = _side_by_side(q)
    k = _side_by_side(k)
    cos = cos.contiguous()
    sin = sin.contiguous()
    weights = [None if weight is None else weight.contiguous() for weight in (q_weight, k_weight)]
    q_out = launch.empty_like(q)
    k_out = launch.empty_like(k)
    sizes, table_stride, grid, settings = _sizes("rope", q, k, cos)
    if sizes[0]:
        launch.run(
            _forward, grid, q, k, cos, sin, *weights, q_out, k_out, *sizes,
            *q.stride()[:3], *k.stride()[:3], table_stride, eps, NORM=q_weight is not None, BACK=back, **settings,
        )  # fmt: skip
    return q_out, k_out


def norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and of the weights of their norms."""
    tensors = [_side_by_side(x) for x in (dq_out, dk_out, q, k)]
    dq = launch.empty_like(q)
    dk = launch.empty_like(k)
    sizes, table_stride, (programs, parts), settings = _sizes("rope_norm_backward", q, k, cos)

    # As many programs as run at once, or as have tokens; each writes its part of both weights' gradients.
    resident = settings.pop("PROGRAMS") * launch.multiprocessors(q.device)
    programs = max(1, min(programs, resident // parts))
    dw = torch.empty(programs * parts, 2, q.shape[-1], dtype=torch.float32, device=q.device)
    contiguous = [x.contiguous() for x in (cos, sin, q_weight, k_weight)]
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    arguments = (*tensors, *contiguous, dq, dk, dw, *sizes, *strides, table_stride, eps)
    launch.run(_backward_norm, (programs, parts), *arguments, **settings)
    dq_weight = dw[:, 0].sum(0).to(q_weight.dtype)
    dk_weight = dw[:, 1].sum(0).to(k_weight.dtype)
    return dq, dk, dq_weight, dk_weight


_op = torch.library.custom_op("minillm::rope", forward, mutates_args=())
_norm_backward_op = torch.library.custom_op("minillm::rope_norm_backward", norm_backward, mutates_args=())


@_op.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps, back):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_norm_backward_op.register_fake
def _(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, eps):
    return tuple(x.new_empty(x.shape) for x in (q, k, q_weight, k_weight))


_norm_backward = launch.op(_norm_backward_op, norm_backward)


def _setup(ctx, inputs, output):
    q, k, cos, sin, q_weight, k_weight, ctx.eps, ctx.back = inputs
    normed = () if q_weight is None else (q, k, q_weight, k_weight)
    ctx.save_for_backward(cos, sin, *normed)


def _gradient(ctx, dq_out, dk_out):
    cos, sin, *normed = ctx.saved_tensors
    if not normed:
        dq, dk = _rope(dq_out, dk_out, cos, sin, None, None, 0.0, not ctx.back)
        return dq, dk, None, None, None, None, None, None
    q, k, q_weight, k_weight = normed
    dq, dk, *dweights = _norm_backward(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, ctx.eps)
    return dq, dk, None, None, *dweights, None, None


_rope = launch.op(_op, forward, _setup, _gradient)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k rotated by the angles of their positions: `kernels.reference.rope`, half-split.

    q: (B, T, H, D), k: (B, T, K, D) fp32, bf16 or fp16, any strides, D even; cos, sin: (T, D/2) or (B, T, D/2), fp32.
    q_weight, k_weight: (D,) both or neither; with them each head goes through `kernels.reference.rms_norm` first.
    Computed in fp32. Returns both rotated, contiguous, in their own dtypes. Raises ValueError for tables of other
    shapes.
    """
    batch, length, _, size = q.shape
    tables = (length, size // 2), (batch, length, size // 2)
    if size % 2 or cos.shape != sin.shape or tuple(cos.shape) not in tables:
        raise ValueError(f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: q {tuple(q.shape)} needs ([B,] T, D/2)")
    return _rope(q, k, cos, sin, q_weight, k_weight, eps, False)
