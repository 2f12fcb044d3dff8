"""Cases of products with quantized weights: one row as in decoding, 2,048 as in training adapters on a frozen base.

Between them lie the rows where our two ways meet (`FUSED_ROWS` of `kernels/quant_matmul.py`): the last that are fused,
and twice as many by way of a scratch, which costs the same for any number of rows beside the product in 16 bits.

Work: for one row the bytes of the codes and scales, which all must read at least; for many the operations of the
product, 2·M·N·K forward and as many backward, where W gets no gradient. The same for the side whose W has 16 bits.
The reference makes W again for each product, by torch's ops.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.bench.case import Function, Place, Side, compiled

KEPT = 32  # columns that int8 keeps in 16 bits


def quant_matmul(place: Place) -> Iterator[Function]:
    sizes = place.choose((4096, 11008), (4096, 11008), (80, 192))
    for bits in place.choose((8, 4), (4,), (8, 4)):
        for rows in place.choose((1, 64, 256, 512, 2048), (1, 256, 512, 2048), (1, 40)):
            yield quantized(place, bits, rows, *sizes)


def drawn_weight(place: Place, bits: int, n_out: int, n_in: int) -> list[Tensor]:
    """The four tensors of a weight whose entries are about 1 / √K in size: see `reference.dequantize`."""
    generator = torch.Generator(place.device).manual_seed(3)

    def draw(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=place.device, generator=generator)

    size = n_in**-0.5
    if bits == 8:
        columns = torch.arange(min(KEPT, n_in // 8), device=place.device) * 5
        codes = draw(-127, 128, torch.int8, n_out, n_in).index_fill_(1, columns, 0)
        scale = torch.full((n_out,), size / 73, device=place.device)
        return [codes, scale, place.draw(n_out, len(columns), seed=4, scale=size), columns]
    blocks = math.ceil(n_in / 64)
    coarse = torch.full((math.ceil(n_out * blocks / 256),), size / 256, device=place.device)
    offset = torch.full((1,), size, device=place.device)
    return [draw(0, 256, torch.uint8, n_out, 32 * blocks), draw(-127, 128, torch.int8, n_out, blocks), coarse, offset]


def quantized(place: Place, bits: int, rows: int, n_out: int, n_in: int) -> Function:
    """x Wᵀ for x (rows, n_in) and a W (n_out, n_in) of so many bits; a single row has no gradient."""
    weight = functools.cache(lambda: drawn_weight(place, bits, n_out, n_in))

    def make() -> tuple[list[Tensor], list[Tensor]]:
        return [place.draw(rows, n_in, seed=0)], [place.draw(rows, n_out, seed=1)] * (rows > 1)

    def wide() -> Tensor:
        return reference.dequantize(weight(), n_in).to(place.dtype)

    def ours() -> Callable:
        from kernels.quant_matmul import quant_matmul

        return lambda x: quant_matmul(x, weight())

    def spec(x: Tensor) -> Tensor:
        return reference.quant_matmul(x, weight())

    def plain() -> Callable:
        return functools.partial(F.linear, weight=wide())

    def bnb() -> Callable:
        import bitsandbytes.nn as bnb

        if bits == 4:
            layer = bnb.Linear4bit(n_in, n_out, bias=False, compute_dtype=place.dtype, quant_type="nf4")
            layer.weight = bnb.Params4bit(wide().cpu(), requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.Linear8bitLt(n_in, n_out, bias=False, has_fp16_weights=False)
            layer.weight = bnb.Int8Params(wide().cpu(), requires_grad=False, has_fp16_weights=False)
        return layer.to(place.device)

    sides = {
        "ours": Side(ours), "reference": Side(lambda: spec),
        "reference, compiled": compiled(lambda: spec), "F.linear, 16 bits": Side(plain),
        "bitsandbytes": Side(bnb),
    }  # fmt: skip
    name = f"{bits} bits, {rows:,} x {n_in:,} x {n_out:,}"
    if rows == 1:
        moved = n_out * n_in * bits / 8 + (4 * n_out if bits == 8 else n_out * n_in / 64)
        return Function("quant_matmul", name, "GB/s", {"forward": moved}, make, spec, sides)
    work = dict.fromkeys(("forward", "backward"), 2.0 * rows * n_out * n_in)
    return Function("quant_matmul", name, "TFLOP/s", work, make, spec, sides)
