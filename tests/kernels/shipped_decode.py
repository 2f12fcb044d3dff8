"""Launches of attention over a cache: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels.attention import decode

HEADS = ((1, 32, 8), (1, 32, 1), (16, 32, 8))  # queries, heads, key heads: 16, 32 and 64 rows
SIZES = (16, 40, 64, 96, 128, 256)


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for size in SIZES if architecture in (80, 90) else (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            for queries, heads, kv_heads in HEADS if dtype == torch.bfloat16 else HEADS[:1]:
                for batch, window, softcap in ((1, None, None), (256, 64, 30.0)):  # split, and not
                    q = torch.empty(batch, queries, heads, size, dtype=dtype, device="meta")
                    kv = torch.empty(batch, 32768, kv_heads, size, dtype=dtype, device="meta")
                    bound = torch.empty(batch, dtype=torch.int32, device="meta")
                    name = f"decode_attention {dtype} {size} {queries}x{heads}/{kv_heads} batch {batch}"
                    options = window, softcap, 0.1
                    yield name, lambda a=(q, kv, kv, bound, bound, *options): decode.forward(*a)
