"""Launches of the optimizers' kernels: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels.optimizers import adamw, muon, newton_schulz

BF16, FP32 = torch.bfloat16, torch.float32
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def adamw_step(kind: torch.dtype, masters: bool, seed: int | None) -> None:
    own, wide = [meta(4096, 4096, dtype=kind)], [meta(4096, 4096)]
    options = dict(step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=meta(), seed=seed)
    adamw.adamw(own, own, wide, wide, masters=wide if masters else None, **options)


def adamw_unaligned() -> None:
    flat = [meta(4097)[1:]]
    adamw.adamw(flat, flat, flat, flat, step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def muon_step(*shape: int) -> None:
    one = [meta(*shape)] * 3
    options = dict(rate=0.1, momentum=0.95, decay=0.01, steps=2, coefficients=COEFFICIENTS)
    muon.muon(one, one, one, grad_scale=meta(), **options)


def products(x: torch.Tensor) -> None:
    gram = newton_schulz.product(x, meta(len(x)))
    newton_schulz.product(gram, None, COEFFICIENTS)
    newton_schulz.product(gram, meta(len(x)), COEFFICIENTS)


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    yield "adamw fp32", lambda: adamw_step(FP32, False, None)
    yield "adamw bf16 with masters", lambda: adamw_step(BF16, True, None)
    yield "adamw bf16 rounded at random", lambda: adamw_step(BF16, False, 1)
    yield "adamw anywhere in memory", adamw_unaligned
    for shape in ((2048, 5632), (5632, 2048), (256, 2048)):
        yield f"muon {shape}", lambda shape=shape: muon_step(*shape)
    for dtype in (BF16, FP32):
        for shape in ((4, 2048, 5632), (4, 5632, 2048), (4, 1999, 2001), (4, 2048, 1999), (4, 1999, 2048)):
            yield f"newton_schulz {dtype} {shape}", lambda s=shape, d=dtype: products(meta(*s, dtype=d))
