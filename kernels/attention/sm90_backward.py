"""Attention backward for Hopper (sm_90), in Gluon: one kernel for all three gradients, five products a step.

The mathematics is that of `backward.py`, the roles and barriers are those of `sm90_forward.py`; read
both first. A tile is 128 keys of one key head; its steps are blocks of 64 queries, of every query head of the group in
turn. Both compute warpgroups see the same queries and have 64 keys each. All scores are transposed, (keys, queries),
so that pᵀ and dsᵀ are in the registers of the very threads which need them as operands of the next product.

    loading warp            warpgroup 0, keys 0–63                        warpgroup 1, keys 64–127

    k, v      ─────────►    kept for the tile (at D 64 the next tile's are loaded meanwhile)
    q, lse    ─► stage ─►   sᵀ  = k₀ qᵀ                                   sᵀ  = k₁ qᵀ
    do, delta ─► stage ─►   dpᵀ = v₀ doᵀ                                  dpᵀ = v₁ doᵀ
                            pᵀ  = 2^(sᵀ − lse)        under dpᵀ            ...
                            dv₀ += pᵀ do              p from registers     dv₁ += pᵀ do
                            dsᵀ = pᵀ (dpᵀ − delta)    under dv             ...
                            dk₀ += dsᵀ q              ds from registers    dk₁ += dsᵀ q
                            dsᵀ ──► ds pair [step & 1], tile 0            dsᵀ ──► ds pair [step & 1], tile 1
              ══════════════════ both meet: bar.sync 8, 256 ═════════════════════════════════════════════
                            dq, first D/2 columns                         dq, last D/2 columns
                               = ds₀ k₀ + ds₁ k₁                             = ds₀ k₀ + ds₁ k₁
              ◄── empty ──  added to memory in fp32                       added to memory in fp32

dq is split by columns, not by keys: each number is added once a tile and not twice. The additions are atomic, so their
order, and the last bits of dq, differ run by run (1e-5 of its norm); dk and dv have one owner and are equal bit for
bit. dq is summed in the order in which threads hold it, which makes every addition 16 bytes wide and a warp's 512 bytes
long; `from_fragments` brings it into its own order and to 16 bits.

What each idea brought to an earlier version, in TFLOP/s on an H100 SXM (700 W), triton 3.6, causal, bf16, 16,384
tokens:

    no spills in the loop                      D 128, 16k: 402 → 518 (with 240 bytes of them 402)
    all tiles in one allocation                128 bytes of spills → 24
    persistent, with a second k, v buffer      at D 64 without groups; at D 128 it brings 200 bytes of spills back
    two kernels without atomics, plain Triton  455 at D 128, 16k, where this one reaches 553

That gave 289, 362, 416 and 473 at 1k, 2k, 4k and 16k for 32 heads of 64 (1.25, 1.17, 1.14 and 1.08 times cuDNN in the
same run), and 293, 393, 462 and 553 for 16 heads of 128 (1.03 each). At 1k, 170 of 600 µs are the two passes beside the
main kernel, which are as fast as memory. This version has not run on a GPU yet.

Lengths that are no multiple of 128: rows of lse, delta, dq, dk and dv are padded in work space, and a log-sum-exp of
+inf in the padding makes every probability there 0.
"""

# ruff: noqa: RUF005 (kernels know a + b of tuples, but not *a)

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.sm90_tiles import barriers, offer, place, queue, take
from kernels.attention.tiles import load_tile, store_tile

KEYS = gl.constexpr(128)  # of a tile
HALF = gl.constexpr(64)  # of a warpgroup, and rows of every tile in shared memory
STEP = 64  # queries of a step


