"""Lesson 2, one way to do it."""

from collections import Counter
from itertools import pairwise


def joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each occurrence of the pair made one, from left to right."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def learn_merges(words: dict[str, int], n_merges: int) -> list[tuple[str, str]]:
    """See the exercise."""
    pieces = {word: list(word) for word in words}
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, number in words.items():
            for pair in pairwise(pieces[word]):
                counts[pair] += number
        if not counts:
            break
        most = max(counts.values())
        merges.append(min(pair for pair in counts if counts[pair] == most))
        pieces = {word: joined(cut, merges[-1]) for word, cut in pieces.items()}
    return merges


def encode(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """See the exercise."""
    pieces = list(word)
    for pair in merges:
        pieces = joined(pieces, pair)
    return pieces


# Counted on 500 texts, the table of 1,000 pieces has never seen 7 % of the pairs that come, that of 400 pieces 0.7 %.
# On 20,000 texts each has seen nearly all, and the loss a token falls. The bits per byte fall on both: with longer
# pieces the table looks back further in the text.
NATS_A_TOKEN = "rises"
BITS_PER_BYTE = "falls"
