"""The products of a matrix with its own transpose in Newton–Schulz iteration, computing half of each.

Muon replaces the singular values of each update by 1, nearly, and keeps its singular vectors (Jordan et al. 2024,
"Muon: an optimizer for hidden layers in neural networks"), by repeating
    x ← a x + (b g + c g²) x        g = x xᵀ, or on the other, shorter side: x ← x (a + b g + c g²), g = xᵀ x
g and g² = g gᵀ are symmetric, so only blocks on and below the diagonal are computed, and each is written twice, as it
is and mirrored: the work of both products is halved, and for a square matrix that of the iteration cut by a third. One
kernel does
    out = s (α x xᵀ + β x + γ 1)        s: one number a matrix, if given; β and γ where x itself is symmetric
first with α = 1 for g, then on g with α = c, β = b, γ = a for p = a + b g + c g². So x ← p x is left: a product like
any other, which is torch's (cuBLAS). Had a x been added there, torch would first have copied x into the result.
With a on p's diagonal the result is also nearer to the exact one: a x + … rounded to bf16 twice errs more.

The division by the matrix's norm at the start costs no pass either: x' = x / ‖x‖ makes g = x xᵀ / ‖x‖², and with s =
1 / ‖x‖ in the second product p x is the new x' already. Products are added up in fp32, results rounded to x's dtype.

Memory traffic is small beside the work; it is the L2 cache that feeds the tensor cores. A tile of 128 × 128 makes 64
operations for each byte it reads, one of 256 × 128 makes 85. So where registers allow it (wgmma, whose operands stay in
shared memory) a program takes two blocks of 128 × 128, one on top of the other. Rows of blocks are taken in pairs then:
for 2,048 rows 72 programs do the work of 144 blocks, 136 of which are needed. Blocks are numbered along the rows of the
triangle, so that programs that run together share rows of x; a whole matrix is in the L2 cache by then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.shared import launch
from kernels.shared.proxy_fence import fence_copies

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _square(number):
    """Row and column of the number-th square on or below the diagonal, counted row by row: number = row (row + 1) / 2
    + column."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)  # the root may be rounded over a whole number
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def _rows(X, matrix, first, k, width, length, stride, row_stride, column_stride,
          TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Tile of x, (ROWS, STEP), beginning at row `first` and column k; zeros outside."""
    if DESCRIPTOR and TRANSPOSED:
        tile = tl.trans(tl.reshape(X.load([matrix, k, first]), (STEP, ROWS)))
    elif DESCRIPTOR:
        tile = tl.reshape(X.load([matrix, first, k]), (ROWS, STEP))
    else:
        row = first + tl.arange(0, ROWS)
        column = k + tl.arange(0, STEP)
        at = X + matrix.to(tl.int64) * stride
        at += row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        tile = tl.load(at, mask=(row < width)[:, None] & (column < length)[None, :], other=0.0)
        fence_copies(X.dtype.element_ty != tl.float32)
    return tile


@triton.jit
def _put(Out, S, total, i, j, matrix, width, alpha, beta, gamma,
         POLYNOMIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Finish block (i, j) of a matrix's products and write it, and its mirror image; above the diagonal do nothing."""
    if i >= j:
        row = i * BLOCK + tl.arange(0, BLOCK)
        column = j * BLOCK + tl.arange(0, BLOCK)
        inside = (row < width)[:, None] & (column < width)[None, :]
        total *= alpha
        begin = matrix.to(tl.int64) * width * width
        at = begin + row[:, None].to(tl.int64) * width + column[None, :]
        if POLYNOMIAL:
            total += beta * tl.load(S + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(row[:, None] == column[None, :], gamma, 0.0)
        out = total.to(Out.dtype.element_ty)
        if i == j:  # above the diagonal copy what was computed below it, so that the result is symmetric to the bit
            out = tl.where(row[:, None] >= column[None, :], out, tl.trans(out))
        tl.store(Out + at, out, mask=inside)
        if i > j:
            mirrored = begin + column[:, None].to(tl.int64) * width + row[None, :]
            tl.store(Out + mirrored, tl.trans(out), mask=tl.trans(inside))


@triton.jit
def _product(Out, X, Y, S, Scale, width, length, stride, row_stride, column_stride, alpha, beta, gamma,
             TRANSPOSED: tl.constexpr, DESCRIPTOR: tl.constexpr, POLYNOMIAL: tl.constexpr, SCALED: tl.constexpr,
             STACK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    # Which block (i, j) this program computes; of a stack, the upper one.
    matrix = tl.program_id(1)
    i, j = _square(tl.program_id(0) // STACK)
    i = i * STACK
    j = j * STACK + tl.program_id(0) % STACK

    total = tl.zeros([STACK * BLOCK, BLOCK], tl.float32)
    for k in range(0, length, STEP):
        x = _rows(X, matrix, i * BLOCK, k, width, length, stride, row_stride, column_stride,
                  TRANSPOSED, DESCRIPTOR, STACK * BLOCK, STEP)  # fmt: skip
        y = _rows(Y, matrix, j * BLOCK, k, width, length, stride, row_stride, column_stride,
                  TRANSPOSED, DESCRIPTOR, BLOCK, STEP)  # fmt: skip
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")

    if SCALED:
        scale = tl.load(Scale + matrix)
        alpha *= scale
        beta *= scale
        gamma *= scale
    if STACK == 2:
        above, below = tl.split(tl.permute(tl.reshape(total, (2, BLOCK, BLOCK)), (1, 2, 0)))
        _put(Out, S, above, i, j, matrix, width, alpha, beta, gamma, POLYNOMIAL, BLOCK)
        _put(Out, S, below, i + 1, j, matrix, width, alpha, beta, gamma, POLYNOMIAL, BLOCK)
    else:
        _put(Out, S, total, i, j, matrix, width, alpha, beta, gamma, POLYNOMIAL, BLOCK)


def tile_settings(x: Tensor, regular: bool) -> dict:
    """Size of the blocks, how many are stacked, and the pipeline, by dtype, layout and architecture.

    Chosen by compiling: 4 warps hold a block of 128 × 128 too, but spill in the second product; two blocks on a stack
    spill without wgmma, on sm_100 (256 bytes), and with pointers instead of descriptors (40 bytes).
    """
    architecture = launch.architecture(x.device)
    if x.dtype == torch.float32:  # exact products, without tensor cores: for comparing
        default = dict(STACK=1, BLOCK=64, STEP=16, num_warps=8, num_stages=2)
    elif not regular:  # element by element, with an address and a mask for each
        default = dict(STACK=1, BLOCK=64, STEP=32, num_warps=8, num_stages=3)
    elif architecture == 90:  # 192 KB of shared memory: one program a multiprocessor
        default = dict(STACK=2, BLOCK=128, STEP=64, num_warps=8, num_stages=4)
    elif architecture in (100, 103):  # 96 KB: two
        default = dict(STACK=1, BLOCK=128, STEP=64, num_warps=8, num_stages=3)
    else:  # 48 KB: two, of the 99 KB that most GPUs have
        default = dict(STACK=1, BLOCK=128, STEP=32, num_warps=8, num_stages=4)
    return launch.settings("newton_schulz", (x.dtype, regular), x.device, default)


def _regular(x: Tensor, width: int) -> bool:
    """Whether all rows of x and of a result of that width begin at multiples of 16 bytes, as 16-bit numbers."""
    row_distances = (*x.stride()[:2], width)
    rows_aligned = all(distance > 0 and distance % 8 == 0 for distance in row_distances)
    return x.stride(2) == 1 and rows_aligned and x.data_ptr() % 16 == 0


def product(x: Tensor, scale: Tensor | None = None, coefficients: tuple[float, float, float] | None = None) -> Tensor:
    """See `symmetric_product`."""
    # a aᵀ is the smaller of the two products; `stored` is a as its rows lie in memory, perhaps a's columns.
    a = x if x.shape[1] <= x.shape[2] else x.mT  # (n, width, length), width ≤ length
    if coefficients is not None:
        a = a.contiguous()
    transposed = coefficients is None and a.stride(2) != 1 and a.stride(1) == 1
    stored = a.mT if transposed else a
    n, width, length = a.shape
    out = torch.empty(n, width, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    regular = _regular(stored, width)
    descriptor = regular and x.element_size() == 2 and launch.architecture(x.device) >= 90
    settings = tile_settings(x, regular)
    stack = settings["STACK"]
    block = settings["BLOCK"]

    def source(rows: int) -> Tensor | TensorDescriptor:
        """What the kernel reads tiles with so many rows of a from."""
        if not descriptor:
            return stored
        tile = [1, settings["STEP"], rows] if transposed else [1, rows, settings["STEP"]]
        return TensorDescriptor(stored, list(stored.shape), list(stored.stride()), tile)

    blocks_high = launch.cdiv(width, stack * block)
    triangle = blocks_high * (blocks_high + 1) // 2
    gamma, beta, alpha = coefficients if coefficients is not None else (0.0, 0.0, 1.0)
    launch.run(
        _product, (triangle * stack, n),
        out, source(stack * block), source(block), a, out if scale is None else scale, width, length, *a.stride(),
        alpha, beta, gamma,
        TRANSPOSED=transposed, DESCRIPTOR=descriptor, POLYNOMIAL=coefficients is not None, SCALED=scale is not None,
        **settings,
    )  # fmt: skip
    return out


def _symmetric_product(x: Tensor, scale: Tensor | None, a: float, b: float, c: float, polynomial: bool) -> Tensor:
    return product(x, scale, (a, b, c) if polynomial else None)


_op = torch.library.custom_op("minillm::symmetric_product", _symmetric_product, mutates_args=())


@_op.register_fake
def _(x, scale, a, b, c, polynomial):
    side = min(x.shape[1], x.shape[2])
    return x.new_empty(x.shape[0], side, side)


_symmetric = launch.op(_op, _symmetric_product)


def symmetric_product(
    x: Tensor, scale: Tensor | None = None, coefficients: tuple[float, float, float] | None = None
) -> Tensor:
    """x xᵀ, or xᵀ x where that is smaller; with coefficients (a, b, c), of a symmetric x: a + b x + c x².

    x: (n, rows, columns) fp32, fp16 or bf16, any strides. scale: (n,) fp32, multiplies each matrix's result. Returns
    (n, m, m) in x's dtype, m = min(rows, columns), symmetric to the bit. Not differentiable.
    Raises `ValueError` for other dtypes, or coefficients with a matrix that is not square.
    """
    if x.dtype not in DTYPES or x.dim() != 3:
        raise ValueError(
            f"symmetric_product: {x.dtype} {tuple(x.shape)}; give (n, rows, columns) of fp32, fp16 or bf16"
        )
    if coefficients is not None and x.shape[1] != x.shape[2]:
        raise ValueError(f"symmetric_product: {tuple(x.shape)} with coefficients; only square matrices have powers")
    a, b, c = coefficients or (0.0, 0.0, 0.0)
    return _symmetric(x.detach(), scale, a, b, c, coefficients is not None)


def newton_schulz(
    x: Tensor, steps: int, coefficients: tuple[float, float, float], norms: Tensor | None = None
) -> Tensor:
    """Bring all singular values of each matrix near 1: see `kernels.reference.newton_schulz`.

    x: (n, rows, columns) fp32 or bf16, any strides, computed in that dtype (fp16 could not hold the first polynomial of
    a matrix of small norm: `ValueError`). norms: (n,) fp32, the matrices' Frobenius norms where they are known.
    Returns a new contiguous tensor of x's shape and dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"newton_schulz: {x.dtype}; give fp32 or bf16")
    if norms is None:
        norms = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32)
    scale = 1 / (norms + 1e-7)
    for step in range(steps):
        gram = symmetric_product(x, scale.square() if step == 0 else None)  # (n, m, m)
        factor = symmetric_product(gram, scale if step == 0 else None, coefficients)  # a + b g + c g²
        x = factor @ x if x.shape[1] <= x.shape[2] else x @ factor
    return x
