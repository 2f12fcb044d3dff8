"""Lesson 5: the loss, its gradient by hand, and what of it a trained model cannot get rid of.

    python docs/course/loss.py        # after python train_pretrain.py

Computes loss and gradients a few rows of logits at a time, compares them with torch's own, and tells which tokens of
the validation text the loss comes from.
"""

from itertools import pairwise

import lesson
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.datasets import TokenBins, TokenWindows
from minillm.tokenizer import Tokenizer


def loss_in_chunks(x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of all targets, summed, and the gradients of x (N, C) and weight (V, C). targets: (N,) int64.

    No more than (rows, V) logits exist at once.
    """
    nats, grad_x, grad_weight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
    for begin in range(0, len(x), rows):
        part = slice(begin, begin + rows)
        log_p = (x[part] @ weight.T).log_softmax(-1)  # (rows, V)
        came = torch.arange(len(log_p)), targets[part]  # the place of each target
        nats = nats - log_p[came].sum()
        grad = log_p.exp()
        grad[came] -= 1  # softmax − onehot: the gradient of the logits, (rows, V)
        grad_x[part] = grad @ weight
        grad_weight += grad.T @ x[part]
    return nats, grad_x, grad_weight


def one_logit_row() -> None:
    """Print the gradient of three logits, by formula and by finite differences."""
    logits, target = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64), torch.tensor(1)
    by_hand = logits.softmax(0) - F.one_hot(target, 3)
    step = 1e-6
    moved = [F.cross_entropy(logits + step * F.one_hot(torch.tensor(v), 3), target) for v in range(3)]
    measured = (torch.stack(moved) - F.cross_entropy(logits, target)) / step
    for name, row in (("softmax", logits.softmax(0)), ("− onehot", by_hand), ("measured", measured)):
        print(f"{name:9}" + "".join(f"{number:8.3f}" for number in row.tolist()))


def main() -> None:
    chosen = lesson.options(__doc__)
    one_logit_row()

    # what the model ends with: a state for each token of 16 windows, and the matrix that makes logits of it
    model = lesson.trained_model("out/pretrain", chosen)
    bins = TokenBins(chosen.data, "val")
    batch = TokenWindows([(bins, 1.0)], seq_len=64, seed=0, documents=True).batch(np.arange(16))
    counts = batch.mask.flatten()
    with torch.no_grad():
        x = model.hidden(batch.x, documents=batch.documents).flatten(0, 1)[counts].double()  # (N, C)
    targets, weight = batch.y.flatten()[counts], model.lm_head.weight.detach().double()  # (N,), (V, C)

    # the same loss in chunks of any size
    whole = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    logits = whole[0] @ whole[1].T
    logits.retain_grad()
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    wanted.backward()
    a_token = wanted.item() / len(x)
    bytes_a_token = bins.document_bytes.sum() / (bins.n_tokens - bins.n_documents)  # without each bos
    a_byte = lesson.bits_per_byte(a_token, bytes_a_token)
    print(f"\n{len(x)} tokens: {a_token:.3f} nats a token, {a_byte:.3f} bits per byte; {len(weight):,} pieces")
    for rows in (len(x), 128, 16, 1):
        nats, grad_x, grad_weight = loss_in_chunks(x, weight, targets, rows)
        pairs = ((nats, wanted.detach()), (grad_x, whole[0].grad), (grad_weight, whole[1].grad))
        error = max(float((ours - torchs).abs().max() / torchs.abs().max()) for ours, torchs in pairs)
        print(f"{rows:5} rows: {rows * len(weight):9,} logits at once, largest difference {error:.0e}")

    # how much each token costs, and how much it teaches: the length of softmax − onehot
    nats = F.cross_entropy(logits.detach(), targets, reduction="none")
    print("\nnats of a token   share of tokens   of the loss   length of the gradient")
    edges = (0.0, 0.01, 0.1, 1.0, 3.0, float("inf"))
    for low, high in pairwise(edges):
        inside = (nats >= low) & (nats < high)
        if not inside.any():
            continue
        of_loss = nats[inside].sum() / nats.sum()
        length = logits.grad[inside].norm(dim=-1).mean()
        print(f"{low:5} to {high:<8}{inside.double().mean():17.1%}{of_loss:14.1%}{length:25.3f}")

    # a text in which each token that cost more than a nat is followed by its price
    tokenizer = Tokenizer.load(chosen.data)
    told = []
    for token, price in zip(targets[:40].tolist(), nats[:40].tolist(), strict=True):
        told.append(tokenizer.pieces.piece_of(token) + (f"[{price:.1f}]" if price > 1 else ""))
    print()
    for begin in range(0, len(told), 10):
        print("".join(told[begin : begin + 10]).replace("▁", " ").strip())


if __name__ == "__main__":
    lesson.run(main)
