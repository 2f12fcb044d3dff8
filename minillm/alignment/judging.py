"""Answers of the policy, what they are worth, and how far they are from the reference."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.alignment.grpo.advantages import has_spread
from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.optimum import estimated_optimum, right_wrong_optimum
from minillm.alignment.policy_loss import Experience
from minillm.alignment.reference import Reference
from minillm.alignment.rewards import Rewards
from minillm.alignment.rollouts import RolloutConfig, Rollouts, roll_out
from minillm.alignment.token_rewards import kl_per_token
from minillm.datasets.batch import Batch
from minillm.datasets.instructions import collate
from minillm.datasets.prompts import Prompt
from minillm.distributed.rows import from_first
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training.run import Run
from minillm.tuning.adapter import merged

PRINT_EVERY = 10  # steps
BEST = 1 - 1e-6  # a reward from here on counts as all that was wanted


class Judged(NamedTuple):
    """N answers to P prompts, group by group.

    rewards: (N,) fp32. log_probs, reference: (N, T) fp32, the tokens' log-probabilities under the policy and under the
    reference, by one and the same kind of pass; kl: (N, T) fp32, log π − log π_ref of each token, whose sum over an
    answer has the KL as its mean. Without a reference the last two are None, and the first are the sampler's.
    """

    rolled: Rollouts
    rewards: Tensor
    log_probs: Tensor
    reference: Tensor | None
    kl: Tensor | None

    def experience(self, advantages: Tensor, batch: Batch | None = None) -> Experience:
        """The answers with their advantages, to be learned from; batch: with another mask than the rollout's."""
        return Experience(batch or self.rolled.batch, advantages, self.rolled.log_probs, self.reference)

    def first(self, n: int) -> "Judged":
        """The first n answers."""
        batch = Batch(*(None if tensor is None else tensor[:n] for tensor in self.rolled.batch))
        rolled = Rollouts(batch, *(facts[:n] for facts in self.rolled[1:]))
        return Judged(rolled, *(None if tensor is None else tensor[:n] for tensor in self[1:]))

    def lengths(self) -> Tensor:
        """Tokens of each answer, its end included: (N,) int64."""
        return self.rolled.batch.mask.sum(1)

    def sums(self) -> dict[str, float]:
        """What `means` is computed from; adds up over ranks."""
        log_probs = self.rolled.log_probs
        return {
            "answers": float(len(self.rewards)),
            "tokens": float(self.lengths().sum()),
            "reward": float(self.rewards.sum()),
            "best": float((self.rewards >= BEST).sum()),
            "kl": 0.0 if self.kl is None else float(self.kl.sum()),
            "surprise": -float(log_probs.sum()),
            "cut": float((~self.rolled.ended).sum()),
        }

    def step_sums(self, group_size: int) -> dict[str, float]:
        """`sums`, how many tokens were read, and how many groups there are and how many of them without spread."""
        groups = self.rewards.view(-1, group_size)  # (P, G)
        no_spread = float((~has_spread(groups)).sum())
        return self.sums() | {"read": self.rolled.batch.x.numel(), "groups": len(groups), "no_spread": no_spread}


def means(sums: dict[str, float]) -> dict[str, float]:
    """The columns of a metrics row: reward, share of best rewards, KL an answer, entropy a token, length, share cut.

    The mean of −log π over sampled tokens has the entropy as its expectation, so no further pass is needed for it.
    """
    n = sums["answers"]
    return {
        "reward": sums["reward"] / n,
        "best_share": sums["best"] / n,
        "kl": sums["kl"] / n,
        "entropy": sums["surprise"] / max(1.0, sums["tokens"]),
        "length": sums["tokens"] / n,
        "cut_share": sums["cut"] / n,
    }


def print_row(run: Run, row: dict[str, float], names: tuple[str, ...]) -> None:
    """Print these of a step's numbers, of the first step and then now and then."""
    if run.due(run.step, PRINT_EVERY) or run.step == 1:
        run.print(f"step {run.step}: " + ", ".join(f"{name} {row[name]:z.3f}" for name in names if name in row))


