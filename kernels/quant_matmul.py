"""A linear layer whose frozen weight is kept in 8 or 4 bits: y = x Wᵀ forward, dx = dy W backward, W never trained.

W (N, K) is four tensors, in one of two formats, which `kernels.reference.dequantize` spells out:
    int8    codes (N, K) int8; scale (N,) fp32: w = code · scale of its row; a few columns kept as they were
            kept (N, O), 16 or 32 bits; columns (O,) int64: where they belong; their codes are 0
    NF4     codes (N, 32 B) uint8, two to a byte; scale (N, B) int8; coarse (⌈N B / 256⌉,) fp32; offset (1,) fp32:
            w = nf4[code] · (scale · coarse of its group + offset), one scale for 64 columns, B = ⌈K / 64⌉
(4-bit NormalFloat with double quantization: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.) A byte's low
half is a column among the first 32 of its block, the high half the one 32 further: a tile of bytes is then two tiles of
weights, each of whole runs of columns, and nothing has to be interleaved.

Products are of x and W rounded to x's dtype, summed in fp32. There are two ways to them:
    fused     tiles of codes are turned into weights between memory and tensor cores. Weights are the product's first
              operand, y being made transposed: few rows of x then fill tiles of 16 columns, not of 64 rows.
    by way of a scratch W in x's dtype (one layer's, 16 bits a weight, gone after the call) and cuBLAS.
A step of decoding (M = 1) is memory traffic alone: codes are read once, a quarter of the bytes of a 16-bit W. Each tile
of rows (up to 128) decodes all of W again, about 5 instructions a weight: for 4096 × 11008 on an H100 about 15 µs a
tile, whose products take 16 µs. The scratch costs 38 µs, however many rows there are (half a byte read, 2 written and
read again, of 3 TB/s). By this estimate the fused way is ahead up to about 256 rows and level at 512, where cuBLAS's
own peak speaks for the scratch: FUSED_ROWS = 256. Estimated, not measured on a GPU; `python -m kernels.bench
quant_matmul` has rows on both sides of it. In fp32, which has no tensor cores, the fused way serves decoding alone.

The 16 values of NF4 are looked up in shared memory (`tl.gather`): different words of one 64-byte line are no bank
conflict. A load from a pointer would be taken for data to be pipelined, and hold up the pipeline of the codes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.shared import launch
from kernels.shared.proxy_fence import fence_copies

FUSED_ROWS = 256


@triton.jit
def _column(j, half, BITS: tl.constexpr):
    """Which column of W is coded by this half of the row's byte j."""
    return j if BITS == 8 else j // 32 * 64 + half * 32 + j % 32


