"""Validation loss in nats and bits per byte, with the floor where it is known.

    bits per byte = summed nats of all evaluated targets, ends of documents included / ln 2 / UTF-8 bytes of their text

This does not depend on the vocabulary. So models with different tokenizers can be compared with one another, and with
the floor: the information of each document according to the generator that wrote it, below which no model can be on
average.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch
from minillm.datasets.files import text_files
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import validation_part
from minillm.distributed.ranks import Ranks
from minillm.model.transformer import Transformer
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import virtual_tokens

ROWS = 16  # rows per batch
DOCUMENTS = 100  # that are encoded together, the first of them decoded too, to see whether the tokenizer loses some


class TextTokens(NamedTuple):
    """A text file's tokens, with the attributes that `Validation` reads from `TokenBins`."""

    arrays: list[np.ndarray]  # one, int64: each document's tokens and eos, after bos if texts begin with it
    eos_id: int
    start_id: int
    path: Path
    document_bytes: np.ndarray  # (n documents,) int64: UTF-8 bytes of the text of each

    @property
    def n_documents(self) -> int:
        return len(self.document_bytes)


def read_text(
    path: Path,
    tokenizer: Tokenizer,
    *,
    split: str = "blank",
    field: str = "text",
    encoding: str = "utf-8",
    allow_lossy: bool = False,
    max_tokens: int | None = None,
) -> TextTokens:
    """Tokenize the documents of a .txt, .jsonl, .json or .parquet file (also .gz) as `data/prepare.py` would.

    split: where documents of a .txt end: "blank" lines, every one of its "lines", or with the "file".
    allow_lossy: see `check_round_trip`. max_tokens: read no further once there are so many; None: all.
    """
    left_out: Counter[str] = Counter()
    files = text_files.find_files([path], left_out)
    text_files.print_left_out(left_out)
    texts = (
        text
        for file in files
        for text, _ in text_files.texts_of(file, boundary=split, field=field, encoding=encoding)
        if text
    )
    start_id = tokenizer.start_id
    eos_id = tokenizer.eos_id
    begin = [start_id] if start_id != eos_id else []
    parts: list[np.ndarray] = []
    n_bytes: list[int] = []
    while (max_tokens is None or sum(map(len, parts)) < max_tokens) and (some := list(islice(texts, DOCUMENTS))):
        if not parts:
            check_round_trip(tokenizer, some, str(path), allow_lossy)
        n_bytes += [len(text.encode()) for text in some]
        ids: list[int] = []
        for tokens in tokenizer.encode_many(some):
            ids += [*begin, *tokens, eos_id]
        parts.append(np.array(ids, dtype=np.int64))
    if not parts:
        raise UserError(f"{path}: holds no text")
    return TextTokens([np.concatenate(parts)], eos_id, start_id, Path(path), np.array(n_bytes, dtype=np.int64))


# ---- the loss on some batches


@torch.no_grad()
def token_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """Summed loss in nats, and the number of targets, over some batches."""
    was_training = model.training
    model.eval()
    nats = 0.0
    n_targets = 0
    for batch in batches:
        n_targets += batch.n_targets()
        batch = batch.to(device)
        nats += float(model(batch.x, batch.y, mask=batch.mask, documents=batch.documents))
    model.train(was_training)
    return nats, n_targets


