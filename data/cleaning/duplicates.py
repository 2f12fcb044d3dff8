"""Which documents are copies of others, exactly or nearly; one of each is kept.

Of copies the first is kept; of near ones the first, or the longest if that is much longer. Documents for validation
come first, so that no copy of one stays in training.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cleaning import near_duplicates
from data.cleaning.judging import read_judged
from data.cleaning.outcomes import EXACT, NEAR, Outcomes, mark_copies

LEAST_OF_PROMPTS = 0.7  # of shingles of 3: at 0.6 begin other tasks
LONG_PROMPT = 20  # tokens; of shorter ones a word is another task: the opposite of “thin”, the opposite of “fat”
MUCH_LONGER = 1.25  # times: a text that is so much longer than the first of its cluster is kept in its place


def mark_exact(found: Outcomes) -> None:
    """Mark those documents, of all that are left, whose text has the same hash as an earlier one's."""
    numbers = np.flatnonzero(found.reason == 0)
    _, first, inverse = np.unique(found.hash[numbers], return_index=True, return_inverse=True)
    originals = numbers[first[inverse]]
    mark_copies(found, *_copies(numbers, originals), EXACT)


def mark_near(found: Outcomes, judged: list[Path], folder: Path) -> None:
    """Mark those documents, of all that are left, that are nearly the same as one that is kept.

    Their signatures lie in a file in `folder` meanwhile.
    """
    numbers = np.flatnonzero(found.reason == 0)
    if not len(numbers):
        return
    file = folder / "signatures.scratch"
    with file.open("wb") as stream:  # written as any file: through a map a full disk would end the process
        for arrays in _of_those_left(found, judged, ("signatures",)):
            stream.write(arrays["signatures"].tobytes())
    signatures = np.memmap(file, np.uint32, "r", shape=(len(numbers), near_duplicates.ENTRIES))

    first = near_duplicates.clusters(signatures, near_duplicates.LEAST)
    of = _to_keep(first, found.size[numbers], found.is_val[numbers])
    for copy in np.flatnonzero(of != np.arange(len(of))):
        found.similarity[numbers[copy]] = (signatures[copy] == signatures[of[copy]]).mean()
    mark_copies(found, *_copies(numbers, numbers[of]), NEAR)
    del signatures
    file.unlink()


def mark_near_prompts(found: Outcomes, judged: list[Path]) -> None:
    """The same for instructions, by their prompts: the first lines must be near, and what follows these too.

    One passage serves several tasks, and one task many passages. Short texts must have the same words, and so must
    the system's messages and earlier answers, of any length: in another context a prompt asks for something else.
    """
    for least in (1.0, LEAST_OF_PROMPTS):
        numbers = np.flatnonzero(found.reason == 0)
        parts = list(_of_those_left(found, judged, ("signatures", "signatures_below", "n_tokens", "context")))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        n_tokens = joined["n_tokens"]  # (m, 2): of the first line, and of what follows
        is_judged = (n_tokens[:, 0] >= LONG_PROMPT) | (least == 1)
        numbers, n_tokens = numbers[is_judged], n_tokens[is_judged]
        signatures, below = (joined[name][is_judged] for name in ("signatures", "signatures_below"))

        # The hash of the context goes into each entry, so that those of two contexts agree in none.
        context = joined["context"][is_judged].astype(np.uint32)  # its lower half
        signatures = np.where(signatures == near_duplicates.NOTHING, signatures, signatures ^ context[:, None])

        # Every second entry of both, so that a cluster is near in both together; then each part by itself.
        both = np.concatenate([signatures, below], axis=1)[:, ::2].copy()
        first = near_duplicates.clusters(both, least)
        of = _to_keep(first, found.size[numbers], found.is_val[numbers])
        for copy in np.flatnonzero(of != np.arange(len(of))):
            shares = [(part[copy] == part[of[copy]]).mean() for part in (signatures, below)]
            is_short = np.minimum(n_tokens[copy], n_tokens[of[copy]]) < LONG_PROMPT
            found.similarity[numbers[copy]] = shares[0]
            if any(share < (1 if short else least) for share, short in zip(shares, is_short, strict=True)):
                of[copy] = copy
        mark_copies(found, *_copies(numbers, numbers[of]), NEAR)


def _of_those_left(found: Outcomes, judged: list[Path], names: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
    """These arrays of each piece, of the documents that are left."""
    for number, path in enumerate(judged):
        arrays = read_judged(path)
        is_left = found.reason[found.begins[number] : found.begins[number + 1]] == 0
        yield {name: arrays[name][is_left] for name in names}


def _to_keep(first: np.ndarray, size: np.ndarray, is_val: np.ndarray) -> np.ndarray:
    """For each text the one that is kept of its cluster, (m,) int64. first: (m,), the first text of it."""
    longest = near_duplicates.kept(first, size)
    return np.where(is_val[first] | (size[longest] <= MUCH_LONGER * size[first]), first, longest)


def _copies(numbers: np.ndarray, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(copies, the original of each), of documents and their originals, of which some are themselves."""
    is_copy = numbers != originals
    return numbers[is_copy], originals[is_copy]
