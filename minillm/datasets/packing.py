"""Packing: put examples of unequal length into rows of one capacity, with little room left over.

Padding is wasted work: instructions of 20 to 200 tokens in rows of 256 would waste half of every step.
So several examples share a row, and attention is kept inside each of them.
"""

import numpy as np


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64 (n,), which depends on the integers of `key` alone.

    It sorts the generator's raw bits, a stream that numpy guarantees not to change, so that a run resumed
    with another version of numpy still sees the same order.
    """
    seed = [k % (1 << 64) for k in key]
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def pack(lengths: np.ndarray, capacity: int, *key: int) -> list[np.ndarray]:
    """Puts every example into a row so that few rows are needed: best fit, longest first.

        for each example, longest first:
            row = the one with the least room that is enough, or a new one
            put the example into it

    Only lengths matter, so rows with equal room are kept together and examples of one length are placed at once: a
    million take about a second. This needs at most 11/9 of the fewest possible rows plus a constant (best-fit
    decreasing, Johnson et al. 1974); instruction data has enough short examples to fill the gaps, and leaves under 1 %
    empty. The key shuffles examples of one length among their places, and the order of the rows. The number of rows
    depends on the lengths alone, so it is the same in every epoch.

    lengths: (n,) int, 1 … capacity. capacity: tokens a row holds. key: integers, e.g. seed and epoch.
    Returns the rows, each an int64 array of positions in `lengths`. Raises ValueError for a length that
    does not fit.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, allowed are 1 to {capacity}")
    order = shuffled(len(lengths), *key, 0)
    order = order[np.argsort(-lengths[order], kind="stable")]  # longest first, shuffled within a length
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the rows that still have so much room
    rooms = 0  # a set of numbers: bit r is 1 where by_room[r] holds a row
    n_rows = 0
    placed: list[np.ndarray] = []  # the row of each example, in `order`
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            room = _least_from(length, rooms, otherwise=capacity)
            each = min(room // length, count)  # the row just used has the least room, so it is filled up first
            n_taken = count // each
            if not by_room[room]:  # no row has enough
                by_room[room] = list(range(n_rows, n_rows + n_taken))
                n_rows += n_taken
            taken, by_room[room] = by_room[room][:n_taken], by_room[room][n_taken:]
            left = room - each * length
            by_room[left] += taken
            rooms |= 1 << left
            if not by_room[room]:
                rooms &= ~(1 << room)
            placed.append(np.repeat(taken, each))
            count -= each * len(taken)
    row_of = shuffled(n_rows, *key, 1)[np.concatenate(placed)]
    by_row = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=n_rows))
    return np.split(order[by_row], ends[:-1])


def _least_from(least: int, numbers: int, otherwise: int) -> int:
    """The smallest number from `least` up in a set whose bit r is 1 for each number r in it; `otherwise` if none is."""
    above = numbers >> least
    return least + (above & -above).bit_length() - 1 if above else otherwise  # x & -x keeps the lowest 1


def fill_ratio(lengths: np.ndarray, n_rows: int, capacity: int) -> float:
    """The share of `n_rows` rows' room that examples of these lengths take, 0 … 1."""
    return float(np.sum(lengths)) / (n_rows * capacity) if n_rows else 0.0
