"""Instructions and conversations (JSONL or a JSON array) become X, Y and a loss mask.

Step by step: a row of a file becomes messages (messages.py), messages become token ids and, for each id,
whether it is to be learned (`encode_messages`), what is too long is cut (`fit`, `truncate`), and examples
become X, Y and mask (`collate`). `InstructionRows` does this for whole files and packs several examples
into a row.
"""

import hashlib
import math
import os
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minillm.base.errors import UserError
from minillm.datasets.batch import Batch
from minillm.datasets.json_rows import numbered_lines, open_rows, parse_line
from minillm.datasets.messages import conversations, is_learned
from minillm.datasets.packing import fill_ratio, pack, shuffled

KEPT_TOKENS = 1 << 25  # data up to this size stays in memory as ids, 5 bytes each (160 MiB)


# ---- Messages become token ids, no longer than a row.


def encode_messages(messages: list[dict], tokenizer, template: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """ids (n,) int32 and learn (n,) bool, up to the last token that is learned; both empty if none is.

    Learned are the tokens of the answers for which `is_learned` is true, and the eos after each.
    """
    ids, learn = tokenizer.encode_chat(messages, template=template)
    ids, learn = np.array(ids, dtype=np.int32), np.array(learn, dtype=bool)
    ends = learn & (ids == tokenizer.eos_id)  # each answer ends in an eos, which no text can forge
    wanted = np.array([is_learned(m) for m in messages if m["role"] == "assistant"] + [False])
    learn &= wanted[np.cumsum(ends) - ends]  # a token's answer is numbered by the eos before it
    return _without_tail(ids, learn)


def _without_tail(ids: np.ndarray, learn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    end = len(learn) - int(np.argmax(learn[::-1])) if learn.any() else 0
    return ids[:end], learn[:end]


def truncate(ids: np.ndarray, learn: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts one example to seq_len + 1 tokens, of which X and Y take seq_len each.

    The prompt (all before the first learned token) is cut first: from its middle, since it begins with the
    task and ends with the question and the separator, and to no less than a quarter of the row. If that is
    not enough, the end of the answer is cut, with its eos, and no other eos is put there: a model must not
    learn to stop where the text did not.
    """
    limit = seq_len + 1
    if len(ids) <= limit:
        return ids, learn
    start = int(np.argmax(learn))
    prompt = min(start, max(limit - (len(ids) - start), limit // 4, 1))
    head, tail = prompt // 2, prompt - prompt // 2
    kept = np.r_[0:head, start - tail : start + limit - prompt]
    return _without_tail(ids[kept], learn[kept])


def fit(messages: list[dict], tokenizer, seq_len: int, template: str = "auto") -> tuple[np.ndarray, np.ndarray, bool]:
    """ids and learn of at most seq_len + 1 tokens (see `encode_messages`), and whether something was cut.

    A conversation that is too long loses its earliest turns, as few as will do, and keeps its system
    message; if its last learned turn alone is too long, that turn is truncated.
    """
    ids, learn = encode_messages(messages, tokenizer, template)
    if len(ids) <= seq_len + 1:
        return ids, learn, False
    end = max(i for i, message in enumerate(messages) if is_learned(message))
    system = next(i for i, message in enumerate(messages) if message["role"] != "system")  # how many system messages
    asks = [message["role"] == "user" for message in messages[:end]]
    turns = [i for i in range(system, end) if asks[i] and (i == system or not asks[i - 1])] or [system]

    def since(turn: int) -> tuple[np.ndarray, np.ndarray]:
        return encode_messages(messages[:system] + messages[turn:], tokenizer, template)

    first = bisect_left(turns, True, hi=len(turns) - 1, key=lambda turn: len(since(turn)[0]) <= seq_len + 1)
    return *truncate(*since(turns[first]), seq_len), True


# ---- Examples become X, Y and mask.


def collate(rows: list[list[tuple[np.ndarray, np.ndarray]]], width: int, pad_id: int, *, documents: bool) -> Batch:
    """Puts examples (ids, learn) of n + 1 tokens each side by side into rows, n positions per example.

    This is the only place with the rule: X is an example without its last token, Y without its first, and
    the mask belongs to Y: 1 exactly where Y is an answer token or the eos that ends an answer. Padding is
    pad_id with mask 0. With `documents` the examples of a row are numbered 0, 1, … and its padding has the
    next number, so that attention keeps them apart. Returns a Batch of (len(rows), width).
    """
    x = np.full((len(rows), width), pad_id, dtype=np.int64)
    y = x.copy()
    mask = np.zeros(x.shape, dtype=bool)
    numbers = np.zeros(x.shape, dtype=np.int32)
    for row, examples in enumerate(rows):
        start = 0
        for number, (ids, learn) in enumerate(examples):
            end = start + len(ids) - 1
            x[row, start:end] = ids[:-1]
            y[row, start:end] = ids[1:]
            mask[row, start:end] = learn[1:]
            numbers[row, start:end] = number
            start = end
        numbers[row, start:] = len(examples)
    x, y, mask, numbers = (torch.from_numpy(array) for array in (x, y, mask, numbers))
    return Batch(x, y, mask, numbers if documents else None)


# ---- The data set.

FILE, OFFSET, SIZE, CHECK, INSTANCE, LENGTH = range(6)  # an example's columns in the index; LENGTH in tokens


class InstructionRows:
    """Instruction files as rows of a batch, epoch after epoch.

    A first pass reads and tokenizes everything once and keeps, for each example, its place in the file and
    its number of tokens: 48 bytes. Up to KEPT_TOKENS the tokens stay in memory too; for larger data each
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
        on_bad_line: str = "error",
    ):
        """paths: .jsonl or .json files, also .gz. seq_len: the positions of a row. template: auto, chat or
        simple (Tokenizer.encode_chat). packing: several examples a row. on_bad_line: error, or skip and count.
        Raises UserError.
        """
        if on_bad_line not in ("error", "skip"):
            raise UserError(f"on_bad_line is {on_bad_line!r}; choose error or skip")
        if seq_len < 1:
            raise UserError(f"--seq_len {seq_len}: a row needs at least 1 position; raise it")
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self.tokenizer, self.seq_len, self.seed, self.template = tokenizer, seq_len, seed, template
        self.packing, self.on_bad_line = packing, on_bad_line
        tokenizer.encode_chat([{"role": "user", "content": ""}], template=template)  # raises if the template is unknown
        self.files = [open_rows(path) for path in self.paths]
        self._scan()
        if not len(self.index):
            raise UserError(f"{', '.join(map(str, self.paths))}: nothing left to learn from ({self.summary()})")
        self.starts = np.cumsum(self.index[:, LENGTH]) - self.index[:, LENGTH]
        self.epochs: dict[int, list[np.ndarray]] = {}  # the rows of the last two epochs asked for
        self.rows_per_epoch = len(self._epoch(0))

    def batch(self, positions: np.ndarray, end: int | None = None) -> Batch:
        """The rows at these positions; a position at or beyond `end` gives a row of padding, all masked.

        positions: (B,) int. Packed rows have T = seq_len; others the longest row of the batch, rounded
        up to 8. Raises UserError if a line that is read again is not what it was.
        """
        rows = []
        for position in np.asarray(positions).tolist():
            epoch, row = divmod(position, self.rows_per_epoch)
            members = [] if end is not None and position >= end else self._epoch(epoch)[row]
            rows.append([self._example(i) for i in members])
        sizes = [sum(len(ids) - 1 for ids, _ in row) for row in rows]
        longest = max([1, *sizes])
        width = self.seq_len if self.packing else min(self.seq_len, -(-longest // 8) * 8)
        return collate(rows, width, self.tokenizer.pad_id, documents=self.packing)

    def total_rows(self, epochs: float) -> int:
        """How many rows these epochs have, rounded up: the `end` of a run, which the script divides into steps."""
        return math.ceil(epochs * self.rows_per_epoch)

    def summary(self) -> str:
        """One line (two if most are cut): rows read, examples kept, dropped and cut, tokens, how full rows are."""
        n = self.counts
        kept, tokens = len(self.index), int(self.index[:, LENGTH].sum())
        dropped = [f"{n[why]:,} dropped ({why})" for why in ("empty answer", "no answer") if n[why]]
        dropped += [f"{n['bad rows']:,} bad rows skipped"] if n["bad rows"] else []
        line = f"{n['rows']:,} rows, {n['examples']:,} examples: {kept:,} kept, "
        line += f"{', '.join(dropped) or '0 dropped'}, {n['cut']:,} cut to fit"
        line += f"; {tokens:,} tokens, {n['learned']:,} of them learned"
        if kept and self.packing:
            full = fill_ratio(self._positions(), self.rows_per_epoch, self.seq_len)
            line += f"; packed into {self.rows_per_epoch:,} rows of {self.seq_len}, {full:.1%} full"
        if 2 * n["cut"] > kept:
            line += f"\nmost examples were cut: a longer --seq_len than {self.seq_len} would learn more of them"
        return line

    def _positions(self) -> np.ndarray:
        """How many positions of a row each example takes, (n,) int64."""
        return self.index[:, LENGTH] - 1

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, each the numbers of its examples: packed, or one example a row."""
        if epoch not in self.epochs:
            if len(self.epochs) > 1:
                self.epochs.pop(next(iter(self.epochs)))
            lengths = self._positions()
            if self.packing:
                self.epochs[epoch] = pack(lengths, self.seq_len, self.seed, epoch)
            else:
                self.epochs[epoch] = shuffled(len(lengths), self.seed, epoch)[:, None]
        return self.epochs[epoch]

    def _example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        file, offset, size, check, instance, length = self.index[i].tolist()
        if len(self.ids):
            kept = slice(self.starts[i], self.starts[i] + length)
            return self.ids[kept], self.learn[kept]
        self.files[file].seek(offset)
        line = self.files[file].read(size)
        if zlib.crc32(line) != check:
            raise UserError(f"{self.paths[file]} has changed at byte {offset} since it was first read; start again")
        return self._fit(conversations(parse_line(line))[instance])[:2]

    def _fit(self, messages: list[dict]) -> tuple[np.ndarray, np.ndarray, bool]:
        return fit(messages, self.tokenizer, self.seq_len, self.template)

    def _scan(self) -> None:
        """Reads every row; sets index, ids and learn (empty above KEPT_TOKENS), counts, fingerprint."""
        index, ids, learn = array("q"), bytearray(), bytearray()
        self.counts, digest = Counter(), hashlib.sha256()
        total = sum(file.seek(0, os.SEEK_END) for file in self.files)
        bar = tqdm(
            total=total, desc="reading instructions", unit="B", unit_scale=True, delay=2, leave=False, disable=None
        )
        for number, file in enumerate(self.files):
            file.seek(0)
            for line_number, offset, line in numbered_lines(file):
                digest.update(line)
                bar.update(len(line))
                try:
                    found = conversations(parse_line(line))
                    examples = [self._fit(messages) for messages in found]
                except UserError as reason:
                    if self.on_bad_line == "error":
                        raise UserError(
                            f"{self.paths[number]}, row {line_number}: {reason}; fix it, or give --on_bad_line skip"
                        ) from None
                    self.counts["bad rows"] += 1
                    continue
                self.counts["rows"] += 1
                self.counts["examples"] += len(found)
                for instance, (messages, example) in enumerate(zip(found, examples, strict=True)):
                    questions = sum(message["role"] == "user" for message in messages)
                    self.counts["turns"] = max(self.counts["turns"], questions)
                    if not len(example[0]):
                        empty = any(m["role"] == "assistant" and m.get("learn", True) for m in messages)
                        self.counts["empty answer" if empty else "no answer"] += 1
                        continue
                    self.counts["cut"] += example[2]
                    self.counts["learned"] += int(example[1].sum())
                    index.extend([number, offset, len(line), zlib.crc32(line), instance, len(example[0])])
                    if len(ids) <= 4 * KEPT_TOKENS:
                        ids += example[0].tobytes()
                        learn += example[1].tobytes()
        bar.close()
        if len(ids) > 4 * KEPT_TOKENS:
            ids, learn = b"", b""
        self.index = np.frombuffer(index, dtype=np.int64).reshape(-1, 6)
        self.ids, self.learn = np.frombuffer(ids, dtype=np.int32), np.frombuffer(learn, dtype=bool)
        self.fingerprint = digest.hexdigest()
