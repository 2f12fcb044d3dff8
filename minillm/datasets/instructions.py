"""Instructions and conversations (JSONL or a JSON array) become X, Y and a loss mask.

Step by step: a row of a file becomes messages (messages.py), messages become token ids and, for each id, whether it is
to be learned, cut if they are too long (fitting.py; instruction_tokens.py does this for whole files), and these samples
become X, Y and mask (`collate`). `InstructionRows` packs several samples into a row of a batch.
"""

import math
from pathlib import Path

import numpy as np
import torch

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch
from minillm.datasets.files.row_files import RowFiles
from minillm.datasets.fitting import ANSWER, PROMPT, TURNS
from minillm.datasets.instruction_tokens import NO_ROOM, NOT_WANTED, Tokenizing, tokens_of
from minillm.datasets.packing import fill_ratio, pack, shuffled

# ---- Samples become X, Y and mask.


def collate(rows: list[list[tuple[np.ndarray, np.ndarray]]], width: int, pad_id: int, *, documents: bool) -> Batch:
    """Puts samples (ids, learn) of n + 1 tokens each side by side into rows, n positions per sample.

    This is the only place with the rule: X is a sample without its last token, Y without its first, and
    the mask belongs to Y: 1 exactly where Y is an answer token or the eos that ends an answer. Padding is
    pad_id with mask 0. With `documents` the samples of a row are numbered 0, 1, … and its padding has the
    next number, so that attention keeps them apart. Returns a Batch of (len(rows), width).
    """
    shape = (len(rows), width)  # (B, T)
    x = np.full(shape, pad_id, dtype=np.int64)
    y = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    numbers = np.zeros(shape, dtype=np.int32)
    for row, samples in enumerate(rows):
        start = 0
        for number, (ids, learn) in enumerate(samples):
            end = start + len(ids) - 1
            x[row, start:end] = ids[:-1]
            y[row, start:end] = ids[1:]
            mask[row, start:end] = learn[1:]
            numbers[row, start:end] = number
            start = end
        numbers[row, start:] = len(samples)
    return Batch(
        torch.from_numpy(x),
        torch.from_numpy(y),
        torch.from_numpy(mask),
        torch.from_numpy(numbers) if documents else None,
    )


# ---- The data set.


