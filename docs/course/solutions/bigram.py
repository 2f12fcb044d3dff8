"""Lesson 1, one way to do it."""

from collections import Counter
from itertools import pairwise

import numpy as np


def trigram(train: np.ndarray, val: np.ndarray, p_two: np.ndarray, prior: float) -> np.ndarray:
    """See the exercise."""
    two = Counter(pairwise(train[:-1]))  # without the last pair, which nothing follows
    three = Counter(zip(train[:-2], train[1:-1], train[2:], strict=True))
    triples = zip(val[:-2], val[1:-1], val[2:], strict=True)
    return np.array([(three[w, x, y] + prior * p_two[x, y]) / (two[w, x] + prior) for w, x, y in triples])


ON_THE_TENTH = "falls"  # less text is learned by heart more easily
ON_VALIDATION = "rises"
