"""Launches of the products with quantized weights: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import quant_matmul

ROWS = (1, 32, 64, 256)
SIZES = ((4096, 11008), (1000, 776))  # N, K


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(bits: int, n: int, k: int) -> list[torch.Tensor]:
    if bits == 8:
        kept, columns = meta(n, 40, dtype=torch.bfloat16), meta(40, dtype=torch.int64)
        return [meta(n, k, dtype=torch.int8), meta(n), kept, columns]
    blocks = -(-k // 64)
    scale, coarse = meta(n, blocks, dtype=torch.int8), meta(-(-n * blocks // 256))
    return [meta(n, 32 * blocks, dtype=torch.uint8), scale, coarse, meta(1)]


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for bits in (8, 4):
        for n, k in SIZES:
            w = weight(bits, n, k)
            for dtype in (torch.bfloat16, torch.float32):
                yield f"dequantize {bits} {n} {k} {dtype}", lambda w=w, k=k, d=dtype: quant_matmul.dequantize(w, k, d)
                for rows in ROWS if dtype == torch.bfloat16 else ROWS[:1]:
                    x, dy = meta(rows, k, dtype=dtype), meta(rows, n, dtype=dtype)
                    name = f"quant_matmul {bits} {rows} {n} {k} {dtype}"
                    yield name, lambda x=x, w=w: quant_matmul.forward(x, w)
                    yield f"{name} backward", lambda g=dy, w=w, k=k: quant_matmul.backward(g, w, k)
