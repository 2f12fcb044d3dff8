import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.datasets.packing import fill_ratio, pack, shuffled

CAPACITY = 32
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=80).map(lambda lengths: np.array(lengths, dtype=np.int64))


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The textbook's loop over all rows: the lengths in each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(LENGTHS, st.integers(0, 1 << 70))
@settings(deadline=None)
def test_every_example_lies_in_one_row_and_no_row_overflows(lengths, seed):
    rows = pack(lengths, CAPACITY, seed)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= CAPACITY for row in rows)


@given(LENGTHS)
@settings(deadline=None)
def test_rows_are_as_full_as_the_textbooks(lengths):
    ours = sorted(int(lengths[row].sum()) for row in pack(lengths, CAPACITY, 0))
    assert ours == sorted(sum(row) for row in best_fit_decreasing(lengths, CAPACITY))


def test_a_packing_by_hand():
    lengths = np.array([7, 3, 6, 4, 10])
    assert {frozenset(lengths[row].tolist()) for row in pack(lengths, 10, 0)} == {
        frozenset(row) for row in ([10], [7, 3], [6, 4])
    }
    assert fill_ratio(lengths, 3, 10) == 1.0
    assert fill_ratio(lengths, 4, 10) == 0.75


def test_an_epoch_has_its_own_rows_but_as_many_as_any_other():
    lengths = np.random.default_rng(0).integers(5, 60, size=2000)
    first, again, second, other_seed = (pack(lengths, 256, *key) for key in [(3, 0), (3, 0), (3, 1), (4, 0)])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) == len(second) == len(other_seed)
    partners = [{frozenset(row.tolist()) for row in rows} for rows in (first, second, other_seed)]
    assert len(partners[0] & partners[1]) < 10
    assert len(partners[0] & partners[2]) < 10
    assert fill_ratio(lengths, len(first), 256) > 0.99


def test_rows_come_in_no_order_of_length():
    lengths = np.r_[np.full(500, 64), np.full(500, 40)]
    longest = np.array([lengths[row].max() for row in pack(lengths, 64, 0)])
    assert 200 < (longest[:500] == 64).sum() < 300


def test_shuffled_is_pinned():
    # A resumed run must see the order of the run it goes on from, whatever numpy it meets.
    assert shuffled(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert shuffled(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert sorted(shuffled(1000, -1, 5).tolist()) == list(range(1000))


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="run from 1 to 9, allowed are 1 to 8"):
        pack(np.array([1, 9]), 8, 0)
    with pytest.raises(ValueError, match="run from 0"):
        pack(np.array([0, 4]), 8, 0)
    assert pack(np.array([], dtype=np.int64), 8, 0) == []
