"""AdamW in Triton: one launch updates all tensors of a group, in place.

For each element, at step t = 1, 2, …  (Kingma & Ba 2015, arXiv:1412.6980; decay apart from the gradient: Loshchilov &
Hutter 2019, arXiv:1711.05101):
    g ← s g                                     s: gradient clipping's factor, if given
    m ← m + (1 − β₁)(g − m)                     v ← v + (1 − β₂)(g² − v)
    w ← w − lr λ w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

m, v and the arithmetic are fp32. A parameter of 16 bits cannot take steps smaller than half the distance to its
neighbour (2⁻⁹ of itself in bf16), so either
- a master copy w in fp32 is kept, and the parameter is w rounded to nearest; or
- the parameter is rounded at random, up or down by how near each neighbour is, so that small steps arrive on
  average (Gupta et al. 2015, arXiv:1502.02551). A bf16 number is the upper half of an fp32 number: adding 16 random
  bits to the lower half, then cutting it off, does just that. The bits are a function (Philox4x32 with 7 rounds, Salmon
  et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the seed, the step, the parameter's number and the
  element: the same after resuming, and whatever the size of the blocks. One call gives the bits of four elements.

Memory traffic is all there is. Bytes an element: 28 for fp32 (read w, g, m, v; write w, m, v), 28 for bf16 with a
master copy, 22 with random rounding. A factor of the gradients, as of clipping, is read from the device and costs
nothing here, where to multiply the gradients before is a pass of its own, 8 bytes an fp32 element. (minillm's training
does that, but only in steps whose gradients are too long: with a factor of 1 there is nothing to save.)

Tiling: `tensor_lists.py` tells how a launch reaches many tensors. A program updates one chunk of one tensor, a block
at a time, so that looking up the addresses (two loads, one after the other) is paid once for 16,384 elements. A whole
chunk is read without a mask: under one that may end anywhere, 16 bytes cannot be loaded at once. Where tensors do not
begin at multiples of 16 bytes, another version of the kernel reads element by element (side by side in a warp still).
"""

import itertools
import math
import operator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.optimizers import tensor_lists
from kernels.shared import launch

DTYPE = operator.attrgetter("dtype")
DEVICE = operator.attrgetter("device")
SHAPE = operator.attrgetter("shape")
COLUMNS = 7  # of the table: addresses of parameter, gradient, m, v and master copy; size; number for random bits


