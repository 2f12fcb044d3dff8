"""Whole documents in rows: best fit, so that few of them are cut and little room is left over.

Windows cut a corpus every T tokens, wherever that is, so most rows begin in the middle of a document and end in the
middle of another: what such an end follows from is not in sight. Here a document is cut only if it is longer than a
row (best-fit packing, Ding et al. 2024, arXiv:2404.10830).
"""

from typing import NamedTuple

import numpy as np

from minillm.base.errors import UserError
from minillm.datasets.packing import pack
from minillm.datasets.token_bins import TokenBins

SCANNED = 1 << 22  # tokens that are searched for eos at a time
PACKED = 1 << 18  # pieces that are packed at a time: this bounds the memory it takes


class PackedRow(NamedTuple):
    """One row: its tokens, which piece each is in, and whether it is room left over."""

    tokens: np.ndarray  # (T + 1,) int64; room left over holds what begins a document
    pieces: np.ndarray  # (T + 1,) int64: 0, 1, … along the row; room left over is one more piece
    is_room: np.ndarray  # (T + 1,) bool


class PackedDocuments:
    """The documents of a split as rows of T + 1 tokens, each a few pieces: whole documents, or parts of long ones.

    A piece begins with what a document begins with: its bos, or where documents have none the eos before (but for the
    first of the split, which has none). The parts of a document overlap by one token, as windows do, so every token
    but the first of each document is a target once.
    """

    def __init__(self, bins: TokenBins, seq_len: int):
        """Finds the documents and packs them: a second or two for a million. seq_len: T in tokens.

        The rows depend on bins and seq_len alone. Raises UserError if it is not known where documents end.
        """
        if bins.eos_id is None:
            raise UserError(f"{bins.path}: the end-of-document id is unknown, so --pack best_fit cannot be")
        self.bins = bins
        self.capacity = seq_len + 1
        ends = document_ends(bins)  # (n documents,)
        begins = np.concatenate([[0], ends[:-1]])
        if bins.start_id == bins.eos_id:
            begins = np.maximum(begins - 1, 0)  # with the eos before
        self.n_documents = len(ends)
        self.n_cut = int((ends - begins > self.capacity).sum())
        ends_of_windows = begins // seq_len * seq_len + self.capacity  # of the window in which each document begins
        self.n_cut_by_windows = int((ends > ends_of_windows).sum())
        self.piece_begins, self.piece_lengths = pieces_of(begins, ends, self.capacity)  # (n pieces,), (n pieces,)

        # The pieces row by row, and where each row begins among them.
        orders, row_sizes = [], []
        for first in range(0, len(self.piece_lengths), PACKED):
            rows = pack(self.piece_lengths[first : first + PACKED], self.capacity, 0)
            orders.append(first + np.concatenate(rows))
            row_sizes.append(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        self.order = np.concatenate(orders)  # (n pieces,)
        self.edges = np.cumsum(np.concatenate([[0], *row_sizes]))  # (n rows + 1,)

    @property
    def n_rows(self) -> int:
        return len(self.edges) - 1

    @property
    def padding(self) -> float:
        """The share of the room that is left over, 0 … 1."""
        return 1 - float(self.piece_lengths.sum()) / (self.n_rows * self.capacity)

    def describe(self) -> str:
        """A line on what packing gives, and how many documents windows would cut."""
        cut, by_windows = self.n_cut / self.n_documents, self.n_cut_by_windows / self.n_documents
        return (
            f"{self.bins.path}: {self.n_documents:,} documents in {self.n_rows:,} rows, {self.padding:.2%} of their "
            f"room left over; {cut:.1%} of the documents are cut (by windows {by_windows:.1%})"
        )

    def row(self, number: int) -> PackedRow:
        """The row of this number, from 0."""
        chosen = self.order[self.edges[number] : self.edges[number + 1]]
        lengths = self.piece_lengths[chosen]
        n_room = self.capacity - int(lengths.sum())
        texts = [self.bins.read(int(self.piece_begins[piece]), int(self.piece_lengths[piece])) for piece in chosen]
        tokens = np.concatenate([*texts, np.full(n_room, self.bins.start_id)]).astype(np.int64)
        pieces = np.repeat(np.arange(len(chosen) + 1), [*lengths, n_room])
        return PackedRow(tokens, pieces, pieces == len(chosen))


def document_ends(bins: TokenBins) -> np.ndarray:
    """The number of the token after each document's eos, (n documents,) int64; the last ends with the split."""
    ends = []
    for begin, tokens in zip(bins.begins, bins.arrays, strict=False):
        for offset in range(0, len(tokens), SCANNED):
            found = np.flatnonzero(tokens[offset : offset + SCANNED] == bins.eos_id)
            ends.append(found + begin + offset + 1)
    ends = np.concatenate(ends)
    if not len(ends) or ends[-1] != bins.n_tokens:  # the last has no eos
        ends = np.append(ends, bins.n_tokens)
    return ends


def pieces_of(begins: np.ndarray, ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(first token, number of tokens) of the pieces that documents are cut into, (n pieces,) int64 each.

    begins, ends: (n documents,) int64. Pieces of one document overlap by one token and have `capacity` tokens, but for
    the last. A document of a single token has no target and gives no piece.
    """
    n_targets = ends - begins - 1
    n_pieces = -(-n_targets // (capacity - 1))  # of each document
    document = np.repeat(np.arange(len(begins)), n_pieces)  # of each piece
    place = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # in its document
    first = begins[document] + place * (capacity - 1)
    return first, np.minimum(capacity, ends[document] - first)
