"""The report of a cleaning: counts that add up, as JSON and as a table on the terminal."""

import numpy as np

from data.cleaning import scores
from data.cleaning.judging import read_judged
from data.cleaning.outcomes import STATUSES, Outcomes
from data.cleaning.passes import Piece
from data.cleaning.rules import Rule
from data.cleaning.text.features import FEATURES, LANGUAGES, NAMES

BINS = 40


def report(pieces: list[Piece], found: Outcomes, rules: list[Rule]) -> dict:
    """All counts, as they go into report.json. Bytes are those of the texts as they were read."""
    status = found.status()
    of_rule = {rule.name: rule for rule in rules}
    by_reason = {}
    for number, name in enumerate(found.reasons):
        is_here = found.reason == number
        n = int(is_here.sum())
        if name and (n or name in of_rule or name in found.limits):
            by_reason[name] = {"documents": n, "bytes": int(found.read[is_here].sum())}
            any_hit = {"any_hit": found.any_hit.get(name, 0)}
            if name in of_rule:
                rule = of_rule[name]
                by_reason[name] |= any_hit | {"feature": rule.feature, "limit": rule.limit()}
            elif name in found.limits:
                limit = scores.said_limit(found, name)
                by_reason[name] |= any_hit | {"feature": scores.SCORE_OF[name], "limit": limit}
    return {
        "read": _counted(np.ones(len(status), bool), found),
        **{name: _counted(status == number, found) for number, name in enumerate(STATUSES)},
        "by_reason": by_reason,
        "flagged": found.flagged,
        "mended_by": found.mended_by,
        "by_source": _by_source(pieces, found, status),
        "by_language": _by(found.language, LANGUAGES, status),
        "copies": _cluster_sizes(found),
    }


def _counted(is_here: np.ndarray, found: Outcomes) -> dict:
    return {"documents": int(is_here.sum()), "bytes": int(found.read[is_here].sum())}


def _by(group: np.ndarray, names: tuple[str, ...] | list[str], status: np.ndarray) -> dict:
    """name → how many documents of the group came to each status; groups without documents are left out."""
    counts = np.bincount(group * len(STATUSES) + status, minlength=len(names) * len(STATUSES))
    counts = counts.reshape(len(names), len(STATUSES))
    rows = {name: dict(zip(STATUSES, map(int, row), strict=True)) for name, row in zip(names, counts, strict=True)}
    return {name: {"read": sum(row.values()), **row} for name, row in rows.items() if sum(row.values())}


def _by_source(pieces: list[Piece], found: Outcomes, status: np.ndarray) -> dict:
    names: dict[str, int] = {}
    group = np.zeros(len(status), np.int64)
    for number, piece in enumerate(pieces):
        documents = slice(found.begins[number], found.begins[number + 1])
        numbers = [names.setdefault(piece.source.name(i), len(names)) for i in range(len(piece.source.paths))]
        group[documents] = np.array(numbers)[found.file_number[documents]]
    return _by(group, list(names), status)


def _cluster_sizes(found: Outcomes) -> dict:
    """How many documents of those kept stand for so many."""
    sizes, counts = np.unique(found.copies[(found.reason == 0) & (found.copies > 1)], return_counts=True)
    return {str(size): int(count) for size, count in zip(sizes, counts, strict=True)}


