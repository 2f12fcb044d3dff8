"""Packing: put samples of unequal length into rows of one capacity, with little room left over.

Padding is wasted work: instructions of 20 to 200 tokens in rows of 256 would waste half of every step.
So several samples share a row, and attention is kept inside each of them.
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
    """Puts every sample into a row so that few rows are needed: best fit, longest first.

        for each sample, longest first:
            row = the one with the least room that is enough, or a new one
            put the sample into it

    Only lengths matter, so rows with equal room are kept together and samples of one length are placed at once: a
    million take about a second. This needs at most 11/9 of the fewest possible rows plus a constant (best-fit
    decreasing, Johnson et al. 1974); instruction data has enough short samples to fill the gaps, and leaves under 1 %
    empty. The key shuffles samples of one length among their places, and the order of the rows. The number of rows
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

    # Longest first, shuffled within a length.
    order = shuffled(len(lengths), *key, 0)
    order = order[np.argsort(-lengths[order], kind="stable")]  # (n,)
    values, counts = np.unique(lengths, return_counts=True)

    rows = _OpenRows(capacity)
    row_of_each: list[np.ndarray] = []  # the row of each sample, in `order`
    for length, n_left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while n_left:
            room = rows.least_room(length)
            # A row that has taken one sample has the least room of all, so it takes more of them first.
            n_each = min(room // length, n_left)
            taken = rows.take(room, n_left // n_each)
            rows.put_back(taken, room - n_each * length)
            row_of_each.append(np.repeat(taken, n_each))
            n_left -= n_each * len(taken)

    # The samples row by row, and the rows in an order of their own.
    row_of = shuffled(rows.n_rows, *key, 1)[np.concatenate(row_of_each)]  # (n,)
    by_row = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=rows.n_rows))
    return np.split(order[by_row], ends[:-1])


class _OpenRows:
    """Rows by the room they still have.

    The rooms that occur are a set of numbers, kept as the bits of one int: bit r is 1 where some row has room r. The
    least room from 3 up is then the lowest 1 from bit 3 up:

        room      9 8 7 6 5 4 3 2 1 0
        rooms     0 1 0 1 0 0 0 1 0 0        some rows have room 8, some 6, some 2
        >> 3            0 1 0 1 0 0 0        without the rooms below 3: bit 3 stands for room 6, bit 5 for room 8
        & −             0 0 0 1 0 0 0        x & −x keeps the lowest 1; its bit_length is 4, so it is bit 3

    Shifting an int of a few thousand bits takes less than a microsecond, a search through a list of rooms far more.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # room → numbers of the rows that have it
        self.rooms = 0  # the rooms r for which rows_with[r] is not empty
        self.n_rows = 0

    def least_room(self, least: int) -> int:
        """The smallest room from `least` up that some row has; if none has, that of a new row."""
        above = self.rooms >> least
        if not above:
            return self.capacity
        lowest = above & -above
        return least + lowest.bit_length() - 1

    def take(self, room: int, most: int) -> list[int]:
        """Up to `most` rows with this room, at least one; new ones if no row has it."""
        if not self.rows_with[room]:
            self.rows_with[room] = list(range(self.n_rows, self.n_rows + most))
            self.n_rows += most
        taken = self.rows_with[room][:most]
        self.rows_with[room] = self.rows_with[room][most:]
        if not self.rows_with[room]:
            self.rooms &= ~(1 << room)
        return taken

    def put_back(self, rows: list[int], room: int) -> None:
        """Rows that have this room now."""
        self.rows_with[room] += rows
        self.rooms |= 1 << room


def fill_ratio(lengths: np.ndarray, n_rows: int, capacity: int) -> float:
    """The share of `n_rows` rows' room that samples of these lengths take, 0 … 1."""
    if not n_rows:
        return 0.0
    return float(np.sum(lengths)) / (n_rows * capacity)
