"""Launches of the kernels that work row by row: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import rms_norm, rope, swiglu

WIDTHS = (64, 128, 768, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS = ((32, 4, 64), (12, 12, 64), (32, 8, 128), (16, 16, 128), (32, 32, 80), (8, 1, 256))  # of q, of k, their size
MORE_HEADS = ((9, 3, 64), (32, 32, 128), (64, 8, 128), (128, 8, 128), (32, 32, 96), (12, 12, 112), (16, 2, 40))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for width in WIDTHS if architecture in (80, 90) else (768, 4096, 8192, 32768):
        x, r, w = meta(4096, width), meta(4096, dtype=torch.float32), meta(width)
        yield f"rms_norm {width}", lambda x=x, w=w: rms_norm.forward(x, None, w, 1e-5, x.dtype)
        yield f"add_rms_norm {width}", lambda x=x, w=w: rms_norm.forward(x, x, w, 1e-5, x.dtype)
        yield f"rms_norm backward {width}", lambda x=x, w=w, r=r: rms_norm.backward(x, None, x, w, r, True)
        yield f"add_rms_norm backward {width}", lambda x=x, w=w, r=r: rms_norm.backward(x, x, x, w, r, True)
        s, g = meta(4096, width, dtype=torch.float32), meta(width, dtype=torch.float32)  # as under autocast
        yield (
            f"add_rms_norm {width} backward, mixed",
            lambda x=x, s=s, g=g, r=r: rms_norm.backward(x, s, s, g, r, True, x.dtype),
        )
    for heads in HEADS + MORE_HEADS if architecture in (80, 90) else HEADS:
        yield from _rope(*heads, torch.bfloat16)
    yield from _rope(32, 32, 128, torch.float32)
    for width, dtype in (
        (8192, torch.bfloat16),
        (5632, torch.bfloat16),
        (11008, torch.bfloat16),
        (2048, torch.float32),
    ):
        x = meta(4096, width, dtype=dtype)
        yield f"swiglu {width} {dtype}", lambda x=x: swiglu.forward(x, x)
        yield f"swiglu backward {width} {dtype}", lambda x=x: swiglu.backward(x, x, x)


def _rope(q_heads: int, k_heads: int, size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    q, k = (meta(8, 2048, n, size, dtype=dtype) for n in (q_heads, k_heads))
    table, w = meta(2048, size // 2, dtype=torch.float32), meta(size, dtype=torch.float32)
    name = f"{q_heads}/{k_heads} {size} {dtype}"
    yield f"rope {name}", lambda: rope.forward(q, k, table, table, None, None, 0.0, False)
    yield f"rope backward {name}", lambda: rope.forward(q, k, table, table, None, None, 0.0, True)
    yield f"rope with norm {name}", lambda: rope.forward(q, k, table, table, w, w, 1e-6, False)
    yield f"rope backward with norm {name}", lambda: rope.norm_backward(q, k, q, k, table, table, w, w, 1e-6)
