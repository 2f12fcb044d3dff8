"""Lesson 11, to be filled in; then `pytest docs/course/checks/reward.py`."""

from torch import Tensor


def best_scale(difference: Tensor) -> float:
    """The factor s ≥ 0 with which σ(s (r_w − r_l)) fits best: that makes −log σ(s · difference) least, on average.

    difference: r_w − r_l of pairs that were not trained on, (P,), some of them negative, their mean positive. A scale
    leaves the order of the answers as it is, and makes a score that is too sure an honest one. (The slope of the loss
    at s grows with s, so it is zero at one place.)
    """
    raise NotImplementedError


# What happens to the loss on held-out pairs, if 5 is added to all scores? And to the share of pairs in the right order,
# if all scores are doubled? "falls", "stays" or "rises".
LOSS_OF_SHIFTED = ""
ACCURACY_OF_DOUBLED = ""
