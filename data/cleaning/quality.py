"""A classifier of one's own: how likely a text is of the good kind, learnt from samples of good and of bad texts.

    p(good | text) = σ(b + Σ w[bucket] / √n)      over the n different buckets of the text's runs of characters

A run of 1 to 4 characters falls into one of 2¹⁸ buckets by a hash, and each bucket has a weight. This is what the
supervised form of fastText learns (Joulin et al. 2016, arXiv:1607.01759) where there are two classes: a linear model of
hashed n-grams. It is written out here since the package `fasttext` has no wheel, and `fasttext-wheel` fails with numpy
2; it also gives the same weights in any run.

Nothing is judged by it before samples that it did not see were: one that is no better than chance there is refused.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data.cleaning.mending import text_hash
from minillm.base.errors import UserError

BEGINNING = 2000  # characters of a text that are looked at
LONGEST = 4  # characters of a run
BUCKETS = 1 << 18
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, of no meaning
FOLDS = 5
FEWEST = 50  # samples of a kind
MOST = 5000  # of a kind, those with the lowest hashes
EPOCHS = 5
AT_ONCE = 32  # samples of a step
RATE = 1.0
SURE = 3.0  # standard errors by which the area under the curve must be above one half


class Quality(NamedTuple):
    """Scores texts by weights (BUCKETS + 1,) float32, the last of which is b. key: a checksum of them."""

    weights: np.ndarray
    key: str
    name: str = "quality"

    def workers(self, most: int) -> int:
        """How many processes to use of so many."""
        return most

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """p(good) of each text, (n,) float32; NaN for an empty one."""
        scores = np.full(len(texts), np.nan, np.float32)
        for number, text in enumerate(texts):
            if text:
                buckets = buckets_of(text)
                scores[number] = _p(self.weights[buckets].sum() / np.sqrt(len(buckets)) + self.weights[-1])
        return scores


class HeldOut(NamedTuple):
    """How samples were judged by weights that were learnt from others.

    kept_good, dropped_bad: of the n_good and n_bad samples. auc: the probability that a good sample has a higher score
    than a bad one, with its standard error.
    """

    n_good: int
    n_bad: int
    kept_good: int
    dropped_bad: int
    auc: float
    error: float

    def said(self, least: float) -> str:
        """In words. least: the probability below which a text is dropped."""
        n_kept = self.kept_good + self.n_bad - self.dropped_bad
        return (
            f"quality on samples held out, {self.n_good:,} good and {self.n_bad:,} bad, at {least:g}: precision "
            f"{self.kept_good / max(n_kept, 1):.1%}, recall {self.kept_good / self.n_good:.1%}, bad ones dropped "
            f"{self.dropped_bad / self.n_bad:.1%}; area under the curve {self.auc:.3f} ± {self.error:.3f}"
        )


def train(good: Iterable[str], bad: Iterable[str], least: float) -> tuple[Quality, HeldOut]:
    """The classifier, and how it judges samples held out: each fifth of them, after learning from the others.

    Raises UserError for too few samples, and where it is no better than chance.
    """
    samples = {"good": _distinct(good), "bad": _distinct(bad)}
    shared = samples["good"].keys() & samples["bad"].keys()
    if shared:
        raise UserError(f"--good and --bad: {len(shared):,} texts are in both; take them out of one")
    for option, by_hash in samples.items():
        if len(by_hash) < FEWEST:
            raise UserError(f"--{option}: {len(by_hash):,} different texts; give at least {FEWEST}")

    # folds by hash, so that more samples move none of the others
    by_hash = samples["good"] | samples["bad"]
    is_good = np.arange(len(by_hash)) < len(samples["good"])
    rows = [buckets_of(text) for text in by_hash.values()]
    fold = np.array([key % FOLDS for key in by_hash])
    scores = np.zeros(len(rows))
    for number in range(FOLDS):
        weights = _learnt(rows, is_good, np.flatnonzero(fold != number))
        for sample in np.flatnonzero(fold == number):
            scores[sample] = _p(weights[rows[sample]].sum() / np.sqrt(len(rows[sample])) + weights[-1])
    held_out = _held_out(scores, is_good, least)
    if held_out.auc - SURE * held_out.error <= 0.5:
        raise UserError(
            f"--good and --bad: {held_out.said(least)}; that is no better than chance: give more samples, or such that "
            "differ in what you want to keep"
        )
    weights = _learnt(rows, is_good, np.arange(len(rows)))
    return Quality(weights, hashlib.sha256(weights.tobytes()).hexdigest()[:12]), held_out


def _distinct(texts: Iterable[str]) -> dict[int, str]:
    """The beginnings of the texts that are not empty by their hashes, each once, those with the MOST lowest hashes."""
    by_hash: dict[int, str] = {}
    for text in texts:
        if text.strip():
            by_hash[text_hash(text)] = text[:BEGINNING]
        if len(by_hash) > 2 * MOST:  # so that memory does not grow with the files
            by_hash = dict(sorted(by_hash.items())[:MOST])
    return dict(sorted(by_hash.items())[:MOST])


def _held_out(scores: np.ndarray, is_good: np.ndarray, least: float) -> HeldOut:
    """Counts and the area under the curve, with the standard error of Hanley & McNeil 1982."""
    n_good, n_bad = int(is_good.sum()), int((~is_good).sum())
    order = np.sort(scores[~is_good])
    below = np.searchsorted(order, scores[is_good], "left")
    above = np.searchsorted(order, scores[is_good], "right")
    auc = float((below + above).mean() / (2 * n_bad))
    both_good, both_bad = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n_good - 1) * (both_good - auc**2) + (n_bad - 1) * (both_bad - auc**2)
    kept = scores >= least
    counts = int((kept & is_good).sum()), int((~kept & ~is_good).sum())
    return HeldOut(n_good, n_bad, *counts, auc, float(np.sqrt(max(variance, 0) / (n_good * n_bad))))


# ---- Text → buckets → weights.


def buckets_of(text: str) -> np.ndarray:
    """The different buckets of a text's runs of 1 to LONGEST characters, sorted, (n,) int32; case does not count."""
    data = text[:BEGINNING].lower().encode("utf-32-le", "replace")
    points = np.frombuffer(data, np.uint32).astype(np.uint64)
    hashes = np.zeros(len(points) + 1, np.uint64)
    found = []
    for length in range(1, min(LONGEST, len(points)) + 1):
        hashes = (hashes[:-1] + points[length - 1 :] + np.uint64(length)) * BASE
        hashes ^= hashes >> np.uint64(32)
        found.append(hashes % np.uint64(BUCKETS))
    return np.unique(np.concatenate(found)).astype(np.int32)


