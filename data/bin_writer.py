"""A folder of token bins while it is being prepared, and what its bins were made from.

Each group of input files (a large file, or several small ones) has bins of its own, one for each split. What a group's
tokens depend on is hashed into its key, and bins whose key is still asked for are kept.

    data/mine/
      train-00000.bin  val-00000.bin …       numbered in the order of the input
      val-00000.sizes …                      UTF-8 bytes of the text of each document, uint32, for bits per byte
      meta.json                              comes last: without it the folder is not finished
      unfinished/                            only while the folder is being prepared:
        <key>.train.bin  <key>.val.bin  …      bins that have no number yet
        <key>.json                             their record, written after them: without it they are not whole
        meta.json                              only while bins are being renamed: the number of each key

Preparing means: name the bins by their keys (`take_apart`), make those that are missing (`BinWriter`), number them all
(`put_together`). Each of these can be killed at any moment and done again. A bin is never written over: a run that has
it open goes on reading the old file.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.sources import Group, check_unchanged, checksum, tokenizer_key
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


# ---- The folder.


class BinFolder:
    """The folder `out`, finished or not."""

    def __init__(self, out: Path):
        """Raises UserError if `out` has bins or a model that were made elsewhere."""
        self.out = out
        self.unfinished = out / "unfinished"
        files.refuse_link(self.unfinished)
        meta_file = out / "meta.json"
        is_earlier_version = (out / "parts.json").exists()
        self.is_ours = "bins" in read_json(meta_file) or self.unfinished.exists() or is_earlier_version
        if self.is_ours:
            return
        bins = self._numbered_bins()
        if bins:
            raise UserError(
                f"{bins[0]}: no meta.json tells what it was made from; choose another --out or delete {out}"
            )
        for file in (meta_file, out / "config.json"):
            if file.exists():
                raise UserError(f"{file}: was not written by a preparation; choose another --out")

    def refuse_other_tokenizer(self, sha256: str) -> None:
        """Raises UserError for a tokenizer in the folder that is not this one and that no preparation put there."""
        there = [self.out / name for name in ("tokenizer.model", "tokenizer.json") if (self.out / name).exists()]
        if there and not self.is_ours and files.sha256(there[0]) != sha256:
            raise UserError(f"{there[0]}: another tokenizer, which would be overwritten; choose another --out")

    def finished_records(self, groups: list[Group], token_bytes: int) -> list[dict] | None:
        """The record of each group if the folder is finished, and of just these groups; else None."""
        records = _records_in(self.out / "meta.json")
        if [record["key"] for record in records] != [group.key for group in groups]:
            return None

        def numbered(record: dict, split: str, kind: str) -> Path:
            return (self.out / record[split]["name"]).with_suffix(kind)

        return records if all(_check_bins(records, numbered, token_bytes)) else None

    def take_apart(self) -> None:
        """Name all bins by their keys. From now on the folder is not finished, and its bins are known to be ours."""
        files.own_folder(self.unfinished)
        self.is_ours = True
        numbers = self.unfinished / "meta.json"
        if (self.out / "meta.json").exists():
            (self.out / "meta.json").replace(numbers)
        if numbers.exists() and not _records_in(numbers):
            print(f"{self.out}: meta.json is damaged or of an earlier version, so everything is tokenized again")
        for record in _records_in(numbers):
            for split, kind, name in _files_of(record):
                if (self.out / name).exists():
                    (self.out / name).replace(bin_path(self.unfinished, record["key"], split, kind))
            write_json(self.unfinished / f"{record['key']}.json", record)
        for path in (*self._numbered_bins(), self.out / "parts.json", numbers):  # parts.json: of an earlier version
            path.unlink(missing_ok=True)

    def whole_records(self, groups: list[Group], token_bytes: int) -> dict[str, dict]:
        """Key → record of those groups whose bins are there and whole, once the folder is taken apart."""
        records = [read_record(read_json(self.unfinished / f"{group.key}.json")) for group in groups]
        records = [record for record, group in zip(records, groups, strict=True) if record.get("key") == group.key]

        def named_by_key(record: dict, split: str, kind: str) -> Path:
            return bin_path(self.unfinished, record["key"], split, kind)

        checks = _check_bins(records, named_by_key, token_bytes)
        return {record["key"]: record for record, is_whole in zip(records, checks, strict=True) if is_whole}

    def has_record(self, group: Group) -> bool:
        """Whether the group's bins were made once, whole or not by now, once the folder is taken apart."""
        return (self.unfinished / f"{group.key}.json").exists()

    def earlier_sources(self) -> dict[str, dict]:
        """File → what its tokens were made from in earlier preparations, once the folder is taken apart."""
        sources = {}
        for path in sorted(self.unfinished.glob("*-*.json")):
            record = read_record(read_json(path))
            for source in record.get("sources", []):
                sources[source["file"]] = source | {"tokenizer": record["tokenizer"]}
        return sources

    def put_together(self, meta: dict) -> None:
        """Number the bins as `meta` (of `meta_of`) says; then meta.json marks the folder as finished."""
        write_json(self.unfinished / "meta.json", meta)
        for record in meta["bins"]:
            for split, kind, name in _files_of(record):
                bin_path(self.unfinished, record["key"], split, kind).replace(self.out / name)
        files.sync(self.out)
        (self.unfinished / "meta.json").replace(self.out / "meta.json")
        files.sync(self.out)
        self.clean()

    def clean(self) -> None:
        """Delete what is left over: bins that are no longer asked for. What else lies there is not ours."""
        for path in self.unfinished.glob("*"):
            if BY_KEY.fullmatch(path.name) or files.SCRATCH.fullmatch(path.name):
                files.discard(path)
        with contextlib.suppress(OSError):
            self.unfinished.rmdir()

    def _numbered_bins(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if NUMBERED.fullmatch(path.name))