def table(result: dict) -> str:
    """The report as lines for a terminal."""
    n_read = max(result["read"]["documents"], 1)
    lines = []
    for name in ("read", *STATUSES):
        counts = result[name]
        share = 100 * counts["documents"] / n_read
        lines.append(f"{name:<22}{counts['documents']:>12,} documents {share:6.1f} % {counts['bytes'] / 1e6:12,.2f} MB")
    for name, counts in sorted(result["by_reason"].items(), key=lambda item: -item[1]["documents"]):
        if counts["documents"] or counts.get("any_hit"):
            limit = f"{counts['feature']} {counts['limit']}" if "limit" in counts else ""
            hits = f"{counts['any_hit']:,} in all" if counts.get("any_hit", 0) > counts["documents"] else ""
            lines.append(f"  {name:<20}{counts['documents']:>12,} {limit:<24} {hits}".rstrip())
    if n_broken := result["by_reason"].get("broken_file", {}).get("documents"):
        lines.append(f"broken files: {n_broken:,}, read up to where they break; dropped/broken_file.jsonl names them")
    n_without = result["by_reason"].get("no_text", {}).get("documents", 0)
    if n_without > n_read / 10:
        lines.append(
            f"no text in {n_without:,}: dropped/no_text.jsonl says why, as where rows have other keys than --field"
        )
    for title, key in (("flagged, and kept", "flagged"), ("mended", "mended_by")):
        named = ", ".join(f"{name} {n:,}" for name, n in sorted(result[key].items(), key=lambda item: -item[1]) if n)
        lines += [f"{title}: {named}"] if named else []
    return "\n".join(lines)


# ---- Histograms, and documents to look at.


def histograms(judged: list, found: Outcomes, rules: list[Rule]) -> dict[str, dict]:
    """feature → edges (BINS + 1) and how many documents lie between, of all and of those that are kept.

    What lies beyond the last edge counts for the last bin.
    """
    limits: dict[str, float] = {}
    for rule in rules:
        limit = rule.above if rule.above is not None else rule.below
        limits[rule.feature] = max(limit, limits.get(rule.feature, 0))
    result = {
        name: {"edges": _edges(name, limits.get(name, 0))} for name in FEATURES if name in limits or name == "length"
    }
    for columns in result.values():
        columns |= {"all": np.zeros(BINS, np.int64), "kept": np.zeros(BINS, np.int64)}
    for number, path in enumerate(judged):
        arrays = read_judged(path)
        is_kept = found.reason[found.begins[number] : found.begins[number + 1]] == 0
        for name, columns in result.items():
            values = arrays["features"][:, NAMES.index(name)]
            says = ~np.isnan(values) & (arrays["bad"] == "")
            for key, chosen in (("all", says), ("kept", says & is_kept)):
                bins = np.searchsorted(columns["edges"], values[chosen], side="right") - 1
                columns[key] += np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)
    return result


def score_histogram(found: Outcomes, name: str) -> dict:
    """The same of a score, between 0 and what 999 of 1,000 documents stay below."""
    values = found.scores[name]
    is_scored = ~np.isnan(values)
    top = float(np.quantile(values[is_scored], 0.999)) if is_scored.any() else 1.0
    columns = {"edges": np.linspace(0, max(top, 1e-3), BINS + 1)}
    for key, chosen in (("all", is_scored), ("kept", is_scored & (found.reason == 0))):
        columns[key] = np.histogram(np.minimum(values[chosen], top), columns["edges"])[0]
    return columns


def score_limits(found: Outcomes, name: str) -> list[Rule]:
    """The limits of a score, each language's as a rule of its own."""
    rules = []
    for reason, of_language in found.limits.items():
        if scores.SCORE_OF[reason] == name:
            for limit in np.unique(of_language[~np.isnan(of_language)]).tolist():
                above, below = (limit, None) if reason == scores.SURPRISING else (None, limit)
                rules.append(Rule(reason, name, above, below, "drop"))
    return rules


def _edges(name: str, limit: float = 0) -> np.ndarray:
    if name in ("length", "unended_length"):
        return np.concatenate([[0], np.geomspace(5, 1e6, BINS)])
    return np.linspace(0, max(4 * limit, 1e-3) if limit < 0.25 or limit > 1 else 1, BINS + 1)


def samples(found: Outcomes, reason: str, most: int) -> list[int]:
    """Up to `most` documents dropped for a reason, chosen by their hashes, in the order of the input."""
    numbers = np.flatnonzero(found.reason == found.reasons.index(reason))
    return sorted(numbers[np.argsort(found.hash[numbers], kind="stable")[:most]].tolist())
