"""Attention backward in Triton: gradients of q, k and v, with every probability recomputed.

With scores s (scaled, perhaps soft-capped), p = e^(s − lse) and the output's gradient do (Dao et al. 2022,
arXiv:2205.14135, appendix B):

    dv = pᵀ do      dp = do vᵀ      delta = Σ_d do · o      ds = p (dp − delta + dlse)
    dq = scale · ds k               dk = scale · dsᵀ q      (soft cap: ds times 1 − (s / cap)²)

Two kernels, each the owner of what it writes, so nothing is added by atomics and two runs are equal bit for bit. One
walks for a block of keys over the queries that see it, of all heads of the group, and keeps dk and dv in registers;
its products are transposed (sᵀ = k qᵀ), so that pᵀ and dsᵀ go from registers into the next product. The other walks
for a block of queries over the keys it sees and keeps dq. The scores are thus computed twice: 7 products in place of
5, which costs less than atomics on dq do. (An earlier, throw-away version on an H100: 11 to 41 % above FlexAttention;
with atomics below it. This version has not run on a GPU yet.)
A small kernel before them makes delta, and from the log-sum-exp what is subtracted from q kᵀ before it is scaled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.mask import seeing_queries, seen_keys
from kernels.attention.settings import attention_settings
from kernels.attention.tiles import describable, heads_together, load_tile, place, scores, store_tile, tile_source
from kernels.shared import launch
from kernels.shared.tanh import tanh

LOG2E = 1.4426950408889634
LARGEST_BLOCK = 128  # of queries: what is kept for each query is padded to whole ones


@triton.jit(do_not_specialize=["q_len"])
def _prepare(Out, DO, Lse, DLse, Delta, Shift, heads, q_len, padded, factor, o_b, o_t, o_h, do_b, do_t, do_h,
             DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta and the shift of each query, in rows padded to whole blocks: see `_keys_step`."""
    bh = tl.program_id(0)
    b = bh // heads
    h = bh % heads
    row = tl.program_id(1) * ROWS
    o = load_tile(Out, b, row, h, q_len, o_b, o_t, o_h, ROWS, D, BLOCK_D, False).to(tl.float32)
    do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, ROWS, D, BLOCK_D, False).to(tl.float32)
    t = row + tl.arange(0, ROWS)
    at = bh.to(tl.int64) * q_len + t
    inside = t < q_len
    delta = tl.sum(o * do, axis=1)  # (ROWS,)
    if DLSE:
        delta -= tl.load(DLse + at, mask=inside, other=0.0)
    lse = tl.load(Lse + at, mask=inside, other=float("-inf"))
    # a query that saw nothing has −inf, and so have those beyond the last: +inf in its place makes each probability 0
    shift = tl.where(lse == float("-inf"), float("inf"), lse * factor)
    at = bh.to(tl.int64) * padded + t
    tl.store(Delta + at, tl.where(inside, delta, 0.0))
    tl.store(Shift + at, shift)


