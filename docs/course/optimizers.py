"""Lesson 6: three optimizers in three lines each, what their steps look like, and why the first ones are kept short.

    python docs/course/optimizers.py

Trains the same small model by SGD, AdamW and Muon, with and without warm-up, and watches one matrix on its way.
"""

import math
from collections import defaultdict

import lesson
import numpy as np
import torch
from block import bits_per_byte
from torch import Tensor

from minillm.datasets import TokenBins, TokenWindows
from minillm.model import Transformer, preset

STEPS = 120
WARMUP = 20  # steps
WEIGHT_DECAY = 0.1
WATCHED = "layers.1.mlp.down_proj.weight"  # (C, F)


def sgd(grad: Tensor, state: dict, step: int) -> Tensor:
    """Momentum: m ← 0.9 m + g."""
    state["m"] = 0.9 * state.get("m", 0) + grad
    return state["m"]


def adam(grad: Tensor, state: dict, step: int) -> Tensor:
    """The mean gradient over the root of its mean square, number by number. step: from 1."""
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["s"] = 0.95 * state.get("s", 0) + 0.05 * grad.square()
    mean, square = state["m"] / (1 - 0.9**step), state["s"] / (1 - 0.95**step)  # both began at 0
    return mean / (square.sqrt() + 1e-8)


def muon(grad: Tensor, state: dict, step: int) -> Tensor:
    """Momentum, with all singular values brought near 1."""
    state["m"] = 0.95 * state.get("m", 0) + grad
    x = grad + 0.95 * state["m"]
    x = x / x.norm()  # singular values into [0, 1]
    for _ in range(5):  # each singular value s becomes 3.4445 s − 4.775 s³ + 2.0315 s⁵
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * math.sqrt(max(x.shape)) * x  # as large as Adam's


# name → what steps the matrices inside the layers, what steps the rest, and the rate
OPTIMIZERS = {"SGD": (sgd, sgd, 0.3), "AdamW": (adam, adam, 4e-3), "Muon": (muon, adam, 8e-3)}


def train(model: Transformer, windows: TokenWindows, name: str, steps: int, warmup: int) -> list[Tensor]:
    """Train; returns each step of the watched matrix over its rate, (C, F)."""
    for_matrices, for_others, peak = OPTIMIZERS[name]
    states, taken = defaultdict(dict), []
    for step in range(1, steps + 1):
        batch = windows.batch(np.arange(16 * step, 16 * step + 16))
        loss = model(batch.x, batch.y, mask=batch.mask) / batch.n_targets()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = peak * min(1, step / max(1, warmup)) * min(1, 2 * (1 + steps - step) / steps)
        for path, w in model.named_parameters():
            is_inside = w.dim() == 2 and "layers." in path
            with torch.no_grad():
                change = (for_matrices if is_inside else for_others)(w.grad, states[path], step)
                w -= rate * (change + WEIGHT_DECAY * w * (w.dim() == 2))
            w.grad = None
            if path == WATCHED:
                taken.append(change.clone())
    return taken


def directions(change: Tensor) -> float:
    """Among how many directions a step is spread: (Σ s²)² / Σ s⁴ of its singular values, 1 to all of them."""
    squares = torch.linalg.svdvals(change).square()
    return float(squares.sum() ** 2 / squares.square().sum())


def main() -> None:
    chosen = lesson.options(__doc__)
    train_windows, val_windows = (
        TokenWindows([(TokenBins(chosen.data, split), 1.0)], seq_len=64, seed=0) for split in ("train", "val")
    )
    bins = TokenBins(chosen.data, "val")
    bytes_a_token = bins.document_bytes.sum() / (bins.n_tokens - bins.n_documents)  # without each bos
    steps, n_layers = (12, 2) if chosen.quick else (STEPS, 4)
    print("optimizer  warm-up   size of step 1   of the last   directions of the last   bits per byte")
    for name in OPTIMIZERS:
        for warmup in (0, WARMUP):
            model = Transformer(preset("tiny", vocab_size=bins.vocab_size, n_layers=n_layers))
            model.init_weights(seed=0)
            taken = train(model, train_windows, name, steps, warmup)
            sizes = [float(change.square().mean().sqrt()) for change in (taken[0], taken[-1])]
            score = bits_per_byte(model, val_windows, bytes_a_token)
            shown = f"{sizes[0]:16.1e} {sizes[1]:13.1e} {directions(taken[-1]):24.1f} {score:15.3f}"
            print(f"{name:9} {warmup:8} {shown}", flush=True)


if __name__ == "__main__":
    lesson.run(main)
