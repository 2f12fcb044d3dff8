"""Lesson 8: how a model knows where a token is, and what happens beyond the length that it was trained on.

    python docs/course/context.py

Turns vectors by their positions and looks at their products; trains a small model on windows of 32 tokens and lets it
read 256.
"""

import dataclasses
import math
from itertools import pairwise

import lesson
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.datasets import TokenBins, TokenWindows
from minillm.model import Transformer, preset
from minillm.model.config import RopeScaling
from minillm.training import build_optimizers

SHORT, LONG = 32, 256  # tokens
STEPS, MORE_STEPS = 200, 20


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by position · base^(−2i/D) radians. x: (T, D), positions: (T,)."""
    size = x.shape[-1]
    frequency = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)  # radians a token, (D/2,)
    angle = positions[:, None] * frequency  # (T, D/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def train(model: Transformer, windows: TokenWindows, steps: int, first: int, lr: float) -> None:
    """Steps of 1,024 tokens with AdamW, a tenth of them warm-up. first: the number of windows that were read before."""
    (optimizer,) = build_optimizers(model, "adamw", lr=lr, weight_decay=0.1)
    rows = 1024 // windows.seq_len
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 10 * (step + 1) / steps, 2 * (steps - step) / steps)
        batch = windows.batch(np.arange(first + rows * step, first + rows * step + rows))
        loss = model(batch.x, batch.y, mask=batch.mask) / batch.n_targets()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def stretched(model: Transformer, kind: str | None) -> Transformer:
    """A copy of the model with a context of `LONG` tokens, its positions stretched by a rule, or not (None)."""
    scaling = RopeScaling(kind, LONG / SHORT, SHORT) if kind else None
    copy = Transformer(dataclasses.replace(model.config, max_seq_len=LONG, rope_scaling=scaling))
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def by_position(model: Transformer, windows: TokenWindows) -> str:
    """Nats a token on 32 windows of the validation split, for each part of the window."""
    batch = windows.batch(np.arange(32))
    nats = F.cross_entropy(model(batch.x).transpose(1, 2), batch.y, reduction="none")  # (B, T)
    edges = (0, 16, 32, 64, 128, 256)
    shown = ""
    for begin, end in pairwise(edges):
        part, counts = nats[:, begin:end], batch.mask[:, begin:end]
        shown += f"{part[counts].mean():10.3f}"
    return shown


def main() -> None:
    chosen = lesson.options(__doc__)

    # products of turned vectors depend on the distance alone
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 32, dtype=torch.float64)
    for distance in (3, 30):
        products = [
            float(rotate(q, torch.tensor([m + distance])) @ rotate(k, torch.tensor([m])).T) for m in (0, 100, 10_000)
        ]
        print(f"distance {distance:2}: q · k =" + "".join(f" {product:.6f}" for product in products))
    turns = SHORT * 10_000.0 ** -(torch.arange(0, 32, 2) / 32) / (2 * math.pi)
    print(f"turns of the 16 pairs in {SHORT} tokens:", " ".join(f"{turn:.2g}" for turn in turns.tolist()))

    # a model that has only seen short windows
    steps, more_steps, n_layers = (4, 2, 2) if chosen.quick else (STEPS, MORE_STEPS, 4)
    bins = TokenBins(chosen.data, "train")
    short, long = (TokenWindows([(bins, 1.0)], seq_len=length, seed=0) for length in (SHORT, LONG))
    val = TokenWindows([(TokenBins(chosen.data, "val"), 1.0)], seq_len=LONG, seed=0)
    model = Transformer(preset("tiny", vocab_size=bins.vocab_size, n_layers=n_layers, max_seq_len=SHORT))
    model.init_weights(seed=0)
    train(model, short, steps, 0, lr=4e-3)

    # what it makes of long ones, as it is, stretched, and after some steps on them
    print("\nnats a token at positions     0-15     16-31     32-63    64-127   128-255")
    for kind in (None, "linear", "yarn"):
        longer = stretched(model, kind)
        print(f"{kind or 'as trained':24}" + by_position(longer, val), flush=True)
        train(longer, long, more_steps, 0, lr=1e-3)
        print(f"{f'  and {more_steps} steps on {LONG}':24}" + by_position(longer, val), flush=True)


if __name__ == "__main__":
    lesson.run(main)
