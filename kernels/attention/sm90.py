"""Attention for Hopper (sm_90) from the host's side: what the Gluon kernels take, their settings, and their launches.

The kernels are in `sm90_forward.py` and `sm90_backward.py`, what both share in `sm90_tiles.py`. They have not run on a
GPU yet: `TESTED_TRITON` is empty, and until the tests (`python -m kernels.prove --only hopper-tests`) have passed on
one with a version of Triton and that version stands in it, `attention` takes the plain kernels. `python -m
kernels.bench attention` measures both, these as "ours (sm_90)".
"""

import torch
import triton
from torch import Tensor

from kernels.attention.sm90_backward import STEP, backward_sm90, from_fragments, prepare
from kernels.attention.sm90_forward import forward_sm90
from kernels.attention.sm90_tiles import describe, describe_vector, fits
from kernels.attention.tiles import heads_together
from kernels.shared import launch

LOG2E = 1.4426950408889634

# Versions (major.minor) on which the tests of these files passed on a GPU. One says nothing of another: 3.6 leaves out
# a meeting of threads that 3.8 puts before a buffer is freed (docs/en/kernels-log.md).
TESTED_TRITON: frozenset[str] = frozenset()
WRITTEN_FOR = frozenset({"3.6", "3.8"})  # versions with which this compiles: 3.9's Gluon names some things otherwise


def supports(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, causal: bool, window: int | None, softcap: float | None
) -> bool:
    """Whether these kernels compute this: causal, no window, no cap, D 64 or 128, 16 bits, Tq = Tk, from 128 on."""
    plain = causal and window is None and softcap is None
    half_precision = q.dtype in (torch.bfloat16, torch.float16)
    length, head_size = q.shape[1], q.shape[3]
    sizes = head_size in (64, 128) and length == k.shape[1] >= 128 and q.numel() > 0
    return plain and half_precision and sizes and all(map(fits, (q, k, v)))


def chosen(q: Tensor, *arguments) -> bool:
    """Whether `attention` comes here: a GPU of this kind, a Triton these files are tested with, and `supports`."""
    if not q.is_cuda or launch.architecture(q.device) != 90:
        return False
    return _version() in TESTED_TRITON and supports(q, *arguments)


def compiles() -> bool:
    """Whether the installed Triton's Gluon is one that these files are written for."""
    return _version() in WRITTEN_FOR


def _version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def forward_settings(size: int, length: int, packed: bool) -> dict:
    """How many warpgroups compute, stages of k and v, buffers of q a warpgroup, and registers a thread.

    D 128 fills shared memory with two stages (197 KB). At D 64 there is room for a third stage and for the next tile's
    queries (1k: 288 → 305), and from 4k on a third warpgroup is better (16k: 450 → 482), unless rows are packed: a
    document's first key then costs registers (72 bytes of spills with 160 of them).
    """
    if size == 128:
        return dict(COMPUTERS=2, STAGES=2, Q_BUFFERS=1, COMPUTE_REGISTERS=240, LOAD_REGISTERS=24)
    if length < 4096 or packed:
        return dict(COMPUTERS=2, STAGES=3, Q_BUFFERS=2, COMPUTE_REGISTERS=240, LOAD_REGISTERS=24)
    return dict(COMPUTERS=3, STAGES=2, Q_BUFFERS=2, COMPUTE_REGISTERS=160, LOAD_REGISTERS=32)


def backward_settings(size: int, grouped: bool) -> dict:
    """D 64 without groups of heads: persistent, a second buffer of keys and values. Else one tile a thread block.

    At D 128 there is no room for the second buffer, and reading the tile's number from shared memory costs registers
    (200 bytes of spills). With groups a tile takes so long that the next one's loading hardly matters.
    """
    persistent = size == 64 and not grouped
    return dict(STAGES=2, PERSISTENT=int(persistent), COMPUTE_REGISTERS=240, LOAD_REGISTERS=24)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output (B, T, H, D) in q's dtype, log-sum-exp (B, H, T) fp32, natural), for what `supports`."""
    assert causal
    batch, length, heads, size = q.shape
    out = launch.empty_like(q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    next_tile = torch.zeros(1, dtype=torch.int32, device=q.device)

    # One block of threads for each multiprocessor takes tile after tile; two tiles for each make a group of heads.
    settings = forward_settings(size, length, spans is not None)
    blocks = launch.cdiv(length, 64 * settings["COMPUTERS"])  # of queries
    tiles = blocks * batch * heads
    group = heads_together(launch.cdiv(blocks, 2), batch * heads, q.device)
    launch.run(
        forward_sm90, (min(tiles, launch.multiprocessors(q.device)),),
        describe(q, 64), describe(k, 128), describe(v, 128), describe(out, 64), out, lse,
        lse if spans is None else spans.contiguous(),  # any pointer will do where there are no spans
        next_tile, tiles, blocks, group, length, heads, k.shape[2], scale * LOG2E,
        SPANS=int(spans is not None), num_warps=4, **settings,
    )  # fmt: skip
    return out, lse


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
    scale: float,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) as `backward.backward`, for what `supports`; dq differs run by run."""
    assert causal
    dout = dout if fits(dout) else dout.clone(memory_format=torch.contiguous_format)
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    blocks = launch.cdiv(length, 128)  # of keys
    padded = 128 * blocks
    device = q.device

    # Rows are padded to whole tiles in everything that the main kernel writes, and in lse and delta.
    dq = launch.empty_like(q)
    dq_sum = torch.empty(batch, heads, padded, size, dtype=torch.float32, device=device)
    dk = torch.empty(batch, padded, kv_heads, size, dtype=q.dtype, device=device)
    dv = torch.empty(batch, padded, kv_heads, size, dtype=q.dtype, device=device)
    delta = torch.empty(batch, heads, padded, dtype=torch.float32, device=device)
    lse2 = torch.empty(batch, heads, padded, dtype=torch.float32, device=device)  # in powers of two
    next_tile = torch.zeros(1, dtype=torch.int32, device=device)

    launch.run(
        prepare, (batch * heads, padded // 64),
        out, dout, lse.contiguous(), delta if dlse is None else dlse.contiguous(), delta, lse2, dq_sum, heads, length,
        padded, *out.stride()[:3], *dout.stride()[:3], DLSE=dlse is not None, D=size, ROWS=64, num_warps=4,
    )  # fmt: skip

    # If persistent, one block of threads for each multiprocessor, and two tiles for each make a group of heads.
    settings = backward_settings(size, heads != kv_heads)
    tiles = blocks * batch * kv_heads
    if settings["PERSISTENT"]:
        programs = min(tiles, launch.multiprocessors(device))
        group = heads_together(launch.cdiv(blocks, 2), batch * kv_heads, device)
    else:
        programs = tiles
        group = heads_together(blocks, batch * kv_heads, device)
    launch.run(
        backward_sm90, (programs,),
        *(describe(x, 64) for x in (q, k, v, dout)), describe_vector(lse2, STEP), describe_vector(delta, STEP),
        lse2 if spans is None else spans.contiguous(),  # any pointer will do where there are no spans
        describe(dk, 64), describe(dv, 64), dq_sum, next_tile,
        tiles, blocks, group, length, padded, heads, kv_heads, scale, scale * LOG2E,
        SPANS=int(spans is not None), num_warps=4, **settings,
    )  # fmt: skip

    launch.run(
        from_fragments, (batch * heads, padded // 64), dq_sum, dq, heads, length, padded, scale, D=size, num_warps=4
    )
    return dq, dk[:, :length].contiguous(), dv[:, :length].contiguous()