@triton.jit
def _keys_step(dk, dv, k, v, q, do, shift, delta, position, begin, end, scale, cap, MASK: tl.constexpr,
               SOFTCAP: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr):  # fmt: skip
    """Add a block of queries to the gradients of a block of keys; all scores are transposed, (keys, queries).

    What is subtracted from a product is the start value of its sum, so that it needs no registers during the product.
    """
    zero = tl.zeros([k.shape[0], q.shape[0]], tl.float32)  # (keys, queries)
    if SOFTCAP:
        t = tanh(scores(k, q, zero) * scale, q.dtype == tl.float32)
        p = tl.exp2(t * cap - shift[None, :])
    else:
        p = tl.exp2(scores(k, q, zero - shift[None, :]) * scale)
    if MASK:
        p = tl.where((begin[:, None] <= position[None, :]) & (position[None, :] < end[:, None]), p, 0.0)
    if NEED_DV:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    if NEED_DK:
        ds = p * scores(v, do, zero - delta[None, :])
        if SOFTCAP:
            ds *= 1 - t * t
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _keys_walk(dk, dv, k, v, Q, DO, Shift, Delta, b, kv, group_size, start, stop, start2, stop2, first, begin, end,
               q_len, padded, heads, scale, cap, q_b, q_t, q_h, do_b, do_t, do_h, MASK: tl.constexpr,
               SOFTCAP: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The queries from row `start` to `stop` and from `start2` to `stop2`, of every head of the group.

    One loop over heads and rows together: the pipeline need not drain between them, and it takes fewer registers.
    """
    before = tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0)
    blocks = before + tl.maximum(tl.cdiv(stop2 - start2, BLOCK_M), 0)
    for i in tl.range(0, group_size * blocks):
        h = kv * group_size + i // blocks
        j = i % blocks
        row = tl.where(j < before, start + j * BLOCK_M, start2 + (j - before) * BLOCK_M)
        q = load_tile(Q, b, row, h, q_len, q_b, q_t, q_h, BLOCK_M, D, BLOCK_D, TMA)
        do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, BLOCK_M, D, BLOCK_D, TMA)
        at = (b.to(tl.int64) * heads + h) * padded + row + tl.arange(0, BLOCK_M)
        position = first + row + tl.arange(0, BLOCK_M)
        dk, dv = _keys_step(dk, dv, k, v, q, do, tl.load(Shift + at), tl.load(Delta + at), position, begin, end,
                            scale, cap, MASK, SOFTCAP, NEED_DK, NEED_DV)  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["n_blocks", "group", "window"])  # a binary for many lengths
def _backward_keys(Q, K, V, DO, DK, DV, Shift, Delta, Spans, n_blocks, group, heads, kv_heads, q_len, padded, k_len,
                   window, scale, factor, cap, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr,
                   NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    # Which keys this program owns, and which queries see each of them.
    block, bh = place(n_blocks, group, False)  # the first keys of a causal row are seen by most queries
    b = bh // kv_heads
    kv = bh % kv_heads
    start = block * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    first = k_len - q_len  # position of the first query
    begin, end = seeing_queries(key, Spans + b.to(tl.int64) * 2 * k_len, first, k_len, window, CAUSAL, WINDOW, SPANS)
    inside = key < k_len

    # Rows of queries:  low ─── whole ═════════ part ─── high      ─ some see some of these keys, ═ all see all of them
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

    # First both edges, with a mask, then what lies between, without.
    size = heads // kv_heads
    after = part if WINDOW or SPANS else high  # else the last query sees all keys
    dk, dv = _keys_walk(dk, dv, k, v, Q, DO, Shift, Delta, b, kv, size, low, tl.minimum(whole, high), after, high,
                        first, begin, end, q_len, padded, heads, factor, cap, q_b, q_t, q_h, do_b, do_t, do_h,
                        True, SOFTCAP, NEED_DK, NEED_DV, D, BLOCK_D, BLOCK_M, TMA)  # fmt: skip
    dk, dv = _keys_walk(dk, dv, k, v, Q, DO, Shift, Delta, b, kv, size, whole, tl.minimum(part, high), 0, 0,
                        first, begin, end, q_len, padded, heads, factor, cap, q_b, q_t, q_h, do_b, do_t, do_h,
                        False, SOFTCAP, NEED_DK, NEED_DV, D, BLOCK_D, BLOCK_M, TMA)  # fmt: skip
    if NEED_DK:
        store_tile(DK, dk * scale, b, start, kv, k_len, kv_heads, BLOCK_N, D, BLOCK_D)
    if NEED_DV:
        store_tile(DV, dv, b, start, kv, k_len, kv_heads, BLOCK_N, D, BLOCK_D)


@triton.jit
def _queries_step(dq, q, do, k, v, shift, delta, key, begin, end, scale, cap,
                  MASK: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """Add a block of keys to the gradient of a block of queries."""
    zero = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    if SOFTCAP:
        t = tanh(scores(q, k, zero) * scale, q.dtype == tl.float32)
        p = tl.exp2(t * cap - shift[:, None])
    else:
        p = tl.exp2(scores(q, k, zero - shift[:, None]) * scale)
    if MASK:
        p = tl.where((begin[:, None] <= key[None, :]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * scores(do, v, zero - delta[:, None])
    if SOFTCAP:
        ds *= 1 - t * t
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _queries_walk(dq, q, do, K, V, b, kv, start, stop, shift, delta, begin, end, k_len, scale, cap,
                  k_b, k_t, k_h, v_b, v_t, v_h, MASK: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The keys from `start` to `stop`."""
    for at in tl.range(start, stop, BLOCK_N):
        k = load_tile(K, b, at, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
        v = load_tile(V, b, at, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
        key = at + tl.arange(0, BLOCK_N)
        dq = _queries_step(dq, q, do, k, v, shift, delta, key, begin, end, scale, cap, MASK, SOFTCAP)
    return dq


@triton.jit(do_not_specialize=["n_blocks", "group", "window"])
def _backward_queries(Q, K, V, DO, DQ, Shift, Delta, Spans, n_blocks, group, heads, kv_heads, q_len, padded, k_len,
                      window, scale, factor, cap, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                      CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      TMA: tl.constexpr):  # fmt: skip
    # Which queries this program owns, and which keys each of them sees.
    block, bh = place(n_blocks, group, True)
    b = bh // heads
    h = bh % heads
    kv = h // (heads // kv_heads)
    row = block * BLOCK_M
    position = row + tl.arange(0, BLOCK_M) + (k_len - q_len)
    begin, end = seen_keys(position, Spans + b.to(tl.int64) * 2 * k_len, k_len, window, CAUSAL, WINDOW, SPANS)
    inside = position < k_len

    # Keys:  first ─── whole ═════════ part ─── last      ─ seen by some of these queries, ═ by all
    first = tl.min(tl.where(inside, begin, k_len)) // BLOCK_N * BLOCK_N
    last = tl.max(end)
    whole = tl.cdiv(tl.max(begin), BLOCK_N) * BLOCK_N
    part = tl.maximum(tl.min(tl.where(inside, end, k_len)) // BLOCK_N * BLOCK_N, whole)

    q = load_tile(Q, b, row, h, q_len, q_b, q_t, q_h, BLOCK_M, D, BLOCK_D, TMA)
    do = load_tile(DO, b, row, h, q_len, do_b, do_t, do_h, BLOCK_M, D, BLOCK_D, TMA)
    at = bh.to(tl.int64) * padded + row
    shift = tl.load(Shift + at + tl.arange(0, BLOCK_M))
    delta = tl.load(Delta + at + tl.arange(0, BLOCK_M))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # One edge with a mask, what lies between without, the other edge with a mask.
    if WINDOW or SPANS:
        dq = _queries_walk(dq, q, do, K, V, b, kv, first, tl.minimum(whole, last), shift, delta, begin, end, k_len,
                           factor, cap, k_b, k_t, k_h, v_b, v_t, v_h, True, SOFTCAP, D, BLOCK_D, BLOCK_N,
                           TMA)  # fmt: skip
    dq = _queries_walk(dq, q, do, K, V, b, kv, whole, part, shift, delta, begin, end, k_len, factor,
                       cap, k_b, k_t, k_h, v_b, v_t, v_h, False, SOFTCAP, D, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
    dq = _queries_walk(dq, q, do, K, V, b, kv, part, last, shift, delta, begin, end, k_len, factor,
                       cap, k_b, k_t, k_h, v_b, v_t, v_h, True, SOFTCAP, D, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
    store_tile(DQ, dq * scale, b, row, h, q_len, heads, BLOCK_M, D, BLOCK_D)


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
    width = max(16, launch.next_power_of_2(size))
    dq = launch.empty_like(q)
    dk = launch.empty_like(k)
    dv = launch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()

    # What is kept for each query, in rows padded to whole blocks.
    padded = launch.cdiv(q_len, LARGEST_BLOCK) * LARGEST_BLOCK
    delta = torch.empty(batch, heads, padded, dtype=torch.float32, device=q.device)
    shift = torch.empty(batch, heads, padded, dtype=torch.float32, device=q.device)
    rows = LARGEST_BLOCK if launch.INTERPRETED else min(LARGEST_BLOCK, max(16, 4096 // width))
    launch.run(
        _prepare, (batch * heads, padded // rows),
        out, dout, lse.contiguous(), delta if dlse is None else dlse.contiguous(), delta, shift, heads, q_len, padded,
        1 / scale if softcap is None else LOG2E, *out.stride()[:3], *dout.stride()[:3],
        DLSE=dlse is not None, D=size, BLOCK_D=width, ROWS=rows, num_warps=4,
    )  # fmt: skip

    # What both kernels take.
    tma = describable(width, q, k, v, dout)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    flags = dict(CAUSAL=causal, WINDOW=window is not None, SPANS=spans is not None, SOFTCAP=softcap is not None)
    factor = scale * LOG2E if softcap is None else scale / softcap
    numbers = (window or 0, scale, factor, (softcap or 1.0) * LOG2E)
    # spans: any pointer will do where there are none
    for_each_query = (shift, delta, shift if spans is None else spans.contiguous())
    more = window is not None or spans is not None or softcap is not None

    def run(kernel, name: str, own_heads: int, length: int, block: str, *outputs: Tensor, **needs: bool) -> None:
        """Start a kernel on all blocks of what it owns: `length` keys or queries of each of its own heads."""
        settings = attention_settings(name, size, q.dtype, q.device, tma=tma, more=more)
        block_m = settings["BLOCK_M"]
        block_n = settings["BLOCK_N"]
        blocks = launch.cdiv(length, settings[block])
        group = heads_together(blocks, batch * own_heads, q.device)
        sources = [tile_source(x, rows, tma) for x, rows in ((q, block_m), (k, block_n), (v, block_n), (dout, block_m))]
        launch.run(
            kernel, (blocks * batch * own_heads,), *sources, *outputs, *for_each_query,
            blocks, group, heads, kv_heads, q_len, padded, k_len,
            *numbers, *strides, **flags, **needs, D=size, BLOCK_D=width, TMA=tma, **settings,
        )  # fmt: skip

    # Above 128 both accumulators of a block of keys do not fit the registers: one after the other.
    for need_dk, need_dv in [(True, True)] if width <= 128 else [(True, False), (False, True)]:
        run(_backward_keys, "keys", kv_heads, k_len, "BLOCK_N", dk, dv, NEED_DK=need_dk, NEED_DV=need_dv)
    run(_backward_queries, "queries", heads, q_len, "BLOCK_M", dq)
    return dq, dk, dv
