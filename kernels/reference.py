"""What every op means, in a few lines of plain torch: the specification the kernels are held to.

Shapes: B batch, Tq and Tk query and key length, H query heads, K key/value heads (H a multiple
of K), D head size, C width, N rows, V vocabulary. Nothing here is fast; everything here is right.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x², last dim) + eps) · weight, in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    x: (..., C) any float dtype; weight: (C,); returns x's shape and dtype.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    return (wide * r).to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm(x + delta)): the residual addition and the norm after it. x, delta: (..., C)."""
    total = (x + delta).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle, half-split (Su et al. 2021, arXiv:2104.09864).

    q: (B, T, H, D), k: (B, T, K, D); cos, sin: (T, D/2) or (B, T, D/2), fp32. Returns both, rotated.
    """
    cos = cos.unsqueeze(-2)  # ([B,] T, 1, D/2): one angle for all heads
    sin = sin.unsqueeze(-2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)  # (B, T, heads, D/2) each
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)

    return rotate(q), rotate(k)


def document_spans(documents: Tensor) -> Tensor:
    """First and one past the last position of each token's document: (B, T, 2) int32.

    documents: (B, T) integers that never decrease along a row.
    """
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device).expand_as(documents)  # (B, T)
    change = documents[:, 1:] != documents[:, :-1]  # (B, T - 1): between a token and the next
    edge = torch.ones_like(documents[:, :1], dtype=torch.bool)
    begins = torch.cat((edge, change), 1)
    ends = torch.cat((change, edge), 1)
    first = torch.where(begins, index, 0).cummax(dim=1).values  # the last beginning so far
    last = torch.where(ends, index, length).flip(1).cummin(dim=1).values.flip(1)  # the next end
    return torch.stack((first, last + 1), dim=-1).int()


def visible(
    q_len: int,
    k_len: int,
    *,
    causal: bool = True,
    window: int | None = None,
    spans: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which key each query may see: bool, (Tq, Tk), or (B, Tq, Tk) where spans are given.

    Queries are the last Tq of the Tk positions (so a cache needs nothing special).
    spans: (B, Tk, 2) of `document_spans`: a token sees only tokens of its own document.
    """
    i = torch.arange(k_len - q_len, k_len, device=device)[:, None]  # (Tq, 1)
    j = torch.arange(k_len, device=device)[None, :]  # (1, Tk)
    seen = j <= i if causal else torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & (i - j < window) & (j - i < window)
    if spans is not None:
        own = spans[:, k_len - q_len :, :, None]  # (B, Tq, 2, 1)
        seen = seen & (own[:, :, 0] <= j) & (j < own[:, :, 1])
    return seen


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
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v over the visible keys, heads grouped (Ainslie et al. 2023, arXiv:2305.13245).

    q: (B, Tq, H, D); k, v: (B, Tk, K, D), query head h uses key head h // (H / K). causal, window, spans:
    see `visible`. softcap: scores become softcap · tanh(scores / softcap). scale: default D^-0.5.
    seen: (B, Tq, Tk) bool, which keys each query sees, in place of these rules.
    Returns the output (B, Tq, H, D) and the scores' log-sum-exp (B, H, Tq), natural logarithm, at least fp32; a
    query that sees no key gives zeros, and -inf.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    group = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(group, dim=2)  # (B, Tk, H, D)
    v = v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale  # (B, H, Tq, Tk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is None:
        seen = visible(q.shape[1], k.shape[1], causal=causal, window=window, spans=spans, device=q.device)
    if seen.dim() == 3:
        seen = seen[:, None]  # (B, 1, Tq, Tk): the same for all heads
    scores = scores.masked_fill(~seen, float("-inf"))
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = torch.softmax(wide, dim=-1)
    weights = weights.nan_to_num(0.0).to(v.dtype)  # a row of -inf has no softmax: it sees nothing
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)  # (B, Tq, H, D)
    return out, torch.logsumexp(wide, dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (Shazeer 2020, arXiv:2002.05202). Same shape and dtype for all three."""
    return torch.nn.functional.silu(gate) * up


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted sum over rows of the cross-entropy of softmax(x weightᵀ), in nats.

    x: (N, C); weight: (V, C); targets: (N,) int64, −100 where none counts. mask: (N,) bool, True where the target
    counts, or float, each row's weight (1 / their number gives the mean). softcap: logits become
    softcap · tanh(logits / softcap). Returns a scalar, at least fp32.
    z_loss ζ: each row adds ζ · logsumexp² (Chowdhery et al. 2022, arXiv:2204.02311, section 5). With it, and be it 0,
    returns two: the whole loss, and the part of it that was added, through which no gradient goes.
    """
    logits = x @ weight.to(x.dtype).T  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    row_weights = torch.ones_like(logits[:, 0]) if mask is None else mask.to(logits.dtype)  # (N,)
    row_weights = row_weights.masked_fill(targets == -100, 0.0)
    left_out = row_weights == 0
    target = targets.masked_fill(left_out, 0)[:, None]  # (N, 1): any index will do where nothing counts
    lse = torch.logsumexp(logits, dim=-1)
    nats = lse - logits.gather(-1, target).squeeze(-1)
    loss = (nats.masked_fill(left_out, 0.0) * row_weights).sum()  # NaN · 0 would be NaN
    if z_loss is None:
        return loss
    penalty = (z_loss * lse.square().masked_fill(left_out, 0.0) * row_weights).sum()
    return loss + penalty, penalty.detach()


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW, counted from 1 (Loshchilov & Hutter 2019, arXiv:1711.05101).

    All of one shape and dtype. Returns the new parameter and its new moments; nothing is written to.
    """
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    mean = exp_avg / (1 - beta1**step)
    square = exp_avg_sq / (1 - beta2**step)
    direction = mean / (square.sqrt() + eps)
    return param - lr * (direction + weight_decay * param), exp_avg, exp_avg_sq


def newton_schulz(matrices: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Bring all singular values of each matrix near 1: x ← a x + (b g + c g²) x with g = x xᵀ (Jordan et al. 2024,
    "Muon: an optimizer for hidden layers in neural networks").

    matrices: (n, rows, columns), divided by their Frobenius norms first, so that no singular value is above 1.
    coefficients: a, b, c. Returns a tensor of the same shape.
    """
    a, b, c = coefficients
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def nf4_values() -> Tensor:
    """The 16 values of 4-bit NormalFloat, ascending from −1 to 1, fp64 (Dettmers et al. 2023, arXiv:2305.14314).

    Quantiles of N(0, 1), the same probability apart on each side: 8 up to zero, 9 from zero on, divided by the
    outermost. That one lies at 1 − (1/30 + 1/32) / 2: halfway into the last bin, the mean of a side of 15 and of 16.
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    below = torch.special.ndtri(torch.linspace(1 - edge, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, edge, 9, dtype=torch.float64))
    return torch.cat((below, above[1:])) / above[-1]


def dequantize_int8(codes: Tensor, scale: Tensor, kept: Tensor, columns: Tensor) -> Tensor:
    """codes (N, K) int8 · scale (N,) fp32 of the row, but columns (O,) int64 are kept (N, O). Returns (N, K) fp32."""
    rounded = codes * scale[:, None]  # (N, K)
    return rounded.index_copy_(1, columns, kept.float())


def dequantize_nf4(codes: Tensor, scale: Tensor, coarse: Tensor, offset: Tensor, width: int) -> Tensor:
    """Each block of 64 columns: NF4 values · its scale, itself 8 bits in groups of 256 blocks (double quantization).

    codes: (N, 32 B) uint8, of each block the 32 first columns in the low halves, the others in the high ones; scale:
    (N, B) int8; coarse: (⌈N B / 256⌉,) and offset: (1,) fp32. Returns (N, width) fp32.
    """
    n, blocks = scale.shape
    pairs = codes.view(n, blocks, 1, 32)
    halves = torch.cat((pairs & 15, pairs >> 4), dim=2).int()  # (N, B, 2, 32)
    values = nf4_values().to(codes.device, torch.float32).index_select(0, halves.flatten()).view_as(halves)
    coarse_of_block = coarse.repeat_interleave(256)[: n * blocks].view(n, blocks)
    block_scale = scale * coarse_of_block + offset  # (N, B)
    weights = values * block_scale[:, :, None, None]  # (N, B, 2, 32)
    return weights.view(n, blocks * 64)[:, :width]  # (N, K)


def dequantize(weight: list[Tensor], width: int) -> Tensor:
    """W (N, K = width) in fp32 from the four tensors of `dequantize_int8` or `dequantize_nf4`, or from itself."""
    if len(weight) == 1:
        return weight[0].float()
    if weight[0].dtype == torch.int8:
        return dequantize_int8(*weight)
    return dequantize_nf4(*weight, width)


def quant_matmul(x: Tensor, weight: list[Tensor]) -> Tensor:
    """x Wᵀ, W as `dequantize` gives it, rounded to x's dtype. x: (..., K). Returns (..., N)."""
    return x @ dequantize(weight, x.shape[-1]).to(x.dtype).T
