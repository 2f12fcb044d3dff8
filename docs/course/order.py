"""Lesson 7: the order of the data as a pure function, and a run that goes on as if it had never stopped.

    python docs/course/order.py

Trains a small model for 30 steps in one go, and again with a stop after 12; compares what they read and every weight.
"""

import copy
import hashlib

import lesson
import numpy as np
import torch

from minillm.datasets import TokenBins, TokenWindows
from minillm.model import Transformer, preset
from minillm.training import build_optimizers

STEPS, STOP = 30, 12
ROWS = 8  # windows of a step's batch


def mixed(right: int, key: int, turn: int, bits: int) -> int:
    """A number of so many bits that follows from the others and looks like chance."""
    digest = hashlib.sha256(f"{key} {turn} {right}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (1 << bits)


def permute(index: int, n: int, key: int) -> int:
    """Where number `index` of 0 … n − 1 goes, in an order that `key` chooses; nothing is stored.

    Four rounds of (left, right) → (right, left ⊕ f(right)): whatever f is, each can be undone, so no two numbers meet.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half
    while True:
        left, right = index >> bits, index % (1 << bits)
        for turn in range(4):
            left, right = right, left ^ mixed(right, key, turn, bits)
        index = left << bits | right
        if index < n:  # the halves can hold a few numbers more than n: those go round again
            return index


def build(vocab_size: int, n_layers: int) -> tuple[Transformer, torch.optim.Optimizer]:
    """A small model with dropout, and its optimizer, as they are before the first step."""
    model = Transformer(preset("tiny", vocab_size=vocab_size, n_layers=n_layers, dropout=0.1))
    model.init_weights(seed=0)
    (optimizer,) = build_optimizers(model, "adamw", lr=4e-3, weight_decay=0.1)
    return model, optimizer


def train(model: Transformer, optimizer: torch.optim.Optimizer, windows: TokenWindows, steps: range, seeded=True):
    """Do these steps. Beside the state a step needs to know its number alone. seeded: whether dropout knows it."""
    for step in steps:
        if seeded:
            torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10)
        batch = windows.batch(np.arange(ROWS * step, ROWS * step + ROWS))
        loss = model(batch.x, batch.y, mask=batch.mask) / batch.n_targets()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(model: Transformer, other: Transformer) -> float:
    """The largest difference of two weights."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


def main() -> None:
    chosen = lesson.options(__doc__)
    bins = TokenBins(chosen.data, "train")
    n_layers, steps, stop = (2, 6, 3) if chosen.quick else (4, STEPS, STOP)

    # the order: every window once an epoch, in each epoch differently
    windows = TokenWindows([(bins, 1.0)], seq_len=64, seed=0)
    n = windows.n_windows
    epochs = [windows.locate(np.arange(n) + epoch * n)[1] for epoch in (0, 1)]
    print(f"{n:,} windows, {len(np.unique(epochs[0])):,} different ones in the first epoch")
    print("epoch 0:", *epochs[0][:8], "...   epoch 1:", *epochs[1][:8], "...")
    print("by hand:", *(permute(p, n, key=0) for p in range(8)), "...")
    positions = np.arange(n // 2, n // 2 + 16)
    ranks = [windows.locate(positions[rank::4])[1] for rank in range(4)]
    same = set(np.concatenate(ranks)) == set(windows.locate(positions)[1])
    print(f"16 windows of a step on 1 and on 4 ranks: {'the same' if same else 'others'}")

    # one run in one go
    whole, optimizer = build(bins.vocab_size, n_layers)
    train(whole, optimizer, windows, range(steps))

    # others that stop, and go on as new processes that know nothing but what was kept
    stopped, optimizer = build(bins.vocab_size, n_layers)
    train(stopped, optimizer, windows, range(stop))
    kept = {"model": stopped.state_dict(), "optimizer": optimizer.state_dict(), "step": stop}
    for forgotten in ("nothing", "the moments", "the step", "dropout's seed"):
        torch.manual_seed(0)
        resumed, optimizer = build(bins.vocab_size, n_layers)
        resumed.load_state_dict(kept["model"])
        if forgotten != "the moments":
            optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))
        begin = 0 if forgotten == "the step" else kept["step"]
        train(resumed, optimizer, windows, range(begin, begin + steps - stop), seeded=forgotten != "dropout's seed")
        print(
            f"resumed, {forgotten + ' forgotten:':26} largest difference of a weight {difference(whole, resumed):.1e}"
        )


if __name__ == "__main__":
    lesson.run(main)
