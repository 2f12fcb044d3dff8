"""What one forward pass reads: inputs, targets, a mask, and which document each token is in."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """The rows at some data positions.

    x, y: (B, T) int64, y[t] the token after x[t]. mask: (B, T) bool, True where y counts as a target
    (None: everywhere). documents: (B, T) int32, the number of the document that x[t] is in,
    non-decreasing along a row (None: attention sees the whole row).
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """On CUDA the copy is from pinned memory and does not block."""
        if device.type != "cuda":
            return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))
        return Batch(
            *(None if tensor is None else tensor.pin_memory().to(device, non_blocking=True) for tensor in self)
        )

    def n_targets(self) -> int:
        return self.y.numel() if self.mask is None else int(self.mask.sum())

    def with_placeholders(self, n: int) -> "Batch":
        """The batch with n positions (id 0, no targets) before each document, for a model's n virtual tokens.

        Without `documents` each row is one document. Rows become as wide as the one with most documents needs; the
        others end in padding with mask False.

            n = 2    x           5 6 7 8               documents 3 3 4 6
                     begins      1 0 1 1
                     column      2 3 6 9               its own + 2 for each document that has begun
                     wide x      0 0 5 6 0 0 7 0 0 8   documents 1 1 1 1 2 2 2 3 3 3
        """
        if n == 0:
            return self
        begins = torch.zeros_like(self.x)  # (B, T): 1 where a document begins
        begins[:, 0] = 1
        if self.documents is not None:
            begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        column = torch.arange(self.x.shape[1]) + n * begins.cumsum(1)  # (B, T): where each token goes
        width = int(column.max()) + 1

        def spread(values: Tensor, columns: Tensor) -> Tensor:
            """values (B, T) put into these columns of zeros (B, width)."""
            return values.new_zeros(len(values), width).scatter(1, columns, values)

        mask = torch.ones_like(self.x, dtype=torch.bool) if self.mask is None else self.mask
        documents = None
        if self.documents is not None:  # numbered anew; a document begins with its placeholders
            documents = spread(begins, column - n).cumsum(1).int()
        return Batch(spread(self.x, column), spread(self.y, column), spread(mask, column), documents)


def shifted(rows: np.ndarray, mask: np.ndarray | None = None, documents: np.ndarray | None = None) -> Batch:
    """A Batch of X and Y from rows of T + 1 tokens, (B, T + 1) int64; mask and documents: (B, T)."""
    tokens = torch.from_numpy(rows)
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        None if mask is None else torch.from_numpy(mask),
        None if documents is None else torch.from_numpy(documents.astype(np.int32)),
    )


def documents_in(x: np.ndarray, start_id: int) -> np.ndarray:
    """Number of the document each input token belongs to: (B, T) int32.

    start_id: bos if every document begins with one, else eos. As an input, the eos that ends a document then counts as
    the beginning of the next: the next document's first token is predicted from it, without seeing the document
    before. This matches generation, which starts from a single bos or eos.
    """
    return np.cumsum(x == start_id, axis=1).astype(np.int32)