class InstructionRows:
    """Instruction files as rows of a batch, epoch after epoch.

    The ids of all samples, and which are learned, are in memory, or for large files mapped from the disk (`tokens_of`).
    Row p is a pure function of (seed, p): epoch e = p // rows_per_epoch is shuffled and packed by (seed, e).
    """

    def __init__(
        self,
        paths: str | Path | list[str | Path],
        tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        template: str = "auto",
        packing: bool = True,
        without_families: frozenset[str] = frozenset(),
        **reading,
    ):
        """paths: files as `open_rows` reads them. seq_len: the positions of a row. template: auto, chat or simple
        (Tokenizer.encode_chat). packing: several samples a row. without_families: rows whose "family" is one of these
        are left out. reading: on_bad_line and encoding, see `Reading`. Raises UserError.
        """
        if seq_len < 1:
            raise UserError(f"--seq_len {seq_len}: a row needs at least 1 position; raise it")
        tokenizer.encode_chat([{"role": "user", "content": ""}], template=template)  # raises if the template is unknown
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.packing = packing

        self.files = RowFiles(paths, **reading)
        self.paths = self.files.paths
        tokens = tokens_of(self.files, Tokenizing(tokenizer, seq_len, template, without_families))
        self.ids = tokens.arrays["ids"]
        self.learn = tokens.arrays["learn"]
        self.lengths = tokens.arrays["lengths"].astype(np.int64)  # (n,) tokens of each sample
        self.begins = np.cumsum(self.lengths) - self.lengths  # of each in ids and learn
        self.where = tokens.where  # the tokens are kept
        self.counts = self.files.counts
        self.first_texts = self.files.first_texts
        self.fingerprint = self.files.fingerprint
        if not len(self.lengths):
            remedy = "; raise --seq_len" if self.counts[NO_ROOM] else ""
            raise UserError(f"{self.files.names}: nothing left to learn from ({self.summary()}){remedy}")
        self.epochs: dict[int, list[np.ndarray]] = {}  # the rows of the last two epochs asked for
        self.rows_per_epoch = len(self._epoch(0))

    def batch(self, positions: np.ndarray, end: int | None = None) -> Batch:
        """The rows at these data positions; one at or beyond `end` gives a row of padding, all masked.

        positions: (B,) int. Packed rows have T = seq_len; others the longest row of the batch, rounded
        up to 8.
        """
        rows = []
        for position in np.asarray(positions).tolist():
            epoch, row = divmod(position, self.rows_per_epoch)
            is_beyond = end is not None and position >= end
            members = [] if is_beyond else self._epoch(epoch)[row]
            rows.append([self._sample(number) for number in members])

        width = self.seq_len
        if not self.packing:
            widths = [sum(len(ids) - 1 for ids, _ in row) for row in rows]
            longest = max([1, *widths])  # even a row of padding alone has a position
            width = min(self.seq_len, 8 * math.ceil(longest / 8))
        return collate(rows, width, self.tokenizer.pad_id, documents=self.packing)

    def total_rows(self, epochs: float) -> int:
        """How many rows these epochs have, rounded up: the `end` of a run, which the script divides into steps."""
        return math.ceil(epochs * self.rows_per_epoch)

    def summary(self) -> str:
        """One line: rows read, samples kept, dropped and cut, tokens, how full rows are, keys that were not used.

        A second line if most samples are cut, and one of where the tokens are kept, if they are.
        """
        counts = self.counts
        n_kept = len(self.lengths)
        n_tokens = int(self.lengths.sum())
        dropped = [
            f"{counts[why]:,} dropped ({why})"
            for why in ("empty answer", "no answer", NO_ROOM, NOT_WANTED)
            if counts[why]
        ]
        if counts["bad rows"]:
            dropped.append(f"{counts['bad rows']:,} bad rows skipped")
        cut = f"{counts['cut']:,} cut to fit"
        if counts["cut"]:
            cut += f" ({', '.join(f'in {counts[part]:,} {part}' for part in (TURNS, PROMPT, ANSWER) if counts[part])})"
        line = (
            f"{counts['rows']:,} rows, {counts['examples']:,} examples: {n_kept:,} kept, "
            f"{', '.join(dropped) or '0 dropped'}, {cut}; {n_tokens:,} tokens, {counts['learned']:,} of them learned"
        )
        if n_kept and self.packing:
            full = fill_ratio(self._widths(), self.rows_per_epoch, self.seq_len)
            line += f"; packed into {self.rows_per_epoch:,} rows of {self.seq_len}, {full:.1%} full"
        line += self.files.keys_not_used()
        if 2 * counts["cut"] > n_kept:
            line += f"\nmost examples were cut: a longer --seq_len than {self.seq_len} would learn more of them"
        if self.where:
            line += f"\ntokens {self.where}"
        return line

    def _widths(self) -> np.ndarray:
        """How many positions of a row each sample takes, (n,) int64."""
        return self.lengths - 1

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, each the numbers of its samples: packed, or one sample a row."""
        if epoch not in self.epochs:
            if len(self.epochs) == 2:
                oldest = next(iter(self.epochs))
                del self.epochs[oldest]
            if self.packing:
                self.epochs[epoch] = pack(self._widths(), self.seq_len, self.seed, epoch)
            else:
                self.epochs[epoch] = shuffled(len(self.lengths), self.seed, epoch)[:, None]
        return self.epochs[epoch]

    def _sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learn) of one sample."""
        begin = self.begins[number]
        end = begin + self.lengths[number]
        return self.ids[begin:end], self.learn[begin:end]
