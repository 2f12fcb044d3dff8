"""Lesson 10: how many directions a model has to move in, and what that costs.

    python docs/course/lora.py

Trains out/pretrain to answer questions by LoRA of three ranks, and then looks at what full training, out/sft, has
changed.
"""

import lesson
import numpy as np
import torch
from torch import Tensor, nn

from minillm.datasets import Batch, InstructionRows
from minillm.evaluation.validation import token_loss
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.training import build_optimizers
from minillm.tuning import TuningConfig, attach, merge
from minillm.tuning.options import TUNING_LR

ROWS = 4  # of a step, 128 tokens each


def answer_nats(model: Transformer, held_out: list[Batch]) -> float:
    """Nats a token of held-out answers."""
    nats, n_targets = token_loss(model.eval(), held_out, torch.device("cpu"))
    return nats / n_targets


def train(model: Transformer, rows: InstructionRows, n_steps: int) -> None:
    """Train what is not frozen, with AdamW, at a rate that falls to 0."""
    lr = TUNING_LR["lora"] / model.config.dim
    (optimizer,) = build_optimizers(model, "adamw", lr=lr, weight_decay=0.0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
        batch = rows.batch(np.arange(step * ROWS, (step + 1) * ROWS))
        loss = model(batch.x, batch.y, mask=batch.mask, documents=batch.documents)
        (loss / batch.n_targets()).backward()
        optimizer.step()
        optimizer.zero_grad()


def low_rank(change: Tensor, rank: int) -> Tensor:
    """The matrix of this rank that is nearest to a change (out, in): its largest singular values and no others."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@torch.no_grad()
def moved(base: Transformer, tuned: Transformer, rank: int) -> float:
    """Add the change of each linear layer to the base, cut to this rank; returns the share of the change that is left.

    The share is of the sum of squares.
    """
    kept = whole = 0.0
    tuned_modules = dict(tuned.named_modules())
    for name, module in base.layers.named_modules(prefix="layers"):
        if isinstance(module, nn.Linear):
            change = tuned_modules[name].weight - module.weight
            cut = low_rank(change, rank)
            module.weight += cut
            kept, whole = kept + float(cut.square().sum()), whole + float(change.square().sum())
    return kept / max(whole, 1e-30)


def main() -> None:
    chosen = lesson.options(__doc__)
    n_steps, n_rows = (3, 4) if chosen.quick else (150, 64)
    tokenizer = Tokenizer.load(chosen.data)
    rows = InstructionRows(chosen.data / "sft_train.jsonl", tokenizer, 128)
    held_out = [InstructionRows(chosen.data / "sft_heldout.jsonl", tokenizer, 128).batch(np.arange(n_rows))]
    base = lesson.trained_model("out/pretrain", chosen)
    print(f"the base {'':28} {answer_nats(base, held_out):.3f} nats a token of an answer")

    # LoRA: few parameters beside a frozen model, merged into it in the end
    for rank in (1, 4, 16):
        model = lesson.trained_model("out/pretrain", chosen)
        adapter = attach(model, TuningConfig(tune="lora", lora_rank=rank))
        n_trained = sum(parameter.numel() for parameter in adapter.parameters().values())
        train(model, rows, n_steps)
        apart = answer_nats(model, held_out)
        merge(model)
        shift = abs(answer_nats(model, held_out) - apart)
        print(f"LoRA of rank {rank:2}, {n_trained:6,} parameters {apart:10.3f}; merged, it differs by {shift:.0e}")

    # how much of a change in all directions lies in a few of them
    tuned = lesson.trained_model("out/sft", chosen)
    for rank in (1, 4, 16, 64):
        model = lesson.trained_model("out/pretrain", chosen)
        share = moved(model, tuned, rank)
        nats = answer_nats(model, held_out)
        print(f"out/sft, changes cut to rank {rank:2} {nats:15.3f}; {share:4.0%} of them is left")
    print(f"out/sft {'':29} {answer_nats(tuned, held_out):.3f}")


if __name__ == "__main__":
    lesson.run(main)
