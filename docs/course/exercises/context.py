"""Lesson 8, to be filled in; then `pytest docs/course/checks/context.py`."""

from torch import Tensor


def rotate_pairs(x: Tensor, positions: Tensor, base: float, stretch: float) -> Tensor:
    """RoPE for neighbouring pairs: (x[2i], x[2i + 1]) is turned by position / stretch · base^(−2i/D) radians.

    x: (T, H, D), D even. positions: (T,) int64. stretch: new length / old length, 1 for none; "linear" scaling.
    Returns (T, H, D).
    """
    raise NotImplementedError


# All positions of a text are 1,000 higher. What happens to the products of its queries and keys?
# "stays" or "changes".
SHIFTED = ""

# The base is 1,000,000 in place of 10,000. How many tokens does the slowest pair take for a turn then, and how many the
# fastest? "fewer", "as many" or "more".
SLOWEST = ""
FASTEST = ""
