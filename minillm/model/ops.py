"""The only file that imports `kernels/`: each op picks an implementation, and `describe` says which.

auto       the fastest there is for the device: triton on an NVIDIA GPU from the A100 on, else torch
triton     our own kernels; on a CPU only through Triton's interpreter (TRITON_INTERPRET=1), for debugging
torch      torch's own fused ops
reference  the specification in `kernels/reference.py`: slow, to read and to compare with
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.model import loss, one_token, packed
from minillm.model.linears import Products, product_dtype

try:
    from kernels import reference
except ImportError as problem:  # PyPI has another package of that name
    raise UserError(
        f"the package 'kernels' that Python finds is not minillm's ({problem}): run from minillm's folder, "
        "or `pip uninstall kernels` and `pip install -e .`"
    ) from None

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")

# the limits of our kernels, beyond which torch computes
OLDEST_GPU = (8, 0)  # compute capability: what they are compiled for and tested against
LARGEST_HEAD = 256  # of attention
MOST_QUERIES = 16  # of attention over a cache

_selected = "auto"
_triton: SimpleNamespace | None = None  # the kernels' modules, once they are imported


def select(implementation: str) -> None:
    """Choose the implementation of every op below from here on: one of `IMPLEMENTATIONS`."""
    global _selected
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton":
        _import_kernels()
        if not torch.cuda.is_available() and not _triton.launch.INTERPRETED:
            raise UserError(
                "implementation triton: no CUDA GPU here; choose auto or torch, or set TRITON_INTERPRET=1 to run the "
                "kernels slowly on the CPU"
            )
        if not _triton.launch.INTERPRETED and _lacking():
            raise UserError(f"implementation triton: {_lacking()}; or choose --impl torch")
    _selected = implementation


def selected() -> str:
    """The implementation chosen by `select`."""
    return _selected


def _import_kernels() -> None:
    """Import Triton and the kernels, once. Raises `UserError` where Triton is not installed."""
    global _triton
    if _triton is not None:
        return
    try:
        from kernels import linear_cross_entropy, quant_matmul, rms_norm, rope, swiglu
        from kernels.attention import attention
        from kernels.attention import decode as decode_attention
        from kernels.optimizers import adamw, muon
        from kernels.shared import launch
    except ImportError as problem:
        raise UserError(
            f"implementation triton: {problem}; install triton (Linux only), or choose --impl torch"
        ) from None
    _triton = SimpleNamespace(
        adamw=adamw,
        attention=attention,
        decode_attention=decode_attention,
        launch=launch,
        linear_cross_entropy=linear_cross_entropy,
        muon=muon,
        quant_matmul=quant_matmul,
        rms_norm=rms_norm,
        rope=rope,
        swiglu=swiglu,
    )


def _has_nvidia_gpu() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _lacking() -> str:
    """What this machine lacks for the kernels, whose launchers Triton compiles in C; "" if nothing."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else OLDEST_GPU
    if capability < OLDEST_GPU:
        needed, present = (f"{major}.{minor}" for major, minor in (OLDEST_GPU, capability))
        return f"the kernels need a GPU of compute capability {needed} or more, and this one has {present}"
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not has_compiler:
        return "the kernels need a C compiler, and there is none (apt install gcc)"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "the kernels need Python's headers, and Python.h is not there (apt install python3-dev)"
    # on datacenter Blackwell older versions leave out a fence (triton#9610) and a barrier (triton#9615), so that some
    # results are wrong
    if capability[0] in (10, 11) and importlib.util.find_spec("triton"):
        from kernels.shared import proxy_fence

        if proxy_fence.LEFT_OUT_BY_TRITON:
            return "the kernels need Triton 3.7.1 or newer on this GPU (pip install -U torch triton)"
    return ""


# At import, not inside an op: torch.compile cannot trace an import.
if _has_nvidia_gpu() and importlib.util.find_spec("triton") is not None and not _lacking():
    _import_kernels()


def tuned_file() -> Path:
    """Where settings that `python -m kernels.tune` has found for the kernels are kept."""
    return _triton.launch.tuned_file()


def fused(x: Tensor) -> bool:
    """Whether our own kernels compute on x."""
    return _kernels_run(x.is_cuda)


def _kernels_run(is_cuda: bool) -> bool:
    """Whether our own kernels compute on a GPU, or on another device."""
    return _selected == "triton" or (_selected == "auto" and is_cuda and _triton is not None)


