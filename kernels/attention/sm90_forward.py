"""Attention forward for Hopper (sm_90), in Gluon: every warp has a role, and barriers are all that they share.

Gluon is Triton one level lower: layouts, shared memory, copies and products are written out. The mathematics is that of
`forward.py`. A plain Triton loop waits for both of its products in every step; here nothing that can run at
the same time waits for anything but its data.

One block of threads on each multiprocessor takes tile after tile: 128 queries of one head, or 192.

    loading warp, 24 registers       shared memory      compute warpgroups 0, 1 [, 2]: 64 queries, 240 registers
    ┌─────────────────────────────┐                   ┌──────────────────────────────────────────────────────┐
    │ number of the tile ─────────┼─► slot       ──►  │ for each block of 128 keys, from the diagonal back:  │
    │ q (64, D) a warpgroup ──────┼─► q          ──►  │     s = q kᵀ                        tensor cores     │
    │ k (128, D) ─────────────────┼─► k 0│1[│2]  ──►  │     p = 2^(s − top), Σ p            exponentials     │
    │ v (128, D) ─────────────────┼─► v 0│1[│2]  ──►  │     o = o · 2^(old top − top) + p v tensor cores     │
    │      by the copy engine     │◄─ empty      ◄──  │ o / Σ p ──► o (64, D) ──► memory, by the copy engine │
    └─────────────────────────────┘                   └──────────────────────────────────────────────────────┘

A step of a warpgroup, and the next; ▒ is time for which it waits:

    tensor cores    s(i) ███ │ o += p(i−1) v(i−1) ███ ·      │ s(i+1) ███ │ o += p(i) v(i) ███ ·      │
    exponentials    ▒▒▒▒▒▒▒▒ │ p(i) ████████████████████████ │ ▒▒▒▒▒▒▒▒▒▒ │ p(i+1) ██████████████████ │

and while one warpgroup waits, another computes. The barriers, by whom they are completed, and who waits for them:

    q_full                  bytes of one copy                  a warpgroup, before its first product of a tile
    k_full, v_full [stage]  bytes of one copy                  every warpgroup, before the product that reads it
    q_empty                 its warpgroup                      the loading warp, before the next tile's queries
    k_empty, v_empty        every warpgroup                    the loading warp, before the stage's next copy
    slot_full; slot_empty   loading warp; every warpgroup      every warpgroup; loading warp

k and v have barriers of their own because a block's v is needed a step later than its k.

What each idea brought to an earlier version, in TFLOP/s on an H100 SXM (700 W), triton 3.6, causal, bf16, 16,384
tokens:

    tiles by an atomic counter, not by a fixed list       D 128: 1k 316 → 411; 16k 439 → 667
    a second q buffer and a third stage                   D 64: 1k 288 → 305
    a third compute warpgroup, 192 queries                D 64: 16k 450 → 482
    heads in groups of about two tiles a multiprocessor   all heads in one group costs up to 35 %
    heavy tiles first                                     light ones first cost 12 %
    a wait that only keeps ptxas from moving another      see `_walk`
    no effect: turns between the warpgroups (named barriers), sums kept in each thread, the next tile's first scores
    under this tile's end. Lost: a quarter of the exponentials as polynomials, 2 to 15 %.

That gave 305, 382, 418 and 482 at 1k, 2k, 4k and 16k for 32 heads of 64 (0.91, 0.98, 1.03 and 1.10 times cuDNN in the
same run), and 410, 528, 579 and 650 for 16 heads of 128 (0.96, 1.10, 1.13 and 1.19).

Those numbers are of a first version of this code. In its inner loops this one has, compiled by triton 3.6 and 3.8, the
same instructions, integers for addresses aside, and the same order of products, waits and exponentials; but it has not
run on a GPU yet: `sm90.py` tells when `attention` takes it. Without a GPU, the tests run this source in a model of
Gluon: `tests/kernels/gluon_model.py`.

Packed documents: a tile stops at the block where its first query's document begins, and compares in every block.
"""

# ruff: noqa: RUF005 (kernels know a + b of tuples, but not *a)

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


