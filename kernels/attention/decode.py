"""Attention of one or a few new queries over a long cache of keys and values, as each step of generation needs it.

For row b, whose keys are the slots begin_b ≤ j < end_b of the cache, query t of Tq stands at slot end_b − Tq + t and
    out = Σ_j softmax_j(q·k_j · scale) v_j        over begin_b ≤ j ≤ its own slot
There is no backward: a cache is only read.

Memory traffic is all there is: every key and value is read once and used for a handful of queries, so the only aim is
to keep all multiprocessors loading. Two things follow.

Grouped heads are one tile. The H/K query heads that share a key head, times the Tq queries, are the rows of one
product with the keys (padded to 16, the least tensor cores take): keys are read once for all of them
(Ainslie et al. 2023, arXiv:2305.13245, section 2.2).

Keys are split (Dao et al. 2023, "Flash-Decoding for long-context inference"). At batch 1 there are only K tiles, far
fewer than multiprocessors, so each tile's keys are shared out among programs. With the scores s of its share of
the keys, a program gives o = softmax(s) v and L = log Σ exp(s), and
    out = Σ_splits exp(L − max L) o / Σ_splits exp(L − max L)
is computed by a second small kernel, always in the same order: the same bits each time. (The last program to finish
could do it and save a launch, some 2 µs of about 50. That takes a counter for each tile which someone must
zero before, or which outlives the call and is shared by streams that run at once: not worth it.)

The launch depends on shapes alone, the shares on the lengths found on the device: begin and end are read by the
kernel, so one CUDA graph serves every step, and a cache of which little is filled costs little. Programs whose share
is empty return at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch
from kernels.shared.proxy_fence import fence_copies
from kernels.shared.tanh import tanh

MOST_QUERIES = 16
LARGEST_HEAD = 256
LOG2_E = 1.4426950408889634


@triton.jit
def _shares(Begin, End, row, n_queries, n_keys, window, splits,
            BEGIN: tl.constexpr, END: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """First and one past the last slot that any query of the batch's row sees, and how many of them a split takes."""
    end = tl.minimum(tl.load(End + row).to(tl.int32), n_keys) if END else n_keys
    begin = tl.maximum(tl.load(Begin + row).to(tl.int32), 0) if BEGIN else 0
    if WINDOW:
        begin = tl.maximum(begin, end - n_queries - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), 16) * 16  # a multiple of 16
    return begin, end, tl.maximum(share, BLOCK_N)


@triton.jit
def _softmax(s, highest, total):
    """A block of scores joins the running softmax: its probabilities, by what earlier ones shrink, maximum and sum."""
    higher = tl.maximum(highest, tl.max(s, axis=1))
    zero = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: −inf − (−inf) would be NaN
    p = tl.exp2(s - zero[:, None])
    shrink = tl.exp2(highest - zero)
    return p, shrink, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "window", "tiles"])
