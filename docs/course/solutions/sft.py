"""Lesson 9, one way to do it."""

import torch
from torch import Tensor


def answer_mask(tokens: Tensor, assistant_id: int, eos_id: int) -> Tensor:
    """See the exercise."""
    learn = torch.zeros_like(tokens, dtype=torch.bool)  # of each token, as a target
    in_answer = False
    for place, token in enumerate(tokens.tolist()):
        learn[place] = in_answer
        if token == assistant_id:
            in_answer = True
        elif token == eos_id:
            in_answer = False  # from the next token on: the eos itself is learned
    return learn[1:]


MEAN_OF_MEANS = "lower"  # (1 + 2) / 2 = 1.5, and (2 + 16) / 10 = 1.8
COUNTS_MORE = "short"  # 1/4 each instead of 1/10
