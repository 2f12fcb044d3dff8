"""Lesson 1, to be filled in; then `pytest docs/course/checks/bigram.py`."""

import numpy as np


def trigram(train: np.ndarray, val: np.ndarray, p_two: np.ndarray, prior: float) -> np.ndarray:
    """The probability of each token of `val` from the third on, given the two before it: (n − 2,).

    With n_wxy, how often y came after w x in `train`, and the bigram's p(y | x) as the shorter context:

        p(y | w x) = (n_wxy + k p(y | x)) / (n_wx + k)

    train, val: ids, (n,) int64. p_two: the bigram, (V, V). prior: k. A V × V × V table would not fit into memory.
    """
    raise NotImplementedError


# The table is counted on a tenth of the training text. What happens to the bits per byte on that tenth itself, and to
# those on the validation text, compared with the table of the whole text? "falls", "stays" or "rises".
ON_THE_TENTH = ""
ON_VALIDATION = ""
