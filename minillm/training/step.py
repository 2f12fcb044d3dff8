"""Parts of one optimizer step: the seed of its dropout, and clipping."""

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's dropout a function of (seed, step, rank), so that no random state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def clip(model: torch.nn.Module, optimizers: list, scaler: torch.amp.GradScaler, limit: float) -> float:
    """Undo the loss scale, clip the gradient's norm to `limit` (0: no clipping), and return the norm before that."""
    if scaler.is_enabled():
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    known = float(norm)
    if 0 < limit < known + 1e-6:  # else torch's clip_grad_norm_ would multiply all gradients by 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return known
