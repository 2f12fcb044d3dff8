"""Launches of attention's Hopper kernels, which no other GPU is given: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels.attention import sm90
from tests.kernels.shipped_attention import meta


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    if architecture != 90 or not sm90.compiles():
        return
    options = dict(causal=True, scale=0.125)
    for size, length, heads in ((64, 1024, 8), (64, 1024, 2), (64, 4096, 8), (128, 4096, 8), (128, 1001, 8)):
        for dtype in (torch.bfloat16, torch.float16) if (size, length) == (128, 4096) else (torch.bfloat16,):
            for spans in (None, meta(2, length, 2, dtype=torch.int32)):
                q, k = meta(2, length, heads, size, dtype=dtype), meta(2, length, 2, size, dtype=dtype)
                lse = meta(2, heads, length, dtype=torch.float32)
                name = f"attention_sm90 {size} {length} {heads // 2} {dtype} {'causal' if spans is None else 'packed'}"
                yield name, lambda a=(q, k, k, spans): sm90.forward(*a, **options)
                yield (
                    f"{name} backward",
                    lambda a=(q, q, k, k, q, lse, spans): sm90.backward(*a, **options),
                )
