"""Lesson 11: from "this one is better" to a number, and whether to believe it.

    python docs/course/reward.py

Learns a score from pairs of answers: of what out/sft has in its states at an answer's last token, which part says good?
"""

import lesson
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.datasets import PreferenceRows
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer

SAMPLES = 32  # pairs of a forward pass


@torch.no_grad()
def states(model: Transformer, rows: PreferenceRows, n_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """States of the chosen and of the rejected answers (P, C), and by how many tokens the chosen is longer (P,)."""
    parts = []
    for begin in range(0, n_pairs, SAMPLES):
        answers = rows.batch(np.arange(begin, min(begin + SAMPLES, n_pairs)))
        batch = answers.batch
        places = torch.arange(batch.y.shape[1])
        last = (places * batch.mask).amax(1)  # (N,), where the answer's last token before its end is read
        of_answers = model.hidden(batch.x)[torch.arange(len(last)), last]  # (N, C)
        lengths = batch.mask.sum(1)  # (N,)
        chosen, rejected = answers.chosen, answers.rejected
        parts.append((of_answers[chosen], of_answers[rejected], (lengths[chosen] - lengths[rejected]).float()))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def fit(chosen: Tensor, rejected: Tensor, n_steps: int) -> Tensor:
    """The direction (C,) of the score r = h · direction that makes −log σ(r_w − r_l) least, on average over pairs."""
    direction = torch.zeros(chosen.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([direction], lr=0.05)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = -F.logsigmoid((chosen - rejected) @ direction).mean()
        loss.backward()
        optimizer.step()
    return direction.detach()


def nats(difference: Tensor) -> float:
    """−log σ(r_w − r_l), the mean over pairs; ln 2 for one who knows nothing."""
    return float(-F.logsigmoid(difference).mean())


def main() -> None:
    chosen = lesson.options(__doc__)
    n_train, n_held_out, n_steps = (64, 32, 20) if chosen.quick else (1024, 512, 300)
    tokenizer = Tokenizer.load(chosen.data)
    model = lesson.trained_model("out/sft", chosen)
    files = (chosen.data / "preferences_train.jsonl", n_train), (chosen.data / "preferences_heldout.jsonl", n_held_out)
    train, held_out = (states(model, PreferenceRows(path, tokenizer, 256), n) for path, n in files)

    # a ruler, and scores from few and from many pairs
    longer = held_out[2]
    right = ((longer > 0) + 0.5 * (longer == 0)).mean()
    print(f"{'the longer answer':24} {right:6.1%} of held-out pairs in the right order")
    for n in (n_train // 16, n_train // 4, n_train):
        direction = fit(train[0][:n], train[1][:n], n_steps)
        difference = (held_out[0] - held_out[1]) @ direction  # (P,)
        right, known = (difference > 0).float().mean(), nats((train[0] - train[1])[:n] @ direction)
        name = f"a score of {n} pairs"
        print(f"{name:24} {right:6.1%}, {nats(difference):.3f} nats a pair; on its own pairs {known:.3f}")

    # when it says 80 %, is it right in 80 of 100?
    print("it is so sure   and right in   of pairs")
    sure, is_right = difference.abs().sigmoid(), difference > 0
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 0.99), (0.99, 1.01)):
        inside = (sure >= low) & (sure < high)
        if inside.any():
            print(f"{sure[inside].mean():13.1%} {is_right[inside].float().mean():14.1%} {int(inside.sum()):10}")


if __name__ == "__main__":
    lesson.run(main)
