"""A folder of token bins while it is being prepared, and what its bins were made from.

Each group of input files (a large file, or several small ones) has bins of its own, one for each split. What a group's
tokens depend on is hashed into its key, and bins whose key is still asked for are kept.

    data/mine/
      train-00000.bin  val-00000.bin …       numbered in the order of the input
      val-00000.sizes …                      UTF-8 bytes of the text of each document, uint32, for bits per byte
      meta.json                              comes last: without it the folder is not finished
      unfinished/                            only while the folder is being prepared:
        tokenizer/                             the tokenizer of the bins that are being made
        <key>.train.bin  <key>.val.bin  …      bins that have no number yet
        <key>.json                             their record, written after them: without it they are not whole
        next.meta.json                         only while files are being put in place: the meta.json to come
        meta.json                              only while old bins lose their numbers: their meta.json

Preparing means: make the bins that are missing in unfinished/ (`BinWriter`), while what was finished before stays as it
is; when all are there, put them in place (`put_together`), by renames alone: the old bins get the names of their keys,
then all bins that are asked for get numbers. Each of these can be killed at any moment. Whatever command comes next
puts in place what was ready, so the folder goes from one finished state to the next. A bin is never written over: a run
that has it open goes on reading the old file.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.bin_writer import (
    BIN,
    BY_KEY,
    FILES,
    FIRST_BAD,
    NUMBERED,
    SHA256,
    SIZES,
    SPLITS,
    bin_path,
    read_json,
    read_record,
    write_json,
)
from data.sources import Group, checksum
from minillm.base import files
from minillm.base.errors import UserError
from minillm.tokenizer.folder_files import COMPANIONS
from minillm.tokenizer.tokenizer import Tokenizer

TOKENIZER = re.compile("|".join(map(re.escape, ("tokenizer.model", "tokenizer.vocab", *COMPANIONS))))


class BinFolder:
    """The folder `out`, finished or not."""

    def __init__(self, out: Path, tokenizer_sha256: str):
        """Open it, or make it; what an earlier preparation was stopped from putting in place is put there first.

        Nothing that is finished is changed until `put_together`. tokenizer_sha256: of the tokenizer to be taken, "" if
        it is to be learnt. Raises UserError if `out` has bins, a model or another tokenizer that were made elsewhere.
        """
        self.out = out
        self.unfinished = out / "unfinished"
        self.new_tokenizer = self.unfinished / "tokenizer"
        files.refuse_link(self.unfinished)
        files.refuse_link(self.new_tokenizer)
        is_ours = "bins" in read_json(out / "meta.json") or self.unfinished.exists()
        if not is_ours:
            self._refuse_what_is_there(tokenizer_sha256)

        files.own_folder(self.unfinished)
        self._put_in_place()
        self.finished = _records_in(out / "meta.json")  # of the bins that have numbers
        if (out / "meta.json").exists() and not self.finished:
            print(f"{out}: meta.json is damaged, so everything is tokenized again")
        _delete(TOKENIZER, self.new_tokenizer)
        files.own_folder(self.new_tokenizer)

    def _refuse_what_is_there(self, tokenizer_sha256: str) -> None:
        """Raises UserError for bins, a model or another tokenizer in the folder."""
        bins = self._numbered_bins()
        if bins:
            raise UserError(
                f"{bins[0]}: no meta.json tells what it was made from; choose another --out or delete {self.out}"
            )
        for name in ("meta.json", "config.json"):
            if (self.out / name).exists():
                raise UserError(f"{self.out / name}: was not written by a preparation; choose another --out")
        there = [self.out / name for name in ("tokenizer.model", "tokenizer.json") if (self.out / name).exists()]
        if there and files.sha256(there[0]) != tokenizer_sha256:
            raise UserError(f"{there[0]}: another tokenizer, which would be overwritten; choose another --out")

    def finished_records(self, groups: list[Group], token_bytes: int) -> list[dict] | None:
        """The record of each group if the folder is finished, and of just these groups; else None."""
        if [record["key"] for record in self.finished] != [group.key for group in groups]:
            return None
        return self.finished if all(_check_bins(self.finished, self._numbered, token_bytes)) else None

    def whole_records(self, groups: list[Group], token_bytes: int) -> dict[str, dict]:
        """Key → record of those groups whose bins are there and whole, with a number or without."""
        keys = {group.key for group in groups}
        numbered = [record for record in self.finished if record["key"] in keys]
        checks = _check_bins(numbered, self._numbered, token_bytes)
        whole = {record["key"]: record for record, is_whole in zip(numbered, checks, strict=True) if is_whole}
        for path in self.unfinished.glob("*"):
            if BY_KEY.fullmatch(path.name) and path.name.partition(".")[0] in whole:
                files.discard(path)  # the numbered bins are taken, not these

        new = [read_record(read_json(self.unfinished / f"{key}.json")) for key in keys - whole.keys()]
        new = [record for record in new if record.get("key") in keys - whole.keys()]
        checks = _check_bins(new, self._named_by_key, token_bytes)
        return whole | {record["key"]: record for record, is_whole in zip(new, checks, strict=True) if is_whole}

    def earlier_sources(self) -> dict[str, dict]:
        """File → what its tokens were made from in earlier preparations."""
        records = [read_record(read_json(path)) for path in sorted(self.unfinished.glob("*-*.json"))]
        sources = {}
        for record in (*records, *self.finished):
            for source in record.get("sources", []):
                sources[source["file"]] = source | {"tokenizer": record["tokenizer"]}
        return sources

    def earlier_keys(self) -> set[str]:
        """The keys of bins that were made once, whole or not by now."""
        return {path.stem for path in self.unfinished.glob("*-*.json")} | {record["key"] for record in self.finished}

    def put_together(self, meta: dict) -> None:
        """Finish the folder as `meta` (of `meta_of`) says, whose bins and tokenizer are whole."""
        write_json(self.unfinished / "next.meta.json", meta)
        self._put_in_place()
        self.clean()

    def _put_in_place(self) -> None:
        """Put in place what is ready, if anything is; killed at any moment, this goes on where it stopped."""
        next_meta = self.unfinished / "next.meta.json"
        last_meta = self.unfinished / "meta.json"
        records = _records_in(next_meta)

        # The old bins lose their numbers. Without meta.json the folder is not finished.
        if records and (self.out / "meta.json").exists():
            (self.out / "meta.json").replace(last_meta)
        for record in _records_in(last_meta):
            for split, kind, name in _files_of(record):
                by_key = self._named_by_key(record, split, kind)
                if (self.out / name).exists() and not by_key.exists():  # a damaged bin was made again
                    (self.out / name).replace(by_key)
        last_meta.unlink(missing_ok=True)
        if not records:
            return

        # The new tokenizer, the new numbers, and meta.json last.
        Tokenizer.load(self.new_tokenizer).save(self.out)
        readable = self.new_tokenizer / "tokenizer.vocab"
        if readable.exists():  # it was learnt
            readable.replace(self.out / readable.name)
        for record in records:
            for split, kind, name in _files_of(record):
                by_key = self._named_by_key(record, split, kind)
                if by_key.exists():
                    by_key.replace(self.out / name)
        files.sync(self.out)
        next_meta.replace(self.out / "meta.json")
        files.sync(self.out)

    def clean(self) -> None:
        """Delete what is left over, once the folder is finished: bins that are no longer asked for, and the like.

        What has no name of ours stays.
        """
        asked_for = {name for record in _records_in(self.out / "meta.json") for _, _, name in _files_of(record)}
        for path in self._numbered_bins():
            if path.name not in asked_for:
                path.unlink()
        _delete(TOKENIZER, self.new_tokenizer)
        _delete(BY_KEY, self.unfinished)

    def _numbered(self, record: dict, split: str, kind: str) -> Path:
        return (self.out / record[split]["name"]).with_suffix(kind)

    def _named_by_key(self, record: dict, split: str, kind: str) -> Path:
        return bin_path(self.unfinished, record["key"], split, kind)

    def _numbered_bins(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if NUMBERED.fullmatch(path.name))


def _delete(names: re.Pattern, folder: Path) -> None:
    """Delete the files of these names in a folder, what was being written there, and the folder if it is then empty."""
    for path in folder.glob("*"):
        if names.fullmatch(path.name) or files.SCRATCH.fullmatch(path.name):
            files.discard(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files_of(record: dict) -> Iterator[tuple[str, str, str]]:
    """(split, kind, name) of each numbered file of a record."""
    for split in SPLITS:
        for kind in FILES[split]:
            if record[split]["name"] and record[split].get(SHA256[kind]):
                yield split, kind, str(Path(record[split]["name"]).with_suffix(kind))


def _records_in(meta_file: Path) -> list[dict]:
    """The records of all bins; none if meta.json is missing or damaged."""
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