def _files_of(record: dict) -> Iterator[tuple[str, str, str]]:
    """(split, kind, name) of each numbered file of a record."""
    for split in SPLITS:
        for kind in FILES[split]:
            if record[split]["name"] and record[split].get(SHA256[kind]):
                yield split, kind, str(Path(record[split]["name"]).with_suffix(kind))


def _records_in(meta_file: Path) -> list[dict]:
    """The records of all bins; none if meta.json is missing, damaged or of an earlier version."""
    meta = read_json(meta_file)
    records = meta.get("bins")
    if not isinstance(records, list) or meta.get("bins_sha256") != checksum(records):
        return []
    are_whole = all(isinstance(record, dict) and read_record(record) for record in records)
    return records if are_whole else []


def _check_bins(records: list[dict], path_of: Callable[[dict, str, str], Path], token_bytes: int) -> list[bool]:
    """Whether the files of each record are as they were written, and bins hold as many tokens as it says.

    path_of: of a record, a split and a kind.
    """

    def is_whole(record: dict) -> bool:
        try:
            for split in SPLITS:
                counts = record[split]
                if not counts["tokens"]:
                    continue  # it has no bin
                if path_of(record, split, BIN).stat().st_size != counts["tokens"] * token_bytes:
                    return False
                for kind in FILES[split]:
                    is_kept = kind == BIN or SHA256[kind] in counts
                    if is_kept and files.sha256(path_of(record, split, kind)) != counts[SHA256[kind]]:
                        return False
            return True
        except (OSError, UserError, KeyError, TypeError):  # a bin is missing, or the record damaged
            return False

    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        return list(pool.map(is_whole, records))


# ---- meta.json.


def meta_of(groups: list[Group], records: list[dict], tokenizer: Tokenizer, about: dict) -> dict:
    """The contents of meta.json, in which every bin has its number. about: further entries, in front of these."""
    bins = []
    numbered = {split: [] for split in SPLITS}
    for group, record in zip(groups, records, strict=True):
        paths = [source.name for source in group.sources]  # they may have been moved
        sources = [old | {"file": path} for old, path in zip(record["sources"], paths, strict=True)]
        bins.append(record | {"sources": sources})
        for split in SPLITS:
            counts = record[split]
            name = f"{split}-{len(numbered[split]):05d}.bin" if counts["tokens"] else None
            bins[-1][split] = counts | {"name": name}
            if name:
                file = {"name": name, "tokens": counts["tokens"], "documents": counts["documents"]}
                numbered[split].append(file | ({"sizes": True} if SHA256[SIZES] in counts else {}))
    first_bad = [
        f"{source['file']}, {bad}" for record in bins for source in record["sources"] for bad in source["first_bad"]
    ]
    return {
        "format": 2,
        "dtype": tokenizer.id_dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        **about,
        "made_from": checksum([group.key for group in groups]),
        "files": numbered,
        "bytes": {split: sum(record[split]["bytes"] for record in bins) for split in SPLITS},
        "bad_lines": sum(record["bad_lines"] for record in bins),
        "empty_documents": sum(record["empty_documents"] for record in bins),
        "copies_of_validation": sum(record.get("copies_of_validation", 0) for record in bins),
        "first_bad": first_bad[:FIRST_BAD],
        "bins": bins,
        "bins_sha256": checksum(bins),
    }
