"""Rows of instruction files become samples: token ids and, for each, whether it is to be learned.

Small files are tokenized at every start. Those of KEPT_FROM bytes and more are tokenized once, and their
tokens are kept on the disk (kept_arrays.py), where every rank and every later run maps them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.base.errors import UserError
from minillm.base.files import sha256
from minillm.base.json_door import file_size
from minillm.datasets.files.json_rows import parse_line
from minillm.datasets.files.row_files import FIRST_TEXTS, RowFiles
from minillm.datasets.fitting import fit
from minillm.datasets.kept_arrays import Arrays, kept_arrays
from minillm.datasets.messages import conversations

KEPT_FROM = 1 << 24  # bytes of files: a quarter of a minute's work; for less, a folder on the disk is not worth it
PIECE_BYTES = 1 << 20  # of lines at a time (one line may be more)
NO_ROOM = "no room for an answer"
NOT_WANTED = "of a family that is left out"
LIBRARIES = ("sentencepiece", "tokenizers", "jinja2")  # which make the ids


class Piece(NamedTuple):
    """Some lines of one file: (number, line) of each."""

    file_number: int
    lines: list[tuple[int, bytes]]


@dataclass
class Samples:
    """What some rows became. counts: "turns" is the most there are in a row, all others are sums.

    file_number: of the file they are from. ids, learn: of all samples, end to end. lengths: int32, tokens of each.
    not_used: key → rows. texts: the first FIRST_TEXTS characters or so. bad: number of each line that is no row, and
    why.
    """

    file_number: int
    ids: bytearray = field(default_factory=bytearray)
    learn: bytearray = field(default_factory=bytearray)
    lengths: bytearray = field(default_factory=bytearray)
    counts: Counter = field(default_factory=Counter)
    not_used: Counter = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenizing:
    """How rows become samples: see `InstructionRows`."""

    tokenizer: object
    seq_len: int
    template: str
    without_families: frozenset[str]

    def __call__(self, piece: Piece) -> Samples:
        """The samples of some lines."""
        samples = Samples(piece.file_number)
        for number, line in piece.lines:
            try:
                self.read(parse_line(line), samples)
                samples.counts["rows"] += 1
            except UserError as reason:
                samples.bad.append((number, str(reason)))
        n_characters = np.cumsum([0, *map(len, samples.texts)])
        samples.texts = samples.texts[: np.searchsorted(n_characters, FIRST_TEXTS)]  # no more are asked for
        return samples

    def read(self, row: object, samples: Samples) -> None:
        """Adds the samples of one row that have something to learn; counts. Raises UserError for a bad row."""
        if self.without_families and isinstance(row, dict) and row.get("family") in self.without_families:
            samples.counts[NOT_WANTED] += 1
            return
        not_used: set[str] = set()
        talks = conversations(row, not_used)
        fitted = [fit(messages, self.tokenizer, self.seq_len, self.template) for messages in talks]

        # nothing is kept before this line, so that a bad row leaves no trace
        counts = samples.counts
        samples.not_used.update(sorted(not_used))
        counts["examples"] += len(talks)
        samples.texts += [message["content"] for messages in talks for message in messages]
        for messages, (ids, learn, cut) in zip(talks, fitted, strict=True):
            n_questions = sum(message["role"] == "user" for message in messages)
            counts["turns"] = max(counts["turns"], n_questions)
            if not len(ids):
                counts[NO_ROOM if cut else _why_nothing_is_learned(messages)] += 1
                continue
            counts["cut"] += bool(cut)
            counts.update(cut)
            counts["learned"] += int(learn.sum())
            samples.ids += ids.astype(self.tokenizer.id_dtype).tobytes()
            samples.learn += learn.tobytes()
            samples.lengths += np.int32(len(ids)).tobytes()


def _why_nothing_is_learned(messages: list[dict]) -> str:
    """What is counted for a conversation without a learned token."""
    answers = [message for message in messages if message["role"] == "assistant" and message.get("learn", True)]
    return "empty answer" if answers else "no answer"


# ---- Whole files.


def tokens_of(files: RowFiles, how: Tokenizing) -> Arrays:
    """ids, in the tokenizer's id_dtype, learn (bool), both end to end, and lengths (int32) of all samples.

    What else reading finds (counts, fingerprint …) is then in `files`.
    """
    n_bytes = sum(file_size(path) for path in files.paths)
    if n_bytes < KEPT_FROM:
        return _tokenized(files, how)
    key = _key(files, how)

    def make() -> Arrays:
        made = _tokenized(files, how)
        if _key(files, how) != key:
            raise UserError(f"{files.names}: changed while it was read; start again")
        return made

    arrays = kept_arrays(key, make)
    files.findings = arrays.about
    return arrays


def _key(files: RowFiles, how: Tokenizing) -> dict:
    """Everything that the tokens depend on: the bytes of the files, how they are read, the code and its libraries."""
    folders = [Path(__file__).parents[1] / name for name in ("datasets", "tokenizer")]
    code = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "files": [[path.suffixes, sha256(path)] for path in files.paths],  # the name of a .csv says that it is one
        "reading": [files.reading.on_bad_line, files.reading.encoding],
        "tokenizer": how.tokenizer.identity,
        "seq_len": how.seq_len,
        "template": how.template,
        "without_families": sorted(how.without_families),
        "code": code.hexdigest(),
        "libraries": [_version(name) for name in LIBRARIES],
    }


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"


def _tokenized(files: RowFiles, how: Tokenizing) -> Arrays:
    """The same, tokenized now."""
    ids, learn, lengths = bytearray(), bytearray(), bytearray()
    counts = files.counts
    for samples in map(how, _pieces(files)):
        for number, reason in samples.bad:
            files.report(samples.file_number, number, reason)
        files.keep_texts(samples.texts, samples.file_number)
        files.not_used.update(samples.not_used)
        turns = max(counts["turns"], samples.counts["turns"])
        counts.update(samples.counts)
        counts["turns"] = turns
        ids += samples.ids
        learn += samples.learn
        lengths += samples.lengths
    arrays = {
        "ids": np.frombuffer(ids, dtype=how.tokenizer.id_dtype),
        "learn": np.frombuffer(learn, dtype=bool),
        "lengths": np.frombuffer(lengths, dtype=np.int32),
    }
    return Arrays(arrays, files.findings)


def _pieces(files: RowFiles) -> Iterator[Piece]:
    """All lines, about PIECE_BYTES of them at a time."""
    piece, size = Piece(0, []), 0
    for file_number, number, _, line in files.lines("instructions"):
        if size >= PIECE_BYTES or file_number != piece.file_number:
            yield piece
            piece, size = Piece(file_number, []), 0
        piece.lines.append((number, line))
        size += len(line)
    yield piece
