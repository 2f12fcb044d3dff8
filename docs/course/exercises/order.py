"""Lesson 7, to be filled in; then `pytest docs/course/checks/order.py`."""

from collections.abc import Callable


def unpermute(window: int, n: int, key: int, mixed: Callable[[int, int, int, int], int]) -> int:
    """The data position at which a window is read: `permute(unpermute(window, n, key), n, key) == window`.

    So that a sample whose loss was a spike can be found in the order, and the other way round. n may be millions, and
    nothing may be stored: undo what `permute` of the experiment does, the last round first.

    mixed: the experiment's f(right, key, turn, bits).
    """
    raise NotImplementedError


# A run is stopped after 1,000 steps with batches of 8 windows. A step reads the positions from its number (from 0)
# times the batch size on. The run goes on with batches of 16, or with batches of 4, and the next step is again number
# 1,000. In each case, is there a window that is read twice in the epoch, or one that is left out?
# "twice", "left out" or "neither".
LARGER_BATCHES = ""
SMALLER_BATCHES = ""
