"""Cases of the ops that work row by row: RMSNorm, RoPE, SwiGLU, and the linear layer with cross-entropy.

Work: for the first three the bytes that must move, each input read once and each output written once (what is only a
row long is not counted); for the loss the operations of its three matrix products, 2·N·C·V each.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.bench.case import Function, Place, Side, compiled

ELEMENTS = 1 << 27
EPS = 1e-5


def _case(
    place: Place,
    op: str,
    name: str,
    *,
    moved: tuple[int, int],
    shapes: list[tuple[int, ...]],
    n_outputs: int,
    right: Callable,
    sides: dict[str, Side],
) -> Function:
    """A case bound by memory.

    moved: how often, forward and backward, tensors of the outputs' shapes are read or written. shapes: of the inputs,
    of which the first n_outputs are those of the outputs as well. right: the reference.
    """

    def make() -> tuple[list[Tensor], list[Tensor]]:
        inputs = [place.draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        return inputs, [place.draw(*shapes[i], seed=9 + i) for i in range(n_outputs)]

    size = sum(torch.Size(shape).numel() for shape in shapes[:n_outputs]) * place.dtype.itemsize
    work = {"forward": moved[0] * size, "backward": moved[1] * size}
    return Function(op, name, "GB/s", work, make, right, sides)


def rms_norm(place: Place) -> Iterator[Function]:
    elements = place.choose(ELEMENTS, ELEMENTS, 96 * 50)
    for width in place.choose((768, 2048, 4096, 8192), (2048,), (96,)):
        yield normed(place, elements // width, width)
    width = place.choose(2048, 2048, 96)
    yield normed(place, elements // width, width, added=True)


def normed(place: Place, rows: int, width: int, added: bool = False) -> Function:
    """RMSNorm of (rows, width); added: of the sum of two such."""

    def ours() -> Callable:
        from kernels.rms_norm import add_rms_norm, rms_norm

        if added:
            return lambda x, d, w: add_rms_norm(x, d, w, EPS)
        return lambda x, w: rms_norm(x, w, EPS)

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

        if added:  # gives both the other way round
            return lambda x, d, w: liger_fused_add_rms_norm(x, d, w, EPS, in_place=False)[::-1]
        return lambda x, w: liger_rms_norm(x, w, EPS, in_place=False)

    def quack() -> Callable:
        from quack import rmsnorm

        if added:
            return lambda x, d, w: rmsnorm(x, w, residual=d, eps=EPS, prenorm=True)[::-1]
        return lambda x, w: rmsnorm(x, w, eps=EPS)

    def torchs(x: Tensor, *others: Tensor):
        if not added:
            (weight,) = others
            return F.rms_norm(x, (width,), weight, EPS)
        delta, weight = others
        total = x + delta
        return total, F.rms_norm(total, (width,), weight, EPS)

    def spec(x: Tensor, *others: Tensor):
        if added:
            return reference.add_rms_norm(x, *others, EPS)
        return reference.rms_norm(x, *others, EPS)

    sides = {
        "ours": Side(ours), "reference": Side(lambda: spec), "F.rms_norm": Side(lambda: torchs),
        "reference, compiled": compiled(lambda: spec), "Liger": Side(liger, writes=True),
        "QuACK": Side(quack, compiled=True),
    }  # fmt: skip
    name = f"{rows:,} x {width:,}"
    if not added:  # x → y; dy, x → dx
        shapes = [(rows, width), (width,)]
        return _case(place, "rms_norm", name, moved=(2, 3), shapes=shapes, n_outputs=1, right=spec, sides=sides)
    # two tensors of that size each time: x, delta → s, y; ds, dy, s → dx
    name += ", with addition"
    shapes = [(rows, width), (rows, width), (width,)]
    return _case(place, "rms_norm", name, moved=(2, 2), shapes=shapes, n_outputs=2, right=spec, sides=sides)


def swiglu(place: Place) -> Iterator[Function]:
    yield gated(place, *place.choose((16384, 8192), (16384, 8192), (40, 96)))


def gated(place: Place, rows: int, width: int) -> Function:
    """SwiGLU of two (rows, width)."""

    def ours() -> Callable:
        from kernels.swiglu import swiglu

        return swiglu

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_swiglu

        return liger_swiglu

    spec = reference.swiglu
    sides = {
        "ours": Side(ours), "reference": Side(lambda: spec), "reference, compiled": compiled(lambda: spec),
        "Liger": Side(liger, writes=True),
    }  # fmt: skip
    name = f"{rows:,} x {width:,}"
    shapes = [(rows, width), (rows, width)]
    return _case(place, "swiglu", name, moved=(3, 5), shapes=shapes, n_outputs=1, right=spec, sides=sides)


def rope(place: Place) -> Iterator[Function]:
    sizes = place.choose((8, 2048, 32, 4, 64), (8, 2048, 32, 4, 64), (2, 20, 4, 2, 16))
    yield turned(place, *sizes)
    yield turned(place, *sizes, with_norm=True)


def turned(
    place: Place, batch: int, length: int, heads: int, kv_heads: int, head_size: int, with_norm: bool = False
) -> Function:
    """RoPE on queries and keys; with_norm: after RMSNorm of each head (QK-norm)."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    cos, sin = angle.cos().to(place.device), angle.sin().to(place.device)

    def ours() -> Callable:
        from kernels.rope import rope

        return lambda q, k, *weights: rope(q, k, cos, sin, *weights, eps=EPS)  # eps serves the norms alone

    def spec(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        if weights:
            q_weight, k_weight = weights
            q = reference.rms_norm(q, q_weight, EPS)
            k = reference.rms_norm(k, k_weight, EPS)
        return reference.rope(q, k, cos, sin)

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_rope

        twice = [torch.cat((x, x), -1).to(place.dtype)[None] for x in (cos, sin)]

        def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q, k = liger_rope(q.transpose(1, 2), k.transpose(1, 2), *twice)
            return q.transpose(1, 2), k.transpose(1, 2)

        return run

    sides = {"ours": Side(ours), "reference": Side(lambda: spec), "reference, compiled": compiled(lambda: spec)}
    if not with_norm:
        sides["Liger"] = Side(liger, writes=True)
    name = f"({batch}, {length:,}, {heads}/{kv_heads}, {head_size})"
    shapes = [(batch, length, heads, head_size), (batch, length, kv_heads, head_size)]
    moved = (2, 2)  # q, k in and out; their gradients in and out
    if with_norm:
        name += ", with QK-norm"
        shapes += [(head_size,), (head_size,)]  # weights
        moved = (2, 3)  # q and k are needed again
    return _case(place, "rope", name, moved=moved, shapes=shapes, n_outputs=2, right=spec, sides=sides)


def loss(place: Place) -> Iterator[Function]:
    rows = ((16384, 768, 32000), (16384, 2048, 32000), (16384, 2048, 128256), (16384, 4096, 128256))
    for sizes in place.choose(rows, rows[1:2], ((40, 32, 200),)):
        yield linear_loss(place, *sizes)


def linear_loss(place: Place, n: int, width: int, vocabulary: int) -> Function:
    """Linear layer and cross-entropy, summed over n rows; forward and backward in one."""
    generator = torch.Generator(place.device).manual_seed(7)
    targets = torch.randint(0, vocabulary, (n,), device=place.device, generator=generator)

    def make() -> tuple[list[Tensor], list[Tensor]]:
        weight = place.draw(vocabulary, width, seed=1, scale=width**-0.5)
        return [place.draw(n, width, seed=0), weight], [torch.ones((), device=place.device)]

    def ours() -> Callable:
        from kernels.linear_cross_entropy import linear_cross_entropy

        return lambda x, w: linear_cross_entropy(x, w, targets)

    def spec(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), targets, reduction="sum")

    def chunked() -> Callable:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w: F.linear_cross_entropy(x, w, targets, reduction="sum", options=options)

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda x, w: liger_fused_linear_cross_entropy(x, w, targets, reduction="sum").float()

    def cce() -> Callable:
        from cut_cross_entropy import linear_cross_entropy

        return lambda x, w: linear_cross_entropy(x, w, targets, reduction="sum").float()

    sides = {
        "ours": Side(ours), "plain torch": Side(lambda: spec), "plain torch, compiled": compiled(lambda: spec),
        "Liger": Side(liger), "CCE": Side(cce),
    }  # fmt: skip
    if hasattr(F, "linear_cross_entropy"):  # torch 2.11 has none
        sides["F.linear_cross_entropy"] = Side(chunked)
    name = f"{n:,} x {width:,}, vocabulary {vocabulary:,}"
    right = functools.partial(_expected_loss, targets=targets)
    return Function("loss", name, "TFLOP/s", {"step": 6.0 * n * width * vocabulary}, make, right, sides)


def _expected_loss(x: Tensor, w: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """The reference, `chunk` rows at a time, recomputed backward: N × V logits in fp32 may not fit."""
    total = torch.zeros((), device=x.device)
    for begin in range(0, len(x), chunk):
        rows = slice(begin, begin + chunk)
        total = total + checkpoint(
            reference.linear_cross_entropy, x[rows], w, targets[rows], use_reentrant=False
        )  # fmt: skip
    return total
