"""A step of learning from preferences: from the log-probabilities of answers to the loss of a micro-batch.

    log π (N, T) of the answers' tokens → sums s (N,) → pairs (P,) → loss of each pair, and the SFT term

The SFT term is the mean of −log π over the tokens of the chosen answers. Preferences alone only say that one answer
should be likelier than another, so both may become less likely, and the model forgets what it could say; the term keeps
the chosen answers likely.

Means are over the whole step, whatever its cut: a micro-batch gives sums, in which each prompt's pairs weigh 1
together, and the SFT term is scaled by the step's number of pairs over its number of chosen tokens.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.alignment.log_probs import answer_log_probs
from minillm.alignment.preferences.losses import Loss, LossOptions, Pairs, kto, kto_reference_point
from minillm.alignment.reference import Reference
from minillm.datasets.batch import Batch
from minillm.datasets.instructions import collate
from minillm.datasets.preferences import Answers, PreferenceRows
from minillm.distributed.shards import is_sharded_model
from minillm.model.transformer import Transformer


class Objective(NamedTuple):
    """What a run minimizes: mean loss + sft_weight × mean nats of the chosen answers' tokens."""

    loss: Loss
    options: LossOptions
    sft_weight: float
    kto_weights: tuple[float, float] = (1.0, 1.0)  # of good and of bad answers

    @property
    def of_pairs(self) -> bool:
        return self.loss.of_pairs is not None


class Shares(NamedTuple):
    """How much each of N answers counts as a chosen one, and as a rejected one: (N,) fp32 each.

    Those of a prompt's pairs are 1 in all for either; an answer between two others counts as both.
    """

    chosen: Tensor
    rejected: Tensor


class Totals(NamedTuple):
    """What the means of a step are over, in all micro-batches of all ranks."""

    n_losses: float  # pairs, each prompt's counting as 1; or answers with labels
    n_chosen_tokens: float


def shares(answers: Answers) -> Shares:
    """See `Shares`."""
    if answers.label is not None:
        is_real = answers.number.ge(0)  # else a row of padding
        return Shares((answers.label & is_real).float(), (~answers.label & is_real).float())
    none = torch.zeros(len(answers.number), device=answers.weight.device)
    return Shares(
        none.index_add(0, answers.chosen, answers.weight), none.index_add(0, answers.rejected, answers.weight)
    )


def counts(batches: Iterable[Answers], of_pairs: bool) -> tuple[float, float, float]:
    """(losses, tokens of chosen answers, positions computed) of some batches: `Totals`, to be summed over ranks."""
    n_losses, n_chosen_tokens, n_positions = 0.0, 0.0, 0.0
    for answers in batches:
        share = shares(answers)
        n_losses += float(answers.weight.sum() if of_pairs else share.chosen.sum() + share.rejected.sum())
        n_chosen_tokens += float((share.chosen * answers.batch.mask.sum(1)).sum())
        n_positions += answers.batch.x.numel()
    return n_losses, n_chosen_tokens, n_positions


def pairs_of(answers: Answers, sums: Tensor, ref_sums: Tensor) -> Pairs:
    """The pairs of some answers. sums, ref_sums: (N,), s and s_r of each answer."""
    lengths = answers.batch.mask.sum(1).to(sums.dtype)  # (N,)
    w, l = answers.chosen, answers.rejected  # noqa: E741
    return Pairs(sums[w], sums[l], ref_sums[w], ref_sums[l], lengths[w], lengths[l])


