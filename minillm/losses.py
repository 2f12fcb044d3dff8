"""The next-token loss without the whole matrix of logits.

For N tokens and a vocabulary of V the logits are N × V numbers, kept by autograd until the backward pass and
then joined by their gradient. Here they are made a few rows at a time, and turned into gradients at once: the
loss is the last thing a model computes, so its gradient needs nothing that comes later but one scalar.
"""

import torch
from torch import Tensor

# Logits held at a time: on a CPU 16 MB in fp32, about what its caches hold (measured); on a GPU 256 MB, so that the
# products stay large enough to fill it (not measured).
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = Σ_i m_i (log Σ_v exp z_iv − z_i,y_i) with z = cap(x Wᵀ), by chunks of rows.

    ∂loss/∂z_iv = m_i (softmax(z_i)_v − [v = y_i]); a soft cap z = c tanh(u / c) multiplies it by 1 − (z / c)².
    """

    @staticmethod
    def forward(ctx, x, weight, labels, mask, softcap, dtype, trained):
        rows = max(16, CHUNK_ELEMENTS.get(x.device.type, 1 << 24) // weight.shape[0])
        w = weight.to(dtype)
        grad_x = torch.empty_like(x) if trained and x.requires_grad else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if trained and weight.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for begin in range(0, x.shape[0], rows):
            part = slice(begin, begin + rows)
            x_part, y_part = x[part].to(dtype), labels[part, None]
            z = (x_part @ w.T).float()
            if softcap is not None:
                z = z.div_(softcap).tanh_().mul_(softcap)
            log_p = torch.log_softmax(z, dim=-1)
            nats = -log_p.gather(-1, y_part)
            total += (nats if mask is None else nats.masked_fill(~mask[part, None], 0.0)).sum()
            if not trained:
                continue
            grad = log_p.exp_().scatter_add_(-1, y_part, -torch.ones_like(nats))
            if mask is not None:
                grad = grad.mul_(mask[part, None])
            if softcap is not None:
                grad = grad.mul_(1 - (z / softcap).square())
            grad = grad.to(dtype)
            if grad_x is not None:
                grad_x[part] = grad @ w
            if grad_w is not None:
                # fp16 ends at 65,504, and no loss scale reaches this sum over rows: for it, products in fp32
                grad_w += grad.float().T @ x_part.float() if dtype == torch.float16 else grad.T @ x_part
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_w = ctx.saved_tensors
        grad_x = None if grad_x is None else grad_x * grad_output.to(grad_x.dtype)
        grad_w = None if grad_w is None else (grad_w * grad_output).to(ctx.weight_dtype)
        return grad_x, grad_w, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """As `kernels.reference.linear_cross_entropy`, in memory for one chunk of logits and both gradients.

    Under autocast the products run in its dtype; the softmax and the sums are in fp32, for fp64 inputs too.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _LinearCrossEntropy.apply(x, weight, targets, mask, softcap, dtype, torch.is_grad_enabled())
