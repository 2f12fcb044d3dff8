"""A frozen base in 16, 8 or 4 bits, to train a few parameters on top of: bf16, int8 by rows, or NF4 with double
quantization.

    load_model(folder, base_bits=4)     quantized tensor by tensor: the whole model is never in memory
    quantize_base(model, 4)             a model that is loaded already, layer by layer
    quantize_for_generation(model, 8)   the same, to generate only: on a CPU by quicker products (packed.py)

The linear layers of the blocks become `QuantLinear`; everything else is put into fp32: norms, head, embedding, and with
them the residual stream (products run in 16 bits under autocast, as in all training here). None of it is trained.

int8 leaves a column unquantized if one of its entries is beyond 6 times the root mean square of its row, since that
entry alone would set the step size of the whole row. (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339, picks columns
by the size of the inputs, which it rounds as well; here inputs are not rounded, so the weights decide. Of 45 million
normal numbers 0.09 lie beyond 6.)

Quantized weights stay rounded: `merge` (tuning/adapter.py) adds an adapter to what they stand for, in plain layers.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.base.huge_pages import use_huge_pages
from minillm.model import ops, packed
from minillm.model.packed import PackedLinear
from minillm.model.transformer import Transformer

BITS = (16, 8, 4)
GENERATION_BITS = (16, 8, 4)
LARGEST_FLOAT16 = torch.finfo(torch.float16).max
BLOCK, GROUP = 64, 256  # columns per scale, scales per second-level scale (arXiv:2305.14314, section 3)
OUTLIER = 6.0
MOST_KEPT = 64  # at most one column in so many is kept: 3 % more memory
CHUNK = 1 << 22  # weights quantized at a time, at about 16 bytes of scratch memory each
NAMES = {16: ("dense",), 8: ("codes", "scale", "kept", "columns"), 4: ("codes", "scale", "coarse", "offset")}


def _parts(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight (N, K), each of about CHUNK numbers."""
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    for begin in range(0, len(weight), rows):
        yield slice(begin, begin + rows)


