"""Launches of attention, forward and backward: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels.attention import backward, forward

LONG = 4096


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    sizes = (16, 32, 64, 80, 128, 256) if architecture in (80, 90) else (64, 128, 256)
    plain = dict(causal=True, window=None, softcap=None, scale=0.125)
    for size in sizes:
        q, k = meta(2, LONG, 8, size), meta(2, LONG, 2, size)
        spans = meta(2, LONG, 2, dtype=torch.int32)
        cases = [("causal", q, k, None, plain)]
        if size in (64, 80, 128):
            cases.append(("packed, window, cap", q, k, spans, plain | dict(window=512, softcap=30.0)))
        if size in (64, 128, 256):
            cases.append(("float32", q.float(), k.float(), None, plain))
        for name, q, k, spans, options in cases:
            lse = meta(2, 8, LONG, dtype=torch.float32)
            yield f"attention {name} {size}", lambda a=(q, k, k, spans), o=options: forward.forward(*a, **o)
            yield (
                f"attention {name} {size} backward",
                lambda a=(q, q, k, k, q, lse, spans), o=options: backward.backward(*a, **o),
            )
