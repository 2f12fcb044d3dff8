"""The reward of answers that were sampled: functions of texts, learned reward models, or weighted sums of both.

--reward data/world/reader.py:reward             a function (evaluation/checks.py)
--reward out/reward                              a reward model: the folder of a run or of a model
--reward "0.5*out/reward,0.5*number"             both
"""

from pathlib import Path

import torch
from torch import Tensor

from minillm.alignment.reward_model import (
    last_scores,
    load_reward_model,
    score_scale,
    text_lengths,
    weights_fingerprint,
)
from minillm.alignment.rollouts import Rollouts
from minillm.base.errors import UserError
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.batch import Batch
from minillm.datasets.prompts import Prompt
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import settle
from minillm.evaluation.checks import TIME_LIMIT_S, load_term, split_terms, weighted_sum
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import sharding

ROWS_AT_ONCE = 64  # answers that a reward model reads at a time


class Rewards:
    """What --reward means, ready to judge answers."""

    def __init__(
        self,
        spec: str,
        tokenizer: Tokenizer,
        time_limit_s: float = TIME_LIMIT_S,
        device: torch.device | str = "cpu",
        template: str = "auto",
        longest: int = 0,
        remedy: str = "--seq_len",
    ):
        """tokenizer, template: the policy's, which a reward model must share. longest: tokens of a prompt and its
        answer, which it must be able to read; remedy: the option by which they become fewer. Raises `UserError` for
        what means no reward.
        """
        how = dict(device=device, tokenizer=tokenizer, template=template, longest=longest, remedy=remedy)
        self.tokenizer = tokenizer
        self.models: list[tuple[float, LearnedReward]] = []
        self.without_scale: list[str] = []  # folders of reward models that record none
        functions, weights = [], []
        for weight, term in split_terms(spec):
            if Path(term).is_dir():
                # less the mean, over the standard deviation, that its training has recorded
                scale = score_scale(term)
                self.models.append((weight, LearnedReward(load_reward_model(term, **how), term, *(scale or ()))))
                self.without_scale += [term] * (scale is None)
                weights.append(weights_fingerprint(term))
            else:
                functions.append((weight, load_term(term, time_limit_s)))
        self.function = weighted_sum(functions)
        self.fingerprint = fingerprint(spec, weights)  # which does not know what stands in a user's file

    def shard(self, training_config, ranks: Ranks) -> None:
        """Deal its reward models out over the ranks as a run's policy is."""
        for _, learned in self.models:
            sharding.shard(training_config, learned.model, ranks)

    def remarks(self) -> list[str]:
        """What a user should know of it, in lines."""
        return [
            f"{folder}: records no scale of its scores, so they are the reward as they are"
            for folder in self.without_scale
        ]

    def __call__(self, rolled: Rollouts, prompts: list[Prompt]) -> Tensor:
        """The reward of each answer, (N,) fp32 on the CPU. prompts: those that were answered."""
        of_answer = [prompts[index] for index in rolled.prompt.tolist()]
        texts = [self.tokenizer.decode(answer) for answer in rolled.answers]
        return self.of_texts(of_answer, texts, rolled.batch)

    def of_texts(self, prompts: list[Prompt], texts: list[str], batch: Batch) -> Tensor:
        """The same of answers given as texts. prompts: the one that each answers. batch: a row for each, prompt, answer
        and end, its mask True where y is of the answer or its end.
        """
        rewards = self.function([prompt.text for prompt in prompts], texts, [prompt.row for prompt in prompts])
        total = torch.tensor(rewards, dtype=torch.float32)  # (N,)
        for weight, model in self.models:
            total += weight * model.scores(batch)
        return total


class LearnedReward:
    """A reward model as a judge of answers, its scores shifted and scaled: (r − mean) / std."""

    def __init__(
        self, model: Transformer, folder: str, mean: float = 0.0, std: float = 1.0, rows_at_once: int = ROWS_AT_ONCE
    ):
        """folder: the model's, for errors."""
        self.model = model
        self.folder = folder
        self.mean, self.std = mean, std
        self.rows_at_once = rows_at_once

    def __call__(self, rolled: Rollouts, prompts: list[Prompt]) -> Tensor:
        """The reward of each answer, (N,) fp32 on the CPU: of the ids that were drawn, not of a text."""
        return self.scores(rolled.batch)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """The score of each row at the last token of its answer, (N,) fp32 on the CPU.

        Raises `UserError` if one is no finite number, from which the policy would learn nothing but NaN.
        """
        parts = batch.split(self.rows_at_once)
        scores = torch.cat([last_scores(self.model, part, text_lengths(part)) for part in parts])  # (N,)
        settle(self.model)
        if not torch.isfinite(scores).all():
            raise UserError(
                f"{self.folder}: this reward model gives an answer the score {scores[~torch.isfinite(scores)][0]}: its "
                "weights are damaged or too large; train it again, or give another"
            )
        return ((scores - self.mean) / self.std).cpu()
