"""Muon in Triton: momentum, orthogonalization and the step, for all matrices of one shape at once, in place.

For each matrix w with gradient g (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"):
    m ← β m + s g                 s: gradient clipping's factor, if given
    u = s g + β m                 Nesterov: one step ahead
    w ← w − decay w − rate O(u)   O: singular values brought near 1, see `newton_schulz.py`

Memory traffic, in bytes an element of fp32 parameters: the first kernel reads g and m, writes m and u in bf16 (14),
and adds up u² on the way, as O divides by u's norm; the last reads w and O, writes w (10). The same by one torch call
after another, with a stack and a cast in between, is 78: at 3 TB/s a third of the whole step's time.

Tiling as in `adamw.py`: a program a chunk, here of the matrix that is the program's second number. Sums of squares are
written one a chunk and added up in a second pass: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.optimizers import tensor_lists
from kernels.optimizers.newton_schulz import newton_schulz
from kernels.shared import launch


@triton.jit
def _look_ahead(begin, inside, G, M, U, momentum, scale, BLOCK: tl.constexpr):
    """m ← β m + s g and u = s g + β m of a block; returns u² as it was rounded, 0 outside."""
    at = begin + tl.arange(0, BLOCK)
    g = tl.load(G + at, mask=inside, other=None if inside is None else 0.0).to(tl.float32) * scale
    m = tl.load(M + at, mask=inside, other=None if inside is None else 0.0).to(tl.float32) * momentum + g  # (BLOCK,)
    tl.store(M + at, m.to(M.dtype.element_ty), mask=inside)
    u = (g + momentum * m).to(U.dtype.element_ty)
    tl.store(U + at, u, mask=inside)
    return u.to(tl.float32) * u.to(tl.float32)


@triton.jit
def _gather(Table, U, Squares, Scale, size, momentum,
            PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
            CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tl.static_assert(CHUNK % BLOCK == 0)  # a whole chunk has no mask
    matrix = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    G = tensor_lists.pointer(Table + 2 * matrix, GRADIENT, ALIGNED)
    M = tensor_lists.pointer(Table + 2 * matrix + 1, PARAMETER, ALIGNED)
    U += matrix * size
    scale = tl.load(Scale) if SCALED else 1.0
    squares = tl.zeros([BLOCK], tl.float32)
    if first + CHUNK <= size:
        for begin in range(first, first + CHUNK, BLOCK):
            squares += _look_ahead(begin, None, G, M, U, momentum, scale, BLOCK)
    else:
        for begin in range(first, size, BLOCK):
            squares += _look_ahead(begin, begin + tl.arange(0, BLOCK) < size, G, M, U, momentum, scale, BLOCK)
    tl.store(Squares + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(squares))


@triton.jit
def _step(begin, inside, W, U, decay, rate, BLOCK: tl.constexpr):
    """w ← w − decay w − rate u of a block."""
    at = begin + tl.arange(0, BLOCK)
    w = tl.load(W + at, mask=inside).to(tl.float32)
    u = tl.load(U + at, mask=inside).to(tl.float32)
    tl.store(W + at, (w - (decay * w + rate * u)).to(W.dtype.element_ty), mask=inside)


@triton.jit
def _apply(Table, U, size, decay, rate,
           PARAMETER: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tl.static_assert(CHUNK % BLOCK == 0)  # a whole chunk has no mask
    matrix = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    W = tensor_lists.pointer(Table + matrix, PARAMETER, ALIGNED)
    U += matrix * size
    if first + CHUNK <= size:
        for begin in range(first, first + CHUNK, BLOCK):
            _step(begin, None, W, U, decay, rate, BLOCK)
    else:
        for begin in range(first, size, BLOCK):
            _step(begin, begin + tl.arange(0, BLOCK) < size, W, U, decay, rate, BLOCK)


def kernel_settings(device: torch.device) -> dict:
    """As for AdamW: four elements a thread, so that vectors of fp32 and of bf16 lie in the same threads."""
    default = {"CHUNK": 16384, "BLOCK": 1024, "num_warps": 8}
    if launch.INTERPRETED:
        default = {"CHUNK": 1 << 20, "BLOCK": 1 << 15, "num_warps": 8}
    return launch.settings("muon", (), device, default)


def _check(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
    """Raise `ValueError` unless all matrices are of one shape and kind that the kernels can take."""
    kinds = {
        (tuple(p.shape), tuple(g.shape), p.dtype, m.dtype, g.dtype, p.device)
        for p, g, m in zip(params, grads, buffers, strict=True)
    }
    shape, grad_shape, dtype, buffer_dtype, grad_dtype, _ = next(iter(kinds))
    if len(kinds) > 1 or len(shape) != 2 or shape != grad_shape or dtype != buffer_dtype:
        raise ValueError(f"muon: {sorted(map(str, kinds))}; one call takes matrices of one shape, dtype and device")
    if not {dtype, grad_dtype} <= set(tensor_lists.TYPES):
        raise ValueError(f"muon: {dtype} parameters with {grad_dtype} gradients; both may be fp32, fp16 or bf16")


def look_ahead(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], momentum: float, grad_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first part of `muon`: m ← β m + s g, in place.

    Returns u = s g + β m, (n, rows, columns) in bf16, and the matrices' norms, (n,) fp32: what `newton_schulz` takes.
    """
    _check(params, grads, buffers)
    device = params[0].device
    size = params[0].numel()
    n_matrices = len(params)

    # The table: addresses of gradient and momentum of each matrix. Where one is not contiguous, of a copy.
    gradients = [x.contiguous() for x in grads]
    written_to = [x.contiguous() for x in buffers]
    addresses = [x.data_ptr() for of_one in zip(gradients, written_to, strict=True) for x in of_one]
    table = tensor_lists.table(tuple(addresses), device)

    # u, with the sum of u² of each chunk
    settings = kernel_settings(device)
    grid = launch.cdiv(size, settings["CHUNK"]), n_matrices
    # on a CPU, in fp32: the interpreter computes in bf16 wrongly
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    u = torch.empty(n_matrices, *params[0].shape, dtype=dtype, device=device)
    squares = torch.empty(n_matrices, grid[0], dtype=torch.float32, device=device)
    launch.run(
        _gather, grid, table, u, squares, squares if grad_scale is None else grad_scale, size, momentum,
        PARAMETER=tensor_lists.TYPES[params[0].dtype], GRADIENT=tensor_lists.TYPES[grads[0].dtype],
        ALIGNED=tensor_lists.aligned(addresses), SCALED=grad_scale is not None, **settings,
    )  # fmt: skip
    _note_written(buffers, written_to)
    return u, squares.sum(1).sqrt()


