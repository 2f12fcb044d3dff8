"""What one forward pass reads: inputs, targets, a mask, documents."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """The examples at some data positions.

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
            return Batch(*(t if t is None else t.to(device) for t in self))
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))

    def n_targets(self) -> int:
        return self.y.numel() if self.mask is None else int(self.mask.sum())

    def with_placeholders(self, n: int) -> "Batch":
        """The batch with n positions (id 0, no targets) before each document, for a model's n virtual tokens.

        Without `documents` each row is one document. Rows become as wide as the one with most documents needs; the
        others end in padding with mask False.
        """
        if n == 0:
            return self
        begins = torch.zeros_like(self.x)
        begins[:, 0] = 1
        if self.documents is not None:
            begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        index = torch.arange(self.x.shape[1]) + n * begins.cumsum(1)  # where each token goes, (B, T)
        width = int(index.max()) + 1

        def spread(values: Tensor, index: Tensor = index) -> Tensor:
            return values.new_zeros(len(values), width).scatter(1, index, values)

        mask = torch.ones_like(self.x, dtype=torch.bool) if self.mask is None else self.mask
        documents = None if self.documents is None else spread(begins, index - n).cumsum(1).int()
        return Batch(spread(self.x), spread(self.y), spread(mask), documents)


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
