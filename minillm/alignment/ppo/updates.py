"""The updates of a PPO step: what they learn from, in which parts, the policy's loss, and what is noted in passing."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.alignment.policy_loss import clipped_loss
from minillm.alignment.ppo.options import PpoConfig
from minillm.alignment.value import explained_variance
from minillm.datasets.batch import Batch
from minillm.distributed.ranks import Ranks


class Experience(NamedTuple):
    """What there is to learn from N answers, each tensor (N, T) fp32."""

    batch: Batch
    log_probs: Tensor  # log π_old
    values: Tensor  # V_old
    advantages: Tensor  # A, whitened
    returns: Tensor  # R

    def rows(self, chosen: Tensor) -> "Experience":
        """Those of these rows, (n,) int64."""
        batch = Batch(*(None if tensor is None else tensor[chosen] for tensor in self.batch))
        return Experience(batch, *(tensor[chosen] for tensor in self[1:]))

    def split(self, n_rows: int) -> "list[Experience]":
        """Parts of at most so many rows. Where their answers are is asked now, before any pass is queued."""
        numbers = torch.arange(len(self.returns), device=self.returns.device).split(n_rows)
        parts = [self.rows(rows) for rows in numbers]
        return [part._replace(batch=part.batch.with_places()) for part in parts]

    def explained_variance(self, ranks: Ranks) -> float:
        return explained_variance(self.values, self.returns, self.batch.mask, ranks)


def minibatches(training_config: PpoConfig, ranks: Ranks, step: int) -> Iterator[tuple[bool, Tensor]]:
    """Of each update of a step whether it is the last of its pass, and its rows of this rank's answers, (n,) int64.

    Prompts are shuffled in blocks of --minibatches, one of each block for each minibatch, by a function of (seed, step,
    pass, block). So ranks, which hold whole blocks, have together the minibatches that one alone would have.
    """
    parts, group = training_config.minibatches, training_config.group_size
    n_blocks = training_config.batch_size // ranks.data_world // parts
    first_block = ranks.data_rank * n_blocks
    for number in range(training_config.updates):
        orders = [
            np.random.default_rng([training_config.seed, step, number, first_block + block]).permutation(parts)
            for block in range(n_blocks)
        ]
        for part in range(parts):
            prompts = torch.tensor([block * parts + int(order[part]) for block, order in enumerate(orders)])
            rows = (prompts[:, None] * group + torch.arange(group)).flatten()  # all answers to a prompt stay together
            yield part + 1 == parts, rows.to(ranks.device)


class ClippedLoss:
    """Σ max(−A ρ, −A clip(ρ, 1 ± ε)), ρ = π / π_old of each token  (Schulman et al. 2017, equation 7).

    No entropy bonus (c_e = 0), as usual for language models.
    """

    def __init__(self, experience: Experience, clip: float, stats: "UpdateStats"):
        self.experience = experience
        self.clip = clip
        self.stats = stats

    def __call__(self, log_probs: Tensor) -> Tensor:
        """log_probs: (n, T) fp32 of the tokens now. Returns the sum over the mask."""
        mask, advantages = self.experience.batch.mask, self.experience.advantages
        log_ratio = (log_probs - self.experience.log_probs).masked_fill(~mask, 0.0)
        ratio = log_ratio.exp()
        too_far = torch.where(advantages > 0, ratio > 1 + self.clip, ratio < 1 - self.clip) & mask
        self.stats.note(clipped=too_far.sum(), moved=log_ratio.detach().square().sum() / 2)
        return clipped_loss(ratio, advantages, self.clip, self.clip).masked_fill(~mask, 0.0).sum()


class UpdateStats:
    """Sums over the tokens of a step, which its losses add up."""

    NAMES = ("clipped", "moved", "value_clipped", "value_loss")

    def __init__(self):
        self.n_tokens = 0.0  # of all ranks, as all that follows
        self.totals = dict.fromkeys(self.NAMES, 0.0)  # of the whole step
        self.noted = dict.fromkeys(self.NAMES, 0.0)  # of the update under way, of this rank
        self.moved = 0.0  # ½ mean (log ρ)² of the last update

    def note(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self.noted[name] = self.noted[name] + value

    def end_update(self, ranks: Ranks, n_tokens: float) -> None:
        """Add the update of all ranks to the step's."""
        sums = dict(zip(self.NAMES, ranks.sum(*map(float, self.noted.values())), strict=True))
        self.n_tokens += n_tokens
        self.totals = {name: self.totals[name] + value for name, value in sums.items()}
        self.moved = sums["moved"] / max(1.0, n_tokens)
        self.noted = dict.fromkeys(self.NAMES, 0.0)

    def shares(self) -> dict[str, float]:
        """For metrics.jsonl: means over the tokens of all updates."""
        mean = {name: total / max(1.0, self.n_tokens) for name, total in self.totals.items()}
        return {
            "clip_share": mean["clipped"],
            "value_clip_share": mean["value_clipped"],
            "value_loss": mean["value_loss"],
            "approx_kl": self.moved,
        }
