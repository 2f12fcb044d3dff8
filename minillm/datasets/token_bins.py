"""Token bins: raw files of ids with a meta.json, opened through a memory map and checked."""

import hashlib
import shlex
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.base.contents import Contents
from minillm.base.errors import MissingError, UserError
from minillm.base.json_door import file_size, path_inside, read_object

SCANNED_TOKENS = 1 << 28  # bins up to this size are checked for bad ids when opened, larger ones as they are read
NEWEST_FORMAT = 2
MOST_META_BYTES = 1 << 30  # of meta.json, which has the path of each input file and some 220 bytes
SAMPLES = 1024  # evenly spaced tokens that go into the fingerprint of a split: each may be a page to read
FEWEST_PAIRS = 32  # of tokens, from which on a raw .bin of uint16 is looked at for halves of uint32
MADE_HOW = ("bins", "bins_sha256", "source", "val_source", "options", "learnt_from", "first_bad")  # keys of meta.json
HIGHEST_HALF = 3  # the upper half of an id of uint32 below 262,144, more than vocabularies have


class Stream(NamedTuple):
    """Tokens of a split that windows run over without a gap: a file, or all of them."""

    name: str
    begin: int  # number of its first token in the split
    end: int  # of the token after its last


class TokenBins:
    """One split of a prepared folder (or of a raw `.bin` made elsewhere), opened read-only and checked."""

    def __init__(self, path: str | Path, split: str, *, dtype: str | None = None, vocab_size: int | None = None):
        """path: a folder with meta.json, or a raw .bin described by `dtype` (uint16 or uint32) and
        `vocab_size`, of which the last hundredth serves as the validation split. Raises UserError.
        """
        self.path = Path(path)
        self.meta: dict = {}
        if self.path.is_dir():
            self.meta = read_meta(self.path)
            dtype = self.meta["dtype"]
            vocab_size = self.meta["vocab_size"]
        else:
            _check_raw(self.path, dtype, vocab_size)
        if dtype == "uint16" and vocab_size > 1 << 16:
            raise UserError(
                f"{self.path}: {vocab_size:,} ids do not fit into uint16, which ends at 65,535; the data is uint32, or "
                "its vocabulary smaller"
            )
        self._open_files(split, np.dtype(dtype).newbyteorder("<"))

        self.vocab_size: int = vocab_size
        self.eos_id: int | None = self.meta.get("eos_id")
        begins_with_bos = self.meta.get("wrap") == "bos_eos"
        self.start_id: int | None = self.meta["bos_id"] if begins_with_bos else self.eos_id  # before a document

        self.begins = [0, *accumulate(len(tokens) for tokens in self.arrays)]  # of each file, in tokens of the split
        self.n_tokens = self.begins[-1]
        self.n_documents = sum(file["documents"] for file in self.meta.get("files", {}).get(split, []))
        self.mean_document = self.n_tokens / self.n_documents if self.n_documents else 0.0  # tokens; 0: not known
        self.document_bytes = self._read_sizes(split)
        if self.meta and read_meta(self.path) != self.meta:
            raise UserError(f"{self.path}: was prepared again while it was opened; start once more")
        if self.n_tokens <= SCANNED_TOKENS:
            for number, tokens in enumerate(self.arrays):
                self._check_ids(tokens, number, 0)

    def _open_files(self, split: str, dtype: np.dtype) -> None:
        """Sets `arrays`, the tokens of each file, (n,) uint16 or uint32, and `names`."""
        if not self.meta:
            tokens = _open(self.path, None, dtype)
            _refuse_halves(self.path, tokens)
            n_val = max(2, len(tokens) // 100)
            self.arrays = [tokens[-n_val:] if split == "val" else tokens[:-n_val]]
            self.names = [str(self.path)]
            return
        files = self.meta["files"].get(split, [])
        if not files:
            raise UserError(f"{self.path}: holds no {split} split; prepare it again with one")
        self.arrays = [_open(self.path / file["name"], file["tokens"], dtype) for file in files]
        self.names = [str(self.path / file["name"]) for file in files]

    def _read_sizes(self, split: str) -> np.ndarray | None:
        """UTF-8 bytes of the text of each document of the split, (n documents,) int64; None if they were not written.

        Raises UserError if they do not add up to what meta.json says.
        """
        files = self.meta.get("files", {}).get(split, [])
        if not files or not all(file.get("sizes") for file in files):
            return None
        sizes = []
        for file in files:
            path = (self.path / file["name"]).with_suffix(".sizes")
            sizes.append(_open(path, file["documents"], np.dtype("<u4")).astype(np.int64))
        total = self.meta.get("bytes", {}).get(split)
        if sum(int(each.sum()) for each in sizes) != total:
            raise UserError(f"{self.path}: the .sizes of {split} do not add up to its {total} bytes; prepare it again")
        return np.concatenate(sizes)

    def check_tokenizer(self, tokenizer) -> None:
        """Raise UserError unless meta.json says that the bins were made by this tokenizer, with as many ids as it has:
        a model with a row for each would read an id beyond them.
        """
        if self.meta.get("tokenizer_sha256") != tokenizer.sha256:
            raise UserError(f"{self.path}: prepared with another tokenizer; prepare it again")
        if self.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{self.path}: meta.json says {self.vocab_size:,} ids, its tokenizer has {tokenizer.vocab_size:,}; "
                "prepare it again"
            )

    def streams(self) -> list[Stream]:
        """What windows run over: all files as one since format 2, where a file is cut between documents; before, each.

        So in format 2 it makes no difference into how many files the texts were put.
        """
        if self.meta.get("format", 1) >= 2:
            return [Stream(str(self.path), 0, self.n_tokens)]
        return list(map(Stream, self.names, self.begins, self.begins[1:]))

    def read(self, start: int, count: int) -> np.ndarray:
        """The tokens start … start + count of the split, over the ends of files: (count,) uint16 or uint32."""
        pieces = []
        number = bisect_right(self.begins, start) - 1  # of the file that holds the first token
        while count:
            offset = start - self.begins[number]
            piece = self.arrays[number][offset : offset + count]
            if self.n_tokens > SCANNED_TOKENS:
                self._check_ids(piece, number, offset)
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
            number += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def ids(self) -> tuple:
        """What the ids mean, as far as known; for a raw .bin only how many there are."""
        return self.vocab_size, self.eos_id, self.start_id, self.meta.get("tokenizer_sha256")

    def identity(self) -> dict:
        """What identifies the data: of meta.json, or for a raw .bin the number of training tokens and a hash of some.

        Where the texts lay, and by which options they were read, is left out: `made_from` has all of it that the tokens
        depend on. So bins of texts that have moved since, or that lie elsewhere on another machine, are the same data.
        """
        if self.meta:
            return {key: value for key, value in self.meta.items() if key not in MADE_HOW}
        return {"tokens": self.n_tokens, "dtype": self.arrays[0].dtype.str, "sha256": self.sample()}

    def sample(self) -> str:
        """SHA-256 of evenly spaced tokens of the split: another one where a file was replaced, or only part-copied.

        meta.json cannot tell, since it is a file of its own; and to read all of some terabytes would take hours.
        """
        step = max(1, self.n_tokens // SAMPLES)
        digest = hashlib.sha256()
        for begin, tokens in zip(self.begins, self.arrays, strict=False):
            digest.update(tokens[-begin % step :: step].tobytes())
        return digest.hexdigest()

    def _check_ids(self, tokens: np.ndarray, number: int, offset: int) -> None:
        """Raise UserError for an id beyond the vocabulary; `offset`: where `tokens` begin in file `number`."""
        if len(tokens) and tokens.max() >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{self.names[number]}: token {offset + at} is {int(tokens[at])}, but the vocabulary has "
                f"{self.vocab_size} ids; the data was made with another tokenizer or has another dtype"
            )