@triton.jit
def prepare(Out, DO, Lse, DLse, Delta, Lse2, DQ, heads, length, padded, o_b, o_t, o_h, do_b, do_t, do_h,
            DLSE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta and the log-sum-exp in powers of two, in rows padded to whole tiles, and dq's accumulator emptied.

    Queries in the padding have a log-sum-exp of +inf: whatever their scores are, every probability is 0.
    """
    bh = tl.program_id(0)  # in x, since y ends at 65,535
    b, h, row = bh // heads, bh % heads, tl.program_id(1) * ROWS
    o = load_tile(Out, b, row, h, length, o_b, o_t, o_h, ROWS, D, D, False).to(tl.float32)
    do = load_tile(DO, b, row, h, length, do_b, do_t, do_h, ROWS, D, D, False).to(tl.float32)
    t = row + tl.arange(0, ROWS)
    at, inside = bh.to(tl.int64) * length + t, t < length
    delta = tl.sum(o * do, axis=1)
    if DLSE:
        delta -= tl.load(DLse + at, mask=inside, other=0.0)
    lse = tl.load(Lse + at, mask=inside, other=float("inf")) * 1.4426950408889634
    at = bh.to(tl.int64) * padded + t
    tl.store(Delta + at, delta)
    tl.store(Lse2 + at, lse)
    tl.store(DQ + at[:, None] * D + tl.arange(0, D)[None, :], tl.zeros([ROWS, D], tl.float32))


@triton.jit
def from_fragments(Sum, DQ, heads, length, padded, scale, D: tl.constexpr):
    """64 rows of dq, from the order in which `_add` left them, to a contiguous (B, T, H, D)."""
    bh, row = tl.program_id(0), tl.program_id(1) * 64
    x = tl.load(Sum + (bh.to(tl.int64) * padded + row) * D + tl.arange(0, 64 * D))
    x = tl.reshape(x, [2, D // 16, 4, 8, 4, 2, 2])  # half of the columns, 8 of them, warp, row, lane, 8 rows, pair
    x = tl.permute(x, [2, 5, 3, 0, 1, 4, 6])  # warp, 8 rows, row; half of the columns, 8 of them, lane, pair
    x = tl.reshape(x, [64, D]) * scale
    store_tile(DQ, x, bh // heads, row, bh % heads, length, heads, 64, D, D)


@gluon.jit
def _both_warpgroups():
    """Both compute warpgroups meet here (a barrier of the hardware; Triton uses numbers 0 to 3 itself)."""
    gl.inline_asm_elementwise("bar.sync 8, 256;\n\tmov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _count_steps(Spans, b, first, length, padded, STEP: gl.constexpr, SPANS: gl.constexpr):
    """How many steps of queries see the keys from `first` on: to the end of the row, or of the last key's document."""
    n = (padded - first) // STEP
    if SPANS:
        end = gl.load(Spans + 2 * (b * length + min(first + KEYS, length) - 1) + 1)
        n = max(KEYS // STEP, (end - first + STEP - 1) // STEP)
    return n


@gluon.jit
def _load(PERSISTENT: gl.constexpr, SPANS: gl.constexpr, Q, K, V, DO, Lse, Delta, Spans, tiles, vectors, step_barriers,
          kv_barriers, next_tile, counter, n_tiles, n_blocks, group, length, padded, heads, kv_heads):  # fmt: skip
    """The loading warp: keys and values once a tile, then queries step by step, for every head of the group."""
    q_full, do_full, empty = step_barriers
    kv_full, kv_empty = kv_barriers
    slot, slot_full, slot_empty = next_tile
    STEP: gl.constexpr = vectors.shape[2]
    D: gl.constexpr = tiles.shape[2]
    STAGES: gl.constexpr = q_full.shape[0]
    KV_BUFFERS: gl.constexpr = kv_full.shape[0]
    per_group = heads // kv_heads
    step = 0  # counted through all tiles
    done = 0  # tiles
    tile = gl.program_id(0)
    while tile < n_tiles:
        if PERSISTENT:
            offer(tile, slot, slot_full, slot_empty, done)
            tile_after = gl.atomic_add(counter, 1) + gl.num_programs(0)
        else:
            tile_after = n_tiles
        block, b_kv = place(tile, n_blocks, group, False)
        b = b_kv // kv_heads
        kv = b_kv % kv_heads
        first = block * KEYS
        n_steps = _count_steps(Spans, b, first, length, padded, STEP, SPANS)
        for g in range(per_group):
            h = kv * per_group + g
            for i in range(n_steps):
                row = first + i * STEP
                vector_at = [0, (b * heads + h) * padded + row]
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(stage), STEP * D * 2 + STEP * 4)
                tma.async_copy_global_to_shared(Q, [b * length + row, h * D], q_full.index(stage), tiles.index(stage))
                tma.async_copy_global_to_shared(Lse, vector_at, q_full.index(stage), vectors.index(stage))
                if i == 0 and g == 0:  # after the first queries, which may come while the last keys are still in use
                    buffer = done % KV_BUFFERS
                    at = 2 * STAGES + 4 * buffer
                    mbarrier.wait(kv_empty.index(buffer), ((done // KV_BUFFERS) & 1) ^ 1)
                    mbarrier.expect(kv_full.index(buffer), 2 * KEYS * D * 2)
                    for c in gl.static_range(2):
                        where = [b * length + first + c * HALF, kv * D]
                        tma.async_copy_global_to_shared(K, where, kv_full.index(buffer), tiles.index(at + c))
                        tma.async_copy_global_to_shared(V, where, kv_full.index(buffer), tiles.index(at + 2 + c))
                mbarrier.expect(do_full.index(stage), STEP * D * 2 + STEP * 4)
                where = [b * length + row, h * D]
                tma.async_copy_global_to_shared(DO, where, do_full.index(stage), tiles.index(STAGES + stage))
                tma.async_copy_global_to_shared(Delta, vector_at, do_full.index(stage), vectors.index(STAGES + stage))
                step += 1
        done += 1
        tile = tile_after
    if PERSISTENT:
        offer(tile, slot, slot_full, slot_empty, done)  # no tile: the others end too


@gluon.jit
def _add(me: gl.constexpr, dq, Pointer):
    """Adds a (64, D / 2) half of dq to memory, in the order in which threads hold it: see `from_fragments`.

    A thread's registers go out four at a time (REDG.ADD.F32x4), a warp's lanes side by side: 512 bytes in one piece.
    """
    D: gl.constexpr = 2 * dq.shape[1]
    # row = (warp, half, lane / 4), column = (group, lane % 4, pair); wanted: group pairs, warp, lane, half, pair
    x = gl.reshape(dq, [4, 2, 8, D // 16, 4, 2])
    x = gl.permute(x, [3, 0, 2, 4, 1, 5])
    x = gl.reshape(x, [32 * D])
    REGISTERS: gl.constexpr = [[1], [2], [512], [1024], [2048]] if D == 128 else [[1], [2], [512], [1024]]
    FRAGMENTS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=REGISTERS, lane_bases=[[4], [8], [16], [32], [64]], warp_bases=[[128], [256]], block_bases=[],
        shape=[32 * D],
    )  # fmt: skip
    x = gl.convert_layout(x, FRAGMENTS, assert_trivial=True)  # no number changes its place: the compiler checks it
    at = gl.arange(0, 32 * D, layout=FRAGMENTS)
    gl.atomic_add(Pointer + me * (32 * D) + at, x, sem="relaxed")


@gluon.jit
def _step(me: gl.constexpr, DIAGONAL: gl.constexpr, SPANS: gl.constexpr, kv, step, shift, end, DQ, dk, dv, tiles,
          vectors, ds_tiles, step_barriers, scale_log2):  # fmt: skip
    """64 queries join dk and dv of this warpgroup's 64 keys; their dq goes to memory. All scores are transposed."""
    q_full, do_full, empty = step_barriers
    STAGES: gl.constexpr = q_full.shape[0]
    STEP: gl.constexpr = vectors.shape[2]
    D: gl.constexpr = tiles.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    DKV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DKV_LAYOUT, 2)
    stage = step % STAGES
    phase = (step // STAGES) & 1
    q = tiles.index(stage)
    do = tiles.index(STAGES + stage)
    zero = gl.zeros((HALF, STEP), gl.float32, S_LAYOUT)
    mbarrier.wait(q_full.index(stage), phase)
    s = warpgroup_mma(tiles.index(kv + me), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(stage), phase)
    dp = warpgroup_mma(tiles.index(kv + 2 + me), do.permute((1, 0)), zero, use_acc=False, is_async=True)
    ds_at = (step & 1) * 2

    s = warpgroup_mma_wait(1, deps=[s])  # dp goes on under the exponentials
    lse = vectors.index(stage).load(S_LAYOUT)
    p = gl.exp2(s * scale_log2 - lse)
    queries = gl.arange(0, STEP, layout=gl.SliceLayout(0, S_LAYOUT)) + shift
    if DIAGONAL:
        keys = gl.arange(0, HALF, layout=gl.SliceLayout(1, S_LAYOUT))
        p = gl.where(queries[None, :] >= keys[:, None], p, 0.0)
    if SPANS:
        p = gl.where(queries[None, :] < end[:, None], p, 0.0)
    p16 = gl.convert_layout(p.to(tiles.dtype), OPERAND)
    dv = warpgroup_mma(p16, do, dv, is_async=True)

    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = vectors.index(STAGES + stage).load(S_LAYOUT)
    ds = p * (dp - delta)
    ds16 = ds.to(tiles.dtype)
    # Two pairs of ds tiles, in turn: at the meeting of the step before, both warpgroups had finished (and waited for
    # the products of) the step before that one, the last to read this pair.
    ds_tiles.index(ds_at + me).store(ds16)
    fence_async_shared()  # what threads wrote is seen by the tensor cores
    ds_operand = gl.convert_layout(ds16, OPERAND)
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
    _both_warpgroups()  # dsᵀ of all 128 keys is there

    dq = gl.zeros((STEP, D // 2), gl.float32, DQ_LAYOUT)
    ds_first = ds_tiles.index(ds_at).permute((1, 0))
    ds_second = ds_tiles.index(ds_at + 1).permute((1, 0))
    k_first = tiles.index(kv).slice(me * (D // 2), D // 2, dim=1)
    k_second = tiles.index(kv + 1).slice(me * (D // 2), D // 2, dim=1)
    dq = warpgroup_mma(ds_first, k_first, dq, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds_second, k_second, dq, is_async=True)
    # nothing stays in flight over the end of a step: ptxas would serialize every product of the loop (C7514)
    dv, dk, dq, _, _ = warpgroup_mma_wait(0, deps=[dv, dk, dq, p16, ds_operand])
    mbarrier.arrive(empty.index(stage), count=1)
    _add(me, dq, DQ)
    return dk, dv


@gluon.jit
def _store(PERSISTENT: gl.constexpr, DK, DV, dk_tile, dv_tile, dk, dv, row, column):
    """A warpgroup's gradients go out by the copy engine; if not persistent, by the buffers of its keys and values."""
    dv_tile.store(dv.to(dv_tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(DV, [row, column], dv_tile)
    if not PERSISTENT:
        _both_warpgroups()  # v was this warpgroup's own, but the other one read these keys too, for its half of dq
    dk_tile.store(dk.to(dk_tile.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(DK, [row, column], dk_tile)


@gluon.jit
def _compute(me: gl.constexpr, PERSISTENT: gl.constexpr, SPANS: gl.constexpr, DQ, DK, DV, Spans, tiles, vectors,
             ds_tiles, step_barriers, kv_barriers, next_tile, n_tiles, n_blocks, group, length, padded, heads, kv_heads,
             scale, scale_log2):  # fmt: skip
    """Warpgroup number `me`: dk and dv of its 64 keys of each tile, and its half of dq's columns."""
    kv_full, kv_empty = kv_barriers
    slot, slot_full, slot_empty = next_tile
    STEP: gl.constexpr = vectors.shape[2]
    D: gl.constexpr = tiles.shape[2]
    STAGES: gl.constexpr = vectors.shape[0] // 2
    KV_BUFFERS: gl.constexpr = kv_full.shape[0]
    OUT: gl.constexpr = 2 * STAGES + (8 if PERSISTENT else 0)  # if not persistent, over the keys and values
    DKV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    KEY_LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16]))
    ON_DIAGONAL: gl.constexpr = KEYS // STEP
    step = 0
    done = 0
    tile = take(slot, slot_full, slot_empty, 0) if PERSISTENT else gl.program_id(0)
    while tile < n_tiles:
        block, b_kv = place(tile, n_blocks, group, False)
        kv = 2 * STAGES + 4 * (done % KV_BUFFERS)
        per_group = heads // kv_heads
        b = b_kv // kv_heads
        first = block * KEYS
        n_steps = _count_steps(Spans, b, first, length, padded, STEP, SPANS)
        end = 0
        if SPANS:
            key = first + me * HALF + gl.arange(0, HALF, layout=KEY_LAYOUT)
            end = gl.load(Spans + 2 * (b * length + key) + 1, mask=key < length, other=0) - (first + me * HALF)
        dk = gl.zeros((HALF, D), gl.float32, DKV_LAYOUT)
        dv = gl.zeros((HALF, D), gl.float32, DKV_LAYOUT)
        dq = DQ + (b_kv * per_group).to(gl.int64) * (padded * D) + first * D
        mbarrier.wait(kv_full.index(done % KV_BUFFERS), (done // KV_BUFFERS) & 1)
        for _ in range(per_group):
            for i in range(ON_DIAGONAL):
                dk, dv = _step(me, True, SPANS, kv, step, i * STEP - me * HALF, end, dq, dk, dv, tiles, vectors,
                               ds_tiles, step_barriers, scale_log2)  # fmt: skip
                dq += STEP * D
                step += 1
            for i in range(ON_DIAGONAL, n_steps):
                dk, dv = _step(me, False, SPANS, kv, step, i * STEP - me * HALF, end, dq, dk, dv, tiles, vectors,
                               ds_tiles, step_barriers, scale_log2)  # fmt: skip
                dq += STEP * D
                step += 1
            if SPANS:
                dq += (padded - n_steps * STEP) * D
            else:
                dq += first * D
        block, b_kv = place(tile, n_blocks, group, False)  # again, rather than kept in registers through the loop
        row = (b_kv // kv_heads) * padded + block * KEYS + me * HALF
        column = (b_kv % kv_heads) * D
        if PERSISTENT:
            mbarrier.arrive(kv_empty.index(done % KV_BUFFERS), count=1)
        done += 1
        if PERSISTENT:
            tile = take(slot, slot_full, slot_empty, done)
            tma.store_wait(0)  # the last tile's gradients have left their buffers
        else:
            tile = n_tiles
        _store(PERSISTENT, DK, DV, tiles.index(OUT + me), tiles.index(OUT + 2 + me), dk * scale, dv, row, column)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "n_blocks", "group", "heads", "kv_heads"])
def backward_sm90(Q, K, V, DO, Lse, Delta, Spans, DK, DV, DQ, counter, n_tiles, n_blocks, group, length, padded,
                  heads, kv_heads, scale, scale_log2, STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
                  SPANS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr):  # fmt: skip
    """Buffers and barriers in shared memory, then each warp to its role. `sm90.backward` starts it."""
    STEP: gl.constexpr = Q.block_shape[0]
    D: gl.constexpr = Q.block_shape[1]
    KV_BUFFERS: gl.constexpr = 2 if PERSISTENT else 1
    # all tiles are one allocation, which saves registers (128 bytes of spills became 24): q and do of each stage, then
    # two tiles of keys and two of values a buffer, then, if persistent, dk and dv on their way out
    N: gl.constexpr = 2 * STAGES + (12 if PERSISTENT else 4)
    tiles = gl.allocate_shared_memory(Q.dtype, [N, HALF, D], Q.layout)
    vectors = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, STEP], Lse.layout)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_tiles = gl.allocate_shared_memory(Q.dtype, [4, HALF, STEP], DS_LAYOUT)
    step_barriers = (barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    kv_barriers = (barriers(KV_BUFFERS, 1), barriers(KV_BUFFERS, 2))
    next_tile = queue(2)
    sizes = (n_tiles, n_blocks, group, length, padded, heads, kv_heads)
    work = (DQ, DK, DV, Spans, tiles, vectors, ds_tiles, step_barriers, kv_barriers, next_tile) + sizes
    work = work + (scale, scale_log2)
    load = (Q, K, V, DO, Lse, Delta, Spans, tiles, vectors, step_barriers, kv_barriers, next_tile, counter) + sizes
    gl.warp_specialize(
        [
            (_compute, (0, PERSISTENT, SPANS) + work),
            (_compute, (1, PERSISTENT, SPANS) + work),
            (_load, (PERSISTENT, SPANS) + load),
        ],
        [4, 1], [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
