"""Instructions and conversations (JSONL or a JSON array) become X, Y and a loss mask.

Step by step: a row of a file becomes messages (messages.py), messages become token ids and, for each id, whether it is
to be learned, cut if they are too long (fitting.py), and these samples become X, Y and mask (`collate`).
`InstructionRows` does this for whole files and packs several samples into a row of a batch.
"""

import math
from pathlib import Path

import numpy as np
import torch

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch
from minillm.datasets.files.row_files import PLACE, RowFiles
from minillm.datasets.fitting import ANSWER, PROMPT, TURNS, fit
from minillm.datasets.messages import conversations
from minillm.datasets.packing import fill_ratio, pack, shuffled

KEPT_TOKENS = 1 << 25  # data up to this size stays in memory as ids, 5 bytes each (160 MiB)
NO_ROOM = "no room for an answer"
NOT_WANTED = "of a family that is left out"


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


SAMPLE = np.dtype(  # a sample in the index of all samples: the place of its row, and
    [
        *PLACE.descr,
        ("conversation", np.int32),  # its number in the row
        ("length", np.int32),  # tokens
    ]
)


class InstructionRows:
    """Instruction files as rows of a batch, epoch after epoch.

    A first pass reads and tokenizes everything once and keeps, for each sample, its place in the file and
    its number of tokens: 32 bytes. Up to KEPT_TOKENS the tokens stay in memory too; for larger data each
    batch reads its lines again and tokenizes them on the fly. Row p is a pure function of (seed, p):
    epoch e = p // rows_per_epoch is shuffled and packed by (seed, e).
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
        self.template = template
        self.packing = packing
        self.without_families = without_families

        self.files = RowFiles(paths, **reading)
        self.paths = self.files.paths
        self.counts = self.files.counts
        self.first_texts = self.files.first_texts
        self._scan()
        if not len(self.index):
            raise UserError(f"{self.files.names}: nothing left to learn from ({self.summary()})")
        lengths = self.index["length"].astype(np.int64)
        self.begins = np.cumsum(lengths) - lengths  # of each sample in ids and learn
        self.epochs: dict[int, list[np.ndarray]] = {}  # the rows of the last two epochs asked for
        self.rows_per_epoch = len(self._epoch(0))

    def batch(self, positions: np.ndarray, end: int | None = None) -> Batch:
        """The rows at these data positions; one at or beyond `end` gives a row of padding, all masked.

        positions: (B,) int. Packed rows have T = seq_len; others the longest row of the batch, rounded
        up to 8. Raises UserError if a line that is read again is not what it was.
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

        A second line if most samples are cut.
        """
        counts = self.counts
        n_kept = len(self.index)
        n_tokens = int(self.index["length"].sum())
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
        return line

    def _widths(self) -> np.ndarray:
        """How many positions of a row each sample takes, (n,) int64."""
        return self.index["length"].astype(np.int64) - 1

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, each the numbers of its samples: packed, or one sample a row."""
        if epoch not in self.epochs:
            if len(self.epochs) == 2:
                oldest = next(iter(self.epochs))
                del self.epochs[oldest]
            if self.packing:
                self.epochs[epoch] = pack(self._widths(), self.seq_len, self.seed, epoch)
            else:
                self.epochs[epoch] = shuffled(len(self.index), self.seed, epoch)[:, None]
        return self.epochs[epoch]

    def _sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learn) of one sample: from memory, or read and tokenized again."""
        place = self.index[number]
        if len(self.ids):
            begin = self.begins[number]
            end = begin + place["length"]
            return self.ids[begin:end], self.learn[begin:end]
        messages = conversations(self.files.row_at(place))[place["conversation"]]
        ids, learn, _ = self._fit(messages)
        return ids, learn

    def _fit(self, messages: list[dict]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        return fit(messages, self.tokenizer, self.seq_len, self.template)

    # ---- The first pass.

    def _scan(self) -> None:
        """Reads every row; sets index, ids and learn (empty above KEPT_TOKENS), fingerprint."""
        self.index = bytearray()  # SAMPLE of each sample
        self.ids = bytearray()  # int32
        self.learn = bytearray()  # bool
        self.files.scan(self._read, "instructions")
        if len(self.learn) > KEPT_TOKENS:
            self.ids, self.learn = b"", b""
        self.index = np.frombuffer(self.index, dtype=SAMPLE)
        self.ids = np.frombuffer(self.ids, dtype=np.int32)
        self.learn = np.frombuffer(self.learn, dtype=bool)
        self.fingerprint = self.files.fingerprint

    def _read(self, row: object, place: tuple) -> None:
        """Keeps the samples of one row that have something to learn; counts."""
        if self.without_families and isinstance(row, dict) and row.get("family") in self.without_families:
            self.counts[NOT_WANTED] += 1
            return
        not_used: set[str] = set()
        talks = conversations(row, not_used)
        fitted = [self._fit(messages) for messages in talks]

        # nothing is kept before this line, so that a bad row leaves no trace
        self.files.not_used.update(sorted(not_used))
        self.counts["examples"] += len(talks)
        self.files.keep_texts([message["content"] for messages in talks for message in messages])
        for number, (messages, (ids, learn, cut)) in enumerate(zip(talks, fitted, strict=True)):
            n_questions = sum(message["role"] == "user" for message in messages)
            self.counts["turns"] = max(self.counts["turns"], n_questions)
            if not len(ids):
                self.counts[NO_ROOM if cut else _why_nothing_is_learned(messages)] += 1
                continue
            self.counts["cut"] += bool(cut)
            self.counts.update(cut)
            self.counts["learned"] += int(learn.sum())
            self.index += np.array((*place, number, len(ids)), dtype=SAMPLE).tobytes()
            if len(self.learn) <= KEPT_TOKENS:
                self.ids += ids.tobytes()
                self.learn += learn.tobytes()


def _why_nothing_is_learned(messages: list[dict]) -> str:
    """What is counted for a conversation without a learned token."""
    answers = [message for message in messages if message["role"] == "assistant" and message.get("learn", True)]
    return "empty answer" if answers else "no answer"
