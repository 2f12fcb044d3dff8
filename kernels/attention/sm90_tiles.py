"""What both attention kernels for Hopper share: how tiles are described, ordered, handed out, and guarded by barriers.

A barrier in shared memory counts arrivals, and bytes that the copy engine promised; when both are complete its phase
flips. A wait names the parity of the phase that it waits for. The n-th use of a buffer (n from 0) is waited for with
n & 1 by who reads it (`full`), and with (n & 1) ^ 1 by who fills it (`empty`): a barrier that nobody has arrived at
counts as just past a phase of parity 1, so the first filling of each buffer waits for nobody.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.tiles import describable


def fits(x: Tensor) -> bool:
    """Whether the copy engine can read x (B, T, H, D), its heads side by side, as a matrix of B·T rows."""
    return describable(x.shape[3], x) and (x.shape[2] == 1 or x.stride(2) == x.shape[3])


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B, T, H, D) as a matrix of B·T rows, in tiles (rows, D) swizzled as wgmma reads them (128 bytes)."""
    batch, length, heads, size = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, [batch * length, heads * size], [x.stride(1), 1], [rows, size], layout)


def describe_vector(x: Tensor, n: int) -> TensorDescriptor:
    """All fp32 numbers of a contiguous x as one row, in pieces of n."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, [1, x.numel()], [x.numel(), 1], [1, n], layout)


@gluon.jit
def place(tile, n_blocks, group, LAST_FIRST: gl.constexpr):
    """Which block, and which (row of the batch, head) counted through, the tile of this number is.

    Tiles run over the heads of a group first, then over its blocks, from heavy to light; then comes the next group.
    """
    g = tile // (group * n_blocks)
    rest = tile - g * group * n_blocks
    block = rest // group
    if LAST_FIRST:
        block = n_blocks - 1 - block
    return block, g * group + rest % group


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """As many barriers in shared memory, each complete with so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def queue(READERS: gl.constexpr):
    """One number in shared memory, the next tile's, with its barriers: the end of the queue inside a thread block."""
    slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return slot, barriers(1, 1), barriers(1, READERS)


@gluon.jit
def offer(tile, slot, full, empty, n):
    """The loading warp tells which tile comes n-th, once all have taken the one before."""
    mbarrier.wait(empty.index(0), (n & 1) ^ 1)
    slot.store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def take(slot, full, empty, n):
    """A warpgroup reads which tile comes n-th.

    The shuffle from lane 0 changes nothing but what the compiler knows: the number is the same in the whole warp, so
    addresses made from it stay in uniform registers.
    """
    mbarrier.wait(full.index(0), n & 1)
    tile = gl.max(slot.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    tile = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [tile], dtype=gl.int32, is_pure=False, pack=1
    )
    mbarrier.arrive(empty.index(0), count=1)
    return tile
