"""Launches of the kernels between the matrix products of the loss: see `shipped.py`."""

from collections.abc import Callable, Iterator

import torch

from kernels import linear_cross_entropy

SIZES = ((256, 6400), (768, 32000), (768, 50257), (2048, 128256), (2048, 151936))  # width, vocabulary


def call(width: int, vocabulary: int, dtype: torch.dtype, trained: bool, softcap=None) -> None:
    x, w = (torch.empty(n, width, dtype=dtype, device="meta") for n in (4096, vocabulary))
    targets = torch.empty(4096, dtype=torch.int64, device="meta")
    linear_cross_entropy.forward(x, w, targets, None, softcap, 1e-4, dtype, trained, trained)


def calls(architecture: int) -> Iterator[tuple[str, Callable]]:
    for width, vocabulary in SIZES if architecture in (80, 90) else SIZES[1:4]:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"linear_cross_entropy {vocabulary} {dtype}"
            for trained in (True, False):
                options = (width, vocabulary, dtype, trained)
                yield f"{name} trained {trained}", lambda options=options: call(*options)
            yield f"{name} capped", lambda o=options[:3]: call(*o, True, 30.0)
    for source, target in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        gradient = torch.empty(32000, 768, dtype=source, device="meta")
        factor = torch.empty((), device="meta")
        yield (
            f"linear_cross_entropy backward {source}",
            lambda g=gradient, f=factor, d=target: linear_cross_entropy.scaled(g, f, d),
        )