@triton.jit
def _random_rounding(w, begin, number, step, seed, BLOCK: tl.constexpr):
    """fp32 → bf16, up or down at random; `begin`, a multiple of 4: the block's first element.

    fp32    s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm       bf16 is the upper half
                     + 0000000 | random 16 bits         carries into the upper half as often as it should
    """
    # Random bits: one call of Philox for each four elements.
    index = (begin + 4 * tl.arange(0, BLOCK // 4)).to(tl.int64) >> 2
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero + number.to(tl.uint32), zero + step.to(tl.uint32), 7)
    random = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))  # a b c d a b c d …

    # Added to the lower half, which is then cut off.
    bits = w.to(tl.uint32, bitcast=True)
    rounded = tl.where(w == w, bits + (random & 0xFFFF), bits | 0x400000)  # NaN plus bits may be a number
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update(begin, inside, P, G, M, V, W, scale, decay, step_size, shrink, share1, share2, eps, number, step, seed,
            MASTER: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of elements; the mask `inside` is None where all of them exist."""
    at = begin + tl.arange(0, BLOCK)
    g = tl.load(G + at, mask=inside).to(tl.float32) * scale
    m = tl.load(M + at, mask=inside)
    v = tl.load(V + at, mask=inside)
    w = tl.load((W if MASTER else P) + at, mask=inside).to(tl.float32)

    m += share1 * (g - m)
    v += share2 * (g * g - v)
    w -= decay * w + step_size * (m / (tl.sqrt(v) * shrink + eps))

    tl.store(M + at, m, mask=inside)
    tl.store(V + at, v, mask=inside)
    if MASTER:
        tl.store(W + at, w, mask=inside)
    if RANDOM:
        tl.store(P + at, _random_rounding(w, begin, number, step, seed, BLOCK), mask=inside)
    else:
        tl.store(P + at, w.to(P.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step", "seed"])
def _adamw(Table, Chunks, Scale, decay, step_size, shrink, share1, share2, eps, step, seed,
           PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, MASTER: tl.constexpr,
           RANDOM: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    tl.static_assert(CHUNK % BLOCK == 0)  # a whole chunk has no mask

    # Which chunk of which tensor this program updates, and where that tensor lies: a row of the table.
    row = Table + tl.load(Chunks + 2 * tl.program_id(0)).to(tl.int64) * COLUMNS
    first = tl.load(Chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    P = tensor_lists.pointer(row, PARAMETER, ALIGNED)
    G = tensor_lists.pointer(row + 1, GRADIENT, ALIGNED)
    M = tensor_lists.pointer(row + 2, tl.float32, ALIGNED)
    V = tensor_lists.pointer(row + 3, tl.float32, ALIGNED)
    W = tensor_lists.pointer(row + 4, tl.float32, ALIGNED)
    size = tl.load(row + 5)
    number = tl.load(row + 6)
    scale = tl.load(Scale) if SCALED else 1.0

    if first + CHUNK <= size:
        for begin in range(first, first + CHUNK, BLOCK):
            _update(begin, None, P, G, M, V, W, scale, decay, step_size, shrink, share1, share2, eps,
                    number, step, seed, MASTER, RANDOM, BLOCK)  # fmt: skip
    else:
        for begin in range(first, size, BLOCK):
            inside = begin + tl.arange(0, BLOCK) < size
            _update(begin, inside, P, G, M, V, W, scale, decay, step_size, shrink, share1, share2, eps,
                    number, step, seed, MASTER, RANDOM, BLOCK)  # fmt: skip


def kernel_settings(device: torch.device) -> dict:
    """Elements of a chunk and of a block, and warps: four elements a thread, whatever the GPU: memory is the limit.

    So a thread holds one vector of 16 bytes of each fp32 tensor and needs 32 registers: a multiprocessor is full of
    threads, with 128 KB on their way to it. With eight elements it is about as many bytes for fewer threads, but the
    vectors of bf16 and fp32 tensors would then lie in different threads and be exchanged through shared memory.
    """
    default = {"CHUNK": 16384, "BLOCK": 1024, "num_warps": 8}
    if launch.INTERPRETED:  # its cost is by program
        default = {"CHUNK": 1 << 20, "BLOCK": 1 << 15, "num_warps": 8}
    return launch.settings("adamw", (), device, default)


def _check(params: list[Tensor], grads: list[Tensor], state: list[list[Tensor]], masters: bool, random: bool) -> None:
    """Raise `ValueError` for what the kernel cannot take; state: moments, and master copies if there are any.

    There may be a thousand tensors, so the loops over them are those of `map` and `set`.
    """
    columns = [params, grads, *state]
    dtypes, grad_dtypes, *state_dtypes = [set(map(DTYPE, column)) for column in columns]
    devices = set(map(DEVICE, itertools.chain(*columns)))
    if len(dtypes) > 1 or len(grad_dtypes) > 1 or len(devices) > 1:
        raise ValueError(
            f"adamw: parameters and gradients of one call share dtype and device, not {dtypes}, {grad_dtypes}, "
            f"{devices}; call twice"
        )

    shapes = [list(map(SHAPE, column)) for column in columns]
    if any(other != shapes[0] for other in shapes):
        unlike = next(of_one for of_one in zip(*shapes, strict=True) if len(set(of_one)) > 1)
        raise ValueError(f"adamw: {[tuple(s) for s in unlike]}: a gradient and moments have their parameter's shape")

    (dtype,) = dtypes
    (grad_dtype,) = grad_dtypes
    if dtype not in tensor_lists.TYPES or grad_dtype not in tensor_lists.TYPES:
        raise ValueError(f"adamw: {dtype} parameters with {grad_dtype} gradients; both may be fp32, fp16 or bf16")
    if random and (dtype != torch.bfloat16 or masters):
        raise ValueError(f"adamw: random rounding is for bf16 parameters without a master copy, not {dtype}")
    if not random and masters == (dtype == torch.float32):
        has = "master copies" if masters else "no master copies"
        raise ValueError(f"adamw: {dtype} parameters with {has}; fp16 and bf16 need one each")
    if any(dtypes != {torch.float32} for dtypes in state_dtypes):
        raise ValueError("adamw: moments and master copies are fp32; convert them by .float()")


def _copied(columns: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The columns with copies of tensors that are stored in unlike or scattered ways; (tensor, copy) of those written.

    columns: parameters, gradients, and what else is written.
    """
    columns = [list(column) for column in columns]
    copies = []
    for i, tensors in enumerate(zip(*columns, strict=True)):  # of one parameter
        if tensor_lists.stored_alike(*tensors):
            continue
        for number, (column, x) in enumerate(zip(columns, tensors, strict=True)):
            column[i] = x.contiguous()
            is_gradient = number == 1  # only read
            if column[i] is not x and not is_gradient:
                copies.append((x, column[i]))
    return columns, copies


def update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
    numbers: list[int] | None,
) -> None:
    """See `adamw`. Tensors that are stored in unlike or scattered ways are copied, and what is written copied back."""
    if not params:
        return
    state = [exp_avgs, exp_avg_sqs]
    if masters:
        state.append(masters)
    _check(params, grads, state, bool(masters), seed is not None)
    columns = [params, grads, *state]
    copies = []
    if not tensor_lists.contiguous(columns):
        columns, copies = _copied(columns)

    # The table: a row for each parameter. Without master copies their column holds any address.
    addresses = [[x.data_ptr() for x in column] for column in columns]
    master_column = [] if masters else addresses[:1]
    sizes = tuple(p.numel() for p in params)
    if numbers is None:
        numbers = range(len(params))
    rows = zip(*addresses, *master_column, sizes, numbers, strict=True)
    device = params[0].device
    table = tensor_lists.table(tuple(itertools.chain.from_iterable(rows)), device)

    settings = kernel_settings(device)
    chunks = tensor_lists.chunks(sizes, settings["CHUNK"], device)
    if len(chunks):
        launch.run(
            _adamw, (len(chunks),),
            table, chunks, table if grad_scale is None else grad_scale,
            lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), 1 - beta1, 1 - beta2, eps,
            step, seed or 0,
            PARAMETER=tensor_lists.TYPES[params[0].dtype], GRADIENT=tensor_lists.TYPES[grads[0].dtype],
            ALIGNED=tensor_lists.aligned(itertools.chain(*addresses)),
            MASTER=bool(masters), RANDOM=seed is not None, SCALED=grad_scale is not None, COLUMNS=COLUMNS, **settings,
        )  # fmt: skip
    for original, copy in copies:
        original.copy_(copy)


