"""Lesson 9: instruction tuning is pretraining with a mask.

    python docs/course/sft.py

Trains out/pretrain on questions and answers: with the mask where it belongs, one place too late, without one, and at
the rate of pretraining.
"""

import lesson
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.datasets import Batch, InstructionRows, TokenBins, TokenWindows
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.training import build_optimizers

ROWS = 4  # of a step, 128 tokens each
PRETRAINING_LR = 4e-3


def right(batch: Batch) -> Tensor:
    """Learn where Y is an answer token, or the end of an answer: (B, T) bool, as `InstructionRows` has it."""
    return batch.mask


def laid_on_x(batch: Batch) -> Tensor:
    """The usual mistake: learn where X is an answer token, one place later."""
    return F.pad(batch.mask[:, :-1], (1, 0))


def everything(batch: Batch) -> Tensor:
    """Learn the questions, too: all targets but the padding after the last sample of a row."""
    return batch.mask.flip(1).cumsum(1).flip(1) > 0  # what has an answer's token at its place or after it


def train(model: Transformer, rows: InstructionRows, mask_of, lr: float, n_steps: int) -> None:
    """AdamW at a rate that falls to 0. mask_of: which targets of a batch are learned."""
    (optimizer,) = build_optimizers(model, "adamw", lr=lr, weight_decay=0.1)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
        batch = rows.batch(np.arange(step * ROWS, (step + 1) * ROWS))
        mask = mask_of(batch)
        loss = model(batch.x, batch.y, mask=mask, documents=batch.documents)  # nats, summed
        (loss / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def nats_of(model: Transformer, batch: Batch) -> Tensor:
    """−log p of every target, (B, T)."""
    logits = model(batch.x, documents=batch.documents)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), reduction="none").view_as(batch.y)


def examine(model: Transformer, answers: Batch, texts: Batch, eos_id: int) -> str:
    """Nats a token: of an answer's first, of those after it, of its end, and of a text as in pretraining."""
    nats = nats_of(model, answers)
    is_end = answers.mask & (answers.y == eos_id)
    is_first = answers.mask & ~laid_on_x(answers) & ~is_end
    is_later = answers.mask & ~is_first & ~is_end
    parts = [float(nats[which].mean()) for which in (is_first, is_later, is_end)]
    return "".join(f"{part:9.3f}" for part in (*parts, float(nats_of(model, texts).mean())))


def main() -> None:
    chosen = lesson.options(__doc__)
    n_steps, n_rows = (3, 4) if chosen.quick else (120, 48)
    tokenizer = Tokenizer.load(chosen.data)
    rows = InstructionRows(chosen.data / "sft_train.jsonl", tokenizer, 128)
    answers = InstructionRows(chosen.data / "sft_heldout.jsonl", tokenizer, 128).batch(np.arange(n_rows))
    texts = TokenWindows([(TokenBins(chosen.data, "val"), 1.0)], seq_len=128, seed=0).batch(range(n_rows))

    # one batch, to see what is learned
    batch = rows.batch(np.arange(ROWS))
    print(f"{int(batch.mask.sum())} of {batch.y.numel()} targets of a batch are answers")

    print(f"{'nats a token, held-out':30}    first    later      end     text")
    print(f"{'the base':30}{examine(lesson.trained_model('out/pretrain', chosen), answers, texts, tokenizer.eos_id)}")
    quarter = PRETRAINING_LR / 4
    ways = {
        "the right mask": (right, quarter),
        "the mask on X": (laid_on_x, quarter),
        "no mask": (everything, quarter),
        "the rate of pretraining": (right, PRETRAINING_LR),
    }
    for name, (mask_of, lr) in ways.items():
        model = lesson.trained_model("out/pretrain", chosen)
        train(model, rows, mask_of, lr, n_steps)
        print(f"{name:30}{examine(model, answers, texts, tokenizer.eos_id)}")


if __name__ == "__main__":
    lesson.run(main)
