"""Files of rows, read once from first to last, and any row again by its place."""

import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from minillm.base.errors import UserError
from minillm.datasets.files.json_rows import Reading, numbered_lines, open_rows, parse_line
from minillm.datasets.files.text_files import refuse_unfinished

FIRST_TEXTS = 1 << 16  # characters
KEYS_NAMED = 8  # of those that were not used, the most frequent
PLACE = np.dtype(  # of a row
    [
        ("file", np.int32),  # its number
        ("offset", np.int64),  # of the line in the file, in bytes
        ("size", np.int64),  # of the line, in bytes
        ("crc32", np.uint32),  # of the line
    ]
)


class RowFiles:
    """Files of rows. counts: "rows" read and "bad rows" skipped; first_texts: of each file, about FIRST_TEXTS
    characters of what `keep_texts` was given; not_used: key that holds text and was not read → rows; fingerprint:
    SHA-256 of all lines. They are there after `scan`, or once `findings` were set.
    """

    def __init__(self, paths: str | Path | list[str | Path], **reading):
        """paths: as `open_rows` reads them. reading: on_bad_line and encoding, see `Reading`. Raises UserError."""
        self.reading = Reading(**reading)
        self.paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for path in self.paths:
            refuse_unfinished(path)
        self.counts = Counter()
        self.not_used = Counter()
        self.first_texts: list[str] = []
        self.n_wanted = [FIRST_TEXTS] * len(self.paths)  # characters of each file

    @cached_property
    def files(self) -> list[BinaryIO]:
        """The files, open from the first time they are read."""
        return [open_rows(path, self.reading.encoding) for path in self.paths]

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.paths))

    def scan(self, use: Callable[[object, tuple], None], what: str) -> None:
        """Calls use(row, place) for each row in turn, place as PLACE says. what: is read, for the progress bar.

        A UserError that `use` raises, or that the row's text is, gets the row's place in front; or the row is counted
        as bad, if so wanted. `use` must therefore raise before it keeps anything of a row.
        """
        for file_number, line_number, offset, line in self.lines(what):
            try:
                use(parse_line(line), (file_number, offset, len(line), zlib.crc32(line)))
                self.counts["rows"] += 1
            except UserError as reason:
                self.report(file_number, line_number, reason)

    def lines(self, what: str) -> Iterator[tuple[int, int, int, bytes]]:
        """(number of the file, number of the line from 1, byte offset, line) of all rows; sets `fingerprint`."""
        digest = hashlib.sha256()
        size = sum(file.seek(0, os.SEEK_END) for file in self.files)
        interval = 0.1 if sys.stderr.isatty() else 60  # seconds: not to fill a log
        bar = tqdm(
            total=size, desc=f"reading {what}", unit="B", unit_scale=True, delay=2, leave=False, mininterval=interval
        )
        with bar:
            for file_number, file in enumerate(self.files):
                file.seek(0)
                for line_number, offset, line in numbered_lines(file):
                    digest.update(line)
                    bar.update(len(line))
                    yield file_number, line_number, offset, line
        self.fingerprint = digest.hexdigest()

    def report(self, file_number: int, line_number: int, reason: UserError | str) -> None:
        """Raises UserError for a bad row, or counts it, as is wanted."""
        if self.reading.on_bad_line == "error":
            path = self.paths[file_number]
            raise UserError(f"{path}, row {line_number}: {reason}; fix it, or give --on_bad_line skip") from None
        self.counts["bad rows"] += 1

    @property
    def findings(self) -> dict:
        """What `scan` found, of the kinds that JSON has; can be set in its place."""
        return {
            "counts": self.counts,
            "not_used": self.not_used,
            "first_texts": self.first_texts,
            "fingerprint": self.fingerprint,
        }

    @findings.setter
    def findings(self, findings: dict) -> None:
        self.counts = Counter(findings["counts"])
        self.not_used = Counter(findings["not_used"])
        self.first_texts = findings["first_texts"]
        self.fingerprint = findings["fingerprint"]

    def keep_texts(self, texts: list[str], file_number: int) -> None:
        """Adds to `first_texts` while the file has given too little; for `use`."""
        for text in texts:
            if self.n_wanted[file_number] > 0:
                self.first_texts.append(text)
                self.n_wanted[file_number] -= len(text)

    def keys_not_used(self) -> str:
        """The end of a summary: the most frequent keys in `not_used`; empty if there is none."""
        if not self.not_used:
            return ""
        named = [f"{key} ({n_rows:,} rows)" for key, n_rows in self.not_used.most_common(KEYS_NAMED)]
        more = len(self.not_used) - len(named)
        return f"; keys not used: {', '.join(named)}" + (f" and {more:,} more" if more else "")

    def row_at(self, place: np.void) -> object:
        """A row again. Raises UserError if its line is not what it was."""
        path, file = self.paths[place["file"]], self.files[place["file"]]
        file.seek(place["offset"])
        line = file.read(place["size"])
        if zlib.crc32(line) != place["crc32"]:
            raise UserError(f"{path} has changed at byte {place['offset']} since it was first read; start again")
        return parse_line(line)