class Measured:
    """What a step's log-probabilities say, added up over its micro-batches."""

    NAMES = ("count", "u", "s", "length")

    def __init__(self, objective: Objective):
        self.objective = objective
        self.added: list[Tensor] = []  # (12,) of each micro-batch, which nothing reads before the step's end

    def add(self, answers: Answers, sums: Tensor, ref_sums: Tensor, preference_loss: Tensor) -> None:
        """sums, ref_sums: (N,). preference_loss: (), summed over pairs or answers, without the SFT term."""
        share = shares(answers)
        facts = torch.stack(
            [torch.ones_like(sums), sums - ref_sums, sums, answers.batch.mask.sum(1).to(sums.dtype)]
        )  # (4, N)
        pairs = pairs_of(answers, sums, ref_sums)
        of_pairs = torch.stack(
            [
                torch.ones_like(pairs.chosen),
                (pairs.delta > 0).float(),
                (pairs.chosen > pairs.rejected).float(),
            ]
        )  # (3, P)
        added = [facts @ share.chosen, facts @ share.rejected, of_pairs @ answers.weight, preference_loss[None]]
        self.added.append(torch.cat(added))

    def means(self, sum_over_ranks: Callable[..., list[float]]) -> dict[str, float]:
        """Columns of a metrics row, without those that nothing is known of.

        rewards_*: β u, margins: their difference; accuracy: share of pairs with u_w > u_l (a tie is wrong, so it is 0
        where policy and reference agree); plain_accuracy: with s_w > s_l; logps_*: s; length_*: tokens. Of a loss with
        an SFT term both parts: preference_loss, and sft_loss, nats a token of the chosen answers, before its weight.
        """
        sums = sum(torch.stack(self.added).cpu().double())  # one after the other
        total = sum_over_ranks(*sums.tolist())
        n_w, u_w, s_w, length_w, n_l, u_l, s_l, length_l, n_pairs, right, plainly_right, preference = total

        def mean(value: float, count: float) -> float:
            return value / count if count else math.nan

        parts = {}
        if self.objective.sft_weight:
            n_losses = n_w if self.objective.of_pairs else n_w + n_l
            parts = {"preference_loss": mean(preference, n_losses), "sft_loss": mean(-s_w, length_w)}
        beta = self.objective.options.beta
        rewards_chosen, rewards_rejected = beta * mean(u_w, n_w), beta * mean(u_l, n_l)
        found = {
            **parts,
            "rewards_chosen": rewards_chosen,
            "rewards_rejected": rewards_rejected,
            "margins": rewards_chosen - rewards_rejected,
            "accuracy": mean(right, n_pairs),
            "plain_accuracy": mean(plainly_right, n_pairs),
            "logps_chosen": mean(s_w, n_w),
            "logps_rejected": mean(s_l, n_l),
            "length_chosen": mean(length_w, n_w),
            "length_rejected": mean(length_l, n_l),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


def loss_of(
    objective: Objective, answers: Answers, ref_sums: Tensor, totals: Totals, z: Tensor, measured: Measured
) -> Callable[[Tensor], Tensor]:
    """The function from log-probabilities (N, T) to the summed loss of a micro-batch, as `Policy` takes it.

    Divided by totals.n_losses and added up, it is the step's mean. ref_sums: (N,), zeros without a reference. z: (),
    KTO's reference point. measured: notes what is seen.
    """
    share = shares(answers)
    options = objective.options

    def loss(log_probs: Tensor) -> Tensor:
        sums = log_probs.sum(1)  # (N,)
        # the loss of pairs, each prompt's weighing 1 (all alike where they are sorted), or of answers
        if objective.of_pairs:
            losses = objective.loss.of_pairs(pairs_of(answers, sums, ref_sums), options)  # (P,)
            weight = answers.weight.mean() if objective.loss.sorts else answers.weight
            total = (losses * weight).sum()
        else:
            losses = kto(sums - ref_sums, answers.label, z, objective.kto_weights, options.beta)  # (N,)
            total = (losses * (share.chosen + share.rejected)).sum()
        measured.add(answers, sums.detach(), ref_sums, total.detach())

        # nats of the chosen answers, scaled so that the step's sum over n_losses is their mean over tokens
        nats = -(sums * share.chosen).sum()
        scale = totals.n_losses / max(1.0, totals.n_chosen_tokens)
        return total + objective.sft_weight * scale * nats

    return loss


# ---- KTO's reference point


@torch.no_grad()
def summed_u_of_mismatched(
    model: Transformer, reference: Reference, rows: PreferenceRows, positions: np.ndarray, step: range
) -> tuple[float, int]:
    """(sum of u, number) of answers put after other prompts than their own, for `z_of`.

    positions: data positions of this rank. step: those of the whole step; the prompt at each is followed by an answer
    of the next position in it whose prompt is another, after the last by the first.
    """
    texts = []
    for position in positions.tolist():
        if position not in step:
            continue
        prompt, _ = _parts(rows, position)
        for distance in range(1, len(step)):
            other_prompt, other_answer = _parts(rows, step[(position - step.start + distance) % len(step)])
            if not np.array_equal(prompt, other_prompt):
                texts.append((prompt, other_answer))
                break
    texts = [(prompt, answer) for prompt, answer in texts if len(prompt) + len(answer) <= rows.seq_len + 1]
    if not texts and not is_sharded_model(model):
        return 0.0, 0

    # shards gather weights from all ranks: one with nothing to compare makes the passes too, over a row of its own
    batch = _as_batch(texts, rows) if texts else rows.batch(positions[:1]).batch
    batch = batch.with_places().to(model.norm.weight.device)
    u = answer_log_probs(model, batch).sum(1) - reference.log_probs(batch).sum(1)  # (n,)
    return (float(u.sum()), len(u)) if texts else (0.0, 0)


def z_of(sum_u: float, count: float, device: torch.device) -> Tensor:
    """KTO's z, (), from the sums over all micro-batches of all ranks; 0 if there is nothing to estimate it by."""
    return kto_reference_point(torch.tensor(sum_u / count if count else 0.0, device=device))


def _parts(rows: PreferenceRows, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a position's prompt, and of one of its answers."""
    batch = rows.batch(np.array([position])).batch
    row = position % len(batch.x)
    mask = batch.mask[row].numpy()
    begin = int(mask.argmax())  # where y is the first token of the answer
    return batch.x[row, : begin + 1].numpy(), batch.y[row].numpy()[mask]


def _as_batch(texts: list[tuple[np.ndarray, np.ndarray]], rows: PreferenceRows) -> Batch:
    """Prompts and answers as rows whose answers are learned."""
    samples = []
    for prompt, answer in texts:
        ids = np.concatenate([prompt, answer])
        samples.append([(ids, np.arange(len(ids)) >= len(prompt))])
    width = max(len(ids) - 1 for [(ids, _)] in samples)
    return collate(samples, width, rows.tokenizer.pad_id, documents=False)
