"""Which texts are nearly the same: MinHash signatures, candidates by bands, and a look at each candidate.

    J(A, B) = |A ∩ B| / |A ∪ B|       of the sets of shingles (runs of 5 tokens) of two texts

A signature is 112 shingles of a text, chosen so that two texts agree in a share of J of them on average (Broder 1997).
Each shingle has a hash, a point on a circle of 2⁶⁴. From each of 112 places, evenly spread over the circle, the next
point is chosen: in the order that begins there it is the smallest, so it is the same for two texts with probability J.
All of them come from one sort (one permutation hashing: Li et al. 2012, with the filling of empty places by Shrivastava
& Li 2014). The share that agrees has a standard deviation of √(J (1 − J) / 112), 0.04 at J = 0.8.

Only texts that agree in all entries of some band are compared: 14 bands of 8 entries find a pair with probability
1 − (1 − J⁸)¹⁴, 0.92 at J = 0.8. They are joined only if their signatures say that they are near enough. Joining whoever
shares a band, as is often done, ties a thousand pages of one template into one cluster, of which one page is kept.

Tokens are those of data/decontaminate.py, words and single characters of Chinese. Runs of 5 characters would do for
Chinese, but unrelated English texts have many of these in common.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data.decontaminate import RUN_BASE, hashes_between, running_sums, tokens_of

ENTRIES = 112
SHINGLE = 5  # tokens
BANDS = 14
LEAST = 0.8  # share of a signature that two near texts agree in
NOTHING = np.uint32(0xFFFFFFFF)  # the entries of a text without tokens
EDGES = np.array([k * (1 << 64) // ENTRIES for k in range(ENTRIES)], dtype=np.uint64)  # places on the circle
MOST_LEADERS = 64  # texts of a band's group that all others are compared with: a bound of the time


# ---- signatures


def signatures(texts: Sequence[str], shingle: int = SHINGLE) -> np.ndarray:
    """The signature of each text, (n, ENTRIES) uint32. shingle: how many tokens make one, fewer in a shorter text."""
    found = np.full((len(texts), ENTRIES), NOTHING, dtype=np.uint32)
    for row, hashes in zip(found, shingles(texts, shingle), strict=True):
        if len(hashes):
            next_points = np.searchsorted(hashes, EDGES) % len(hashes)  # beyond the last one comes the first
            row[:] = hashes[next_points].astype(np.uint32)  # the lower 32 bits
    return found


def shingles(texts: Sequence[str], length: int = SHINGLE) -> Iterator[np.ndarray]:
    """The hashes of each text's shingles, sorted, (n,) uint64; repeated ones may be there more than once."""
    for text in texts:
        tokens = tokens_of(text)
        own_length = min(length, len(tokens.hashes))
        begins = np.arange(len(tokens.hashes) - own_length + 1 if own_length else 0)
        sums = running_sums(tokens.hashes, RUN_BASE)
        yield np.sort(hashes_between(sums, begins, begins + own_length, RUN_BASE))


# ---- who is near to whom


def clusters(signatures: np.ndarray, least: float = LEAST, bands: int = BANDS) -> np.ndarray:
    """For each text the number of the first text of its cluster, its own where it is near to none; (n,) int64.

    signatures: (n, ENTRIES) uint32, also a memory map: one band of it is in memory at a time, some 100 bytes a text.
    least: the share of entries in which two texts agree that are joined. Two texts that are near to a third are in one
    cluster, whether they are near to each other or not.
    """
    first = np.arange(len(signatures))  # of each text: one of its cluster with a lower number, at last the first
    rows = ENTRIES // bands
    for band in range(bands):
        keys = _band_keys(np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows]))
        for group in _equal(keys):
            _join(first, signatures, group, least)
    for number in range(len(first)):  # lower numbers have theirs already
        first[number] = first[first[number]]
    return first


def _band_keys(entries: np.ndarray) -> np.ndarray:
    """A number for the entries of a band, (n,) uint64: equal entries, equal numbers. entries: (n, rows) uint32."""
    keys = np.zeros(len(entries), dtype=np.uint64)
    for column in entries.T:
        keys = (keys ^ column) * np.uint64(RUN_BASE)
        keys ^= keys >> np.uint64(29)
    return keys


def _equal(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The places of each key that stands at more than one, (m,) int64, in rising order."""
    order = np.argsort(keys, kind="stable")
    is_new = np.concatenate([[True], keys[order][1:] != keys[order][:-1], [True]])
    borders = np.flatnonzero(is_new)
    is_shared = np.diff(borders) > 1
    for begin, end in zip(borders[:-1][is_shared], borders[1:][is_shared], strict=True):
        yield order[begin:end]


def _join(first: np.ndarray, signatures: np.ndarray, group: np.ndarray, least: float) -> None:
    """Join the texts of a group that are near to each other. group: (m,) numbers of texts, rising."""
    entries = signatures[group]  # (m, ENTRIES)
    left = np.flatnonzero(entries[:, 0] != NOTHING)
    for _ in range(MOST_LEADERS):
        if len(left) < 2:
            return
        leader, others = left[0], left[1:]
        is_near = (entries[others] == entries[leader]).mean(axis=1) >= least
        for other in others[is_near]:
            one, two = _root(first, group[leader]), _root(first, group[other])
            first[max(one, two)] = min(one, two)
        left = others[~is_near]


def _root(first: np.ndarray, number: int) -> int:
    """The first text of a cluster; the way there is halved for the next time."""
    while first[number] != number:
        first[number] = first[first[number]]
        number = first[number]
    return int(number)


# ---- what is kept


def kept(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each text the number of the one that is kept of its cluster, (n,) int64: the longest, of equals the first.

    first: of `clusters`. lengths: (n,), of the texts.
    """
    order = np.lexsort((np.arange(len(first)), -np.asarray(lengths), first))  # clusters, each by length
    is_best = np.concatenate([[True], first[order][1:] != first[order][:-1]])[: len(first)]
    best_of = np.empty(len(first), dtype=np.int64)
    best_of[first[order][is_best]] = order[is_best]
    return best_of[first]


def times(size: int) -> int:
    """How often FineWeb2 repeats what is kept of a cluster of this size (Penedo et al. 2025, arXiv:2506.20920).

    What many pages copy is worth reading more than once, up to where it is copied by machines.
    """
    if size < 4:
        return size
    if size < 5:
        return 3
    if size < 100:
        return 5
    return 8 if size < 1000 else 1
