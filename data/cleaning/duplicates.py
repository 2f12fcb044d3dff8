"""Which documents are copies of others, exactly or nearly; one of each is kept.

Of copies the first is kept, of near ones the longest; of a document for validation and its copies in training, that
for validation.
"""

import numpy as np


def exact(hashes: np.ndarray, is_left: np.ndarray) -> np.ndarray:
    """For each document the number of the one it copies, −1 where it copies none, (n,) int64.

    hashes: (n,) uint64; is_left: (n,) bool, which documents take part. The first of equal ones is the original.
    """
    original = np.full(len(hashes), -1, np.int64)
    numbers = np.flatnonzero(is_left)
    _, first, inverse = np.unique(hashes[numbers], return_index=True, return_inverse=True)
    of = numbers[first[inverse]]
    is_copy = of != numbers
    original[numbers[is_copy]] = of[is_copy]
    return original