@triton.jit
def _scales(Scale, Coarse, Offset, n, first, n_out, blocks, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Scales of the rows n and of COUNT blocks of columns from `first` on, (N, COUNT), or (N, 1) for whole rows."""
    if BITS == 8:
        scale = tl.load(Scale + n, mask=n < n_out, other=0.0)[:, None]
    else:
        b = first + tl.arange(0, COUNT)
        inside = (n < n_out)[:, None] & (b < blocks)[None, :]  # (N, COUNT)
        at = n[:, None].to(tl.int64) * blocks + b[None, :]
        fine = tl.load(Scale + at, mask=inside, other=0).to(tl.float32)
        scale = fine * tl.load(Coarse + at // 256, mask=inside, other=0.0) + tl.load(Offset)
    return scale


@triton.jit
def _weights(packed, half, scale, table, dtype: tl.constexpr, BITS: tl.constexpr):
    """Weights of a tile of bytes, or of one half of each: (N, BYTES) in `dtype`."""
    N: tl.constexpr = packed.shape[0]
    BYTES: tl.constexpr = packed.shape[1]
    COUNT: tl.constexpr = scale.shape[1]
    if BITS == 8:
        value = packed.to(tl.float32)
    else:
        code = (packed >> (4 * half)) & 15
        value = tl.gather(table, tl.reshape(code.to(tl.int32), [N * BYTES]), 0)
    value = tl.reshape(value, [N, COUNT, BYTES // COUNT]) * scale[:, :, None]  # a block of columns, its scale
    return tl.reshape(value, [N, BYTES]).to(dtype)


@triton.jit(do_not_specialize=["n_rows"])
def _forward(X, Codes, Scale, Coarse, Offset, Kept, Columns, Table, Y, n_rows, n_out, n_in, row_bytes, n_kept, x_stride,
             BITS: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # rows of W, columns of y
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of x and y
    row = n[:, None].to(tl.int64)
    n_inside = (n < n_out)[:, None]
    m_inside = (m < n_rows)[None, :]
    X += m[None, :].to(tl.int64) * x_stride
    dtype: tl.constexpr = X.dtype.element_ty
    table = tl.load(Table + tl.arange(0, 16))
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # transposed

    # Tiles of W, decoded, times tiles of x.
    scale = _scales(Scale, Coarse, Offset, n, 0, n_out, row_bytes // 32, BITS, BYTES // 32)
    for start in range(0, row_bytes, BYTES):
        j = start + tl.arange(0, BYTES)
        packed = tl.load(Codes + row * row_bytes + j[None, :], mask=n_inside & (j < row_bytes)[None, :], other=0)
        next_scale = scale  # asked for a step ahead: single bytes cannot be copied to shared memory in the background
        if BITS == 4:
            next_block = start // 32 + BYTES // 32
            next_scale = _scales(Scale, Coarse, Offset, n, next_block, n_out, row_bytes // 32, BITS, BYTES // 32)
        for half in tl.static_range(8 // BITS):
            k = _column(j, half, BITS)
            x = tl.load(X + k[:, None], mask=(k < n_in)[:, None] & m_inside, other=0.0)  # (BYTES, M)
            fence_copies(BLOCK_N >= 64)
            w = _weights(packed, half, scale, table, dtype, BITS)  # (N, BYTES)
            y = tl.dot(w, x, y, input_precision=PRECISION)
        scale = next_scale

    # The columns of int8 that were kept as they were, 32 at a time.
    if KEPT:
        for start in range(0, n_kept, 32):
            o = start + tl.arange(0, 32)
            k = tl.load(Columns + o, mask=o < n_kept, other=0)
            x = tl.load(X + k[:, None], mask=(o < n_kept)[:, None] & m_inside, other=0.0)  # (32, M)
            w = tl.load(Kept + row * n_kept + o[None, :], mask=n_inside & (o < n_kept)[None, :], other=0.0)  # (N, 32)
            y = tl.dot(w.to(tl.float32).to(dtype), x, y, input_precision=PRECISION)
    tl.store(Y + m[None, :].to(tl.int64) * n_out + n[:, None], y.to(dtype), mask=n_inside & m_inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(DY, Codes, Scale, Coarse, Offset, Table, DX, n_rows, n_out, n_in, row_bytes, dy_stride,
              BITS: tl.constexpr, PRECISION: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    j = tl.program_id(0) * BYTES + tl.arange(0, BYTES)  # bytes of each row of W
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of dy and dx
    first = tl.program_id(0) * (BYTES // 32)  # block of 64 columns
    blocks = row_bytes // 32
    m_inside = (m < n_rows)[:, None]
    dtype: tl.constexpr = DY.dtype.element_ty
    table = tl.load(Table + tl.arange(0, 16))
    dx = tl.zeros([BLOCK_M, BYTES], tl.float32)  # of the columns in the bytes' low halves, or of int8
    dx_high = tl.zeros([BLOCK_M, BYTES], tl.float32)

    # Tiles of dy times tiles of W, decoded, down the rows of W.
    scale = _scales(Scale, Coarse, Offset, tl.arange(0, BLOCK_N), first, n_out, blocks, BITS, BYTES // 32)
    for start in range(0, n_out, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = n[:, None].to(tl.int64) * row_bytes + j[None, :]
        packed = tl.load(Codes + at, mask=(n < n_out)[:, None] & (j < row_bytes)[None, :], other=0)
        next_scale = _scales(Scale, Coarse, Offset, n + BLOCK_N, first, n_out, blocks, BITS, BYTES // 32)
        at = m[:, None].to(tl.int64) * dy_stride + n[None, :]
        dy = tl.load(DY + at, mask=m_inside & (n < n_out)[None, :], other=0.0)  # (M, N)
        dx = tl.dot(dy, _weights(packed, 0, scale, table, dtype, BITS), dx, input_precision=PRECISION)
        if BITS == 4:
            dx_high = tl.dot(dy, _weights(packed, 1, scale, table, dtype, BITS), dx_high, input_precision=PRECISION)
        scale = next_scale

    DX += m[:, None].to(tl.int64) * n_in
    k = _column(j, 0, BITS)[None, :]
    tl.store(DX + k, dx.to(dtype), mask=(k < n_in) & m_inside)
    if BITS == 4:
        tl.store(DX + k + 32, dx_high.to(dtype), mask=(k + 32 < n_in) & m_inside)


@triton.jit
def _dequantize(Codes, Scale, Coarse, Offset, Table, W, n_out, n_in, row_bytes, BITS: tl.constexpr,
                BLOCK_N: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    row = n[:, None].to(tl.int64)
    n_inside = (n < n_out)[:, None]
    first = tl.program_id(1) * (BYTES // 32)  # block of 64 columns
    table = tl.load(Table + tl.arange(0, 16))
    packed = tl.load(Codes + row * row_bytes + j[None, :], mask=n_inside & (j < row_bytes)[None, :], other=0)
    scale = _scales(Scale, Coarse, Offset, n, first, n_out, row_bytes // 32, BITS, BYTES // 32)
    for half in tl.static_range(8 // BITS):
        k = _column(j, half, BITS)
        w = _weights(packed, half, scale, table, W.dtype.element_ty, BITS)
        tl.store(W + row * n_in + k[None, :], w, mask=n_inside & (k < n_in)[None, :])


def block_settings(rows: int, bits: int, itemsize: int, forward: bool, device: torch.device) -> dict:
    """A tile's rows of x (or dy), rows of W and bytes of codes, warps and stages, for 16, 32, 64 or 128 rows of x.

    Decoding wants bytes on their way: 16 rows of W a program, so that a layer of 4,096 gives an H100 two programs
    a multiprocessor, and seven stages of 2 KB of NF4 codes or five of 4 KB of int8 for each (fp32: half). That is 28
    and 40 KB a multiprocessor; 18 must be on their way at 3.35 TB/s and 700 ns. With more rows the sums take the
    registers, 64 a thread at 128 × 64; int8 takes 8 warps there, since 4 would leave no register over.
    """
    default = {"BLOCK_M": rows, "BLOCK_N": 64, "BYTES": 8 * bits, "num_warps": 4, "num_stages": 4}
    if launch.INTERPRETED:  # its cost is by program
        default |= {"BLOCK_M": 32, "BYTES": 128}
    elif rows == 16 and forward:
        default |= {"BLOCK_N": 16, "BYTES": 64 * bits // itemsize, "num_stages": 10 - bits // 2}
    elif rows == 128:
        default |= {"num_warps": bits, "num_stages": 3}
    op = "quant_matmul_forward" if forward else "quant_matmul_backward"
    return launch.settings(op, (rows, bits, itemsize), device, default)


@functools.cache
def _table(device: torch.device) -> Tensor:
    return reference.nf4_values().to(device, torch.float32)


def _operands(weight: list[Tensor]) -> tuple[int, tuple[Tensor, ...], Tensor, Tensor]:
    """Bits of a code; what each kernel takes of W; kept columns and their indices.

    The formats have tensors that the other has not: a kernel does not read those, so there any tensor will do.
    """
    table = _table(weight[0].device)
    if weight[0].dtype == torch.int8:
        codes, scale, kept, columns = weight
        return 8, (codes, scale, scale, scale, table), kept, columns
    codes, scale, coarse, offset = weight
    return 4, (codes, scale, coarse, offset, table), scale, scale


def _settings(n_rows: int, bits: int, forward: bool, x: Tensor) -> dict:
    """Settings of a product with n_rows rows of x: those of the smallest tile that holds them all, else of 128."""
    tile = min(128, max(16, launch.next_power_of_2(n_rows)))
    settings = block_settings(tile, bits, x.element_size(), forward, x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return settings | {"PRECISION": precision, "BITS": bits}


def is_fused(matrix: Tensor, other: int, forward: bool) -> bool:
    """Whether a product of `matrix` with W, which has `other` numbers on its other side, decodes tiles (see above).

    In fp32, and where rows are not aligned to 16 numbers, large tiles would spill registers: there only decoding is.
    """
    aligned = all(n % 16 == 0 for n in (matrix.stride(0), matrix.shape[1], other))
    most_rows = 16 if forward else 0
    if matrix.element_size() == 2 and aligned:
        most_rows = FUSED_ROWS
    return len(matrix) <= most_rows


def dequantize(weight: list[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """W (N, K = width) in `dtype`: see `kernels.reference.dequantize`."""
    bits, operands, kept, columns = _operands(weight)
    n, row_bytes = operands[0].shape
    w = torch.empty(n, width, dtype=dtype, device=operands[0].device)
    block_n, block_bytes = (64, 256) if launch.INTERPRETED else (16, 128)
    launch.run(
        _dequantize, (launch.cdiv(n, block_n), launch.cdiv(row_bytes, block_bytes)),
        *operands, w, n, width, row_bytes, BITS=bits, BLOCK_N=block_n, BYTES=block_bytes, num_warps=4,
    )  # fmt: skip
    if bits == 8 and columns.numel():
        w.index_copy_(1, columns, kept.to(dtype))
    return w


def forward(x: Tensor, weight: list[Tensor]) -> Tensor:
    """y = x Wᵀ (..., N) in x's dtype, for x (..., K) of any strides."""
    matrix = launch.rows(x)  # (M, K)
    n_rows, n_in = matrix.shape
    n_out, row_bytes = weight[0].shape
    if not is_fused(matrix, n_out, True):
        w = dequantize(weight, n_in, x.dtype)  # (N, K)
        return (matrix @ w.T).view(*x.shape[:-1], n_out)

    y = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
    bits, (*operands, table), kept, columns = _operands(weight)
    n_kept = columns.numel() if bits == 8 else 0
    settings = _settings(n_rows, bits, True, x)
    if n_rows:
        launch.run(
            _forward, (launch.cdiv(n_out, settings["BLOCK_N"]), launch.cdiv(n_rows, settings["BLOCK_M"])),
            matrix, *operands, kept, columns, table, y, n_rows, n_out, n_in, row_bytes, n_kept, matrix.stride(0),
            KEPT=n_kept > 0, **settings,
        )  # fmt: skip
    return y


def backward(dy: Tensor, weight: list[Tensor], width: int) -> Tensor:
    """dx = dy W (..., K = width) in dy's dtype, for dy (..., N) of any strides."""
    matrix = launch.rows(dy)  # (M, N)
    n_rows = len(matrix)
    n_out, row_bytes = weight[0].shape
    if not is_fused(matrix, width, False):
        w = dequantize(weight, width, dy.dtype)  # (N, K)
        return (matrix @ w).view(*dy.shape[:-1], width)

    dx = torch.empty(*dy.shape[:-1], width, dtype=dy.dtype, device=dy.device)
    bits, operands, kept, columns = _operands(weight)
    settings = _settings(n_rows, bits, False, dy)
    if n_rows:
        launch.run(
            _backward, (launch.cdiv(row_bytes, settings["BYTES"]), launch.cdiv(n_rows, settings["BLOCK_M"])),
            matrix, *operands, dx, n_rows, n_out, width, row_bytes, matrix.stride(0), **settings,
        )  # fmt: skip
    if bits == 8 and columns.numel():  # the codes of kept columns are 0, and so is dx there until now
        dx.view(n_rows, width).index_copy_(1, columns, matrix @ kept.to(dy.dtype))
    return dx


_op = torch.library.custom_op("minillm::quant_matmul", forward, mutates_args=())
_backward_op = torch.library.custom_op("minillm::quant_matmul_backward", backward, mutates_args=())


@_op.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight[0].shape[0])


