"""Scores of texts, which are optional: of each piece a file on the disk, and what is dropped by them.

    predictable, surprising   bits per byte of a model (`model_score`) below or above quantiles of the text's language
    low_quality               probability of being good (`quality`) below a limit

<key>.<name>-<of>.npz   the scores of a piece's documents; `of` is a checksum of what they depend on besides the piece

Only what the rules leave is scored, since a model takes longer than all else; after a change of rules, what is new.
Quantiles are those of the documents that the rules leave, of each set of exact copies one, without validation.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.cleaning.judging import final_documents
from data.cleaning.mending import How, mended_documents, write_arrays
from data.cleaning.model_score import ModelScore
from data.cleaning.outcomes import Outcomes
from data.cleaning.passes import Piece, in_order
from data.cleaning.quality import HeldOut, Quality, train
from data.cleaning.reading import SUFFIXES, raw_documents
from data.cleaning.text.features import LANGUAGES
from minillm.base.files import write_file
from minillm.datasets.files.text_files import find_files

FEWEST = 100  # documents of a language that have quantiles
SAMPLES_AT_ONCE = 256  # that are mended together
PREDICTABLE, SURPRISING, LOW_QUALITY = "predictable", "surprising", "low_quality"
SCORE_OF = {PREDICTABLE: "bits_per_byte", SURPRISING: "bits_per_byte", LOW_QUALITY: "quality"}
MEANING = {"bits_per_byte": "bits per byte by the model", "quality": "probability of being good by the samples"}


class Limits(NamedTuple):
    """low, high: quantiles of bits per byte that are kept between; least: the probability of being good."""

    low: float
    high: float
    least: float


# ---- Scoring.


def learnt_quality(good: tuple[str, ...], bad: tuple[str, ...], how: How, least: float) -> tuple[Quality, HeldOut]:
    """The classifier of the samples in these files, which are mended as all texts are."""

    def texts_of(paths: tuple[str, ...]) -> Iterator[str]:
        raws = (raw for path in find_files(paths, suffixes=SUFFIXES) for raw in raw_documents(path, how.boundary))
        while some := list(itertools.islice(raws, SAMPLES_AT_ONCE)):
            yield from (document["text"] for document in mended_documents(some, how) if "bad" not in document)

    return train(texts_of(good), texts_of(bad), least)


def score(
    found: Outcomes, pieces: list[Piece], recurring: np.ndarray, scorer: ModelScore | Quality, workers: int
) -> tuple[np.ndarray, list[Path]]:
    """(the scores (n,) float32, the file of each piece) of all documents, NaN for those that are dropped.

    recurring: hashes of lines to be cut, sorted.
    """
    key = hashlib.sha256(recurring.tobytes() + scorer.key.encode()).hexdigest()[:12]
    files = [piece.stem.with_suffix(f".{scorer.name}-{key}.npz") for piece in pieces]
    tasks = {}  # file → what has to be scored; of equal pieces once
    for number, (piece, path) in enumerate(zip(pieces, files, strict=True)):
        is_left = found.reason[found.begins[number] : found.begins[number + 1]] == 0
        if (is_left & np.isnan(_read(path, len(is_left)))).any():
            tasks.setdefault(path, (piece.stem, path, is_left))
    bar = tqdm(total=len(tasks), unit="piece", desc=scorer.name, mininterval=0.5, disable=not tasks)
    n_workers = scorer.workers(min(workers, max(len(tasks), 1)))
    for _ in in_order(_score_piece, tasks.values(), (recurring, scorer), n_workers):
        bar.update()
    bar.close()
    parts = [_read(path, int(n)) for path, n in zip(files, np.diff(found.begins), strict=True)]
    return np.where(found.reason == 0, np.concatenate(parts), np.nan), files


def _score_piece(stem: Path, path: Path, is_left: np.ndarray, recurring: np.ndarray, scorer: ModelScore | Quality):
    """Write the scores of a piece, of those documents that are left and have none yet."""
    values = _read(path, len(is_left))
    numbers = np.flatnonzero(is_left & np.isnan(values))
    documents = final_documents(stem, recurring)
    values[numbers] = scorer.scores([documents[number]["text"] for number in numbers])
    write_file(path, lambda temporary: write_arrays(temporary, {"scores": values}))


def _read(path: Path, n: int) -> np.ndarray:
    """The scores of a piece of n documents, (n,) float32; NaN for those that have none yet."""
    if not path.exists():
        return np.full(n, np.nan, np.float32)
    with np.load(path) as arrays:
        return arrays["scores"]


# ---- Deciding.


def mark(found: Outcomes, scores: dict[str, np.ndarray], limits: Limits) -> None:
    """Mark those documents, of all that are left, whose scores (n,) are beyond the limits.

    `found` then holds the scores and, by reason, the limit for each language, NaN where too few documents give one.
    """
    found.scores = scores
    if "bits_per_byte" in scores:
        low, high = _quantiles(found, scores["bits_per_byte"], (limits.low, limits.high))
        found.limits[PREDICTABLE], found.limits[SURPRISING] = low, high
    if "quality" in scores:
        found.limits[LOW_QUALITY] = np.full(len(LANGUAGES), limits.least)
    for reason, of_language in found.limits.items():
        values = scores[SCORE_OF[reason]]
        limit = of_language[found.language]  # (n,)
        is_beyond = values > limit if reason == SURPRISING else values < limit
        found.any_hit[reason] = int(is_beyond.sum())
        found.reason[is_beyond & (found.reason == 0)] = found.number_of(reason)


def _quantiles(found: Outcomes, values: np.ndarray, shares: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The limits (languages,) of each language, beyond which lies at most that share; NaN: there are none."""
    low, high = (np.full(len(LANGUAGES), np.nan) for _ in shares)
    counted = np.flatnonzero((found.reason == 0) & ~found.is_val & ~np.isnan(values))
    counted = counted[np.unique(found.hash[counted], return_index=True)[1]]
    for number in range(len(LANGUAGES)):
        own = values[counted[found.language[counted] == number]]
        if len(own) >= FEWEST:
            low[number] = np.quantile(own, shares[0], method="lower")
            high[number] = np.quantile(own, shares[1], method="higher")
    return low, high


# ---- Saying.


def why(found: Outcomes, number: int) -> dict:
    """The scores of a document, and the limit beyond which they are if it was dropped for one."""
    about = {name: round(float(values[number]), 4) for name, values in found.scores.items()}
    about = {name: value for name, value in about.items() if not np.isnan(value)}
    reason = found.reasons[found.reason[number]]
    if reason in found.limits:
        limit = found.limits[reason][found.language[number]]
        about["value"] = about[SCORE_OF[reason]]
        about["limit"] = f"{_sign(reason)} {limit:.4g}"
    return about


def _sign(reason: str) -> str:
    return ">" if reason == SURPRISING else "<"


def said_limit(found: Outcomes, reason: str) -> str:
    """The limits of a reason in words."""
    of_language = found.limits[reason]
    named = {
        f"{limit:.4g}": [LANGUAGES[i] for i in np.flatnonzero(of_language == limit)]
        for limit in of_language[~np.isnan(of_language)]
    }
    if len(named) == 1 and len(next(iter(named.values()))) == len(LANGUAGES):
        return f"{_sign(reason)} {next(iter(named))}"
    parts = [f"{_sign(reason)} {limit} {' '.join(languages)}" for limit, languages in named.items()]
    return ", ".join(parts) or f"no language has {FEWEST} documents"
