"""The only file that imports `kernels/`: each op picks an implementation, and `describe` says which.

auto       the fastest there is for the device: triton on an NVIDIA GPU from the A100 on, else torch
triton     our own kernels; on a CPU only through Triton's interpreter (TRITON_INTERPRET=1), for debugging
torch      torch's own fused ops
reference  the specification in `kernels/reference.py`: slow, to read and to compare with
"""

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.model import loss
from minillm.model.linears import Products, product_dtype

try:
    from kernels import reference
except ImportError as problem:  # PyPI has another package of that name
    raise UserError(
        f"the package 'kernels' that Python finds is not minillm's ({problem}): run from minillm's folder, "
        "or `pip uninstall kernels` and `pip install -e .`"
    ) from None

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
OLDEST_GPU = 8, 0  # compute capability: what the kernels are compiled for and tested against

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
    try:
        if _triton is None:
            from kernels import linear_cross_entropy, quant_matmul, rms_norm, rope, swiglu
            from kernels.attention import attention
            from kernels.attention import decode as decode_attention
            from kernels.optimizers import adamw, muon
            from kernels.shared import launch

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
    except ImportError as problem:
        raise UserError(
            f"implementation triton: {problem}; install triton (Linux only), or choose --impl torch"
        ) from None


def _gpu_is_supported() -> bool:
    nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    return nvidia and torch.cuda.get_device_capability() >= OLDEST_GPU


def _lacking() -> str:
    """What this machine lacks for the kernels, whose launchers Triton compiles in C; "" if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "the kernels need a C compiler, and there is none (apt install gcc)"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "the kernels need Python's headers, and Python.h is not there (apt install python3-dev)"
    # on datacenter Blackwell older ones leave out a fence (triton#9610) and a barrier (triton#9615): now and then wrong
    affected = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (10, 11)
    if affected and importlib.util.find_spec("triton"):
        from kernels.shared import proxy_fence

        if proxy_fence.LEFT_OUT_BY_TRITON:
            return "the kernels need Triton 3.7.1 or newer on this GPU (pip install -U torch triton)"
    return ""


def _blocks_are_quicker() -> bool:
    """Whether one row's product with a large matrix is quicker as a batch of products with blocks of the matrix.

    MKL's product of a matrix and a vector reads an AMD processor's memory at half its speed; its batch of them at
    almost all of it, and in several threads. On Intel's processors it is the other way round.
    """
    processor = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and processor.exists() and "AuthenticAMD" in processor.read_text()


# From so many numbers on; a smaller matrix (2 MB) may still be in the processor's cache from the step before.
_large_matrix = 2**19 if _blocks_are_quicker() else math.inf

# At import, not inside an op: torch.compile cannot trace an import.
if _gpu_is_supported() and importlib.util.find_spec("triton") is not None and not _lacking():
    _import_kernels()


def fused(x: Tensor) -> bool:
    """Whether our own kernels compute on x."""
    return _selected == "triton" or (_selected == "auto" and x.is_cuda and _triton is not None)


def describe(device: torch.device) -> str:
    """One line for a run's start: which implementation each op uses on the device."""
    if _selected == "reference":
        return "ops: reference (plain torch) for all"
    if _selected == "triton" or (_selected == "auto" and device.type == "cuda" and _triton is not None):
        how = ", interpreted on the CPU" if _triton.launch.INTERPRETED else ""
        return f"ops: triton{how} (attention, norm with residual, rope, swiglu, loss in chunks, optimizers)"
    why = f"; {_lacking()}" if _selected == "auto" and device.type == "cuda" and _lacking() else ""
    return f"ops: torch (attention: scaled_dot_product_attention; norm: rms_norm; loss: cross_entropy in chunks){why}"


def _is_step(x: Tensor) -> bool:
    """Whether x (B, 1, …) is one token a row of generation in fp32 on a CPU.

    There a call costs more than the numbers in it, so some ops have a form with fewer calls.
    """
    few = x.shape[1] == 1 and x.is_cpu and x.dtype is torch.float32
    return few and not torch.is_grad_enabled() and _selected not in ("reference", "triton")