_op = torch.library.custom_op("minillm::adamw", update, mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters"))


@_op.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, lr, beta1, beta2, eps, weight_decay, step, seed,
      numbers):  # fmt: skip
    return None


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    masters: list[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    seed: int | None = None,
    numbers: list[int] | None = None,
) -> None:
    """One step of AdamW for a list of tensors, in place: see `kernels.reference.adamw`.

    params: fp32, fp16 or bf16, of one dtype and device, any strides; grads: of one dtype, only read; exp_avgs,
    exp_avg_sqs: fp32, each of its parameter's shape. step: counted from 1. masters: fp32 copies of fp16 or bf16
    parameters, from which they are rounded. grad_scale: fp32 tensor of one number on the device that gradients are
    multiplied by. seed: round bf16 parameters at random instead of keeping masters; the random bits of a parameter
    depend on seed, step, and its number in `numbers` (default: its place in the list).
    Raises `ValueError` on shapes and dtypes that do not go together.
    """
    arguments = (params, grads, exp_avgs, exp_avg_sqs, masters or [], grad_scale, lr, *betas, eps, weight_decay)
    if torch.compiler.is_compiling():
        _op(*arguments, step, seed, numbers)
    else:  # the same without a dispatcher that looks at each of a thousand tensors: 0.3 ms
        update(*arguments, step, seed, numbers)
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *(masters or [])])
