"""Launches of the optimizers' kernels: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import adamw

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(kind: torch.dtype, masters: bool, seed: int | None, scale: bool) -> None:
    wide = [meta(4096, 4096)]
    adamw.adamw(
        [meta(4096, 4096, dtype=kind)], [meta(4096, 4096, dtype=kind)], wide, wide, masters=wide if masters else None,
        seed=seed, grad_scale=meta() if scale else None, step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    yield "adamw fp32", lambda: step(FP32, False, None, True)
    yield "adamw bf16 with masters", lambda: step(BF16, True, None, True)
    yield "adamw bf16 rounded at random", lambda: step(BF16, False, 1, True)
