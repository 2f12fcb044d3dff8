"""Attention's cases: causal over whole rows, inside packed documents, and one query against a long cache.

Work: two products forward, each 2·T²·D operations a head, half of them causal; five backward. For decoding, bytes of
the keys and values that are read.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.bench.case import Function, Place, Side, compiled
from kernels.shared import launch

HEADS = ((32, 32, 64), (16, 16, 128), (32, 8, 128))  # query heads, key heads, head size
TOKENS = 16384  # batch · length, whatever the length
LENGTHS = (1024, 2048, 4096, 16384)
DOCUMENTS = (3000, 257, 1024, 64, 2048, 511, 1500, 96, 800, 2200, 333, 1200, 1, 900, 450, 2000)
CACHE = 32768
PLAIN_LENGTH = 1024  # up to here implementations that keep T × T scores are compared


def expected(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """The reference's causal attention, `chunk` queries at a time, recomputed backward: T × T scores would not fit."""
    parts = []
    for begin in range(0, q.shape[1], chunk):
        end = min(begin + chunk, q.shape[1])
        seen = None if spans is None else spans[:, :end]

        def part(q: Tensor, k: Tensor, v: Tensor, seen=seen) -> Tensor:
            return reference.attention(q, k, v, spans=seen)[0]

        parts.append(checkpoint(part, q[:, begin:end], k[:, :end], v[:, :end], use_reentrant=False))
    return torch.cat(parts, dim=1)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v)[0]


