"""Launches of the kernels that work row by row: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import rms_norm

WIDTHS = (64, 128, 768, 1024, 2048, 4096, 8192, 16384, 32768)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for width in WIDTHS if architecture in (80, 90) else (768, 4096, 8192, 32768):
        x, r, w = meta(4096, width), meta(4096, dtype=torch.float32), meta(width)
        yield f"rms_norm {width}", lambda x=x, w=w: rms_norm.forward(x, None, w, 1e-5, x.dtype)
        yield f"add_rms_norm {width}", lambda x=x, w=w: rms_norm.forward(x, x, w, 1e-5, x.dtype)
        yield f"rms_norm backward {width}", lambda x=x, w=w, r=r: rms_norm.backward(x, None, x, w, r, True)
        yield f"add_rms_norm backward {width}", lambda x=x, w=w, r=r: rms_norm.backward(x, x, x, w, r, True)