def describe(device: torch.device) -> str:
    """One line for a run's start: which implementation each op uses on the device."""
    if _selected == "reference":
        return "ops: reference (plain torch) for all"
    if _kernels_run(device.type == "cuda"):
        how = ", interpreted on the CPU" if _triton.launch.INTERPRETED else ""
        return f"ops: triton{how} (attention, norm with residual, rope, swiglu, loss in chunks, optimizers)"
    why = ""
    if _selected == "auto" and device.type == "cuda" and _lacking():
        why = f"; {_lacking()}"
    return f"ops: torch (attention: scaled_dot_product_attention; norm: rms_norm; loss: cross_entropy in chunks){why}"


def _is_cpu_step(x: Tensor) -> bool:
    """Whether x (B, 1, …) is one token a row of generation in fp32 on a CPU.

    There some ops have a form with fewer calls: see one_token.py.
    """
    if torch.compiler.is_compiling():  # calls cost nothing there
        return False
    is_one_token = x.shape[1] == 1 and x.is_cpu and x.dtype == torch.float32
    return is_one_token and not torch.is_grad_enabled() and _selected not in ("reference", "triton")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension, as `kernels.reference.rms_norm` has it."""
    if _is_cpu_step(x):
        return one_token.rms_norm(x, weight, eps)
    if fused(x):
        return _triton.rms_norm.rms_norm(x, weight, eps, product_dtype(x))
    if _selected == "reference":
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its `rms_norm`), as `kernels.reference.add_rms_norm` has it."""
    if fused(x):
        return _triton.rms_norm.add_rms_norm(x, delta, weight, eps, product_dtype(x))
    x = x + delta
    return x, rms_norm(x, weight, eps)