@gluon.jit
def _key_blocks(Spans, b, first_row, end_row, length, BLOCK_N: gl.constexpr, SPANS: gl.constexpr):
    """The first block of keys that queries first_row ≤ i < end_row see, and one past the last."""
    end = min(end_row + BLOCK_N - 1, length + BLOCK_N - 1) // BLOCK_N
    begin = 0
    if SPANS:
        begin = gl.load(Spans + 2 * (b * length + first_row)) // BLOCK_N
    return begin, end


@gluon.jit
def _load(SPANS: gl.constexpr, Q, K, V, Spans, tiles, full, empty, next_tile, counter, n_tiles, n_blocks, group, length,
          heads, kv_heads):  # fmt: skip
    """The loading warp: keeps the copy engine busy and the queue moving; 24 registers are enough.

    A block's first tile is its own number: there are no more blocks than tiles. Every later one is asked for once, and
    the counter gives each number once, from the number of blocks on; the first that is too large ends the block.
    """
    q_tile, k_tile, v_tile, o_tile = tiles
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    slot, slot_full, slot_empty = next_tile
    COMPUTERS: gl.constexpr = o_tile.shape[0]
    ROWS: gl.constexpr = q_tile.shape[1]
    D: gl.constexpr = q_tile.shape[2]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    STAGES: gl.constexpr = k_tile.shape[0]
    Q_BUFFERS: gl.constexpr = q_tile.shape[0] // COMPUTERS
    step = 0  # blocks of keys, counted through all tiles
    done = 0  # tiles
    tile = gl.program_id(0)
    while tile < n_tiles:
        offer(tile, slot, slot_full, slot_empty, done)
        # asked for now, needed after this tile: the answer from L2 has the whole tile to arrive
        tile_after = gl.atomic_add(counter, 1) + gl.num_programs(0)
        block, bh = place(tile, n_blocks, group, True)
        b = bh // heads
        h = bh % heads
        kv = h // (heads // kv_heads)
        first_row = block * COMPUTERS * ROWS
        begin, end = _key_blocks(Spans, b, first_row, first_row + COMPUTERS * ROWS, length, BLOCK_N, SPANS)
        for c in gl.static_range(COMPUTERS):
            at = (done % Q_BUFFERS) * COMPUTERS + c
            mbarrier.wait(q_empty.index(at), ((done // Q_BUFFERS) & 1) ^ 1)
            mbarrier.expect(q_full.index(at), ROWS * D * 2)
            row = b * length + first_row + c * ROWS
            tma.async_copy_global_to_shared(Q, [row, h * D], q_full.index(at), q_tile.index(at))
        done += 1
        for i in range(end - begin):
            row = b * length + (end - 1 - i) * BLOCK_N  # from the diagonal back
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(K, [row, kv * D], k_full.index(stage), k_tile.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), BLOCK_N * D * 2)
            tma.async_copy_global_to_shared(V, [row, kv * D], v_full.index(stage), v_tile.index(stage))
            step += 1
        tile = tile_after
    offer(tile, slot, slot_full, slot_empty, done)  # no tile: the others end too


@gluon.jit
def _row_sums(p):
    """Eight sums a row, each within a thread: threads add up what they have once, after a tile's last step."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def _softmax(s, top, total, scale):
    """A block of scores joins maximum and sum (powers of two): its probabilities, and by what earlier ones shrink."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + _row_sums(p)
    return p, new_top, shrink, total


@gluon.jit
def _store(Out, OutPointer, o_tile, o, b, h, row, length, heads):
    """A warpgroup's rows go out by the copy engine; rows at the end of a sequence, which it cannot cut, by pointers."""
    ROWS: gl.constexpr = o.shape[0]
    D: gl.constexpr = o.shape[1]
    if row + ROWS <= length:
        o_tile.store(o.to(o_tile.dtype))
        fence_async_shared()  # what threads wrote is seen by the copy engine
        tma.async_copy_shared_to_global(Out, [b * length + row, h * D], o_tile)
    else:
        if row < length:
            t = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, o.type.layout))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, o.type.layout))
            at = OutPointer + (b * length + t).to(gl.int64)[:, None] * (heads * D) + (h * D + d)[None, :]
            gl.store(at, o.to(o_tile.dtype), mask=(t < length)[:, None])


