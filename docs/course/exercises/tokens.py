"""Lesson 2, to be filled in; then `pytest docs/course/checks/tokens.py`."""


def learn_merges(words: dict[str, int], n_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the pairs of pieces that are joined, in their order.

    Each word begins as its characters. Count how often each pair of neighbours comes, over all words times their
    number; join the commonest pair wherever it stands; begin again. Of equally common pairs take the first in the
    order of `min`. Stop early if no pair is left.

    words: word → how often it comes.
    """
    raise NotImplementedError


def encode(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces of a word: its characters, joined by the merges in the order in which they were learned."""
    raise NotImplementedError


# The vocabulary grows from 400 to 1,000 pieces, learned and counted on 500 texts of the small corpus. What happens to
# the nats a token and to the bits per byte of the table of pairs? "falls", "stays" or "rises".
NATS_A_TOKEN = ""
BITS_PER_BYTE = ""