@functools.cache
def _norm_constants(width: int, eps: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(math.sqrt(width * eps)), torch.tensor(1 / math.sqrt(width))


def _rms_norm_of_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x w / √(|x|²/C + ε) = x w / (hypot(|x|, √(Cε)) / √C), in five calls; torch's own makes ten."""
    smallest, scale = _norm_constants(x.shape[-1], eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # |x|, (…, 1)
    rms = norm.hypot_(smallest).mul_(scale)
    return (x * weight).div_(rms)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`."""
    if _is_step(x):
        return _rms_norm_of_step(x, weight, eps)
    if fused(x):
        return _triton.rms_norm.rms_norm(x, weight, eps, product_dtype(x))
    if _selected == "reference":
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.add_rms_norm`."""
    if fused(x):
        return _triton.rms_norm.add_rms_norm(x, delta, weight, eps, product_dtype(x))
    x = x + delta
    return x, rms_norm(x, weight, eps)


def rotation(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The angles of a forward pass in the form that `rope` is quickest with, for all layers.

    cos, sin: (T, D/2) or (B, T, D/2), fp32, of the tokens' positions. dtype: of queries and keys. Usually (cos, sin)
    themselves; of a step of generation one matrix, (D, D), or one for each row, (B, 1, D, D), that turns by a product:

        (x₁ x₂) [  cos  sin ]  =  (x₁ cos − x₂ sin,  x₂ cos + x₁ sin)          cos and sin as diagonal matrices
                [ −sin  cos ]
    """
    if dtype != torch.float32 or not _is_step(cos if cos.dim() == 3 else cos[None]):
        return cos, sin
    if cos.dim() == 2:
        cos, sin = cos[0], sin[0]
    cos, sin = torch.diag_embed(cos), torch.diag_embed(sin)  # (…, D/2, D/2)
    return (torch.cat((torch.cat((cos, sin), -1), torch.cat((-sin, cos), -1)), -2),)


def rope(
    q: Tensor,
    k: Tensor,
    angles: tuple[Tensor, ...],
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.rope`; angles: from `rotation`. With weights, queries and keys are normed before."""
    if fused(q):
        return _triton.rope.rope(q, k, *angles, q_weight, k_weight, eps)
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    if len(angles) == 1:
        return q @ angles[0], k @ angles[0]
    return reference.rope(q, k, *angles)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.reference.swiglu`."""
    if _is_step(gate):
        return F.silu(gate).mul_(up)
    return _triton.swiglu.swiglu(gate, up) if fused(gate) else reference.swiglu(gate, up)


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
    ends: Tensor | None = None,
) -> Tensor:
    """See `kernels.reference.attention`; the output alone.

    ends: (B,) int64, where k and v are a cache whose rows have lengths of their own: row b's keys are the slots
    j < ends[b], and its queries stand at the last of them. Causal, with no spans and no gradient.
    """
    if ends is None and spans is None and softcap is None and _is_step(q) and (window or k.shape[1]) >= k.shape[1]:
        # the newest token sees every key
        heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, T, D)
        return F.scaled_dot_product_attention(*heads_first, scale=scale, enable_gqa=True).transpose(1, 2)
    options = dict(causal=causal, window=window, spans=spans, softcap=softcap, scale=scale)
    if ends is not None:
        return _cached_attention(q, k, v, ends, options)
    if fused(q):
        dtype = product_dtype(q)
        return _triton.attention.attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
    if _selected == "reference" or softcap is not None:
        return reference.attention(q, k, v, **options)[0]
    q_len, k_len = q.shape[1], k.shape[1]
    simple = spans is None and (window is None or window >= k_len)
    seen = None
    if not simple or (causal and q_len > 1 and q_len != k_len):
        # torch's causal flag aligns the first query with the first key, ours the last with the last
        seen = reference.visible(q_len, k_len, causal=causal, window=window, spans=spans, device=q.device)
        seen = seen if seen.dim() == 2 else seen[:, None]
    is_causal = causal and seen is None
    if q_len == 1:  # an `if` of its own: with torch.compile's symbolic lengths `and` would make is_causal symbolic
        is_causal = False
    return _torch_attention(q, k, v, mask=seen, is_causal=is_causal, scale=scale)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """torch's own; mask: (Tq, Tk) or (B, 1, Tq, Tk) bool, True where a query sees a key; None: it sees all."""
    groups = q.shape[2] // k.shape[2]
    if mask is not None and groups > 1 and q.is_cuda:  # torch has no fused CUDA kernel for a mask and grouped heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    enable_gqa = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


MOST_QUERIES, LARGEST_HEAD = 16, 256  # of our decode kernel


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, options: dict) -> Tensor:
    """`attention` where each row's keys end at a slot of its own. What changes from step to step is on the device."""
    window, softcap, scale = (options[name] for name in ("window", "softcap", "scale"))
    if options["spans"] is not None or not options["causal"]:
        raise ValueError("attention over a cache whose rows end at slots of their own is causal, and has no spans")
    if fused(q) and q.shape[1] <= MOST_QUERIES and q.shape[3] <= LARGEST_HEAD:
        how = dict(window=window, softcap=softcap, scale=scale)
        return _triton.decode_attention.decode_attention(q.to(k.dtype), k, v, end=ends, **how)
    if _selected == "reference" or softcap is not None:
        rows = range(len(q))
        each = [(q[b : b + 1], k[b : b + 1, : ends[b]], v[b : b + 1, : ends[b]]) for b in rows]
        return torch.cat([reference.attention(*row, **options)[0] for row in each])
    slots = torch.arange(k.shape[1], device=q.device)
    own = ends[:, None, None] - q.shape[1] + slots[: q.shape[1], None]  # (B, Tq, 1): the slot of each query
    seen = slots <= own  # (B, Tq, Tk)
    if window is not None:
        seen = seen & (slots > own - window)
    return _torch_attention(q, k, v, mask=seen[:, None], scale=scale)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """See `kernels.reference.linear_cross_entropy`."""
    if fused(x):
        return _triton.linear_cross_entropy.linear_cross_entropy(x, weight, targets, mask, softcap)
    if _selected == "reference":
        return reference.linear_cross_entropy(x, weight, targets, mask, softcap)
    return loss.linear_cross_entropy(x, weight, targets, mask, softcap)


def matrices(layer: nn.Module) -> list[tuple[Tensor, Tensor | None]] | None:
    """The (weight, bias) pairs of the products that a linear layer takes of its input; None where it does more.

    Our own layers have a method of this name, and `joined(*products)`, which makes their output of the products.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    if any(hooks):
        return None
    if type(layer) is nn.Linear:
        return [(layer.weight, layer.bias)]
    return layer.matrices() if hasattr(layer, "matrices") else None


def _linear_of_step(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x), past what a call of a module costs where that does no more than its product."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight.numel() >= _large_matrix and len(x) == 1 and weight.is_contiguous():
        return _linear_by_blocks(x, weight, bias)
    return F.linear(x, weight, bias)


BLOCK = 16  # rows of a matrix; many, so that there are enough for all threads


def _linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of one row x (1, 1, C), for which W (K, C) is read in blocks of rows: see `_blocks_are_quicker`."""
    n_whole = len(weight) // BLOCK * BLOCK  # rows in whole blocks
    blocks = weight[:n_whole].view(-1, BLOCK, weight.shape[1])
    column = x.mT.expand(len(blocks), -1, -1)  # (blocks, C, 1); of other strides MKL takes a slow way
    out = torch.bmm(blocks, column).view(1, 1, n_whole)
    if n_whole < len(weight):
        out = torch.cat((out, F.linear(x, weight[n_whole:])), -1)
    return out if bias is None else out + bias


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x); x (B, T, C)."""
    return _linear_of_step(x, layer) if _is_step(x) else layer(x)


def linears(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of linear layers that share one input x (…, C); under autocast in its dtype."""
    if _is_step(x):
        return tuple([_linear_of_step(x, layer) for layer in layers])
    trains_fused = fused(x) and torch.is_grad_enabled()
    pairs = [matrices(layer) for layer in layers] if trains_fused else [None]  # of each layer: its (W, b), …
    if not all(pairs):
        return tuple(layer(x) for layer in layers)

    # all products of all layers at once
    flat = [tensor for own in pairs for pair in own for tensor in pair]  # W, b, W, b, …
    rows = x.reshape(-1, x.shape[-1])  # (N, C)
    products = list(Products.apply(rows, product_dtype(x), *flat))  # each (N, K)

    # each layer makes its output of its own
    outputs = []
    for layer, own in zip(layers, pairs, strict=True):
        first, *others = products[: len(own)]
        products = products[len(own) :]
        out = layer.joined(first, *others) if hasattr(layer, "joined") else first  # (N, K)
        outputs.append(out.view(*x.shape[:-1], out.shape[-1]))
    return tuple(outputs)


class _QuantMatmul(torch.autograd.Function):
    """x Wᵀ, for which W is made from its codes in the forward pass and again in the backward pass, never kept."""

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
    """See `kernels.reference.quant_matmul`; under autocast in its dtype. The quantized weight gets no gradient."""
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


def muon(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], **options) -> None:
    """One step for matrices of one shape on a device where `fused`, in place: see `kernels.optimizers.muon.muon`."""
    _triton.muon.muon(params, grads, buffers, **options)