def _learnt(rows: list[np.ndarray], is_good: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Weights (BUCKETS + 1,) float32 from the samples `chosen`, both kinds counting alike.

    Logistic regression by AdaGrad (Duchi et al. 2011), whose steps are longer for weights that seldom change.
    """
    weights = np.zeros(BUCKETS + 1, np.float32)
    squares = np.full(BUCKETS + 1, 1e-6, np.float32)
    share_good = is_good[chosen].mean()
    importance = np.where(is_good, 0.5 / share_good, 0.5 / (1 - share_good))
    for numbers in _steps(chosen):
        lengths = np.array([len(rows[number]) for number in numbers])
        begins = np.cumsum(lengths) - lengths
        index = np.concatenate([rows[number] for number in numbers])
        logits = np.add.reduceat(weights[index], begins) / np.sqrt(lengths) + weights[-1]
        error = (_p(logits) - is_good[numbers]) * importance[numbers] / len(numbers)
        slope = np.bincount(index, np.repeat(error / np.sqrt(lengths), lengths), BUCKETS + 1).astype(np.float32)
        slope[-1] = error.sum()
        squares += slope**2
        weights -= RATE * slope / np.sqrt(squares)
    return weights


def _steps(chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The samples in steps of AT_ONCE, in another order each epoch."""
    random = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = random.permutation(chosen)
        yield from (order[begin : begin + AT_ONCE] for begin in range(0, len(order), AT_ONCE))


def _p(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