def rotation(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The angles of a forward pass in the form that is quickest for `rope`, made once for all layers.

    cos, sin: (T, D/2) or (B, T, D/2), fp32, of the tokens' positions. dtype: of queries and keys. Usually returns
    (cos, sin) themselves; for a step of generation the one matrix, or one for each row, of `one_token.rotation`.
    """
    if dtype != torch.float32 or not _is_cpu_step(cos if cos.dim() == 3 else cos[None]):
        return cos, sin
    return (one_token.rotation(cos, sin),)


def rope(
    q: Tensor,
    k: Tensor,
    angles: tuple[Tensor, ...],
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles, as `kernels.reference.rope` has it.

    angles: from `rotation`. With weights, queries and keys are normed first.
    """
    if fused(q):
        return _triton.rope.rope(q, k, *angles, q_weight, k_weight, eps)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
        k = rms_norm(k, k_weight, eps)
    if len(angles) == 1 and angles[0].dim() == 2:  # a matrix, (D, D)
        return q @ angles[0], k @ angles[0]
    if len(angles) == 1:  # a matrix for each row, (B, D, D)
        return torch.bmm(q[:, 0], angles[0])[:, None], torch.bmm(k[:, 0], angles[0])[:, None]
    return reference.rope(q, k, *angles)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, as `kernels.reference.swiglu` has it."""
    if not torch.is_grad_enabled() and gate.is_cpu and _selected not in ("reference", "triton"):
        return F.silu(gate).mul_(up)  # new memory costs a CPU as much as the product
    return _triton.swiglu.swiglu(gate, up) if fused(gate) else reference.swiglu(gate, up)


def document_spans(documents: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What `attention` needs to know of documents (B, T), in the form that suits it best; made once for all layers.

    Usually the spans (B, T, 2) int32 of `kernels.reference.document_spans`. For torch's own op it is a mask to add to
    the scores, (B, 1, T, T): 0 where a query sees a key, −∞ elsewhere. From spans that op would make and keep a mask in
    each layer. dtype: of the states.
    """
    spans = reference.document_spans(documents)
    if fused(documents) or _selected == "reference":
        return spans
    length = documents.shape[1]
    seen = reference.visible(length, length, window=window, spans=spans, device=documents.device)  # (B, T, T)
    return _to_add(seen[:, None], product_dtype(documents.new_empty(0, dtype=dtype)))


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, spans: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √D) v over the keys that each query sees: the output of `kernels.reference.attention`.

    spans: of `document_spans`, with the same window.
    """
    if spans is not None and spans.dim() == 4:  # what to add to the scores
        return _torch_attention(q, k, v, spans)
    if spans is None and _is_cpu_step(q) and (window or k.shape[1]) >= k.shape[1]:
        return _torch_attention(q, k, v)  # the newest token sees every key
    if fused(q) and q.shape[3] <= LARGEST_HEAD:
        dtype = product_dtype(q)
        return _triton.attention.attention(
            q.to(dtype), k.to(dtype), v.to(dtype), causal=causal, window=window, spans=spans
        )
    if _selected == "reference":
        return reference.attention(q, k, v, causal=causal, window=window, spans=spans)[0]

    # torch's op takes a flag for plain causal attention; anything else needs a mask
    q_len = q.shape[1]
    k_len = k.shape[1]
    is_plain = spans is None and (window is None or window >= k_len)
    mask = None
    if not is_plain or (causal and q_len > 1 and q_len != k_len):
        # torch's causal flag aligns the first query with the first key, ours the last with the last
        mask = reference.visible(q_len, k_len, causal=causal, window=window, spans=spans, device=q.device)
        mask = mask if mask.dim() == 2 else mask[:, None]  # (Tq, Tk) or (B, 1, Tq, Tk)
    is_causal = causal and mask is None
    if q_len == 1:  # not by `and` above: with torch.compile's symbolic lengths that would make is_causal symbolic
        is_causal = False
    return _torch_attention(q, k, v, mask, is_causal=is_causal)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """`attention` by no rule but a mask. seen: (B, Tq, Tk) bool, which keys each query sees, at least one."""
    if _selected == "reference":
        return reference.attention(q, k, v, seen=seen)[0]
    return _torch_attention(q, k, v, seen[:, None])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, window: int | None = None) -> Tensor:
    """Causal `attention` over a cache whose rows differ in length. What changes from step to step is on the device.

    ends: (B,) int64. Row b's keys are the slots j < ends[b], and its queries belong to the last of them. Or what
    `visible_keys` made of it.
    """
    if ends.dim() == 4:
        return _torch_attention(q, k, v, ends)
    n_queries = q.shape[1]
    if fused(q) and n_queries <= MOST_QUERIES and q.shape[3] <= LARGEST_HEAD:
        return _triton.decode_attention.decode_attention(q.to(k.dtype), k, v, end=ends, window=window)
    if _selected == "reference":
        outputs = []
        for row, end in enumerate(ends.tolist()):
            keys = k[row : row + 1, :end]  # (1, end, K, D)
            values = v[row : row + 1, :end]
            outputs.append(reference.attention(q[row : row + 1], keys, values, window=window)[0])
        return torch.cat(outputs)
    return _torch_attention(q, k, v, _cache_mask(ends, n_queries, k.shape[1], window))


def visible_keys(ends: Tensor, n_queries: int, n_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """The ends (B,) of a cache's rows in the form that is quickest for `cached_attention`, made once for all layers.

    Usually returns `ends` itself. For torch's own op on a CPU it is a mask to add to the scores, in `dtype`, (B, 1, Tq,
    Tk): 0 where a query sees a key, −∞ elsewhere.
    """
    if not ends.is_cpu or _selected in ("reference", "triton"):
        return ends
    return _to_add(_cache_mask(ends, n_queries, n_keys, window), dtype)


def _to_add(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores, so that only keys that are seen count: 0 for these, −∞ for others."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _cache_mask(ends: Tensor, n_queries: int, n_keys: int, window: int | None) -> Tensor:
    """Which keys the last queries of each row see, bool (B, 1, Tq, Tk)."""
    key_slots = torch.arange(n_keys, device=ends.device)  # (Tk,)
    query_slots = ends[:, None, None, None] - n_queries + key_slots[:n_queries, None]  # (B, 1, Tq, 1)
    mask = key_slots <= query_slots
    return mask if window is None else mask & (key_slots > query_slots - window)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """torch's fused attention on (B, T, H, D). mask: bool or to be added, broadcast to (B, H, Tq, Tk)."""
    groups = q.shape[2] // k.shape[2]
    if mask is not None and groups > 1 and q.is_cuda:  # torch has no fused CUDA kernel for a mask and grouped heads
        k = k.repeat_interleave(groups, dim=2)  # (B, Tk, H, D)
        v = v.repeat_interleave(groups, dim=2)
    if q.shape[1] == 1 and groups > 1 and q.is_cpu:  # heads that share keys as queries of one head: read once
        queries = q.reshape(len(q), k.shape[2], groups, q.shape[3])  # (B, K, H/K, D)
        out = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.reshape(q.shape)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, Tq, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=bool(q.shape[2] != k.shape[2]),
    )
    return out.transpose(1, 2)  # (B, Tq, H, D)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, softcap: float | None, z_loss: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Summed cross-entropy of softmax(x weightᵀ), in nats, as `kernels.reference.linear_cross_entropy` has it."""
    if fused(x):
        return _triton.linear_cross_entropy.linear_cross_entropy(x, weight, targets, mask, softcap, z_loss)
    if _selected == "reference":
        return reference.linear_cross_entropy(x, weight, targets, mask, softcap, z_loss)
    return loss.linear_cross_entropy(x, weight, targets, mask, softcap, z_loss)


