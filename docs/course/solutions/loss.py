"""Lesson 5, one way to do it."""

import torch
from torch import Tensor


def smoothed_loss(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The gradient is softmax − t as before, since Σ t = 1."""
    n_counted, vocab_size = mask.sum(), logits.shape[-1]
    top = logits.amax(-1, keepdim=True)  # e of it is never computed, so it cannot overflow
    log_p = logits - top - (logits - top).exp().sum(-1, keepdim=True).log()  # (N, V)
    wanted = torch.full_like(logits, smoothing / vocab_size)
    wanted[torch.arange(len(logits)), targets] += 1 - smoothing
    losses = -(wanted * log_p).sum(-1)  # (N,)
    gradient = (log_p.exp() - wanted) * mask[:, None]
    return (losses * mask).sum() / n_counted, gradient / n_counted


LOSS_WITH_CONSTANT = "stays"  # it multiplies every e^z, and their sum
TARGET_OF_THE_SHORT = "100 times as much"  # 1/10 in place of 1/1000
