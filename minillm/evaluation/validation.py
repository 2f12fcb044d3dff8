"""Validation loss in nats and bits per byte, with the floor where it is known.

    bits per byte = summed nats of all evaluated targets, ends of documents included / ln 2 / UTF-8 bytes of their text

It does not depend on the vocabulary, so models with different tokenizers can be compared, also with a generator that
knows how many bits of information each document holds: no model can be below that floor on average.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minillm.base.errors import UserError
from minillm.datasets import text_files
from minillm.datasets.batch import Batch
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import validation_part
from minillm.distributed.ranks import Ranks
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer


class TextTokens(NamedTuple):
    """A text file's tokens, with the attributes that `validation.Validation` reads from `TokenBins`."""

    arrays: list[np.ndarray]  # one, int64: each document's tokens and eos, after bos if texts begin with it
    eos_id: int
    start_id: int
    path: Path


def read_text(path: Path, tokenizer: Tokenizer, *, split: str = "blank", field: str = "text") -> TextTokens:
    """Tokenize the documents of a .txt, .jsonl, .json or .parquet file (also .gz) as `data/prepare.py` would.

    split: where documents of a .txt end: "blank" lines, every one of its "lines", or with the "file".
    """
    files = text_files.find_files([path])
    documents = [text for file in files for text, _ in text_files.texts_of(file, boundary=split, field=field) if text]
    if not documents:
        raise UserError(f"{path}: holds no text")
    start, end = tokenizer.start_id, tokenizer.eos_id
    begin = [start] if start != end else []
    ids = [t for tokens in tokenizer.encode_many(documents) for t in (*begin, *tokens, end)]
    return TextTokens([np.array(ids, dtype=np.int64)], end, start, Path(path))


ROWS = 16  # rows per batch


@torch.no_grad()
def token_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """Summed loss in nats, and the number of targets, over some batches."""
    training, nats, targets = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        targets += batch.n_targets()
        batch = batch.to(device)
        nats += float(model(batch.x, batch.y, mask=batch.mask, documents=batch.documents))
    model.train(training)
    return nats, targets


class Validation:
    """A fixed part of a validation split, the first whole documents of it."""

    def __init__(
        self, bins: TokenBins, tokenizer: Tokenizer | None, seq_len: int, max_tokens: int, documents: bool = False
    ):
        """bins: the validation split; tokenizer: for the number of bytes (None: no bits per byte); seq_len and
        max_tokens in tokens; documents: attention stays inside each. Raises `UserError` as `TokenBins` does.
        """
        self.part, self.documents, self.start_id = validation_part(bins, seq_len, max_tokens), documents, bins.start_id
        targets = self.part.rows[:, 1:][self.part.mask]
        self.n_bytes, self.no_bytes = None, None  # no_bytes: why the number of bytes cannot be told
        if tokenizer is not None:
            try:
                self.n_bytes = int(tokenizer.byte_lengths()[targets].sum())
            except UserError as reason:
                self.no_bytes = str(reason)
        self.floor, self.floor_error = self._floor(bins, tokenizer, targets)

    def _floor(self, bins: TokenBins, tokenizer, targets: np.ndarray) -> tuple[float | None, float | None]:
        """Bits per byte of information in these documents according to their generator, and the standard error."""
        file = Path(bins.path) / "val_bits.npy"
        n = self.part.n_documents
        if self.n_bytes is None or n < 2 or not file.is_file():
            return None, None
        bits = np.load(file, allow_pickle=False)[:n]
        ends = np.flatnonzero(targets == bins.eos_id)
        sizes = np.diff(np.cumsum(tokenizer.byte_lengths()[targets])[ends], prepend=0)
        floor = float(bits.sum() / sizes.sum())
        # of a ratio of sums over independent documents (Cochran, Sampling Techniques, equation 2.46)
        residual = bits - floor * sizes
        return floor, float(math.sqrt((residual**2).sum() * n / (n - 1)) / sizes.sum())

    def scores(self, model: Transformer, ranks: Ranks, autocast) -> dict[str, float]:
        """val_loss (nats a token) and, where bytes and floor are known, val_bpb, floor_bpb and its standard error.

        The ranks share the work. autocast: a context to compute in.
        """
        batches = [b.with_placeholders(model.n_virtual) for b in self.part.batches(ROWS, self.documents, self.start_id)]
        batches = batches[ranks.rank :: ranks.world]
        with autocast:
            nats, targets = ranks.sum(*token_loss(model, batches, ranks.device))
        scores = {"val_loss": nats / targets}
        if self.n_bytes:
            scores["val_bpb"] = nats / math.log(2) / self.n_bytes
        if self.floor is not None:
            scores |= {"floor_bpb": self.floor, "floor_error": self.floor_error}
        return scores


def answer_loss(model: nn.Module, rows, max_tokens: int, ranks: Ranks, autocast) -> dict[str, float]:
    """val_loss of held-out instructions: nats a learned token over the first rows, up to `max_tokens` positions.

    rows: a `chat_data.InstructionRows`. The ranks share the work; autocast: the context to compute in.
    """
    n = min(rows.rows_per_epoch, max(1, max_tokens // rows.seq_len))
    batches = [rows.batch(np.arange(i, min(i + ROWS, n))) for i in range(0, n, ROWS)][ranks.rank :: ranks.world]
    with autocast:
        nats, targets = ranks.sum(*token_loss(model, batches, ranks.device))
    return {"val_loss": nats / targets}
