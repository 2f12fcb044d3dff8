"""Launches of attention, forward and backward: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import attention_backward, attention_forward

LONG = 4096


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    sizes = (16, 32, 64, 80, 128, 256) if architecture in (80, 90) else (64, 128, 256)
    plain = dict(causal=True, window=None, softcap=None, scale=0.125)
    for size in sizes:
        for name, q, k, spans, options in (
            ("causal", meta(2, LONG, 8, size), meta(2, LONG, 2, size), None, plain),
            ("packed, window, cap", meta(2, LONG, 8, size), meta(2, LONG, 2, size), meta(2, LONG, 2, dtype=torch.int32),
             plain | dict(window=512, softcap=30.0)),
            ("float32", meta(2, LONG, 8, size, dtype=torch.float32), meta(2, LONG, 2, size, dtype=torch.float32), None, plain),
        ):  # fmt: skip
            if name != "causal" and size not in (64, 128):
                continue
            lse = meta(2, 8, LONG, dtype=torch.float32)
            yield f"attention {name} {size}", lambda a=(q, k, k, spans), o=options: attention_forward.forward(*a, **o)
            yield (
                f"attention {name} {size} backward",
                lambda a=(q, q, k, k, q, lse, spans), o=options: attention_backward.backward(*a, **o),
            )