@gluon.jit
def _skip(n_steps, step, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """Blocks of keys that only later warpgroups of this tile see: free their buffers as they come."""
    for _ in range(n_steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def _diagonal(q_tile, at, k_tile, k_full, k_empty, step, rows, end, Spans, row_of_batch, length, scale,
              SPANS: gl.constexpr):  # fmt: skip
    """A tile's first step, the block of keys before `end`: probabilities, maximum, sums, and each row's first key.

    All other blocks lie before the diagonal, so this one alone is compared with it, element by element. And each row
    sees a key of this block, its own, so that no maximum is ever minus infinity.
    """
    ROWS: gl.constexpr = q_tile.shape[1]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    STAGES: gl.constexpr = k_tile.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = step % STAGES
    zero = gl.zeros((ROWS, BLOCK_N), gl.float32, S_LAYOUT)
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    s = warpgroup_mma(q_tile.index(at), k_tile.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    keys = (end - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    s = gl.where(rows[:, None] >= keys[None, :], s, -1.0e30)
    first_key = 0
    if SPANS:
        first_key = gl.load(Spans + 2 * (row_of_batch + rows), mask=rows < length, other=0)
        s = gl.where(keys[None, :] >= first_key[:, None], s, -1.0e30)
    top = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - top[:, None])
    return p, top, _row_sums(p), first_key


@gluon.jit
def _walk(at, tiles, full, empty, step, begin, end, first_key, o, p16, top, total, scale, SPANS: gl.constexpr):
    """The steps after the first, down to block `begin`. Their last probabilities have not joined the output yet."""
    q_tile, k_tile, v_tile, o_tile = tiles
    k_full, v_full = full[1], full[2]
    k_empty, v_empty = empty[1], empty[2]
    ROWS: gl.constexpr = q_tile.shape[1]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    STAGES: gl.constexpr = k_tile.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros((ROWS, BLOCK_N), gl.float32, S_LAYOUT)
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    stage = step % STAGES
    phase = (step // STAGES) & 1
    for i in range(end - 1 - begin):
        before = stage
        phase_before = phase
        step += 1
        stage = step % STAGES
        phase = (step // STAGES) & 1
        # Two products in flight: scores of this block, then the block before joins the output. The exponentials below
        # need the first alone, and run while the tensor cores are busy with the second.
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q_tile.index(at), k_tile.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), phase_before)
        pv = warpgroup_mma(p16, v_tile.index(before), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if SPANS:
            s = gl.where(columns[None, :] >= (first_key - (end - 2 - i) * BLOCK_N)[:, None], s, -1.0e30)
        p, top, shrink, total = _softmax(s, top, total, scale)
        # This wait was over long ago. It stands here because ptxas would move the next one, which waits for registers
        # alone, above the exponentials; across a barrier it moves nothing. What the second wait carries is `p` in fp32:
        # as 16-bit numbers they would be taken apart and packed again (32 PRMT a step).
        mbarrier.wait(v_full.index(before), phase_before)
        o, p, total, _ = warpgroup_mma_wait(0, deps=[pv, p, total, p16])
        mbarrier.arrive(v_empty.index(before), count=1)
        p16 = gl.convert_layout(p.to(o_tile.dtype), p16.type.layout)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return o, p16, top, total, step


@gluon.jit
def _compute(me: gl.constexpr, SPANS: gl.constexpr, Out, OutPointer, Lse, Spans, tiles, full, empty, next_tile, n_tiles,
             n_blocks, group, length, heads, scale):  # fmt: skip
    """Warpgroup number `me`: its 64 rows of each tile, from scores to output."""
    q_tile, k_tile, v_tile, o_tile = tiles
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    slot, slot_full, slot_empty = next_tile
    COMPUTERS: gl.constexpr = o_tile.shape[0]
    ROWS: gl.constexpr = q_tile.shape[1]
    D: gl.constexpr = q_tile.shape[2]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    STAGES: gl.constexpr = k_tile.shape[0]
    Q_BUFFERS: gl.constexpr = q_tile.shape[0] // COMPUTERS
    S_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    step = 0
    done = 0
    tile = take(slot, slot_full, slot_empty, 0)
    while tile < n_tiles:
        block, bh = place(tile, n_blocks, group, True)
        b = bh // heads
        h = bh % heads
        first_row = block * COMPUTERS * ROWS
        row = first_row + me * ROWS
        rows = row + gl.arange(0, ROWS, layout=S_ROWS)
        # a tile's first row sees the earliest key of all its rows: every warpgroup walks down to that key's block
        begin, tile_end = _key_blocks(Spans, b, first_row, first_row + COMPUTERS * ROWS, length, BLOCK_N, SPANS)
        end = min(row + ROWS + BLOCK_N - 1, length + BLOCK_N - 1) // BLOCK_N
        step = _skip(tile_end - end, step, k_full, k_empty, v_full, v_empty, STAGES)
        at = (done % Q_BUFFERS) * COMPUTERS + me
        mbarrier.wait(q_full.index(at), (done // Q_BUFFERS) & 1)
        p, top, total, first_key = _diagonal(q_tile, at, k_tile, k_full, k_empty, step, rows, end, Spans, b * length,
                                             length, scale, SPANS)  # fmt: skip
        o = gl.zeros((ROWS, D), gl.float32, O_LAYOUT)
        p16 = gl.convert_layout(p.to(o_tile.dtype), P_LAYOUT)
        o, p16, top, total, step = _walk(at, tiles, full, empty, step, begin, end, first_key, o, p16, top, total, scale,
                                         SPANS)  # fmt: skip
        mbarrier.arrive(q_empty.index(at), count=1)
        done += 1
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        pv = warpgroup_mma(p16, v_tile.index(stage), o, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), S_ROWS)
        # Which tile comes next is read while the last product runs. The loading warp offers it when it has asked for
        # all of this tile's keys and values, and waits for nothing that is freed below: no circle.
        tile = take(slot, slot_full, slot_empty, done)
        lse = (top + gl.log2(total)) * 0.6931471805599453
        gl.store(Lse + bh.to(gl.int64) * length + rows, lse, mask=rows < length)
        tma.store_wait(0)  # the last tile's output has left `o_tile`
        o, _ = warpgroup_mma_wait(0, deps=[pv, p16])
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        o = o / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        _store(Out, OutPointer, o_tile.index(me), o, b, h, row, length, heads)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "n_blocks", "group", "heads", "kv_heads"])
def forward_sm90(Q, K, V, Out, OutPointer, Lse, Spans, counter, n_tiles, n_blocks, group, length, heads, kv_heads,
                 scale, COMPUTERS: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, SPANS: gl.constexpr,
                 COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr):  # fmt: skip
    """Buffers and barriers in shared memory, then each warp to its role. `sm90.forward` starts it."""
    ROWS: gl.constexpr = Q.block_shape[0]
    BLOCK_N: gl.constexpr = K.block_shape[0]
    D: gl.constexpr = K.block_shape[1]
    tiles = (
        gl.allocate_shared_memory(Q.dtype, [Q_BUFFERS * COMPUTERS, ROWS, D], Q.layout),
        gl.allocate_shared_memory(K.dtype, [STAGES, BLOCK_N, D], K.layout),
        gl.allocate_shared_memory(V.dtype, [STAGES, BLOCK_N, D], V.layout),
        gl.allocate_shared_memory(Out.dtype, [COMPUTERS, ROWS, D], Out.layout),
    )
    full = (barriers(Q_BUFFERS * COMPUTERS, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(Q_BUFFERS * COMPUTERS, 1), barriers(STAGES, COMPUTERS), barriers(STAGES, COMPUTERS))
    next_tile = queue(COMPUTERS)
    sizes = (n_tiles, n_blocks, group, length, heads)
    load = (Q, K, V, Spans, tiles, full, empty, next_tile, counter) + sizes + (kv_heads,)
    work = (Out, OutPointer, Lse, Spans, tiles, full, empty, next_tile) + sizes + (scale,)
    # the first function runs in the warps that the kernel was started with; the others get warps of their own
    if COMPUTERS == 2:
        gl.warp_specialize(
            [(_compute, (0, SPANS) + work), (_compute, (1, SPANS) + work), (_load, (SPANS,) + load)],
            [4, 1], [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_compute, (0, SPANS) + work), (_compute, (1, SPANS) + work), (_compute, (2, SPANS) + work),
             (_load, (SPANS,) + load)],
            [4, 4, 1], [COMPUTE_REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
