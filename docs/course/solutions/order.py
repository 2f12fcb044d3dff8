"""Lesson 7, one way to do it."""

from collections.abc import Callable


def unpermute(window: int, n: int, key: int, mixed: Callable[[int, int, int, int], int]) -> int:
    """A round gave (right, left ⊕ f(right)): its first half tells f, so the second half tells left."""
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = window >> bits, window % (1 << bits)
        for turn in reversed(range(4)):
            left, right = right ^ mixed(left, key, turn, bits), left
        window = left << bits | right
        if window < n:  # else it had gone round again
            return window


LARGER_BATCHES = "left out"  # positions 8,000 to 15,999
SMALLER_BATCHES = "twice"  # positions 4,000 to 7,999
