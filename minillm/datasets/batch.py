"""What one forward pass reads: inputs, targets, a mask, and which document each token is in."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """The rows at some data positions.

    x, y: (B, T) int64, y[t] the token after x[t]. mask: (B, T) bool, True where y counts as a target
    (None: everywhere). documents: (B, T) int32, the number of the document that x[t] is in,
    non-decreasing along a row (None: attention sees the whole row). places: see `with_places`.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Without waiting for the device: see `sent`."""
        return Batch(*(sent(tensor, device) for tensor in self))

    def with_places(self) -> "Batch":
        """The batch with the places among its B·T at which the mask is True, (N,) int64; without any, place 0.

        How many they are a GPU would have to tell the host, which waits for that; so it is asked while the mask is on
        the host, or between two passes. To be called last: rows taken of the batch have other places.
        """
        mask = torch.ones_like(self.y, dtype=torch.bool) if self.mask is None else self.mask
        places = mask.flatten().nonzero().squeeze(-1)
        return self._replace(places=places if len(places) else places.new_zeros(1))

    def tokens(self) -> Tensor:
        """Inputs and the last target: (B, T + 1) int64. A row's last token is in y alone."""
        return torch.cat((self.x[:, :1], self.y), dim=1)

    def n_targets(self) -> int:
        return self.y.numel() if self.mask is None else int(self.mask.sum())

    def part(self, row_part) -> "Batch":
        """The tokens of each row that a `RowPart` has; `documents` stay those of the whole row.

        Rows are padded to equal parts, by a document of its own without targets.
        """
        if row_part.context * row_part.tensor == 1:
            return self
        x, y, mask, documents = self[:4]
        n_missing = row_part.padded(x.shape[1]) - x.shape[1]
        if n_missing:
            mask = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
            mask = F.pad(mask, (0, n_missing))
        if n_missing and documents is not None:
            padding = documents[:, -1:] + 1  # (B, 1)
            documents = torch.cat((documents, padding.expand(-1, n_missing)), 1)
        x, y, mask = (None if tensor is None else row_part.of(tensor) for tensor in (x, y, mask))
        return Batch(x, y, mask, documents)

    def without_targets(self) -> "Batch":
        """The batch with no position that counts."""
        return self._replace(mask=torch.zeros_like(self.y, dtype=torch.bool), places=None)

    def one_text_a_row(self) -> "Batch":
        """The batch with each document in a row of its own, as wide as the longest; rows end in padding, mask False."""
        if self.documents is None:
            return self
        begins = torch.ones_like(self.x, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        index = torch.arange(self.x.shape[1]).expand_as(self.x)
        columns = index - torch.where(begins, index, 0).cummax(1).values  # position in its document, (B, T)
        rows = (begins.flatten().cumsum(0) - 1).view_as(self.x)  # (B, T)
        shape = int(rows[-1, -1]) + 1, int(columns.max()) + 1

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(shape).index_put((rows, columns), values)

        mask = torch.ones_like(self.x, dtype=torch.bool) if self.mask is None else self.mask
        return Batch(placed(self.x), placed(self.y), placed(mask))

    def split(self, n_rows: int) -> "list[Batch]":
        """The batch as batches of at most so many rows."""
        starts = range(0, len(self.x), n_rows)
        return [Batch(*(None if t is None else t[start : start + n_rows] for t in self)) for start in starts]


def mean_span(batches: Sequence[Batch]) -> float:
    """How many tokens the document of a token has in its row, on average over all tokens of batches with documents."""
    n_tokens, n_pairs = 0, 0
    for batch in batches:
        documents = batch.documents.numpy()  # (B, T)
        is_first = np.ones(documents.shape, dtype=bool)
        is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        lengths = np.diff(np.flatnonzero(is_first), append=documents.size)
        n_tokens += documents.size
        n_pairs += int((lengths**2).sum())
    return n_pairs / n_tokens


def sent(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on a device. To a GPU it is copied from pinned memory, so that the host need not wait for the GPU."""
    if tensor is None or device.type != "cuda":
        return None if tensor is None else tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
