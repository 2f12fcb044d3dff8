"""Lesson 12: from a reward to a loss of pairs, and what becomes of both answers.

    python docs/course/dpo.py

Trains out/sft on the bundled preferences, without and with a term that keeps the chosen answers likely.
"""

import lesson
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.preferences.losses import LossOptions, Pairs, sigmoid
from minillm.datasets import PreferenceRows
from minillm.datasets.preferences import Answers
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.training import build_optimizers

BETA = 0.1
PAIRS = 8  # of a step


def sums(model: Transformer, answers: Answers) -> Tensor:
    """log π of each answer, the sum over its tokens, with gradients: (N,)."""
    batch = answers.batch
    logits = model(batch.x)  # (N, T, V)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), reduction="none").view_as(batch.y)
    return -(nats * batch.mask).sum(1)


def pairs_of(policy: Tensor, reference: Tensor, answers: Answers) -> Pairs:
    """The sums of both answers of each pair, by the policy and by the reference: (N,) each."""
    chosen, rejected = answers.chosen, answers.rejected
    n_tokens = answers.batch.mask.sum(1)
    of_both = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
    return Pairs(*of_both, n_tokens[chosen], n_tokens[rejected])


def train(model: Transformer, reference: Transformer, rows: PreferenceRows, n_steps: int, sft_weight: float) -> None:
    """DPO, and `sft_weight` times the nats a token of the chosen answers."""
    (optimizer,) = build_optimizers(model, "adamw", lr=3e-4, weight_decay=0.0)
    for step in range(n_steps):
        answers = rows.batch(np.arange(step * PAIRS, (step + 1) * PAIRS))
        before = answer_log_probs(reference, answers.batch).sum(1)  # (N,)
        pairs = pairs_of(sums(model, answers), before, answers)
        loss = sigmoid(pairs, LossOptions(beta=BETA)).mean()
        loss = loss - sft_weight * pairs.chosen.sum() / pairs.n_chosen.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def examine(model: Transformer, reference: Transformer, held_out: Answers) -> str:
    """By how many nats the answers have become likelier, and how many pairs are in the right order."""
    policy, before = (answer_log_probs(one, held_out.batch).sum(1) for one in (model, reference))
    pairs = pairs_of(policy, before, held_out)
    right = (pairs.delta > 0).float().mean()
    return f"{pairs.u_chosen.mean():+7.2f} {pairs.u_rejected.mean():+9.2f} {pairs.delta.mean():+8.2f} {right:9.0%}"


def main() -> None:
    chosen = lesson.options(__doc__)
    n_steps, n_pairs = (2, 8) if chosen.quick else (60, 128)
    tokenizer = Tokenizer.load(chosen.data)
    rows, held_out_rows = (
        PreferenceRows(chosen.data / f"preferences_{part}.jsonl", tokenizer, 256) for part in ("train", "heldout")
    )
    held_out = held_out_rows.batch(np.arange(n_pairs))
    reference = lesson.trained_model("out/sft", chosen)

    print(f"{'nats by which it changed, held-out':36} chosen  rejected   margin  u_w > u_l")
    for sft_weight in (0.0, 1.0):
        model = lesson.trained_model("out/sft", chosen)
        for part in (1, 2):
            train(model, reference, rows, n_steps, sft_weight)
            name = f"DPO and {sft_weight:.0f} × SFT, pass {part}"
            print(f"{name:36}{examine(model, reference, held_out)}")


if __name__ == "__main__":
    lesson.run(main)
