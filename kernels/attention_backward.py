"""Attention backward in Triton: gradients of q, k and v, with every probability made again.

With scores s (scaled, perhaps soft-capped), p = e^(s − lse) and the output's gradient do (Dao et al. 2022,
arXiv:2205.14135, appendix B):

    dv = pᵀ do      dp = do vᵀ      delta = Σ_d do · o      ds = p (dp − delta + dlse)
    dq = scale · ds k               dk = scale · dsᵀ q      (soft cap: ds times 1 − (s / cap)²)

Two kernels, each the owner of what it writes, so nothing is added by atomics and two runs are equal bit for bit. One
walks for a block of keys over the queries that see it, of all heads of the group, and keeps dk and dv in registers;
its products are transposed (sᵀ = k qᵀ), so that pᵀ and dsᵀ go from registers into the next product. The other walks
for a block of queries over the keys it sees and keeps dq. The scores are thus computed twice: 7 products in place of
5, which costs less than atomics on dq do (measured on an H100: 11 to 41 % above FlexAttention; with atomics below it).
A small kernel before them makes delta, and the log-sum-exp in powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.attention_mask import seeing_queries, seen_keys
from kernels.attention_tiles import describable, heads_together, load_tile, place, soft_capped, store_tile, tile_source

LOG2E = 1.4426950408889634


@triton.jit
def _prepare(O, DO, Lse, DLse, Delta, Lse2, heads, q_len, o_b, o_t, o_h, do_b, do_t, do_h,
             DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    bh = tl.program_id(1)
    b, h, row = bh // heads, bh % heads, tl.program_id(0) * ROWS
    o = load_tile(O, b, row, h, q_len, o_b, o_t, o_h, ROWS, D, BLOCK_D, False).to(tl.float32)
    do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, ROWS, D, BLOCK_D, False).to(tl.float32)
    t = row + tl.arange(0, ROWS)
    at, inside = bh.to(tl.int64) * q_len + t, t < q_len
    delta = tl.sum(o * do, axis=1)
    if DLSE:
        delta -= tl.load(DLse + at, mask=inside, other=0.0)
    lse = tl.load(Lse + at, mask=inside, other=0.0)
    # a query that saw nothing has −inf: +inf in its place makes every probability e^−inf = 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(Delta + at, delta, mask=inside)
    tl.store(Lse2 + at, lse, mask=inside)


@triton.jit
def _keys_step(dk, dv, k, v, q, do, lse, delta, key, position, begin, end, scale, cap, MASK: tl.constexpr,
               SOFTCAP: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr):  # fmt: skip
    """A block of queries joins the gradients of a block of keys; all scores transposed, (keys, queries)."""
    s = tl.dot(k, q.T, input_precision="ieee")
    if SOFTCAP:
        s = soft_capped(s * scale, cap)
        p = tl.exp2(s * 1.4426950408889634 - lse[None, :])
    else:
        p = tl.exp2(s * scale - lse[None, :])
    if MASK:
        p = tl.where((begin[:, None] <= position[None, :]) & (position[None, :] < end[:, None]), p, 0.0)
    if NEED_DV:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    if NEED_DK:
        ds = p * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
        if SOFTCAP:
            ds *= 1 - (s / cap) * (s / cap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys_walk(dk, dv, k, v, Q, DO, Lse2, Delta, b, kv, group_size, start, stop, first, key, begin, end, q_len, heads,
               scale, cap, q_b, q_t, q_h, do_b, do_t, do_h, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
               NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The queries from row `start` to `stop`, of every head of the group.

    One loop over heads and rows together: the pipeline need not drain between heads, and it takes fewer registers.
    """
    blocks = tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0)
    for i in tl.range(0, group_size * blocks):
        h = kv * group_size + i // blocks
        row = start + i % blocks * BLOCK_M
        q = load_tile(Q, b, row, h, q_len, q_b, q_t, q_h, BLOCK_M, D, BLOCK_D, TMA)
        do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, BLOCK_M, D, BLOCK_D, TMA)
        t = row + tl.arange(0, BLOCK_M)
        at = (b.to(tl.int64) * heads + h) * q_len + t
        lse = tl.load(Lse2 + at, mask=t < q_len, other=float("inf"))
        delta = tl.load(Delta + at, mask=t < q_len, other=0.0)
        dk, dv = _keys_step(dk, dv, k, v, q, do, lse, delta, key, t + first, begin, end, scale, cap, MASK, SOFTCAP,
                            NEED_DK, NEED_DV)  # fmt: skip
    return dk, dv


