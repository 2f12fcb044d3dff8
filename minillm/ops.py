"""The only door to `kernels/`: each op picks an implementation, and `describe` says which.

auto       the fastest there is for the device
torch      torch's own fused ops
reference  the specification in `kernels/reference.py`: slow, for reading and comparing
"""

import torch.nn.functional as F
from torch import Tensor

from minillm import UserError, losses

try:
    from kernels import reference
except ImportError as problem:  # another package of that name is on the registry
    raise UserError(
        f"the package 'kernels' that Python finds is not minillm's ({problem}): run from minillm's folder, "
        "or `pip uninstall kernels` and `pip install -e .`"
    ) from None

IMPLEMENTATIONS = ("auto", "torch", "reference")
_selected = "auto"


def select(implementation: str) -> None:
    """Choose the implementation of every op below from here on: one of `IMPLEMENTATIONS`."""
    global _selected
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    _selected = implementation


def selected() -> str:
    """The implementation chosen by `select`."""
    return _selected


def describe() -> str:
    """One line for a run's start: which implementation each op uses."""
    if _selected == "reference":
        return "ops: reference (plain torch) for all"
    return "ops: torch (attention: scaled_dot_product_attention; norm: rms_norm; loss: cross_entropy in chunks)"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`."""
    if _selected == "reference":
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.rope`."""
    return reference.rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.reference.swiglu`."""
    return reference.swiglu(gate, up)


def document_spans(documents: Tensor) -> Tensor:
    """See `kernels.reference.document_spans`."""
    return reference.document_spans(documents)


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
) -> Tensor:
    """See `kernels.reference.attention`."""
    if _selected == "reference" or softcap is not None:
        return reference.attention(q, k, v, causal=causal, window=window, spans=spans, softcap=softcap, scale=scale)[0]
    q_len, k_len = q.shape[1], k.shape[1]
    simple = spans is None and (window is None or window >= k_len)
    seen = None
    if not simple or (causal and 1 < q_len < k_len):
        # torch's causal flag aligns the first query with the first key; ours the last with the last
        seen = reference.visible(q_len, k_len, causal=causal, window=window, spans=spans, device=q.device)
        seen = seen if seen.dim() == 2 else seen[:, None]
    groups = q.shape[2] // k.shape[2]
    if seen is not None and groups > 1 and q.is_cuda:  # torch has no fused CUDA kernel for a mask and grouped heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=causal and seen is None and q_len > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """See `kernels.reference.linear_cross_entropy`."""
    if _selected == "reference":
        return reference.linear_cross_entropy(x, weight, targets, mask, softcap)
    return losses.linear_cross_entropy(x, weight, targets, mask, softcap)