def _check_raw(path: Path, dtype: str | None, vocab_size: int | None) -> None:
    """Raises UserError for a path that is no folder and no raw .bin with a description."""
    if not path.exists():
        raise UserError(
            f"{path}: no such data; run `python data/prepare.py --input … --out {shlex.quote(str(path))}`, or for the "
            "bundled corpus `python data/bundled.py`"
        )
    if path.name.removesuffix(".gz").endswith((".txt", ".json", ".jsonl", ".parquet")):
        raise UserError(
            f"{path}: is text; make token bins: `python data/prepare.py --input {shlex.quote(str(path))} …`"
        )
    if dtype not in ("uint16", "uint32") or vocab_size is None:
        raise UserError(f"{path}: a raw .bin needs --data_dtype uint16|uint32 and --data_vocab_size N")


def _open(file: Path, n_tokens: int | None, dtype: np.dtype) -> np.ndarray:
    """The numbers of one file, mapped into memory. n_tokens: how many meta.json says there are."""
    try:
        size = file_size(file)
    except MissingError:
        raise UserError(f"{file}: missing, though meta.json lists it; prepare the data again") from None
    if n_tokens is not None and size != n_tokens * dtype.itemsize:
        raise UserError(
            f"{file}: {size} bytes, but meta.json says {n_tokens} tokens of {dtype.itemsize} bytes; prepare again"
        )
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{file}: {size} bytes are not a whole number of {dtype.name} tokens; is the dtype right?")
    return np.asarray(np.memmap(file, dtype=dtype, mode="r"))  # a plain view: slicing a memmap object is slow