@_backward_op.register_fake
def _(dy, weight, width):
    return dy.new_empty(*dy.shape[:-1], width)


_quant_matmul_backward = launch.op(_backward_op, backward)


def _setup(ctx, inputs, output):
    x, weight = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(*weight)  # the layer's own tensors: x is not kept, W being frozen


def _gradient(ctx, dy):
    return _quant_matmul_backward(dy, list(ctx.saved_tensors), ctx.width), [None] * 4


_quant_matmul = launch.op(_op, forward, _setup, _gradient)


def _check(x: Tensor, weight: list[Tensor]) -> None:
    """Raise `ValueError` for what the kernels cannot take."""
    codes = weight[0]
    if codes.dtype not in (torch.int8, torch.uint8) or not all(t.is_contiguous() for t in weight):
        raise ValueError(
            f"codes are {codes.dtype}: contiguous int8 or uint8, as kernels.reference.dequantize reads them"
        )
    row_bytes = x.shape[-1] if codes.dtype == torch.int8 else launch.cdiv(x.shape[-1], 64) * 32
    if codes.shape[1] != row_bytes:
        raise ValueError(f"x (..., {x.shape[-1]}) needs {row_bytes} bytes of codes a row; W has {tuple(codes.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}: the kernels take float32, float16 or bfloat16; cast it")


def quant_matmul(x: Tensor, weight: list[Tensor]) -> Tensor:
    """x Wᵀ for a quantized W: see `kernels.reference.quant_matmul`.

    x: (..., K) fp32, bf16 or fp16, any strides; under autocast it is cast to its dtype. weight: four tensors, see
    `kernels.reference.dequantize`. Sums in fp32. Returns (..., N) in x's dtype; the gradient is x's alone. Raises
    `ValueError` for other shapes and dtypes.
    """
    x = x.to(launch.product_dtype(x))
    _check(x, weight)
    return _quant_matmul(x, list(weight))