def apply(params: list[Tensor], u: Tensor, rate: float, decay: float) -> None:
    """The last part of `muon`: w ← w − decay w − rate u, in place; u: (n, rows, columns), contiguous."""
    device = params[0].device
    size = params[0].numel()
    written_to = [x.contiguous() for x in params]
    addresses = [x.data_ptr() for x in written_to]
    table = tensor_lists.table(tuple(addresses), device)
    settings = kernel_settings(device)
    grid = launch.cdiv(size, settings["CHUNK"]), len(params)
    launch.run(
        _apply, grid, table, u, size, decay, rate,
        PARAMETER=tensor_lists.TYPES[params[0].dtype], ALIGNED=tensor_lists.aligned(addresses), **settings,
    )  # fmt: skip
    _note_written(params, written_to)


def _note_written(originals: list[Tensor], written_to: list[Tensor]) -> None:
    """Give tensors that are not contiguous what a kernel has written to their copies, and let autograd know."""
    for original, copy in zip(originals, written_to, strict=True):
        if original.data_ptr() != copy.data_ptr():
            original.copy_(copy)
    torch.autograd.graph.increment_version(originals)


def update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    grad_scale: Tensor | None,
    rate: float,
    momentum: float,
    decay: float,
    steps: int,
    coefficients: list[float],
) -> None:
    """See `muon`."""
    if not params or not params[0].numel():
        return
    u, norms = look_ahead(params, grads, buffers, momentum, grad_scale)
    u = newton_schulz(u, steps, tuple(coefficients), norms)
    apply(params, u, rate, decay)


_op = torch.library.custom_op("minillm::muon", update, mutates_args=("params", "buffers"))


@_op.register_fake
def _(params, grads, buffers, grad_scale, rate, momentum, decay, steps, coefficients):
    return None


def muon(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    rate: float,
    momentum: float,
    decay: float,
    steps: int,
    coefficients: tuple[float, float, float],
    grad_scale: Tensor | None = None,
) -> None:
    """One step of Muon for matrices of one shape, in place: w ← w − decay w − rate O(u), see above.

    params: (rows, columns) each, fp32, fp16 or bf16, any strides; grads: alike, only read; buffers: the momentum, of
    the parameters' dtype. steps, coefficients: of Newton–Schulz iteration, which works in bf16. grad_scale: fp32 tensor
    of one number on the device that gradients are multiplied by. Raises `ValueError` if the matrices differ.
    """
    arguments = (params, grads, buffers, grad_scale, rate, momentum, decay, steps, list(coefficients))
    if torch.compiler.is_compiling():
        _op(*arguments)
    else:  # without the dispatcher, as in `adamw.py`
        update(*arguments)