def quantize_int8(weight: Tensor) -> list[Tensor]:
    """W (N, K) → codes (N, K) int8, scale (N,) fp32, kept (N, O) in W's dtype, columns (O,) int64.

    Each row in 255 steps up to its largest magnitude outside the kept columns; to nearest.
    """
    n_rows, width = weight.shape

    # each column's largest entry, in units of the root mean square of the entry's row
    largest = torch.zeros(width, device=weight.device)  # (K,)
    for part in _parts(weight):
        rows = weight[part].float()
        root_mean_square = rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        largest = torch.maximum(largest, (rows.abs() / root_mean_square).amax(0))

    # the columns with an outlier are kept as they are: the worst ones, if there are too many
    n_kept = min(int((largest > OUTLIER).sum()), width // MOST_KEPT)
    columns = largest.topk(n_kept).indices.sort().values  # (O,)
    kept = weight[:, columns].contiguous()  # (N, O)

    # the rest of each row is rounded to steps of a 127th of its largest magnitude
    codes = torch.empty(n_rows, width, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n_rows, device=weight.device)
    for part in _parts(weight):
        rest = weight[part].float().index_fill(1, columns, 0.0)
        scale[part] = rest.abs().amax(1) / 127
        steps = rest / scale[part].clamp_min(1e-30)[:, None]
        codes[part] = steps.round().to(torch.int8)
    return [codes, scale, kept, columns]


def quantize_nf4(weight: Tensor) -> list[Tensor]:
    """W (N, K) → codes, scale, coarse, offset of `kernels.reference.dequantize_nf4`, B = ⌈K / 64⌉ blocks a row.

    The largest magnitude of each block, minus the mean of them all, is rounded to 255 steps per group (8-bit integers,
    which are closer than the paper's 8-bit floats); each weight goes to the nearest NF4 value times that rounded scale.
    """
    n_rows, width = weight.shape
    n_blocks = -(-width // BLOCK)  # of a row, the last one padded with zeros
    n_scales = n_rows * n_blocks
    n_groups = -(-n_scales // GROUP)

    def blocks_of(part: slice) -> Tensor:
        """These rows as blocks: (rows, B, 64) fp32."""
        padded = F.pad(weight[part].float(), (0, n_blocks * BLOCK - width))
        return padded.view(-1, n_blocks, BLOCK)

    # the scale of each block is its largest magnitude; what it has beyond the mean is rounded, group by group
    scale = torch.cat([blocks_of(part).abs().amax(2) for part in _parts(weight)])  # (N, B)
    offset = scale.mean().view(1)
    excess = F.pad(scale.flatten() - offset, (0, n_groups * GROUP - n_scales)).view(n_groups, GROUP)
    coarse = excess.abs().amax(1) / 127  # (G,): the step of each group
    fine = (excess / coarse.clamp_min(1e-30)[:, None]).round()  # (G, 256): steps
    rounded_scale = (fine * coarse[:, None] + offset).flatten()[:n_scales].view(n_rows, n_blocks)
    rounded_scale = torch.where(rounded_scale == 0, 1.0, rounded_scale)

    # each weight becomes the number of the nearest of the 16 values, found by the midpoints between them
    values = ops.reference.nf4_values().to(weight.device, torch.float32)  # (16,), ascending
    midpoints = (values[1:] + values[:-1]) / 2
    codes = torch.empty(n_rows, n_blocks, BLOCK // 2, dtype=torch.uint8, device=weight.device)
    for part in _parts(weight):
        relative = blocks_of(part) / rounded_scale[part, :, None]
        numbers = torch.bucketize(relative, midpoints, out_int32=True).to(torch.uint8)  # (rows, B, 64), 0 to 15
        # two in a byte: bits 0 to 3 hold number i of a block, bits 4 to 7 number i + 32
        low, high = numbers[:, :, : BLOCK // 2], numbers[:, :, BLOCK // 2 :]
        codes[part] = low | high << 4
    fine = fine.to(torch.int8).flatten()[:n_scales].view(n_rows, n_blocks)
    return [codes.view(n_rows, n_blocks * BLOCK // 2), fine, coarse, offset]


def to_bfloat16(weight: Tensor) -> list[Tensor]:
    """W (N, K) → itself in bf16: what a base in 16 bits holds."""
    return [weight.bfloat16()]


QUANTIZE = {16: to_bfloat16, 8: quantize_int8, 4: quantize_nf4}


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of torch's own with this weight (out, in) and bias (out,), frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


class QuantLinear(nn.Module):
    """y = x Wᵀ + b with a frozen W in 16, 8 or 4 bits: `kernels.reference.quant_matmul`.

    in_features, out_features as in nn.Linear. W's tensors, one or four, are buffers outside the state dict: what is
    saved is an adapter, or a whole model after `dequantize_base`.
    """

    def __init__(self, linear: nn.Linear, bits: int):
        """Quantizes the weight of `linear`, on its device, and takes over its bias."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bits = bits
        self.bias = linear.bias
        for name, tensor in zip(NAMES[bits], QUANTIZE[bits](linear.weight.detach()), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def quantized(self) -> list[Tensor]:
        """The tensors that `kernels.reference.dequantize` takes."""
        return [getattr(self, name) for name in NAMES[self.bits]]

    def forward(self, x: Tensor) -> Tensor:
        y = ops.quant_matmul(x, self.quantized)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def matrices(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """For `ops.linears`: only a W in 16 bits is multiplied by as it is."""
        return [(self.dense, self.bias)] if self.bits == 16 else None

    def keep_part(self, dim: int, index: int, parts: int) -> None:
        """Keep of W part `index` of its rows (dim 0) or columns (1), with the values that they have in the whole.

        In 4 bits columns must be divided between blocks of 64. Scales are then kept in fp32, since the second level of
        their quantization goes over the borders of parts.
        """

        def part(tensor: Tensor, dim: int = dim) -> Tensor:
            return tensor.chunk(parts, dim)[index].clone()

        if self.bits == 16:
            self.dense = part(self.dense)
        elif self.bits == 8:
            width = self.codes.shape[1]
            self.codes = part(self.codes)
            if dim == 0:
                self.scale, self.kept = part(self.scale), part(self.kept)
            else:
                begin = index * width // parts
                is_here = (self.columns >= begin) & (self.columns < begin + width // parts)
                self.kept, self.columns = self.kept[:, is_here].contiguous(), self.columns[is_here] - begin
        else:
            coarse = self.coarse.repeat_interleave(GROUP)[: self.scale.numel()].view_as(self.scale)
            self.scale = part(self.scale * coarse + self.offset)  # (N, B) fp32, of each block
            self.codes = part(self.codes)
            self.coarse = torch.ones(-(-self.scale.numel() // GROUP), device=self.scale.device)
            self.offset = torch.zeros_like(self.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain layer that computes the same, frozen."""
        weight = ops.reference.dequantize(self.quantized, self.in_features)  # (out, in)
        bias = None if self.bias is None else self.bias.to(dtype)
        return plain_linear(weight.to(dtype), bias)

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices, but casts nothing: .half() or .bfloat16() would ruin the scales."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor[:0]).device), recurse)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, bits={self.bits}"


def take_weight(model: Transformer, name: str, weight: Tensor, bits: int) -> bool:
    """If `name` is the weight of a linear layer of a block, quantize `weight` into it. Returns whether it is."""
    path, _, kind = name.rpartition(".")
    linear = model.get_submodule(path)
    in_a_block = kind == "weight" and path.startswith("layers.")
    if not in_a_block or type(linear) is not nn.Linear:
        return False
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model.set_submodule(path, QuantLinear(linear, bits))
    return True


def check_bits(bits: int) -> None:
    """Raise `UserError` for a number of bits without a format."""
    if bits not in BITS:
        raise UserError(f"--base_bits {bits}: choose one of {', '.join(map(str, BITS))}")


def is_quantized(model: nn.Module) -> bool:
    """Whether any of the model's linear layers is quantized."""
    return any(isinstance(module, QuantLinear | PackedLinear) for module in model.modules())


def quantize_base(model: Transformer, bits: int) -> None:
    """Quantize a model in place and freeze it; memory holds the model and one layer more. See the top of this file.

    Raises `UserError` for other bits than 16, 8 and 4, for weights that are not finite, and if it is quantized already.
    """
    check_bits(bits)
    _check_weights(model)
    names = [name for name, _ in model.named_parameters()]  # names only: a list of weights would keep them alive
    for name in names:
        take_weight(model, name, model.get_parameter(name).detach(), bits)
    prepare_base(model)


def _check_weights(model: Transformer) -> None:
    """Raise `UserError` for weights that are not finite, or quantized already."""
    if is_quantized(model):
        raise UserError("the base is quantized already: load it again, or dequantize it first")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds values that are not finite: it cannot be quantized")


def prepare_base(model: Transformer) -> None:
    """Freeze everything, and put what is not quantized into fp32."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def dequantize_base(model: Transformer, dtype: torch.dtype = torch.float32) -> None:
    """Make a quantized model plain again, in place, all its parameters in `dtype` and trainable."""
    paths = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    for path in paths:
        model.set_submodule(path, model.get_submodule(path).dequantize(dtype))
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


# ---- for generation


def quantize_for_generation(model: Transformer, bits: int) -> None:
    """Put a model's linear layers into 16, 8 or 4 bits, in place, to generate only: nothing of it is trained or saved.

    On a CPU the layers of the blocks and the head become packed ones. Where a machine has no products for those, and on
    a GPU, the layers of the blocks become those of a quantized base, and the head stays as it is. A layer whose shape
    does not suit 4 bits is packed in 8, or stays plain on a machine that has only products for 4. Raises `UserError` as
    `quantize_base` does, for a linear layer that is not plain, and for weights that float16 does not hold.
    """
    if bits not in GENERATION_BITS:
        raise UserError(f"--bits {bits}: choose one of {', '.join(map(str, GENERATION_BITS))}")
    _check_weights(model)
    _check_layers(model, bits)
    if model.norm.weight.device.type != "cpu" or not packed.can_pack(bits):
        dtype = model.norm.weight.dtype
        quantize_base(model, bits)
        model.to(dtype).build_rotation()  # its tables stay in fp32
        return
    if bits == 16:
        _check_float16(model)
    for block in model.layers:
        for module, names in packed.SHARING:
            packed.pack_layers(block.get_submodule(module), names, bits)
    if not model.config.score_head:
        is_quicker = bits != 4 or not packed.can_pack(8)  # 4 bits are no quicker for a head than 8
        packed.pack_layers(model, ("lm_head",), bits if is_quicker else 8)
    model.requires_grad_(False)
    use_huge_pages()


def _check_float16(model: Transformer) -> None:
    """Raise `UserError` for a weight beyond what float16 holds, which would be cut to that without a word."""
    for path, layer in model.named_modules():
        largest = float(layer.weight.detach().abs().max()) if isinstance(layer, nn.Linear) else 0.0
        if largest > LARGEST_FLOAT16:
            limit = f"{LARGEST_FLOAT16:,.0f}"
            raise UserError(
                f"--bits 16: {path}.weight holds {largest:,.0f}, beyond float16's {limit}; leave --bits out"
            )


def _check_layers(model: Transformer, bits: int) -> None:
    """Raise `UserError` unless the linear layers of each block are the usual ones, each a plain `nn.Linear`."""
    usual = {f"{module}.{name}" for module, names in packed.SHARING for name in names}
    for number, block in enumerate(model.layers):
        linears = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        if linears != usual:
            odd = min(linears ^ usual)
            raise UserError(
                f"--bits {bits}: layers.{number}.{odd} is no linear layer of a plain model; leave --bits out"
            )