def shared_loss(model: nn.Module, batches: list[Batch], ranks: Ranks, autocast) -> tuple[float, float]:
    """`token_loss` over batches that the ranks divide among them; every rank gets the result of all.

    All make equally many forward passes, as those of a sharded model need every rank: where a batch is lacking, one
    without targets. autocast: the context to compute in.
    """
    n_each = -(-len(batches) // ranks.data_world)
    batches_of_rank = batches[ranks.data_rank :: ranks.data_world]
    batches_of_rank += [batches[0].without_targets()] * (n_each - len(batches_of_rank))
    batches_of_rank = [batch.part(ranks.row_part) for batch in batches_of_rank]
    with autocast:
        nats, n_targets = token_loss(model, batches_of_rank, ranks.device)
    nats, n_targets = ranks.sum(nats, n_targets)
    return nats, n_targets


class Validation:
    """A fixed part of a validation split, the first whole documents of it."""

    def __init__(
        self, bins: TokenBins, tokenizer: Tokenizer | None, seq_len: int, max_tokens: int, documents: bool = False
    ):
        """bins: the validation split; tokenizer: for the number of bytes (None: no bits per byte); seq_len and
        max_tokens in tokens; documents: attention stays inside each. Raises `UserError` as `TokenBins` does.
        """
        self.part = validation_part(bins, seq_len, max_tokens)
        self.documents = documents
        self.start_id = bins.start_id
        self.n_bytes: int | None = None
        self.no_bytes: str | None = None  # why the number of bytes is not known
        self.floor: float | None = None
        self.floor_error: float | None = None
        if tokenizer is None:
            return

        # the bytes of the texts, as written down when they were tokenized
        n_documents = self.part.n_documents
        n_bytes = self._sizes(bins, tokenizer)  # (n documents,), or (1,) of a part of one
        if n_bytes is None:
            return
        self.n_bytes = int(n_bytes.sum())

        # the floor, if the generator of the documents left their information
        bits = read_bits(bins) if isinstance(bins, TokenBins) else None
        if bits is not None and n_documents > 1:
            self.floor, self.floor_error = information(bits[:n_documents], n_bytes)

    def _sizes(self, bins: TokenBins, tokenizer: Tokenizer) -> np.ndarray | None:
        """Bytes of each document, (n,) int64, or (1,) of what is read of the first; None, and `no_bytes`, if not known.

        Where they were not written down (bins made elsewhere, a document that is cut), they are those of the
        pieces: just as many, unless the tokenizer changes or loses text.
        """
        if self.part.n_documents and bins.document_bytes is not None:
            return bins.document_bytes[: self.part.n_documents]
        targets = self.part.rows[:, 1:][self.part.mask]  # (all targets,)
        try:
            n_bytes = tokenizer.byte_lengths()[targets]
        except UserError as reason:
            self.no_bytes = str(reason)
            return None
        if not self.part.n_documents:
            return n_bytes.sum(keepdims=True)
        ends = np.flatnonzero(targets == bins.eos_id)  # (n documents,)
        return np.diff(np.cumsum(n_bytes)[ends], prepend=0)

    def scores(self, model: Transformer, ranks: Ranks, autocast) -> dict[str, float]:
        """val_loss (nats a token) and, where bytes and floor are known, val_bpb, floor_bpb and its standard error.

        The ranks share the work. autocast: the context to compute in.
        """
        batches = list(self.part.batches(ROWS, self.documents, self.start_id))
        if virtual_tokens(model) is not None:  # they come before one text a row
            batches = [part for batch in batches for part in batch.one_text_a_row().split(ROWS)]
        nats, n_targets = shared_loss(model, batches, ranks, autocast)
        scores = {"val_loss": nats / n_targets}
        if self.n_bytes:
            scores["val_bpb"] = nats / math.log(2) / self.n_bytes
        if self.floor is not None:
            scores["floor_bpb"] = self.floor
            scores["floor_error"] = self.floor_error
        return scores


def read_bits(bins: TokenBins) -> np.ndarray | None:
    """The information of each validation document in bits, (n,) float64; None if the folder has no `val_bits.npy`.

    Raises UserError if the file is not one finite number from 0 up for each document.
    """
    path = Path(bins.path) / "val_bits.npy"
    if not path.is_file():
        return None
    remedy = "make the data again; without the file no floor is shown"
    try:
        bits = np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # mapped: its header may name any size
    except Exception as problem:  # numpy's reader raises many kinds for a damaged header
        raise UserError(f"{path}: damaged ({problem!s:.100}); {remedy}") from None
    is_one_each = bits.shape == (bins.n_documents,) and bits.dtype == np.float64
    if not (is_one_each and np.isfinite(bits).all() and (bits >= 0).all()):
        raise UserError(f"{path}: not {bins.n_documents:,} numbers from 0 up, one a validation document; {remedy}")
    return bits


def information(bits: np.ndarray, n_bytes: np.ndarray) -> tuple[float, float]:
    """Bits per byte of documents according to their generator, and the standard error.

    bits, n_bytes: (n,), of each document.
    """
    n = len(bits)
    total_bytes = n_bytes.sum()
    floor = float(bits.sum() / total_bytes)
    # the error of a ratio of sums over independent documents (Cochran, Sampling Techniques, equation 2.46)
    residual = bits - floor * n_bytes  # (n,)
    error = math.sqrt((residual**2).sum() * n / (n - 1)) / total_bytes
    return floor, float(error)


def answer_loss(model: nn.Module, rows: InstructionRows, max_tokens: int, ranks: Ranks, autocast) -> dict[str, float]:
    """val_loss of held-out instructions: nats a learned token over the first rows, up to `max_tokens` positions.

    The ranks share the work; autocast: the context to compute in.
    """
    n_rows = min(rows.rows_per_epoch, max(1, max_tokens // rows.seq_len))
    batches = []
    for begin in range(0, n_rows, ROWS):
        end = min(begin + ROWS, n_rows)
        batches.append(rows.batch(np.arange(begin, end)))
    nats, n_targets = shared_loss(model, batches, ranks, autocast)
    return {"val_loss": nats / n_targets}
