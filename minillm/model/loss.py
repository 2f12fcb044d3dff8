"""The next-token loss without the whole matrix of logits.

For N tokens and a vocabulary of V the logits are N × V numbers, which autograd keeps until the backward pass and
whose gradient is as large. Here they are computed a few rows at a time and turned into gradients immediately: the
loss is the last thing a model computes, so its gradient depends on nothing later but one scalar.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model.linears import product_dtype

# Logits held at a time: on a CPU 16 MB in fp32, about what its caches hold (measured); on a GPU 256 MB, so that the
# products stay large enough to fill it (not measured).
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}

PACKED_ROWS = 128  # rows of logits held at a time in `cross_entropy_of`
IGNORED = -100  # the target of a row that never counts, as in torch


def rows_at_once(weight: Tensor) -> int:
    """How many rows of logits are held at a time, by a head's weight (V, C)."""
    return max(16, CHUNK_ELEMENTS.get(weight.device.type, 1 << 24) // len(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = Σ_i m_i (log Z_i − z_i,y + ζ log² Z_i), z = cap(x Wᵀ), Z_i = Σ_v exp z_iv, a chunk of rows i at a time.

    ∂loss/∂z_iv = m_i (softmax(z_i)_v (1 + 2 ζ log Z_i) − [v = y_i]); a soft cap z = c tanh(u / c) multiplies it by
    1 − (z / c)². The third term is the z-loss (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    The m_i, over the largest of them, are multiplied into the narrow side of each product.
    """

    @staticmethod
    def forward(ctx, x, weight, labels, mask, softcap, z_loss, trained):
        """x (N, C), weight (V, C), labels (N,) int64, mask (N,) or None → the loss, and the z-loss in it; fp32."""
        n = x.shape[0]
        dtype = product_dtype(x)

        # how much each row counts; one that does not may hold any label
        counts = torch.ones(n, dtype=torch.float32, device=x.device) if mask is None else mask.float()
        counts = counts.masked_fill(labels == IGNORED, 0.0)[:, None]  # (N, 1)
        labels = labels[:, None].masked_fill(counts == 0, 0)  # (N, 1)
        largest = counts.abs().amax().clamp_min(1e-30) if n else counts.new_ones(())
        shares = counts / largest  # a probability divided by the number of tokens would underflow in fp16

        w = weight.to(dtype)
        grad_x = torch.empty_like(x) if trained and x.requires_grad else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if trained and weight.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        penalty = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = rows_at_once(weight)
        for begin in range(0, n, rows):
            part = slice(begin, begin + rows)

            # forward: the logits of these rows, and their loss
            x_part, labels_part = x[part].to(dtype), labels[part]
            logits = (x_part @ w.T).float()  # (rows, V)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            log_p = torch.log_softmax(logits, dim=-1)
            nats = -log_p.gather(-1, labels_part)  # (rows, 1)
            # no `+=`: torch 2.11, compiling, gives an output changed in place no gradient
            total = total + (nats.masked_fill(counts[part] == 0, 0.0) * counts[part]).sum()
            if z_loss:
                log_z = logits.gather(-1, labels_part) + nats  # (rows, 1)
                squares = log_z.square().masked_fill(counts[part] == 0, 0.0)
                penalty = penalty + (z_loss * squares * counts[part]).sum()
            if not trained:
                continue

            # backward: softmax minus one at the label, through the soft cap, then both products
            grad = log_p.exp_()  # (rows, V)
            if z_loss:
                grad = grad.mul_(1 + 2 * z_loss * log_z)
            grad = grad.scatter_add_(-1, labels_part, torch.full_like(nats, -1.0))
            if softcap is not None:
                grad = grad.mul_(1 - (logits / softcap).square())
            grad = grad.to(dtype)
            if grad_x is not None:
                grad_x[part] = (grad @ w) * shares[part].to(dtype)  # (rows, C)
            if grad_w is not None:
                x_part = x_part * shares[part].to(dtype)
                # fp16 ends at 65,504, and the loss scale, applied later, cannot keep this sum below that: fp32
                grad_w += grad.float().T @ x_part.float() if dtype == torch.float16 else grad.T @ x_part  # (V, C)
        ctx.save_for_backward(grad_x, grad_w, largest)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(penalty)
        return total + penalty, penalty

    @staticmethod
    def backward(ctx, grad_output, _):
        grad_x, grad_w, largest = ctx.saved_tensors
        factor = grad_output * largest
        if grad_x is not None:
            wide = torch.promote_types(grad_x.dtype, torch.float32)
            grad_x = (grad_x.to(wide) * factor).to(grad_x.dtype)
        if grad_w is not None:
            grad_w = (grad_w * factor).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `kernels.reference.linear_cross_entropy`, in memory for one chunk of logits and both gradients.

    Under autocast the products run in its dtype; the softmax and the sums are in fp32, for fp64 inputs too.
    """
    trained = torch.is_grad_enabled()
    loss, penalty = _LinearCrossEntropy.apply(x, weight, targets, mask, softcap, z_loss or 0.0, trained)
    return loss if z_loss is None else (loss, penalty)


@torch.no_grad()
def cross_entropy_of(
    x: Tensor, logits_of: Callable[[Tensor], Tensor], targets: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The same loss where the head is no plain matrix, without gradients. logits_of: x (n, C) → logits (n, V)."""
    counts = torch.ones(len(x), device=x.device) if mask is None else mask.float()  # (N,)
    targets = targets.masked_fill(counts == 0, IGNORED)
    total = torch.zeros((), device=x.device)
    for begin in range(0, len(x), PACKED_ROWS):
        part = slice(begin, begin + PACKED_ROWS)
        nats = F.cross_entropy(logits_of(x[part]).float(), targets[part], ignore_index=IGNORED, reduction="none")
        total += (nats * counts[part]).sum()
    return total


@torch.no_grad()
def target_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log π of each target, and the entropy of each distribution in nats if asked: (N,) fp32 each; no gradient.

    hidden: (N, C). weight: (V, C) of the head. targets: (N,) int64. Products run in autocast's dtype, as in the loss;
    softmax and sums are in fp32. Logits exist for a few rows at a time.
    """
    n = len(hidden)
    dtype = product_dtype(hidden)
    weight = weight.to(dtype)
    log_probs = torch.empty(n, device=hidden.device)
    entropy = torch.empty(n, device=hidden.device) if with_entropy else None
    rows = rows_at_once(weight)
    for begin in range(0, n, rows):
        part = slice(begin, begin + rows)
        states = (hidden[part] / temperature).to(dtype)
        logits = (states @ weight.T).float()  # (rows, V)
        if softcap is not None:
            cap = softcap / temperature
            logits = logits.div_(cap).tanh_().mul_(cap)
        log_p = torch.log_softmax(logits, dim=-1)  # (rows, V)
        log_probs[part] = log_p.gather(-1, targets[part, None]).squeeze(-1)
        if entropy is not None:
            entropy[part] = -(log_p.exp() * log_p).sum(-1)
    return log_probs, entropy