@triton.jit
def _backward_keys(Q, K, V, DO, DK, DV, Lse2, Delta, Spans, n_blocks, group, heads, kv_heads, q_len, k_len, window,
                   scale, scale_log2, cap, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr,
                   NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    block, bh = place(n_blocks, group, False)  # the first keys of a causal row are seen by most queries
    b, kv = bh // kv_heads, bh % kv_heads
    start = block * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    first = k_len - q_len  # position of the first query
    begin, end = seeing_queries(
        key, Spans + b.to(tl.int64) * 2 * k_len, first, k_len, window, CAUSAL, WINDOW, SPANS
    )
    inside = key < k_len
    # rows of queries: from `low` on some see some of these keys, from `whole` to `part` all see all
    low = tl.maximum(tl.min(tl.where(inside, begin, k_len)) - first, 0) // BLOCK_M * BLOCK_M
    high = tl.minimum(tl.max(end) - first, q_len)
    whole = tl.cdiv(tl.maximum(tl.max(begin) - first, 0), BLOCK_M) * BLOCK_M
    part = tl.min(tl.where(inside, end, k_len)) - first
    part = tl.where(part < q_len, part // BLOCK_M * BLOCK_M, tl.cdiv(q_len, BLOCK_M) * BLOCK_M)
    part = tl.maximum(part, whole)

    k = load_tile(K, b, start, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
    v = load_tile(V, b, start, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    used = scale if SOFTCAP else scale_log2
    size = heads // kv_heads
    dk, dv = _keys_walk(dk, dv, k, v, Q, DO, Lse2, Delta, b, kv, size, low, tl.minimum(whole, high), first, key, begin,
                        end, q_len, heads, used, cap, q_b, q_t, q_h, do_b, do_t, do_h, True, SOFTCAP, NEED_DK, NEED_DV,
                        D, BLOCK_D, BLOCK_M, TMA)  # fmt: skip
    dk, dv = _keys_walk(dk, dv, k, v, Q, DO, Lse2, Delta, b, kv, size, whole, tl.minimum(part, high), first, key, begin,
                        end, q_len, heads, used, cap, q_b, q_t, q_h, do_b, do_t, do_h, False, SOFTCAP, NEED_DK, NEED_DV,
                        D, BLOCK_D, BLOCK_M, TMA)  # fmt: skip
    if WINDOW or SPANS:  # else the last query sees all keys
        dk, dv = _keys_walk(dk, dv, k, v, Q, DO, Lse2, Delta, b, kv, size, part, high, first, key, begin,
                            end, q_len, heads, used, cap, q_b, q_t, q_h, do_b, do_t, do_h, True, SOFTCAP, NEED_DK, NEED_DV,
                            D, BLOCK_D, BLOCK_M, TMA)  # fmt: skip
    if NEED_DK:
        store_tile(DK, dk * scale, b, start, kv, k_len, kv_heads, BLOCK_N, D, BLOCK_D)
    if NEED_DV:
        store_tile(DV, dv, b, start, kv, k_len, kv_heads, BLOCK_N, D, BLOCK_D)


@triton.jit
def _queries_step(dq, q, do, k, v, lse, delta, key, begin, end, scale, cap,
                  MASK: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """A block of keys joins the gradient of a block of queries."""
    s = tl.dot(q, k.T, input_precision="ieee")
    if SOFTCAP:
        s = soft_capped(s * scale, cap)
        p = tl.exp2(s * 1.4426950408889634 - lse[:, None])
    else:
        p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        p = tl.where((begin[:, None] <= key[None, :]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
    if SOFTCAP:
        ds *= 1 - (s / cap) * (s / cap)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _queries_walk(dq, q, do, K, V, b, kv, start, stop, lse, delta, begin, end, k_len, scale, cap,
                  k_b, k_t, k_h, v_b, v_t, v_h, MASK: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The keys from `start` to `stop`."""
    for at in tl.range(start, stop, BLOCK_N):
        k = load_tile(K, b, at, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
        v = load_tile(V, b, at, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
        key = at + tl.arange(0, BLOCK_N)
        dq = _queries_step(dq, q, do, k, v, lse, delta, key, begin, end, scale, cap, MASK, SOFTCAP)
    return dq


@triton.jit
def _backward_queries(Q, K, V, DO, DQ, Lse2, Delta, Spans, n_blocks, group, heads, kv_heads, q_len, k_len, window,
                      scale, scale_log2, cap, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                      CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      TMA: tl.constexpr):  # fmt: skip
    block, bh = place(n_blocks, group, True)
    b, h = bh // heads, bh % heads
    kv = h // (heads // kv_heads)
    row = block * BLOCK_M
    position = row + tl.arange(0, BLOCK_M) + (k_len - q_len)
    begin, end = seen_keys(position, Spans + b.to(tl.int64) * 2 * k_len, k_len, window, CAUSAL, WINDOW, SPANS)
    inside = position < k_len
    first = tl.min(tl.where(inside, begin, k_len)) // BLOCK_N * BLOCK_N
    last = tl.max(end)
    whole = tl.cdiv(tl.max(begin), BLOCK_N) * BLOCK_N
    part = tl.maximum(tl.min(tl.where(inside, end, k_len)) // BLOCK_N * BLOCK_N, whole)

    q = load_tile(Q, b, row, h, q_len, q_b, q_t, q_h, BLOCK_M, D, BLOCK_D, TMA)
    do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, BLOCK_M, D, BLOCK_D, TMA)
    t = row + tl.arange(0, BLOCK_M)
    at = bh.to(tl.int64) * q_len + t
    lse = tl.load(Lse2 + at, mask=t < q_len, other=float("inf"))
    delta = tl.load(Delta + at, mask=t < q_len, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    used = scale if SOFTCAP else scale_log2
    if WINDOW or SPANS:
        dq = _queries_walk(dq, q, do, K, V, b, kv, first, tl.minimum(whole, last), lse, delta, begin, end, k_len, used,
                           cap, k_b, k_t, k_h, v_b, v_t, v_h, True, SOFTCAP, D, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
    dq = _queries_walk(dq, q, do, K, V, b, kv, whole, part, lse, delta, begin, end, k_len, used,
                       cap, k_b, k_t, k_h, v_b, v_t, v_h, False, SOFTCAP, D, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
    dq = _queries_walk(dq, q, do, K, V, b, kv, part, last, lse, delta, begin, end, k_len, used,
                       cap, k_b, k_t, k_h, v_b, v_t, v_h, True, SOFTCAP, D, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
    store_tile(DQ, dq * scale, b, row, h, q_len, heads, BLOCK_M, D, BLOCK_D)


def settings(kernel: str, width: int, x: Tensor) -> dict:
    """Block sizes, warps and stages for heads padded to `width`."""
    if launch.INTERPRETED:
        return {"BLOCK_M": 64, "BLOCK_N": 64}
    small = launch.shared_memory(x.device) < 128 << 10
    key = (width, x.element_size(), small)
    table = {"keys": KEYS, "queries": QUERIES}[kernel]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return launch.settings(f"attention_backward_{kernel}", (width, x.dtype), x.device, dict(zip(names, table[key])))


# (head size padded to a power of two, bytes of a number, small shared memory): BLOCK_M, BLOCK_N, warps, stages
KEYS = {}
QUERIES = {}


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the inputs' dtypes; shapes as in `attention`. dlse: (B, H, Tq) or None."""
    q, k, v, out, dout = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, out, dout))
    batch, q_len, heads, size = q.shape
    k_len, kv_heads = k.shape[1], k.shape[2]
    width = max(16, triton.next_power_of_2(size))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta, lse2 = (torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device) for _ in range(2))
    rows = min(64, triton.next_power_of_2(q_len)) if launch.INTERPRETED else max(16, 8192 // width)
    launch.run(
        _prepare, (triton.cdiv(q_len, rows), batch * heads),
        out, dout, lse.contiguous(), delta if dlse is None else dlse.contiguous(), delta, lse2, heads, q_len,
        *out.stride()[:3], *dout.stride()[:3], DLSE=dlse is not None, D=size, BLOCK_D=width, ROWS=rows, num_warps=4,
    )  # fmt: skip
    tma = describable(width, q, k, v, dout)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    flags = dict(CAUSAL=causal, WINDOW=window is not None, SPANS=spans is not None, SOFTCAP=softcap is not None)
    numbers = (window or 0, scale, scale * LOG2E, softcap or 1.0)
    # spans: any pointer will do where there are none
    extents = (lse2, delta, lse2 if spans is None else spans.contiguous())
    keys, queries = (_backward_keys, kv_heads, k_len), (_backward_queries, heads, q_len)
    parts = [(*keys, (dk, dv), {"NEED_DK": True, "NEED_DV": True}), (*queries, (dq,), {})]
    if width > 128:  # both accumulators of a block of keys do not fit the registers: one after the other
        parts[:1] = [(*keys, (dk, dv), {"NEED_DK": needed, "NEED_DV": not needed}) for needed in (True, False)]
    for kernel, own_heads, length, outputs, more in parts:
        by_keys = kernel is _backward_keys
        chosen = settings("keys" if by_keys else "queries", width, q)
        m, n = chosen["BLOCK_M"], chosen["BLOCK_N"]
        blocks = triton.cdiv(length, n if by_keys else m)
        sources = [tile_source(x, r, tma) for x, r in ((q, m), (k, n), (v, n), (dout, m))]
        launch.run(
            kernel, (blocks * batch * own_heads,), *sources, *outputs, *extents,
            blocks, heads_together(blocks, batch * own_heads, q.device), heads, kv_heads, q_len, k_len, *numbers,
            *strides, **flags, **more, D=size, BLOCK_D=width, TMA=tma, **chosen,
        )  # fmt: skip
    return dq, dk, dv
