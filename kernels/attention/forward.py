"""Attention forward in Triton: softmax(q kᵀ · scale) v without the matrix of scores.

For a block of queries the keys are read block by block, and the softmax is accumulated on the way (Milakov &
Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). With scores s of the new block, running maximum
m, sum l and output o:

    m' = max(m, max s)    a = e^(m − m')    p = e^(s − m')    l' = a l + Σ p    o' = a o + p v

and at the end o / l, and the log-sum-exp m + ln l, from which the backward pass recomputes every p.
e^x is computed as 2^(x log₂ e), log₂ e being folded into the scale.

Memory traffic: q, k, v and o once each (k and v again for every block of queries, from the L2 cache), nothing of size
Tq × Tk. Work: 4 D operations for each pair of a query and a key that it sees.

Tiling: `mask.py` says which blocks of keys are skipped, taken whole, or compared element by element. Heavy
blocks (late in a causal row) start first, so that light ones fill up the end. An earlier, throw-away version was
measured on an H100 (causal, bf16): light blocks first cost 12 %, masking every block 10 %, all heads in one group up to
35 %. This version has not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.mask import seen_keys
from kernels.attention.settings import attention_settings
from kernels.attention.tiles import describable, heads_together, load_tile, place, scores, store_tile, tile_source
from kernels.shared import launch
from kernels.shared.tanh import tanh

LOG2E = 1.4426950408889634


@triton.jit
def _step(acc, total, top, q, k, v, key, begin, end, scale, cap, MASK: tl.constexpr, SOFTCAP: tl.constexpr):
    """Update output, sum and maximum by a block of keys; scores are exponents of 2."""
    s = scores(q, k, tl.zeros([q.shape[0], k.shape[0]], tl.float32))  # (M, N)
    if SOFTCAP:
        s = cap * tanh(s * scale, q.dtype == tl.float32)
    else:
        s *= scale
    if MASK:
        s = tl.where((begin[:, None] <= key[None, :]) & (key[None, :] < end[:, None]), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    base = new_top
    if MASK:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet, and -inf − -inf is no number
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit(do_not_specialize=["n_blocks", "group", "window"])  # a binary for many lengths
def _forward(Q, K, V, Out, Lse, Spans, n_blocks, group, heads, kv_heads, q_len, k_len, window, scale, cap,
             q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
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
    part = tl.min(tl.where(inside, end, k_len)) // BLOCK_N * BLOCK_N
    part = tl.maximum(part, whole)

    q = load_tile(Q, b, row, h, q_len, q_b, q_t, q_h, BLOCK_M, D, BLOCK_D, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)

    # One edge with a mask, what lies between without, the other edge with a mask.
    if WINDOW or SPANS:  # else every query sees the first key
        for start in tl.range(first, tl.minimum(whole, last), BLOCK_N):
            k = load_tile(K, b, start, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
            v = load_tile(V, b, start, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
            key = start + tl.arange(0, BLOCK_N)
            acc, total, top = _step(acc, total, top, q, k, v, key, begin, end, scale, cap, True, SOFTCAP)
    for start in tl.range(whole, part, BLOCK_N):
        k = load_tile(K, b, start, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
        v = load_tile(V, b, start, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
        acc, total, top = _step(acc, total, top, q, k, v, start, begin, end, scale, cap, False, SOFTCAP)
    for start in tl.range(part, last, BLOCK_N):
        k = load_tile(K, b, start, kv, k_len, k_b, k_t, k_h, BLOCK_N, D, BLOCK_D, TMA)
        v = load_tile(V, b, start, kv, k_len, v_b, v_t, v_h, BLOCK_N, D, BLOCK_D, TMA)
        key = start + tl.arange(0, BLOCK_N)
        acc, total, top = _step(acc, total, top, q, k, v, key, begin, end, scale, cap, True, SOFTCAP)

    # Output and log-sum-exp; a query that saw no key has zeros and −inf.
    seen = total != 0  # NaN is not nothing: it must show
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    store_tile(Out, acc, b, row, h, q_len, heads, BLOCK_M, D, BLOCK_D)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    t = row + tl.arange(0, BLOCK_M)
    tl.store(Lse + bh.to(tl.int64) * q_len + t, lse, mask=t < q_len)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output (B, Tq, H, D) in q's dtype, log-sum-exp (B, H, Tq) fp32, natural); arguments as in `attention`."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, q_len, heads, size = q.shape
    k_len, kv_heads = k.shape[1], k.shape[2]
    out = launch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    width = max(16, launch.next_power_of_2(size))
    tma = describable(width, q, k, v)
    more = window is not None or spans is not None or softcap is not None
    settings = attention_settings("forward", size, q.dtype, q.device, tma=tma, more=more)
    block_m = settings["BLOCK_M"]
    block_n = settings["BLOCK_N"]
    blocks = launch.cdiv(q_len, block_m)
    launch.run(
        _forward, (blocks * batch * heads,),
        tile_source(q, block_m, tma), tile_source(k, block_n, tma), tile_source(v, block_n, tma), out, lse,
        lse if spans is None else spans.contiguous(),  # any pointer will do where there are no spans
        blocks, heads_together(blocks, batch * heads, q.device), heads, kv_heads, q_len, k_len, window or 0,
        scale * LOG2E if softcap is None else scale / softcap, (softcap or 1.0) * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        CAUSAL=causal, WINDOW=window is not None, SPANS=spans is not None, SOFTCAP=softcap is not None,
        D=size, BLOCK_D=width, TMA=tma, **settings,
    )  # fmt: skip
    return out, lse
