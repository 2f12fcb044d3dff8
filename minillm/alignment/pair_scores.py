"""Scores of pairs of answers: the loss that a reward model learns by, and how well it tells better from worse.

r_w is the score of the chosen answer, r_l that of the rejected one. By Bradley and Terry (1952) the chosen one is
preferred with the probability σ(r_w − r_l).
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.alignment.reward_model import last_scores, text_lengths
from minillm.datasets.preferences import Answers, PreferenceRows

BINS = 10  # of the calibration
SAMPLES = 16  # whose answers go through one forward pass of an evaluation


def pair_loss(scores: Tensor, answers: Answers, center: float) -> Tensor:
    """Σ over pairs of weight · (−log σ(r_w − r_l − margin) + center · (r_w + r_l)²), a scalar fp32.

    scores: (N,) fp32, of the answers. All pairs of a prompt weigh 1 together, as in one element of a batch (Ouyang et
    al. 2022, arXiv:2203.02155, section 3.5). A margin asks for a larger difference where one answer is much better
    (Touvron et al. 2023, arXiv:2307.09288, section 3.2.2). The second term keeps scores near 0, which differences alone
    do not fix (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    chosen, rejected = scores[answers.chosen], scores[answers.rejected]  # (P,)
    nats = -F.logsigmoid(chosen - rejected - answers.margin)
    return (answers.weight * (nats + center * (chosen + rejected).square())).sum()


def early_pair_loss(scores: Tensor, answers: Answers) -> Tensor:
    """Σ over pairs of weight · mean over tokens of −log σ(r_w(t) − r_l(t)), a scalar fp32.

    scores: (N, T + 1) fp32, at every token of the answers. The mean is over the tokens, counted from the beginning of
    the prompt, from the first in which the two answers differ to the end of the shorter one: there a fault shows, or
    soon after. A score that has to tell right from wrong at once learns where to look, while at the last token alone it
    has to find out where in the answer it was (Cobbe et al. 2021, arXiv:2110.14168, section 4.1: verifiers that judge
    every token).
    """
    tokens = answers.batch.tokens()  # (N, T + 1)
    is_answer = F.pad(answers.batch.mask, (1, 0))  # (N, T + 1)
    differ = (tokens[answers.chosen] != tokens[answers.rejected]).cumsum(1) > 0  # (P, T + 1), from the first on
    compared = differ & is_answer[answers.chosen] & is_answer[answers.rejected]  # (P, T + 1)
    nats = -F.logsigmoid(scores[answers.chosen] - scores[answers.rejected])  # (P, T + 1)
    of_each = (nats * compared).sum(1) / compared.sum(1).clamp(min=1)  # (P,)
    return (answers.weight * of_each).sum()


class PairScores(NamedTuple):
    """The scores of some pairs and of their answers.

    chosen, rejected: (P,) fp64. longer: (P,), 1 where the chosen has more tokens, 0 where fewer, else ½. kinds: P
    texts, the fault of the rejected. scores: (N,) fp64, of all answers. lengths: (N,) int64, tokens of each answer.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    longer: np.ndarray
    kinds: list[str]
    scores: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    rows: PreferenceRows,
    positions: np.ndarray | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> PairScores:
    """The scores of the samples at these data positions, by default one epoch, the shortest first.

    autocast: the context to compute in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    if positions is None:
        positions = np.arange(rows.rows_per_epoch)
    positions = positions[np.argsort(rows.longest(positions), kind="stable")]  # less padding
    found = []
    with autocast or contextlib.nullcontext():
        for begin in range(0, len(positions), SAMPLES):
            answers = rows.batch(positions[begin : begin + SAMPLES])
            batch = answers.batch.to(device)
            scores = last_scores(model, batch, text_lengths(batch)).double().cpu().numpy()  # (N,)
            found.append(_of_batch(answers, scores))
    model.train(was_training)
    kinds = [kind for part in found for kind in part.kinds]
    columns = {
        name: np.concatenate([getattr(part, name) for part in found]) for name in PairScores._fields if name != "kinds"
    }
    return PairScores(**columns, kinds=kinds)


def _of_batch(answers: Answers, scores: np.ndarray) -> PairScores:
    chosen, rejected = answers.chosen.numpy(), answers.rejected.numpy()
    lengths = answers.batch.mask.sum(1).numpy()
    longer = (np.sign(lengths[chosen] - lengths[rejected]) + 1) / 2
    return PairScores(scores[chosen], scores[rejected], longer, answers.kinds, scores, lengths)


# ---- what is measured


def measures(pairs: PairScores) -> dict[str, float]:
    """heldout_accuracy (a tie is wrong), heldout_nll in nats, ece, and longer_wins: what a ruler would get (ties ½)."""
    difference = pairs.chosen - pairs.rejected
    return {
        "heldout_accuracy": float((difference > 0).mean()),
        "heldout_nll": float(np.logaddexp(0, -difference).mean()),  # −log σ
        "ece": calibration_error(difference),
        "longer_wins": float(pairs.longer.mean()),
    }


def calibration_error(difference: np.ndarray) -> float:
    """The expected calibration error of σ(|r_w − r_l|), the probability that the higher score is the better answer.

    Σ over BINS equal bins of [½, 1] of (share of the pairs in it) · |mean probability − share that is right|
    (Guo et al. 2017, arXiv:1706.04599). difference: (P,), r_w − r_l.
    """
    probability = 1 / (1 + np.exp(-np.abs(difference)))  # ½ … 1
    right = difference > 0
    bins = np.minimum(((probability - 0.5) * 2 * BINS).astype(int), BINS - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += inside.mean() * abs(probability[inside].mean() - right[inside].mean())
    return float(error)


def length_correlation(pairs: PairScores) -> float:
    """Pearson's correlation between an answer's score and its number of tokens; NaN where one of them never differs."""
    if pairs.scores.std() == 0 or pairs.lengths.std() == 0:
        return math.nan
    return float(np.corrcoef(pairs.scores, pairs.lengths)[0, 1])


def noise_floor(label_noise: float) -> float:
    """H(η) = −η ln η − (1 − η) ln(1 − η): the nats of a pair whose label is wrong with probability η, known otherwise.

    No reward model has a lower NLL on such labels on average, nor an accuracy above 1 − η.
    """
    return -sum(p * math.log(p) for p in (label_noise, 1 - label_noise) if p > 0)


def accuracy_lines(pairs: PairScores) -> list[str]:
    """The share of pairs that are right ± its standard error √(p(1 − p)/n), a line a kind of fault, all last."""
    right = pairs.chosen > pairs.rejected
    kinds = np.array([kind or "not said" for kind in pairs.kinds])
    names = [*sorted(set(kinds.tolist())), "all"]
    width = max(map(len, names))
    lines = []
    for name in names:
        inside = right if name == "all" else right[kinds == name]
        p, n = float(inside.mean()), len(inside)
        lines.append(f"  {name:<{width}}  {p:6.1%} ± {math.sqrt(p * (1 - p) / n):5.1%}   ({int(inside.sum())}/{n})")
    return lines


def summary_lines(pairs: PairScores, label_noise: float = 0.0) -> list[str]:
    """What to print of pairs labelled with this noise: accuracy by kind, calibration, the effect of length."""
    found = measures(pairs)
    floor = f"; floor {noise_floor(label_noise):.4f} at --label_noise {label_noise:g}" if label_noise else ""
    return [
        *accuracy_lines(pairs),
        f"  NLL {found['heldout_nll']:.4f} nats a pair (a coin: {math.log(2):.4f}{floor}); "
        f"expected calibration error {found['ece']:.3f}",
        f"  the longer one would win {found['longer_wins']:.1%}; the score's correlation with length "
        f"{length_correlation(pairs):+.2f}",
    ]
