"""The reward of answers that were sampled: reward functions, learned reward models, or weighted sums of both.

--reward data/world/reader.py:reward             a function of texts (evaluation/checks.py)
"""

import torch
from torch import Tensor

from minillm.alignment.rollouts import Rollouts
from minillm.datasets.prompts import Prompt
from minillm.evaluation.checks import TIME_LIMIT_S, load_reward
from minillm.tokenizer.tokenizer import Tokenizer


class Rewards:
    """What --reward means, ready to judge answers."""

    def __init__(self, spec: str, tokenizer: Tokenizer, time_limit_s: float = TIME_LIMIT_S):
        """tokenizer: the policy's. Raises `UserError` for a text that means no reward."""
        self.tokenizer = tokenizer
        self.function = load_reward(spec, time_limit_s)

    def __call__(self, rolled: Rollouts, prompts: list[Prompt]) -> Tensor:
        """The reward of each answer, (N,) fp32 on the CPU. prompts: those that were answered."""
        of_answer = [prompts[index] for index in rolled.prompt.tolist()]
        texts = [self.tokenizer.decode(answer) for answer in rolled.answers]
        rewards = self.function([prompt.text for prompt in of_answer], texts, [prompt.row for prompt in of_answer])
        return torch.tensor(rewards, dtype=torch.float32)