def _head_groups(kv_heads: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Cuts of (B, T, heads, D): the first row's first key head with its queries, and the last row's last."""

    def cut(x: Tensor, row: int, group: int) -> Tensor:
        size = x.shape[2] // kv_heads
        return x[row : row + 1, :, group * size : (group + 1) * size]

    def first(x: Tensor) -> Tensor:
        return cut(x, 0, 0)

    def last(x: Tensor) -> Tensor:
        return cut(x, x.shape[0] - 1, kv_heads - 1)

    return first, last


class _Apart(torch.autograd.Function):
    """Attention by a forward and a backward function of one file, whatever `kernels.attention` would choose."""

    @staticmethod
    def forward(ctx, q, k, v, spans, forward, backward):
        ctx.backward = backward
        ctx.options = dict(causal=True, scale=q.shape[-1] ** -0.5)
        out, lse = forward(q, k, v, spans, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse, spans)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, spans = ctx.saved_tensors
        dq, dk, dv = ctx.backward(dout, q, k, v, out, lse, spans, **ctx.options)
        return dq, dk, dv, None, None, None


def _ours(spans: Tensor | None) -> Callable:
    from kernels.attention.attention import attention

    return functools.partial(attention, spans=spans)


def _sm90(spans: Tensor | None) -> Callable:
    from kernels.attention import sm90

    return lambda *qkv: _Apart.apply(*qkv, spans, sm90.forward, sm90.backward)


def _plain_triton(spans: Tensor | None) -> Callable:
    from kernels.attention import backward as attention_backward
    from kernels.attention import forward as attention_forward

    none = dict(window=None, softcap=None)
    forward = functools.partial(attention_forward.forward, **none)
    backward = functools.partial(attention_backward.backward, **none)
    return lambda *qkv: _Apart.apply(*qkv, spans, forward, backward)


def our_paths(place: Place, spans: Tensor | None = None) -> dict[str, Side]:
    """What a user gets, and on sm_90 each of its two paths by itself."""
    from kernels.attention.attention import sm90 as hopper  # None where there is no Gluon

    loads = {"ours": _ours}
    on_hopper = place.device.type == "cuda" and launch.architecture(place.device) == 90
    if on_hopper and hopper and hopper.compiles():
        loads["ours (sm_90)"] = _sm90
        loads["ours (plain Triton)"] = _plain_triton
    return {name: Side(functools.partial(load, spans)) for name, load in loads.items()}


def sdpa(backend: str, causal: bool) -> Side:
    """torch's scaled_dot_product_attention with one backend and no other."""

    def load() -> Callable:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend == "EFFICIENT_ATTENTION":  # knows no grouped heads
                group = q.shape[2] // k.shape[2]
                k = k.repeat_interleave(group, dim=2)
                v = v.repeat_interleave(group, dim=2)
            grouped = q.shape[2] != k.shape[2]
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

        return run

    return Side(load)


def flex(place: Place, length: int, documents: Tensor | None = None, causal: bool = True) -> Side:
    """torch's FlexAttention, compiled: causal over whole rows or inside documents (T,), or without a mask."""

    def load() -> Callable:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(b, h, i, j):
            return (j <= i) if documents is None else (j <= i) & (documents[i] == documents[j])

        mask = create_block_mask(sees, None, None, length, length, device=place.device) if causal else None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            grouped = q.shape[2] != k.shape[2]
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

        return compiled(lambda: run).load()

    return Side(load, compiled=True)


def flash(four: bool, lengths: tuple[int, ...] | None = None, device: torch.device | None = None) -> Side:
    """The packages flash-attn (2) and flash-attn-4; with `lengths`, their functions for packed documents."""

    def load() -> Callable:
        if four:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        else:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        if lengths is None:
            return lambda q, k, v: _first(flash_attn_func(q, k, v, causal=True))
        edges, longest = _edges(lengths, device)
        documents = dict(cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=longest, max_seqlen_k=longest)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = (x.squeeze(0) for x in (q, k, v))  # (tokens, heads, D)
            out = flash_attn_varlen_func(*rows, causal=True, **documents)
            return _first(out).unsqueeze(0)

        return run

    return Side(load, compiled=four)


def _first(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _edges(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Where documents begin and the last ends, (n + 1,) int32, and the longest length."""
    edges = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return edges, max(lengths)


def varlen(lengths: tuple[int, ...], device: torch.device) -> Side:
    """torch's own attention for packed documents."""

    def load() -> Callable:
        from torch.nn.attention.varlen import varlen_attn

        edges, longest = _edges(lengths, device)
        windows = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.10 had is_causal
        order = dict(window_size=(-1, 0)) if windows else dict(is_causal=True)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group = q.shape[2] // k.shape[2]
            k = k.repeat_interleave(group, dim=2)
            v = v.repeat_interleave(group, dim=2)
            rows = (x.squeeze(0) for x in (q, k, v))
            return varlen_attn(*rows, edges, edges, longest, longest, **order).unsqueeze(0)

        return run

    return Side(load)


def causal(place: Place, heads: int, kv_heads: int, head_size: int, batch: int, length: int) -> Function:
    """Causal attention over `batch` whole rows."""
    operations = 4 * batch * heads * length**2 * head_size / 2
    sides = our_paths(place) | {
        "SDPA flash": sdpa("FLASH_ATTENTION", True), "SDPA efficient": sdpa("EFFICIENT_ATTENTION", True),
        "SDPA cuDNN": sdpa("CUDNN_ATTENTION", True), "FlexAttention": flex(place, length),
        "flash-attn 2": flash(False), "flash-attn 4": flash(True),
    }  # fmt: skip
    if length <= PLAIN_LENGTH:
        sides["SDPA math"] = sdpa("MATH", True)
        sides["reference"] = Side(lambda: _plain)
    name = f"{heads}/{kv_heads}, D {head_size}, T {length:,}"
    work = {"forward": operations, "backward": 2.5 * operations}
    make = _drawn(place, [(batch, length, n, head_size) for n in (heads, kv_heads, kv_heads, heads)])
    return Function("attention", name, "TFLOP/s", work, make, expected, sides, _head_groups(kv_heads))


def _drawn(place: Place, shapes: list[tuple[int, ...]]) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """What draws q, k and v, and the output's gradient, of these shapes."""

    def make() -> tuple[list[Tensor], list[Tensor]]:
        q, k, v, dout = (place.draw(*shape, seed=seed) for seed, shape in enumerate(shapes))
        return [q, k, v], [dout]

    return make


def packed(place: Place, heads: int, kv_heads: int, head_size: int, lengths: tuple[int, ...]) -> Function:
    """Documents packed into one row, each seeing itself alone; work is what the documents need."""
    device = place.device
    tokens = sum(lengths)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)  # (tokens,)
    spans = reference.document_spans(documents[None])
    operations = sum(4 * heads * n**2 * head_size / 2 for n in lengths)
    sides = our_paths(place, spans) | {
        "FlexAttention": flex(place, tokens, documents),
        "torch varlen_attn": varlen(lengths, device),
        "flash-attn 2": flash(False, lengths, device), "flash-attn 4": flash(True, lengths, device),
    }  # fmt: skip
    name = f"{heads}/{kv_heads}, D {head_size}, {len(lengths)} documents"
    right = functools.partial(expected, spans=spans)
    work = {"forward": operations, "backward": 2.5 * operations}
    make = _drawn(place, [(1, tokens, n, head_size) for n in (heads, kv_heads, kv_heads, heads)])
    return Function("attention", name, "TFLOP/s", work, make, right, sides, _head_groups(kv_heads))


def attention(place: Place) -> Iterator[Function]:
    if place.size == "small":
        yield causal(place, 4, 2, 32, 2, 96)
        yield packed(place, 4, 2, 32, (40, 1, 23, 64))
        return
    for shape in place.choose(HEADS, HEADS[::2], ()):
        for length in place.choose(LENGTHS, (4096,), ()):
            yield causal(place, *shape, TOKENS // length, length)
    for shape in place.choose(HEADS, HEADS[2:], ()):
        yield packed(place, *shape, DOCUMENTS)


def decode(place: Place) -> Iterator[Function]:
    """One query a row against a full cache."""
    heads, kv_heads, head_size = place.choose((32, 8, 128), (32, 8, 128), (4, 2, 32))
    length = place.choose(CACHE, CACHE, 200)
    for batch in place.choose((1, 16), (1,), (2,)):
        yield cached(place, heads, kv_heads, head_size, batch, length)


def cached(place: Place, heads: int, kv_heads: int, head_size: int, batch: int, length: int) -> Function:
    """One query a row against `length` keys and values."""

    def make() -> tuple[list[Tensor], list[Tensor]]:
        q = place.draw(batch, 1, heads, head_size, seed=0)
        k = place.draw(batch, length, kv_heads, head_size, seed=1)
        v = place.draw(batch, length, kv_heads, head_size, seed=2)
        return [q, k, v], []

    def load() -> Callable:
        from kernels.attention.decode import decode_attention

        return decode_attention

    def with_cache() -> Callable:
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache

    sides = {
        "ours": Side(load), "reference": Side(lambda: _plain),
        "SDPA flash": sdpa("FLASH_ATTENTION", False), "SDPA efficient": sdpa("EFFICIENT_ATTENTION", False),
        "SDPA cuDNN": sdpa("CUDNN_ATTENTION", False), "FlexAttention": flex(place, length, causal=False),
        "flash-attn 2": Side(with_cache),
    }  # fmt: skip
    work = {"forward": 2.0 * batch * length * kv_heads * head_size * place.dtype.itemsize}
    name = f"{heads}/{kv_heads}, D {head_size}, cache {length:,}, batch {batch}"
    return Function("decode", name, "GB/s", work, make, _plain, sides, _head_groups(kv_heads))