def matrices(layer: nn.Module) -> list[tuple[Tensor, Tensor | None]] | None:
    """The (weight, bias) pairs by which a linear layer multiplies its input; None where it does more than that.

    Our own layers have a method of this name, and `joined(*products)`, which makes the output from the products.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    if any(hooks):
        return None
    if type(layer) is nn.Linear:
        return [(layer.weight, layer.bias)]
    return layer.matrices() if hasattr(layer, "matrices") else None


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x); x (B, T, C)."""
    return one_token.linear(x, layer) if _is_cpu_step(x) else layer(x)


def linears(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of linear layers that share one input x (…, C); under autocast in its dtype."""
    outputs_of_one_product = packed.products(x, layers)
    if outputs_of_one_product is not None:
        return outputs_of_one_product
    if _is_cpu_step(x):
        return tuple([one_token.linear(x, layer) for layer in layers])
    if not fused(x) or not torch.is_grad_enabled():
        return tuple(layer(x) for layer in layers)
    pairs_of_layers = [matrices(layer) for layer in layers]  # [(W, b), …] of each layer
    if not all(pairs_of_layers):
        return tuple(layer(x) for layer in layers)

    # all products of all layers at once
    weights_and_biases = []  # W, b, W, b, …
    for pairs in pairs_of_layers:
        for weight, bias in pairs:
            weights_and_biases += [weight, bias]
    rows = x.reshape(-1, x.shape[-1])  # (N, C)
    products = list(Products.apply(rows, product_dtype(x), *weights_and_biases))  # each (N, K)

    # each layer makes its output from its products
    outputs = []
    for layer, pairs in zip(layers, pairs_of_layers, strict=True):
        first, *others = products[: len(pairs)]
        products = products[len(pairs) :]
        out = layer.joined(first, *others) if hasattr(layer, "joined") else first  # (N, K)
        outputs.append(out.view(*x.shape[:-1], out.shape[-1]))  # (…, K)
    return tuple(outputs)


class _QuantMatmul(torch.autograd.Function):
    """x Wᵀ. W is computed from its codes in the forward pass and again in the backward pass, and not kept between."""

    @staticmethod
    def forward(ctx, x, *weight):
        ctx.width = x.shape[-1]
        ctx.save_for_backward(*weight)
        return reference.quant_matmul(x, weight)

    @staticmethod
    def backward(ctx, dy):
        weight = ctx.saved_tensors
        w = reference.dequantize(weight, ctx.width)  # (N, K)
        no_gradients = [None] * len(weight)
        return dy @ w.to(dy.dtype), *no_gradients


def quant_matmul(x: Tensor, weight: list[Tensor]) -> Tensor:
    """x Wᵀ of a quantized W, as `kernels.reference.quant_matmul` has it; under autocast in its dtype.

    No gradient goes to W.
    """
    dtype = product_dtype(x)
    if weight[0].dtype == dtype:  # a base in 16 bits: nothing to dequantize
        return F.linear(x.to(dtype), *weight)
    if fused(x) and len(weight) > 1:
        return _triton.quant_matmul.quant_matmul(x, weight)
    return _QuantMatmul.apply(x.to(dtype), *weight)


def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], **options
) -> None:
    """One step for a list of fp32 tensors where `fused`, in place: see `kernels.optimizers.adamw.adamw`."""
    _triton.adamw.adamw(params, grads, exp_avgs, exp_avg_sqs, **options)


def muon() -> ModuleType:
    """The parts of Muon's step where `fused`: `look_ahead`, `newton_schulz`, `apply` of `kernels.optimizers.muon`."""
    return _triton.muon