def _attend(Q, K, V, Begin, End, Out, Part, Lse, n_queries, n_keys, window, tiles, scale, softcap,
            q_batch, q_token, q_head, q_step, k_batch, k_token, k_head, k_step, v_batch, v_token, v_head, v_step,
            HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
            BEGIN: tl.constexpr, END: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
            UNIT: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # Which tile and which share of its keys this program takes. Neighbouring programs take the key heads of the same
    # slots, which lie side by side in memory.
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % tiles
    b = (tl.program_id(0) // HEADS // tiles).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    begin, end, share = _shares(Begin, End, b, n_queries, n_keys, window, splits, BEGIN, END, WINDOW, BLOCK_N)
    first = begin + split * share
    last = tl.minimum(first + share, end)
    if SPLIT:  # noqa: SIM102 (known when compiled, the inner one is not)
        if first >= last:
            return

    # The tile's rows: Tq tokens times the query heads that share this key head.
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m // GROUP
    query_head = head * GROUP + m % GROUP
    slot = end - n_queries + token
    row_inside = token < n_queries
    column_inside = d < D
    at = b * q_batch + token[:, None].to(tl.int64) * q_token + query_head[:, None] * q_head + d[None, :] * q_step
    q = tl.load(Q + at, mask=row_inside[:, None] & column_inside[None, :], other=0.0)  # (M, D)
    K += tl.multiple_of(b * k_batch + head.to(tl.int64) * k_head, UNIT)
    V += tl.multiple_of(b * v_batch + head.to(tl.int64) * v_head, UNIT)

    # The share's keys, block by block, with a running softmax as in `forward.py`.
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        j = start + n
        at_k = tl.multiple_of(j.to(tl.int64) * k_token, UNIT)
        at_v = tl.multiple_of(j.to(tl.int64) * v_token, UNIT)
        inside = (j < last)[:, None] & column_inside[None, :]
        k = tl.load(K + at_k[:, None] + d[None, :] * k_step, mask=inside, other=0.0)  # (N, D)
        fence_copies(BLOCK_M >= 64)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (M, N), without a cap in units of log 2
        if SOFTCAP:
            s = softcap * tanh(s, q.dtype == tl.float32)
        seen = (j[None, :] <= slot[:, None]) & (j < last)[None, :]
        if WINDOW:
            seen = seen & (j[None, :] > slot[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        p, shrink, highest, total = _softmax(s, highest, total)
        v = tl.load(V + at_v[:, None] + d[None, :] * v_step, mask=inside, other=0.0)  # (N, D)
        fence_copies(BLOCK_M >= 64)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)

    # The output, or this split's part of it with the log-sum-exp that it is weighted by.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (b * n_queries + token) * (HEADS * GROUP) + query_head  # of the output, (B, Tq, H)
    if SPLIT:
        row = row * splits + split
        lse = tl.where(total == 0.0, float("-inf"), highest + tl.log2(total))
        tl.store(Lse + row, lse, mask=row_inside)
        tl.store(Part + row[:, None] * D + d[None, :], out, mask=row_inside[:, None] & column_inside[None, :])
    else:
        out = out.to(Out.dtype.element_ty)
        tl.store(Out + row[:, None] * D + d[None, :], out, mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["n_queries", "n_keys", "window", "splits"])
def _combine(Part, Lse, Begin, End, Out, n_queries, n_keys, window, splits, HEADS: tl.constexpr, D: tl.constexpr,
             BEGIN: tl.constexpr, END: tl.constexpr, WINDOW: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // (n_queries * HEADS)
    begin, end, share = _shares(Begin, End, b, n_queries, n_keys, window, splits, BEGIN, END, WINDOW, BLOCK_N)
    used = tl.cdiv(tl.maximum(end - begin, 0), share)  # the other splits have written nothing
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)

    # The largest log-sum-exp of all splits.
    highest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(0, used, BLOCK_S):
        lse = tl.load(Lse + row * splits + start + s, mask=start + s < used, other=float("-inf"))
        highest = tl.maximum(highest, lse)
    best = tl.max(highest, axis=0)
    best = tl.where(best == float("-inf"), 0.0, best)

    # The splits' outputs, weighted.
    total = tl.zeros([BLOCK_S], tl.float32)
    out = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, used, BLOCK_S):
        inside = start + s < used
        weight = tl.exp2(tl.load(Lse + row * splits + start + s, mask=inside, other=float("-inf")) - best)
        at = (row * splits + start + s)[:, None] * D + d[None, :]
        out += weight[:, None] * tl.load(Part + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total += weight
    total = tl.sum(total, axis=0)
    out = tl.sum(out, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(Out + row * D + d, out.to(Out.dtype.element_ty), mask=d < D)


def block_settings(rows: int, head_size: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Keys a block, warps, stages, and programs for each multiprocessor, for tiles of 16, 32 or 64 rows.

    Memory takes about 800 ns to answer, in which an H100 could have sent 20 KB to each multiprocessor: so much must be
    asked for and not yet there. A stage is a block of keys and one of values, 32 KB together where a
    multiprocessor has 163 KB of shared memory or more, 16 KB where it has 99; two programs with two stages on
    the way ask for several times enough, and one computes while the other waits at a barrier. fp32 is multiplied
    without tensor cores, from registers: 32 KB would spill, as would more keys with more rows at 16 bits.
    """
    large = launch.shared_memory(device) > 99 << 10 and dtype.itemsize == 2
    stage = (32 if large else 16) << 10
    keys = stage // (2 * launch.next_power_of_2(head_size) * dtype.itemsize)
    most = {16: 128, 32: 64, 64: 32}[rows]
    keys = min(most, max(16, keys))
    if launch.INTERPRETED:  # its cost is by block
        keys = 128
    default = {"BLOCK_N": keys, "num_warps": 4, "num_stages": 3, "PROGRAMS": 2}
    return launch.settings("decode_attention", (rows, head_size, dtype.itemsize), device, default)


def split_count(groups: int, slots: int, most: int) -> int:
    """Into how many splits the keys of each of `groups` tiles go, where `slots` programs run at once.

    As few as leave less than a twentieth of the last round of programs idle, else of up to four rounds the best.
    """
    best = 1
    best_filled = 0.0  # share of its rounds' slots that are busy
    for rounds in range(1, 5):
        splits = max(1, min(rounds * slots // groups, most))
        needed = launch.cdiv(splits * groups, slots)  # rounds that this many programs take
        filled = splits * groups / (needed * slots)
        if filled > best_filled:
            best = splits
            best_filled = filled
        if best_filled > 0.95:
            break
    return best


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """The output (B, Tq, H, D) of `decode_attention`, contiguous."""
    batch, n_queries, heads, head_size = q.shape
    n_keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    out = launch.empty_like(q)
    if not out.numel():
        return out

    # Tiles of rows, and splits of their keys: as many programs as fill the GPU.
    block_d = max(16, launch.next_power_of_2(head_size))
    # More would not fit the registers; without tensor cores (fp32) each thread holds more of every operand.
    most_rows = 16 if q.dtype == torch.float32 else 64 if block_d <= 64 else 32
    block_m = min(most_rows, max(16, launch.next_power_of_2(n_queries * group)))
    tiles = launch.cdiv(n_queries * group, block_m)
    settings = dict(block_settings(block_m, head_size, q.dtype, q.device))
    block_n = settings["BLOCK_N"]
    slots = settings.pop("PROGRAMS") * launch.multiprocessors(q.device)
    splits = split_count(batch * kv_heads * tiles, slots, max(1, launch.cdiv(n_keys, block_n)))
    rows = batch * n_queries * heads if splits > 1 else 0
    part = torch.empty(rows, splits, head_size, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, splits, dtype=torch.float32, device=q.device)

    factor = scale * LOG2_E if softcap is None else scale / softcap  # exp2 is the hardware's own exponential
    # Triton learns of a stride only whether 16 divides it; of a head size of 40, that loads of 16 bytes are aligned.
    unit = 8 if all(x.stride(i) % 8 == 0 for x in (k, v) for i in range(3)) else 1
    first = q if begin is None else begin.contiguous()  # any pointer will do where there are no bounds
    last = q if end is None else end.contiguous()
    bounded = dict(BEGIN=begin is not None, END=end is not None, WINDOW=window is not None)
    launch.run(
        _attend, (batch * kv_heads * tiles, splits),
        q, k, v, first, last, out, part, lse, n_queries, n_keys, window or 0, tiles, factor, (softcap or 1.0) * LOG2_E,
        *q.stride(), *k.stride(), *v.stride(), HEADS=kv_heads, GROUP=group, D=head_size,
        **bounded, SOFTCAP=softcap is not None, SPLIT=splits > 1, UNIT=unit,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", BLOCK_M=block_m, BLOCK_D=block_d, **settings,
    )  # fmt: skip
    if splits > 1:
        block_s = min(4096 // block_d, launch.next_power_of_2(splits))  # 32 numbers a thread
        launch.run(
            _combine, (rows,),
            part, lse, first, last, out, n_queries, n_keys, window or 0, splits, HEADS=heads, D=head_size,
            **bounded, BLOCK_N=block_n, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


_op = torch.library.custom_op("minillm::decode_attention", forward, mutates_args=())


@_op.register_fake
def _(q, k, v, begin, end, window, softcap, scale):
    return q.new_empty(q.shape)


_decode_attention = launch.op(_op, forward)


def _check(q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, end: Tensor | None, window: int | None) -> None:
    """Raise `ValueError` for what the kernels cannot take."""
    batch, n_queries, heads, head_size = q.shape
    if k.shape != v.shape or k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, head_size):
        raise ValueError(f"decode_attention: q {tuple(q.shape)} does not fit k {tuple(k.shape)}, v {tuple(v.shape)}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"decode_attention: {heads} query heads are no multiple of {k.shape[2]} key heads")
    if not 1 <= n_queries <= MOST_QUERIES:
        raise ValueError(f"decode_attention: {n_queries} queries: 1 to {MOST_QUERIES}; for more there is attention")
    if not 1 <= head_size <= LARGEST_HEAD:
        raise ValueError(f"decode_attention: head size {head_size}: 1 to {LARGEST_HEAD}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"decode_attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}: one of fp32, fp16, bf16 for all")
    for name, bound in (("begin", begin), ("end", end)):
        if bound is not None and (bound.shape != (batch,) or bound.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"decode_attention: {name} {tuple(bound.shape)} {bound.dtype}: must be ({batch},) int32")
        if bound is not None and bound.device != q.device:
            raise ValueError(f"decode_attention: {name} is on {bound.device}, q on {q.device}: put it there once")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window {window}: at least 1, or None")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("decode_attention has no backward: call it under torch.no_grad(), or use attention")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    begin: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest Tq tokens of each row over its part of a cache, causal among themselves.

    q: (B, Tq, H, D), 1 ≤ Tq ≤ 16, D ≤ 256; k, v: (B, Tmax, K, D), the whole preallocated cache, any strides. All
    fp32, bf16 or fp16. begin, end: (B,) int32 on q's device (None: 0 and Tmax): row b's keys are the slots
    begin[b] ≤ j < end[b], its own new ones included, and query t stands at slot end[b] − Tq + t.
    window: a query sees itself and window − 1 slots before. softcap, scale: see `kernels.reference.attention`.
    Returns (B, Tq, H, D) in q's dtype; a query that sees no key gives zeros. Raises ValueError for other shapes and
    dtypes, and where a gradient would be wanted: there is none.
    """
    _check(q, k, v, begin, end, window)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _decode_attention(q, k, v, begin, end, window, softcap, scale)
