"""Which documents are copies of others, exactly or nearly; one of each is kept.

Of copies the first is kept; of near ones the first, or the longest if that is much longer. Documents for validation
come first, so that no copy of one stays in training.
"""

from pathlib import Path

import numpy as np

from data.cleaning import near_duplicates
from data.cleaning.judging import read_judged
from data.cleaning.outcomes import EXACT, NEAR, Outcomes, mark_copies

LEAST = {False: near_duplicates.LEAST, True: 0.7}  # by whether prompts are compared: at 0.6 begin other tasks
MUCH_LONGER = 1.25  # times: a text that is so much longer than the first of its cluster is kept in its place


def mark_exact(found: Outcomes) -> None:
    """Mark those documents, of all that are left, whose text has the same hash as an earlier one's."""
    numbers = np.flatnonzero(found.reason == 0)
    _, first, inverse = np.unique(found.hash[numbers], return_index=True, return_inverse=True)
    originals = numbers[first[inverse]]
    mark_copies(found, *_copies(numbers, originals), EXACT)


def mark_near(found: Outcomes, judged: list[Path], folder: Path, is_sft: bool) -> None:
    """Mark those documents, of all that are left, that are nearly the same as one that is kept.

    Signatures lie in a file in `folder` meanwhile. Of instructions, prompts are near if their first lines are, and what
    follows these too: one passage serves several tasks.
    """
    numbers = np.flatnonzero(found.reason == 0)
    if not len(numbers):
        return
    file = folder / "signatures.scratch"
    signatures = np.memmap(file, np.uint32, "w+", shape=(len(numbers), near_duplicates.ENTRIES))
    below = np.zeros_like(signatures) if is_sft else None
    n_before = 0
    for number, path in enumerate(judged):
        arrays = read_judged(path)
        is_left = found.reason[found.begins[number] : found.begins[number + 1]] == 0
        here = slice(n_before, n_before + int(is_left.sum()))
        signatures[here] = arrays["signatures"][is_left]
        if below is not None:
            below[here] = arrays["signatures_below"][is_left]
        n_before = here.stop

    # One of each cluster is kept; the others are its copies, as similar to it as the signatures say.
    first = near_duplicates.clusters(signatures, LEAST[is_sft])
    size, is_val = found.size[numbers], found.is_val[numbers]
    longest = near_duplicates.kept(first, size)
    of = np.where(is_val[first] | (size[longest] <= MUCH_LONGER * size[first]), first, longest)
    similarity = np.ones(len(numbers))
    for copy in np.flatnonzero(of != np.arange(len(of))):
        similarity[copy] = (signatures[copy] == signatures[of[copy]]).mean()
        if below is not None and (below[copy] == below[of[copy]]).mean() < LEAST[is_sft]:
            of[copy] = copy
    found.similarity[numbers] = similarity
    mark_copies(found, *_copies(numbers, numbers[of]), NEAR)
    del signatures
    file.unlink()


def _copies(numbers: np.ndarray, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(copies, the original of each), of documents and their originals, of which some are themselves."""
    is_copy = numbers != originals
    return numbers[is_copy], originals[is_copy]
