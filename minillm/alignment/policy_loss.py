"""Policy losses of sampled answers: PPO's clipped ratio, and what has been made of it.

Answers y ~ π_old have advantages A. With the ratio ρ_t = π(y_t) / π_old(y_t) of each token,

    ℓ_t = −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A)                          Schulman et al. 2017, equation 7

    name      what is different                                    sum of ℓ divided by
    grpo                                                           tokens of the answer, then answers   Shao 2024
    bnpo                                                           tokens of the micro-batch
    dapo      ε_high > ε_low                                       all tokens of the step               Yu 2025
    dr_grpo   A without std                                        answers × max_new_tokens             Liu 2025
    cispo     ℓ_t = −min(ρ_t, ε_high) A log π, the cap no gradient all tokens of the step               MiniMax 2025
    gspo      one ρ an answer, the mean of its log ρ_t             as grpo                              Zheng 2025
    rloo      one ρ an answer, the sum of its log ρ_t              answers                              Ahmadian 2024
    reinforce A_t of tokens                                        all tokens of the step               Hu 2025

"All tokens of the step" are those of every micro-batch on every rank, so that all losses but bnpo have the same
gradient however the step is cut up. Answers that are not learned from, as those of a group with equal rewards, count in
none of these numbers. On the first update after sampling ρ is 1 and the loss says little: for A of mean 0
it is near 0, while its gradient is −A ∇log π.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.datasets.batch import Batch

# loss → default ε_low and ε_high
CLIPS = {
    "grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "dr_grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.0, 5.0),  # ε_high is the cap itself
    "rloo": (0.2, 0.2),
    "reinforce": (0.2, 0.2),
    "reinforce_baseline": (0.2, 0.2),
}
KL_TERMS = ("k3", "k3_ratio")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_mask")


class Experience(NamedTuple):
    """Answers that were sampled, N rows of T tokens, and what is known of them when they are trained on.

    batch: rows with the mask (N, T) on the answers' tokens. advantages: (N,), or (N, T) for each token. sampler:
    (N, T) fp32, log-probabilities of the tokens when they were drawn. reference: (N, T) fp32 under the reference
    policy, for a KL term (None: without one). old: (N, T) fp32, by the trainer's own forward pass before the first
    update (None: this is the first update).
    """

    batch: Batch
    advantages: Tensor
    sampler: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None

    def rows(self, which: slice | Tensor) -> "Experience":
        """Some of the rows."""
        batch = Batch(*(None if tensor is None else tensor[which] for tensor in self.batch))
        return Experience(batch, *(None if tensor is None else tensor[which] for tensor in self[1:]))

    def split(self, n_rows: int) -> "list[Experience]":
        """Parts of at most so many rows, those of like length together, each as wide as its longest row."""
        columns = torch.arange(1, self.batch.mask.shape[1] + 1, device=self.batch.mask.device)  # (T,)
        ends = (self.batch.mask * columns).amax(1)  # (N,), one past the last token of each
        order = ends.argsort(stable=True)
        parts = [self.rows(order[begin : begin + n_rows]) for begin in range(0, len(order), n_rows)]
        parts = [part._narrowed(int((part.batch.mask * columns).max())) for part in parts]
        # where the answers are is asked now, before any pass is queued
        return [part._replace(batch=part.batch.with_places()) for part in parts]

    def _narrowed(self, length: int) -> "Experience":
        """Without the columns from `length` on; at least one stays."""

        def narrow(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dim() == 1 else tensor[:, : max(1, length)]

        return Experience(Batch(*map(narrow, self.batch)), *map(narrow, self[1:]))

    def silent(self) -> "Experience":
        """The first row with nothing in it that is learned: it has a gradient, which is zero."""
        row = self.rows(slice(1))
        return row._replace(batch=row.batch._replace(mask=torch.zeros_like(row.batch.mask)))


class ClipCounts(NamedTuple):
    """Numbers of tokens of a forward pass, (), which add up over micro-batches and ranks."""

    n_tokens: Tensor
    clipped_low: Tensor  # whose ρ is below 1 − ε_low with A < 0, so that they have no gradient
    clipped_high: Tensor  # above 1 + ε_high with A > 0


@dataclass(frozen=True)
class PolicyLoss:
    """One of the losses above, with its constants."""

    kind: str
    clip_low: float
    clip_high: float
    max_new_tokens: int  # dr_grpo divides by it
    two_sided: float | None = None  # δ > 1 + ε_high: the most that ρ counts where A < 0
    beta: float = 0.0  # weight of the KL term
    kl: str = "k3"
    correction: str = "none"  # of tokens drawn by a sampler that is not the trainer
    correction_cap: float = 3.0

    def __call__(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """The loss of these rows, a sum: divided by the `count` of all of the step's it is their mean.

        log_probs: (N, T) of the tokens now, with a gradient.
        """
        mask = experience.batch.mask
        losses = self.of_tokens(log_probs, experience)  # (N, T)
        losses = torch.where(mask, losses, 0.0)
        if self.kind in ("grpo", "gspo", "rloo"):
            return (losses.sum(1) / mask.sum(1).clamp_min(1)).sum()
        if self.kind == "bnpo":
            return losses.sum() / mask.sum().clamp_min(1)
        return losses.sum()

    def count(self, mask: Tensor) -> float:
        """What the sum is divided by, of a micro-batch's mask (N, T); adds up over micro-batches and ranks."""
        if self.kind in ("grpo", "gspo", "rloo"):
            return len(mask)
        if self.kind == "bnpo":
            return 1
        if self.kind == "dr_grpo":
            return len(mask) * self.max_new_tokens
        return int(mask.sum())

    def of_tokens(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """The loss of each token, (N, T), with its KL term; outside the mask it has no meaning."""
        advantages = _of_tokens(experience.advantages)  # (N, 1) or (N, T)
        ratio = self.ratio(log_probs, experience)  # (N, 1) or (N, T)
        if self.kind == "cispo":
            losses = -ratio.detach().clamp_max(self.clip_high) * advantages * log_probs
        else:
            losses = clipped_loss(ratio, advantages, self.clip_low, self.clip_high, self.two_sided)
        if self.correction != "none":
            losses = losses * self.correction_weight(log_probs, experience)
        if self.beta and experience.reference is not None:
            losses = losses + self.beta * self._kl_term(log_probs, experience)
        return losses.expand_as(log_probs)

    def ratio(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """ρ = π / π_old of each token (N, T), or of each answer (N, 1)."""
        mask = experience.batch.mask
        old = log_probs.detach() if experience.old is None else experience.old
        log_ratio = torch.where(mask, log_probs - old, 0.0)
        if self.kind == "gspo":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        elif self.kind == "rloo":
            log_ratio = log_ratio.sum(1, keepdim=True)
        return log_ratio.exp()

    def _kl_term(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """k3 = e^{−d} − 1 + d with d = log π − log π_ref, (N, T), positive and of the KL's mean.

        k3_ratio: × ρ. Its gradient at ρ = 1 is d, that of the KL of this token, where plain k3 has 1 − e^{−d}.
        """
        d = torch.where(experience.batch.mask, log_probs - experience.reference, 0.0)
        k3 = torch.expm1(-d) + d
        return k3 * self.ratio(log_probs, experience) if self.kl == "k3_ratio" else k3

    @torch.no_grad()
    def correction_weight(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """w = π_old / π_sampler of each token (N, T), or of each answer (N, 1), bounded.

        Tokens were drawn by a forward pass that rounds otherwise than the trainer's, so their expectation is put right
        by importance sampling. token_truncate: w is at most the cap. token_mask: a token above it does not count.
        sequence_mask: one w an answer, and an answer above the cap does not count.
        """
        mask = experience.batch.mask
        old = log_probs if experience.old is None else experience.old
        log_weight = torch.where(mask, old - experience.sampler, 0.0)
        if self.correction == "sequence_mask":
            log_weight = log_weight.sum(1, keepdim=True)
        weight = log_weight.exp()
        if self.correction == "token_truncate":
            return weight.clamp_max(self.correction_cap)
        return torch.where(weight <= self.correction_cap, weight, 0.0)

    @torch.no_grad()
    def clip_counts(self, log_probs: Tensor, experience: Experience) -> ClipCounts:
        """How many tokens there are, and how many of them the clip holds back."""
        mask = experience.batch.mask
        ratio = self.ratio(log_probs, experience)
        advantages = _of_tokens(experience.advantages)
        low = (ratio < 1 - self.clip_low) & (advantages < 0) & mask
        high = (ratio > 1 + self.clip_high) & (advantages > 0) & mask
        if self.kind == "cispo":
            low, high = torch.zeros_like(mask), (ratio > self.clip_high) & mask
        return ClipCounts(mask.sum(), low.sum(), high.sum())


class Watched:
    """A loss of some rows, to be called once with their log-probabilities, that counts what the clip holds back."""

    def __init__(self, loss: PolicyLoss, experience: Experience):
        self.loss = loss
        self.experience = experience
        self.clip_counts: ClipCounts | None = None

    def __call__(self, log_probs: Tensor) -> Tensor:
        self.clip_counts = self.loss.clip_counts(log_probs, self.experience)
        loss = self.loss(log_probs, self.experience)
        if self.experience.old is None:  # the first pass over these rows: later ones are compared with it
            self.experience = self.experience._replace(old=log_probs.detach())
        return loss


def clipped_loss(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, two_sided: float | None = None
) -> Tensor:
    """−min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A), element by element.

    two_sided: δ, the most that ρ counts where nothing else bounds it, at A < 0 (Prime Intellect 2025, INTELLECT-2).
    """
    bounded = ratio if two_sided is None else ratio.clamp_max(two_sided)
    return -torch.min(bounded * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _of_tokens(advantages: Tensor) -> Tensor:
    """Advantages that broadcast over (N, T): (N, 1) of answers, or (N, T) as they are."""
    return advantages[:, None] if advantages.dim() == 1 else advantages
