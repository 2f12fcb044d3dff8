"""Attention as a torch op: forward and backward kernels, their fake implementations, autograd.

The mathematics is in `forward.py` and `backward.py`, what a query sees in `mask.py`.
The backward pass is deterministic: each gradient has one owner, nothing is added by atomics. On a Hopper GPU, and with
a Triton they were tested with, the kernels of `sm90.py` take what they support; that
backward pass adds dq by atomics, so under `torch.use_deterministic_algorithms(True)` the other one runs.
"""

import torch
from torch import Tensor

from kernels.attention import backward, forward
from kernels.shared import launch

try:
    from kernels.attention import sm90
except (ImportError, AttributeError):  # Gluon is experimental: another Triton may have changed it, or lack it
    sm90 = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if sm90 and sm90.chosen(q, k, v, spans, causal, window, softcap):
        return sm90.forward(q, k, v, spans, causal=causal, scale=scale)
    return forward.forward(q, k, v, spans, causal=causal, window=window, softcap=softcap, scale=scale)


_op = torch.library.custom_op("minillm::attention", _forward, mutates_args=())


@_op.register_fake
def _(q, k, v, spans, causal, window, softcap, scale):
    batch, q_len, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, q_len), dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spans: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    repeatable = torch.are_deterministic_algorithms_enabled()
    if sm90 and not repeatable and sm90.chosen(q, k, v, spans, causal, window, softcap):
        options = dict(causal=causal, scale=scale, dlse=dlse)
        return sm90.backward(dout, q, k, v, out, lse, spans, **options)
    options = dict(causal=causal, window=window, softcap=softcap, scale=scale, dlse=dlse)
    return backward.backward(dout, q, k, v, out, lse, spans, **options)


_backward_op = torch.library.custom_op("minillm::attention_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(dout, q, k, v, out, lse, dlse, spans, causal, window, softcap, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_backward = launch.op(_backward_op, _backward)


def _setup(ctx, inputs, output):
    q, k, v, spans, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, spans)


def _gradient(ctx, dout, dlse):
    q, k, v, out, lse, spans = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 8
    if dout is None:  # only the log-sum-exp was used
        dout = torch.zeros_like(out)
    dq, dk, dv = _attention_backward(dout, q, k, v, out, lse, dlse, spans, *ctx.options)
    return dq, dk, dv, None, None, None, None, None


_attention = launch.op(_op, _forward, _setup, _gradient)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, spans: Tensor | None, softcap, scale) -> None:
    """Raise `ValueError` for what the kernels cannot take."""
    batch, q_len, heads, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not go together: (B, Tq, H, D) "
            "and twice (B, Tk, K, D), H a multiple of K, are needed"
        )
    if not 1 <= size <= 256:
        raise ValueError(f"attention: head size {size}; 1 to 256 are supported: choose more heads, or impl torch")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; one of fp32, fp16, bf16 is needed for all"
        )
    if spans is not None:
        described = spans.shape == (batch, k.shape[1], 2) and spans.dtype == torch.int32
        if not described or q_len > k.shape[1]:
            raise ValueError(
                f"attention: spans {tuple(spans.shape)} {spans.dtype} for {q_len} queries and {k.shape[1]} keys; int32 "
                "(B, Tk, 2) of document_spans, and no more queries than keys, are needed"
            )
    window_is_wrong = window is not None and window < 0
    cap_is_wrong = softcap is not None and not softcap > 0  # NaN is wrong, too
    if window_is_wrong or cap_is_wrong or not scale > 0:
        raise ValueError(f"attention: window {window}, softcap {softcap}, scale {scale}; none may be negative or zero")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    spans: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over the visible keys: see `kernels.reference.attention`.

    q: (B, Tq, H, D); k, v: (B, Tk, K, D), H a multiple of K, D at most 256, all fp32, bf16 or fp16, any strides.
    spans: (B, Tk, 2) int32 of `reference.document_spans`; with them Tq ≤ Tk. Returns (B, Tq, H, D) in q's dtype, and
    with `return_lse` the log-sum-exp of the scores, (B, H, Tq) fp32; both have gradients. Raises ValueError for
    shapes, dtypes and numbers that are not possible.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, window, spans, softcap, scale)
    out, lse = _attention(q, k, v, spans, causal, window, softcap, scale)
    return (out, lse) if return_lse else out