def _refuse_halves(path: Path, tokens: np.ndarray) -> None:
    """Raise UserError for uint16 that look like uint32 cut in two: every second is its upper half, 0 or little more.

    No text has such ids at each second place, and seldom there alone; padding, a small id too, is at both.
    """
    pairs = tokens[: len(tokens) // 2 * 2].reshape(-1, 2)
    if tokens.dtype.itemsize != 2 or len(pairs) < FEWEST_PAIRS:
        return
    lower, upper = pairs[:: max(1, len(pairs) // SAMPLES)].T
    is_upper = upper.max() <= HIGHEST_HALF and upper.min() == 0
    if is_upper and np.mean(lower > HIGHEST_HALF) > 0.5:
        raise UserError(
            f"{path}: looks like uint32: of its uint16 every second is at most {upper.max()}; give --data_dtype uint32"
        )


def read_meta(folder: Path) -> dict:
    """A data folder's meta.json, in which all that reading the bins needs is of its kind. Raises UserError."""
    path = folder / "meta.json"
    try:
        meta = read_object(path, MOST_META_BYTES)
    except MissingError:
        raise _no_meta_error(folder) from None
    if meta.get("format", int, 1) > NEWEST_FORMAT:
        raise UserError(f"{path}: format {meta.values['format']} is newer than this minillm; update it")

    # what the tokens are
    meta.need("dtype", str, choices=("uint16", "uint32"))
    vocab_size = meta.need("vocab_size", int, at_least=1)
    for name in ("tokenizer_sha256", "wrap"):
        meta.get(name, str)
    for name in ("bos_id", "eos_id", "pad_id"):
        meta.get(name, int, at_least=0, at_most=vocab_size - 1)
    if meta.get("wrap", str) == "bos_eos":
        meta.need("bos_id", int)

    # where they are
    meta.need("files", dict)
    n_bytes = meta.part("bytes")
    for split in ("train", "val"):
        n_bytes.get(split, int, at_least=0)
        for file in meta.part("files").parts(split):
            _check_file(file, folder)
    return {name: value for name, value in meta.values.items() if value is not None}


def _check_file(file: Contents, folder: Path) -> None:
    """Raise UserError for a wrong value of what meta.json says of a bin, or one that is not in the folder."""
    path_inside(folder, file.need("name", str), file.source)
    file.need("tokens", int, at_least=0)
    file.need("documents", int, at_least=0)


def _no_meta_error(folder: Path) -> UserError:
    if any(folder.glob("*.bin")) or (folder / "unfinished").exists():
        return UserError(
            f"{folder}: holds no meta.json, so it was never finished, or making it anew failed; run the "
            f"`python data/prepare.py … --out {shlex.quote(str(folder))}` that made it again"
        )
    if (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return UserError(
            f"{folder}: holds a tokenizer and no token bins; make some by it: "
            f"`python data/prepare.py --input … --tokenizer {shlex.quote(str(folder))} --out DIR`"
        )
    return UserError(
        f"{folder}: holds no token bins; make some of its texts: "
        f"`python data/prepare.py --input {shlex.quote(str(folder))} …`"
    )


def parse_mixture(text: str) -> list[tuple[Path, float]]:
    """`a` or `a:3,b:1` → folders with their shares, which sum to one."""
    weighted = [_weighted(part.strip()) for part in text.split(",") if part.strip()]
    if not weighted or any(not 0 < weight < float("inf") for _, weight in weighted):
        raise UserError(f"--data {text!r}: expected FOLDER, or FOLDER:WEIGHT,FOLDER:WEIGHT,… with weights above 0")
    total = sum(weight for _, weight in weighted)
    return [(path, weight / total) for path, weight in weighted]


def _weighted(part: str) -> tuple[Path, float]:
    """`a:3` → a, 3; `a` → a, 1."""
    path, colon, weight = part.rpartition(":")
    if not (colon and path):
        return Path(part), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        if Path(path).exists() and not Path(part).exists():
            raise UserError(f"--data {part}: the weight {weight!r} is no number; give FOLDER:WEIGHT") from None
        return Path(part), 1.0  # a colon that belongs to the path