class Judge:
    """Lets a policy answer prompts, and judges the answers."""

    def __init__(
        self,
        model: Transformer,
        rewards: Rewards,
        reference: Reference | None,
        rollout: RolloutConfig,
        rows_at_once: int,
        autocast: Callable[[], AbstractContextManager],
    ):
        """rows_at_once: answers a forward pass. autocast(): the context in which training and the reference compute."""
        self.model = model
        self.rewards = rewards
        self.reference = reference
        self.rollout = rollout
        self.rows_at_once = rows_at_once
        self.autocast = autocast

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def answers(self, prompts: list[Prompt], numbers: list[int], step: int, rollout: RolloutConfig | None = None):
        """A group of answers to each prompt, as `Judged`. numbers, step: of `roll_out`; rollout: another than usual."""
        rollout = rollout or self.rollout
        with merged(self.model):
            rolled = roll_out(self.model, [prompt.ids for prompt in prompts], numbers, step, rollout)
        rewards = self.rewards(rolled, prompts).to(rolled.log_probs.device)
        rewards = from_first(self.model, rewards)  # a function of the user's may draw, or ask elsewhere
        if self.reference is None:
            return Judged(rolled, rewards, rolled.log_probs, None, None)
        log_probs, temperature = rolled.log_probs, rollout.temperature
        parts = rolled.batch.split(self.rows_at_once)
        with self.autocast():
            reference = torch.cat([self.reference.log_probs(part, temperature) for part in parts])
            # the sampler's are in fp32: where training rounds, policy and reference have to round alike
            if torch.is_autocast_enabled(reference.device.type):
                passes = [answer_log_probs(self.model, part, temperature=temperature) for part in parts]
                log_probs = torch.cat(passes)
        self.reference.settle()
        kl = kl_per_token(log_probs, reference, rolled.batch.mask)
        return Judged(rolled, rewards, log_probs, reference, kl)


def optimum_of(judged: Judged, group_size: int, beta: float, at_least: Tensor | None = None) -> float:
    """J* of the prompts, on average, estimated from these answers: see `estimated_optimum`.

    at_least: (P,), what it is known to be at least.
    """
    rewards = judged.rewards.view(-1, group_size)  # (P, G)
    kl = None if judged.kl is None else judged.kl.sum(1).view(-1, group_size)
    found = estimated_optimum(rewards, beta, kl).cpu()  # (P,)
    return float((found if at_least is None else torch.maximum(found, at_least)).mean())


def optimum_by_answers(judge: Judge, prompts: list[Prompt], tokenizer: Tokenizer, template: str, beta: float) -> Tensor:
    """J* of a reward that is 1 for the right answer of each prompt's row, 0 for all others: (P,) fp64 on the CPU.

    The probability of that answer, its end included, is one forward pass of the reference at the sampler's temperature.
    A check that forgives other spellings makes J* larger. −∞ for a prompt without an answer, or with one that is longer
    than the policy's may be.
    """
    found = torch.full((len(prompts),), -math.inf, dtype=torch.float64)
    samples = {}  # index of a prompt → ids of prompt and answer, and which are of the answer
    for index, prompt in enumerate(prompts):
        if "answer" not in prompt.row:
            continue
        talk = [*prompt.messages, {"role": "assistant", "content": prompt.row["answer"]}]
        ids, learn = tokenizer.encode_chat(talk, template=template)
        n_given = len(prompt.ids)
        end = max((at + 1 for at in range(n_given, len(ids)) if learn[at]), default=n_given)  # a template may go on
        if 0 < end - n_given <= judge.rollout.max_new_tokens:
            samples[index] = np.array(ids[:end]), np.arange(end) >= n_given
    where = list(samples)
    for begin in range(0, len(where), judge.rows_at_once):
        part = where[begin : begin + judge.rows_at_once]
        rows = [[samples[index]] for index in part]
        longest = max(len(ids) - 1 for [(ids, _)] in rows)
        batch = collate(rows, longest, tokenizer.pad_id, documents=False)
        with judge.autocast():
            log_probs = judge.reference.log_probs(batch.to(judge.device), judge.rollout.temperature)  # (n, T)
        found[part] = right_wrong_optimum(log_probs.double().sum(1).cpu(), beta)
    return found
