"""Files of rows, read once from first to last, and any row again by its place."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
    SHA-256 of all lines. They are there after `scan`.
    """

    def __init__(self, paths: str | Path | list[str | Path], **reading):
        """paths: as `open_rows` reads them. reading: on_bad_line and encoding, see `Reading`. Raises UserError."""
        self.reading = Reading(**reading)
        self.paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        for path in self.paths:
            refuse_unfinished(path)
        self.files = [open_rows(path, self.reading.encoding) for path in self.paths]
        self.counts = Counter()
        self.not_used = Counter()
        self.first_texts: list[str] = []

    @property
    def names(self) -> str:
        return ", ".join(map(str, self.paths))

    def scan(self, use: Callable[[object, tuple], None], what: str) -> None:
        """Calls use(row, place) for each row in turn, place as PLACE says. what: is read, for the progress bar.

        A UserError that `use` raises, or that the row's text is, gets the row's place in front; or the row is counted
        as bad, if so wanted. `use` must therefore raise before it keeps anything of a row.
        """
        digest = hashlib.sha256()
        size = sum(file.seek(0, os.SEEK_END) for file in self.files)
        with tqdm(
            total=size, desc=f"reading {what}", unit="B", unit_scale=True, delay=2, leave=False, disable=None
        ) as bar:
            for file_number, file in enumerate(self.files):
                file.seek(0)
                self.n_wanted = FIRST_TEXTS  # characters of this file
                for line_number, offset, line in numbered_lines(file):
                    digest.update(line)
                    bar.update(len(line))
                    try:
                        use(parse_line(line), (file_number, offset, len(line), zlib.crc32(line)))
                        self.counts["rows"] += 1
                    except UserError as reason:
                        self._report(self.paths[file_number], line_number, reason)
        self.fingerprint = digest.hexdigest()

    def _report(self, path: Path, line_number: int, reason: UserError) -> None:
        if self.reading.on_bad_line == "error":
            raise UserError(f"{path}, row {line_number}: {reason}; fix it, or give --on_bad_line skip") from None
        self.counts["bad rows"] += 1

    def keep_texts(self, texts: list[str]) -> None:
        """Adds to `first_texts` while a file has given too little; for `use`."""
        for text in texts:
            if self.n_wanted > 0:
                self.first_texts.append(text)
                self.n_wanted -= len(text)

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
