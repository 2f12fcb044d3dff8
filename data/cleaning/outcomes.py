"""What becomes of each document: kept, kept after mending, dropped for a reason, or a copy of another."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.cleaning.judging import read_judged
from data.cleaning.mending import read_rows
from data.cleaning.passes import Piece
from data.cleaning.rules import Rule, decide
from minillm.base.errors import UserError

KEPT = ""  # the reason of those that are not dropped
EXACT, NEAR, OF_VAL = "exact_duplicate", "near_duplicate", "copy_of_validation"
COPIES = (EXACT, NEAR, OF_VAL)
CONTAMINATED = "contaminated"
STATUSES = ("kept", "mended", "dropped", "duplicate")


@dataclass
class Outcomes:
    """Of all n documents, in the order of the input.

    begins: (number of pieces + 1,) where each piece begins. reasons: the names that `reason` (n,) int16 counts in.
    original: (n,) int64, the document that a copy is of, −1; similarity: (n,) float, of the two. copies: (n,) int32,
    how many documents one stands for. file_number: (n,) int32 among those of its source; line: (n,) int64 in it. read,
    size: (n,) bytes of the text before and after. hash: (n,) uint64; language: (n,) uint8; is_mended, is_val: bool.
    any_hit: name of a rule → documents that it holds for. flagged: name of a flag → documents that are kept with it
    (see `count_flags`). mended_by: what was mended → documents.
    scores: name of a score → (n,) float32; limits: name of a reason → its limit for each language (see `scores`).
    """

    begins: np.ndarray
    reasons: list[str]
    reason: np.ndarray
    original: np.ndarray
    similarity: np.ndarray
    copies: np.ndarray
    file_number: np.ndarray
    line: np.ndarray
    read: np.ndarray
    size: np.ndarray
    hash: np.ndarray
    language: np.ndarray
    is_mended: np.ndarray
    is_val: np.ndarray
    any_hit: dict[str, int] = field(default_factory=dict)
    flagged: dict[str, int] = field(default_factory=dict)
    mended_by: dict[str, int] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    limits: dict[str, np.ndarray] = field(default_factory=dict)

    def status(self) -> np.ndarray:
        """(n,) index into STATUSES."""
        is_copy = np.isin(self.reason, [self.reasons.index(name) for name in COPIES])
        status = np.where(self.is_mended, STATUSES.index("mended"), STATUSES.index("kept"))
        status[self.reason != 0] = STATUSES.index("dropped")
        status[is_copy] = STATUSES.index("duplicate")
        return status

    def number_of(self, name: str) -> int:
        """The number of a reason, a new one if it has none yet."""
        if name not in self.reasons:
            self.reasons.append(name)
        return self.reasons.index(name)

    def place(self, number: int) -> tuple[int, int]:
        """(piece, document in it) of a document."""
        piece = int(np.searchsorted(self.begins, number, side="right")) - 1
        return piece, number - int(self.begins[piece])


def outcomes(pieces: list[Piece], judged: list[Path], rules: list[Rule]) -> Outcomes:
    """What the rules say of each document; copies are not looked for yet."""
    parts: dict[str, list[np.ndarray]] = {}
    begins = [0]
    counts: dict[str, dict[str, int]] = {"any_hit": {}, "mended_by": {}}
    reasons = [KEPT, *COPIES, CONTAMINATED, *(rule.name for rule in rules if rule.do == "drop")]
    # By the number of a rule; the last one is for −1, no rule.
    reason_of_rule = [reasons.index(rule.name) if rule.do == "drop" else 0 for rule in rules] + [0]
    reason_of_rule = np.array(reason_of_rule, np.int16)
    for piece, path in zip(pieces, judged, strict=True):
        arrays = read_judged(path)
        is_bad = arrays["bad"] != ""
        table = arrays["features"]
        table[is_bad] = np.nan

        # The first reason that holds: it cannot be read, a rule, a benchmark's question in it.
        reason = reason_of_rule[decide(rules, table)]
        reason[(reason == 0) & (arrays["contamination"] != "")] = reasons.index(CONTAMINATED)
        for name in np.unique(arrays["bad"][is_bad]):
            if name not in reasons:
                reasons.append(str(name))
            reason[arrays["bad"] == name] = reasons.index(name)

        # Counts of all rules that hold, and of what was mended.
        for rule in rules:
            if rule.do == "drop":
                counts["any_hit"][rule.name] = counts["any_hit"].get(rule.name, 0) + int(rule.holds(table).sum())
        _count_names(counts["mended_by"], arrays["mended"])

        begins.append(begins[-1] + len(reason))
        columns = {name: arrays[name] for name in ("file_number", "line", "read", "size", "language")}
        columns |= {"reason": reason, "hash": arrays["hashes"], "is_mended": arrays["mended"] != ""}
        columns["is_val"] = np.full(len(reason), piece.source.is_val)
        for name, values in columns.items():
            parts.setdefault(name, []).append(values)
    if not pieces:
        raise UserError("--input: the files hold no document; give others")
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    n = begins[-1]
    joined |= {"original": np.full(n, -1), "similarity": np.ones(n), "copies": np.ones(n, np.int32)}
    return Outcomes(np.array(begins), reasons, **joined, **counts)


def _count_names(counts: dict[str, int], names: np.ndarray) -> None:
    """Add to the counts of names those of each document, (n,) str with commas between."""
    for name in (name for joined in names.tolist() if joined for name in joined.split(",")):
        counts[name] = counts.get(name, 0) + 1


def count_flags(found: Outcomes, judged: list[Path], rules: list[Rule]) -> None:
    """Count the flags of the documents that are kept: once scores and copies are marked too."""
    found.flagged = {rule.name: 0 for rule in rules if rule.do == "flag"}
    for number, path in enumerate(judged):
        arrays = read_judged(path)
        is_kept = found.reason[found.begins[number] : found.begins[number + 1]] == 0
        for rule in rules:
            if rule.do == "flag":
                found.flagged[rule.name] += int(rule.holds(arrays["features"][is_kept]).sum())
        _count_names(found.flagged, arrays["flags"][is_kept])


def settle_copies(found: Outcomes) -> None:
    """Say of each copy which document is kept in its place, where a search for copies dropped the one it was a copy of.

    The reason is that of the document that is kept: a copy of a copy of a validation text is one too.
    """
    copies = np.flatnonzero(found.original >= 0)
    of = found.original[copies]
    while (is_copy := found.original[of] >= 0).any():
        nearer = np.minimum(found.similarity[copies], found.similarity[of])
        found.similarity[copies] = np.where(is_copy, nearer, found.similarity[copies])
        of = np.where(is_copy, found.original[of], of)
    found.original[copies] = of
    is_leak = found.is_val[of] & ~found.is_val[copies]
    found.reason[copies[is_leak]] = found.number_of(OF_VAL)


def refuse_if_unread(found: Outcomes, pieces: list[Piece]) -> None:
    """Raises UserError if no document at all could be read, with what is wrong with the first."""
    if (found.size > 0).any():
        return
    first = read_rows(pieces[0].stem.with_suffix(".jsonl"))[0]
    what = ": ".join(first["bad"]) if "bad" in first else "it is empty"
    place = f"{pieces[0].source.name(first['file'])}:{first['number']}"
    raise UserError(f"--input: no document holds text; {place}: {what}; choose the key with --field")


def mark_copies(found: Outcomes, copies: np.ndarray, of: np.ndarray, reason: str) -> None:
    """Mark the documents `copies` (m,) as copies of others, `of` (m,)."""
    found.original[copies] = of
    is_leak = found.is_val[of] & ~found.is_val[copies]
    found.reason[copies] = np.where(is_leak, found.number_of(OF_VAL), found.number_of(reason))
    np.add.at(found.copies, of, found.copies[copies])
