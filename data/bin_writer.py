"""The bins of one group of input files while they are being made, and the record of what they were made from.

    <key>.train.bin  <key>.val.bin    the tokens of each split
    <key>.val.sizes                   UTF-8 bytes of the text of each document, uint32, for bits per byte
    <key>.json                        the record, written after them: without it they are not whole

What a group's tokens depend on is hashed into its key. bin_folder.py gives whole bins their numbers.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.sources import Group, check_unchanged, tokenizer_key
from minillm.base import files, json_door
from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.datasets.token_bins import MOST_META_BYTES
from minillm.tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "val")
BIN, SIZES = ".bin", ".sizes"
FILES = {"train": (BIN,), "val": (BIN, SIZES)}  # of one group
SHA256 = {BIN: "sha256", SIZES: "sizes_sha256"}  # in a record, whose bins may be of a version that wrote no sizes
FIRST_BAD = 5  # bad lines quoted of each file, and of all
NUMBERED = re.compile(r"(train|val)-\d{5}\.(bin|sizes)")
BY_KEY = re.compile(r"[0-9a-f]{32}-\d+\.(json|(train|val)\.(bin|sizes))")  # names in unfinished/


def read_json(file: Path) -> dict:
    """The JSON object in a file; {} if it is missing or damaged. Raises UserError for one that is too large."""
    try:
        size = json_door.file_size(file)
        if size <= MOST_META_BYTES:
            return json_door.read_object(file, MOST_META_BYTES).values
    except UserError:
        return {}
    raise UserError(f"{file}: {size:,} bytes, more than are read (at most {MOST_META_BYTES:,}); join input files")


def write_json(file: Path, values: dict) -> None:
    """Write what `read_json` reads. Raises UserError for more than that."""
    files.write_json_atomically(file, values, MOST_META_BYTES)


def read_record(values: dict) -> dict:
    """The record of a group's bins, {} unless every value is of its kind: they are then made again.

    The names in it are of the forms above, since files are renamed by them: a folder may come from elsewhere.
    """
    record = Contents(values, "record")
    try:
        record.need("tokenizer", str)
        is_ours = BY_KEY.fullmatch(f"{record.need('key', str)}.json") is not None
        for name in ("bad_lines", "empty_documents"):
            record.need(name, int, at_least=0)
        record.get("copies_of_validation", int, 0, at_least=0)
        for source in record.parts("sources"):
            source.need("file", str)
            source.need("sha256", str)
            source.need("first_bad", list[str])
        for split in SPLITS:
            counts = record.part(split)
            for name in ("tokens", "documents", "bytes"):
                counts.need(name, int, at_least=0)
            for name in SHA256.values():
                counts.get(name, str)
            name = counts.get("name", str, f"{split}-00000{BIN}")  # null if it has no tokens
            is_ours &= NUMBERED.fullmatch(name) is not None and name.endswith(BIN)
    except UserError:
        return {}
    return values if is_ours else {}


# ---- The bins of one group.


class BinWriter:
    """Writes the bins of one group; they count as whole only after `finish`."""

    def __init__(self, folder: Path, group: Group, tokenizer: Tokenizer):
        self.folder = folder
        self.sources = group.sources
        self.key = group.key
        self.token_bytes = tokenizer.id_dtype.itemsize
        self.open_files: dict[tuple[str, str], BinaryIO] = {}  # (split, kind) → its file, from the first token on
        self.record = {
            "key": group.key,
            "tokenizer": tokenizer_key(tokenizer),
            "sources": [
                {"file": s.name, "sha256": s.sha256, "options": s.options.of(s.path), "first_bad": []}
                for s in group.sources
            ],
            "bad_lines": 0,
            "empty_documents": 0,
            "copies_of_validation": 0,
        }
        for split in SPLITS:
            self.record[split] = {"tokens": 0, "documents": 0, "bytes": 0, "sha256": ""}

    def add(self, split: str, data: bytes, sizes: np.ndarray) -> None:
        """Append the tokens `data` of whole documents; sizes: UTF-8 bytes of the text of each, (n,) int."""
        if not data:
            return
        contents = {BIN: data, SIZES: sizes.astype("<u4").tobytes()}
        for kind in FILES[split]:
            path = bin_path(self.folder, self.key, split, kind)
            with _naming_full_disk(path, len(contents[kind])):
                if (split, kind) not in self.open_files:
                    self.open_files[split, kind] = files.create(path)
                self.open_files[split, kind].write(contents[kind])
        counts = self.record[split]
        counts["tokens"] += len(data) // self.token_bytes
        counts["documents"] += len(sizes)
        counts["bytes"] += int(sizes.sum())

    def note_left_out(self, source_number: int, bad: list[str], n_empty: int, n_held_out: int = 0) -> None:
        """bad: what is wrong with each bad line of this source."""
        first_bad = self.record["sources"][source_number]["first_bad"]
        first_bad += bad[: FIRST_BAD - len(first_bad)]
        self.record["bad_lines"] += len(bad)
        self.record["empty_documents"] += n_empty
        self.record["copies_of_validation"] += n_held_out

    def finish(self) -> dict:
        """Put the bins on the disk, then their record, which is returned.

        Raises `UserError` if a source is not the file any more whose hash the record holds.
        """
        check_unchanged(self.sources)
        for (split, kind), file in self.open_files.items():
            path = bin_path(self.folder, self.key, split, kind)
            with _naming_full_disk(path, file.tell()):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            self.record[split][SHA256[kind]] = files.sha256(path)
        self.open_files = {}
        write_json(self.folder / f"{self.key}.json", self.record)
        return self.record

    def close(self) -> None:
        """Leave the bins as they are, not whole."""
        for file in self.open_files.values():
            with contextlib.suppress(OSError):  # a full disk, which has been told of
                file.close()


def bin_path(folder: Path, key: str, split: str, kind: str = BIN) -> Path:
    """Where a bin, or another kind of its files, is while it has no number."""
    return folder / f"{key}.{split}{kind}"


@contextlib.contextmanager
def _naming_full_disk(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: writing {size:,} bytes failed ({error.strerror}); make room, then run the same command again: it "
            "keeps the bins that are whole"
        ) from None
