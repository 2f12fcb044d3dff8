"""Products of weights in 16, 8 or 4 bits on a CPU, for generation: one token's time is that of reading the weights.

16 bits  W is rounded to float16, x is not; sums are in float32 (fbgemm, in torch on x86). Whatever rows are beside a
         row, its result is the same up to rounding: with AVX2 few rows are summed in another order than many.
8 bits   x is rounded as well, row by row, and the products are sums of whole numbers (fbgemm, in torch on x86):

             y = s · (round(127 x / s) · codesᵀ) · scales / 127       s the largest magnitude of the row of x

         A row's result has the same bits whatever rows are beside it, and alone up to rounding.
4 bits   x is rounded to bfloat16; a weight is (code − 8) · scale + zero, with a scale and a zero for each 32 weights of
         a row, in bfloat16: 5 bits a weight.

The layers q, k and v, and gate and up, which share their input, are packed as one matrix, multiplied in one call.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

GROUP = 32  # weights that share a scale in 4 bits
MULTIPLE = 16  # of which torch's op for 4 bits wants the number of outputs of a layer


def can_pack(bits: int) -> bool:
    """Whether this machine's torch has the products for weights in so many bits."""
    if bits == 4:
        return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    product = {16: "linear_dynamic_fp16", 8: "linear_with_input_q_dq_qweight_dq_output_fp32"}[bits]
    return hasattr(torch.ops.quantized, product) and "fbgemm" in torch.backends.quantized.supported_engines


def fits(layer: nn.Linear, bits: int) -> bool:
    """Whether a layer's shape suits the products."""
    return bits != 4 or not (layer.in_features % GROUP or layer.out_features % MULTIPLE)


class Float16Matrix:
    """A matrix W (N, K) in float16, to multiply rows by."""

    def __init__(self, weight: Tensor):
        """weight: (N, K), of magnitudes up to 65,504. To nearest."""
        self.sizes = [len(weight)]  # rows of each layer in it
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, K) fp32 → (…, N) fp32."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Matrix:
    """A matrix W (N, K) in 8 bits, to multiply rows by."""

    def __init__(self, weight: Tensor):
        """weight: (N, K), finite. Each row in 255 steps up to its largest magnitude; to nearest."""
        self.sizes = [len(weight)]  # rows of each layer in it
        scale = weight.float().abs().amax(1) / 127  # (N,)
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = _packed(codes, scale)

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, K) fp32 → (…, N) fp32."""
        if x.numel() == x.shape[-1] and not torch.compiler.is_compiling():
            largest = x.abs().max().item() or 1.0  # of one row a number: three calls, not five
            return _product(x, largest, activation_steps(), self.packed)
        largest = x.abs().amax(-1, keepdim=True)  # (…, 1)
        return self.of_unit_rows(x / largest).mul_(largest)  # of a row of zeros: of 0/0, finite and then times 0

    def of_unit_rows(self, x: Tensor) -> Tensor:
        """x (…, K) fp32 within ±1 → (…, N) fp32."""
        return _product(x, 1, activation_steps(), self.packed)


def _packed(codes: Tensor, scale: Tensor):
    """Codes (N, K) int8 and scales (N,) of their rows in fbgemm's layout."""
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are to leave torch one day; here one lives for this line only
        weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def _product(x: Tensor, largest: float, steps: int, packed) -> Tensor:
    """x (…, K), within ± largest, rounded to a `steps`-th of that → its products (…, N) with a packed matrix."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, largest / steps, steps + 1, packed)


@functools.cache
def activation_steps() -> int:
    """Steps from 0 to a row's largest magnitude: 127, or 63 where the products are not exact with 127.

    Processors without VNNI add two products in 16 bits, where 2 · 254 · 127 has no room but 2 · 126 · 127 has. A
    product of the largest numbers shows which kind this one is.
    """
    ones = torch.ones(1, 64)
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    y = _product(ones, 1, 127, _packed(codes, torch.ones(16)))
    return 127 if torch.allclose(y, torch.full((1, 16), 64.0 * 127)) else 63


class Int4Matrix:
    """A matrix W (N, K) in 4 bits, N a multiple of 16 and K of 32, to multiply rows by."""

    def __init__(self, weight: Tensor):
        """weight: (N, K), finite. Each group in 15 steps from its smallest to its largest weight; to nearest."""
        self.sizes = [len(weight)]  # rows of each layer in it
        groups = weight.float().view(len(weight), -1, GROUP)  # (N, K/32, 32)
        smallest = groups.amin(2, keepdim=True)
        step = ((groups.amax(2, keepdim=True) - smallest) / 15).bfloat16()  # (N, K/32, 1)
        step = torch.where(step == 0, 1.0, step)
        middle = (smallest + 8 * step.float()).bfloat16()  # what code 8 stands for
        codes = ((groups - middle.float()) / step.float()).round().add_(8).clamp_(0, 15)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().view(weight.shape), 1)
        self.scales_and_zeros = torch.cat((step, middle), 2).transpose(0, 1).contiguous()  # (K/32, N, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N) fp32."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_zeros)
        return y.float().view(*x.shape[:-1], -1)


MATRICES = {16: Float16Matrix, 8: Int8Matrix, 4: Int4Matrix}
Matrix = Float16Matrix | Int8Matrix | Int4Matrix


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, where W is some rows of a packed matrix. Nothing of it is trained or saved."""

    def __init__(self, linear: nn.Linear, matrix: Matrix, rows: slice):
        """linear: the layer whose place it takes, of which the bias is kept. rows: those of the matrix."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.matrix = matrix
        self.rows = rows
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(product(x, self.matrix)[..., self.rows])

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (…, K) → (…, N) in x's dtype. Raises RuntimeError where a gradient would have to go through."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weights packed for generation give no gradient: load the model without --bits to train it")
    if x.dtype == torch.float32:
        return matrix(x)
    return matrix(x.float()).to(x.dtype)


def products(x: Tensor, layers: tuple[nn.Module, ...]) -> tuple[Tensor, ...] | None:
    """The outputs of layers that are one packed matrix together, in its order; None if they are not."""
    first = layers[0]
    if type(first) is not PackedLinear or len(layers) != len(first.matrix.sizes):
        return None
    for layer in layers:
        if type(layer) is not PackedLinear or layer.matrix is not first.matrix:
            return None
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
    y = product(x, first.matrix)  # (…, N of all)
    outputs = y.split(first.matrix.sizes, -1)
    return tuple([layer.add_bias(out) for layer, out in zip(layers, outputs, strict=True)])


# The linear layers of a block: a module of it, and those of its layers that share one input.
SHARING = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


def pack_layers(parent: nn.Module, names: tuple[str, ...], bits: int) -> None:
    """Put packed layers in the place of these plain ones of a module; they share their input, and so one matrix.

    In 8 bits where their shape does not suit 4; where this machine has no products for those, they stay plain.
    """
    layers = [getattr(parent, name) for name in names]
    if not all(fits(layer, bits) for layer in layers):
        if not can_pack(8):
            return
        bits = 8
    matrix = MATRICES[bits](torch.cat([layer.weight.detach() for layer in layers]))
    matrix.sizes = [layer.out_features for layer in layers]
    begin = 0
    for name, layer in zip(names, layers, strict=True):
        end = begin + layer.out_features
        setattr(parent, name, PackedLinear(layer, matrix, slice(begin, end)))
        begin = end
