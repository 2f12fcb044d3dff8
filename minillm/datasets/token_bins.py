"""Token bins: raw files of ids with a meta.json, opened through a memory map and checked."""

import hashlib
import json
from pathlib import Path

import numpy as np

from minillm.base.errors import UserError

SCANNED_TOKENS = 1 << 28  # bins up to this size are checked for bad ids when opened, larger ones as they are read
SAMPLES = 1024  # evenly spaced tokens that go into a raw .bin's fingerprint: each may be a page to read


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
            dtype, vocab_size = self.meta["dtype"], self.meta["vocab_size"]
            files = [(self.path / f["name"], f["tokens"]) for f in self.meta["files"].get(split, [])]
            if not files:
                raise UserError(f"{self.path}: holds no {split} split; prepare it again with one")
        elif not self.path.exists():
            raise UserError(f"{self.path}: no such data; run `python data/prepare.py --input … --out {self.path}`")
        elif self.path.name.removesuffix(".gz").endswith((".txt", ".json", ".jsonl", ".parquet")):
            raise UserError(f"{self.path}: is text; make token bins: `python data/prepare.py --input {self.path} …`")
        elif dtype not in ("uint16", "uint32") or vocab_size is None:
            raise UserError(f"{self.path}: a raw .bin needs --data_dtype uint16|uint32 and --data_vocab_size N")
        else:
            files = [(self.path, None)]
        self.vocab_size: int = vocab_size
        self.eos_id: int | None = self.meta.get("eos_id")
        with_bos = self.meta.get("wrap") == "bos_eos"
        self.start_id: int | None = self.meta["bos_id"] if with_bos else self.eos_id  # before a document
        self.arrays = [self._open(file, tokens, np.dtype(dtype).newbyteorder("<")) for file, tokens in files]
        if not self.meta:
            cut = len(self.arrays[0]) - max(2, len(self.arrays[0]) // 100)
            self.arrays = [self.arrays[0][cut:] if split == "val" else self.arrays[0][:cut]]
        self.names = [str(file) for file, _ in files]
        self.n_tokens = sum(len(a) for a in self.arrays)
        documents = sum(f["documents"] for f in self.meta.get("files", {}).get(split, []))
        self.mean_document = self.n_tokens / documents if documents else 0.0  # tokens; 0: not known
        if self.n_tokens <= SCANNED_TOKENS:
            for number, tokens in enumerate(self.arrays):
                self.check_ids(tokens, number, 0)

    def ids(self) -> tuple:
        """What the ids mean, as far as known; for a raw .bin only how many there are."""
        return self.vocab_size, self.eos_id, self.start_id, self.meta.get("tokenizer_sha256")

    def identity(self) -> dict:
        """What identifies the data: meta.json, or for a raw .bin the number of training tokens and a hash of some."""
        if self.meta:
            return self.meta
        tokens = self.arrays[0]
        some = tokens[:: max(1, len(tokens) // SAMPLES)].tobytes()
        return {"tokens": len(tokens), "dtype": tokens.dtype.str, "sha256": hashlib.sha256(some).hexdigest()}

    def _open(self, file: Path, tokens: int | None, dtype: np.dtype) -> np.ndarray:
        if not file.exists():
            raise UserError(f"{file}: missing, though meta.json lists it; prepare the data again")
        size = file.stat().st_size
        if tokens is not None and size != tokens * dtype.itemsize:
            raise UserError(
                f"{file}: {size} bytes, but meta.json says {tokens} tokens of {dtype.itemsize} bytes; prepare again"
            )
        if size == 0 or size % dtype.itemsize:
            raise UserError(f"{file}: {size} bytes are not a whole number of {dtype.name} tokens; is the dtype right?")
        return np.asarray(np.memmap(file, dtype=dtype, mode="r"))  # a plain view: slicing a memmap object is slow

    def check_ids(self, tokens: np.ndarray, number: int, offset: int) -> None:
        """Raise UserError for an id beyond the vocabulary; `offset`: where `tokens` begin in file `number`."""
        if len(tokens) and tokens.max() >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{self.names[number]}: token {offset + at} is {int(tokens[at])}, but the vocabulary has "
                f"{self.vocab_size} ids; the data was made with another tokenizer or has another dtype"
            )


def read_meta(folder: Path) -> dict:
    """A data folder's meta.json, checked for the keys that reading the bins needs."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["dtype"], meta["vocab_size"], meta["files"]["train"]
    except FileNotFoundError:
        if not any(folder.glob("*.bin")) and not (folder / "parts.json").exists():
            raise UserError(
                f"{folder}: holds no token bins; make some of its texts: `python data/prepare.py --input {folder} …`"
            ) from None
        raise UserError(
            f"{folder}: holds no meta.json, so never finished; run `python data/prepare.py … --out {folder}` again"
        ) from None
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{folder / 'meta.json'}: cannot be read ({problem!r}); prepare the data again") from None
    return meta


def parse_mixture(text: str) -> list[tuple[Path, float]]:
    """`a` or `a:3,b:1` → folders with their shares, which sum to one."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = []
    for part in parts:
        path, colon, weight = part.rpartition(":")
        try:
            pairs.append((Path(path), float(weight)) if colon and path else (Path(part), 1.0))
        except ValueError:
            if Path(path).exists() and not Path(part).exists():
                raise UserError(f"--data {part}: the weight {weight!r} is no number; give FOLDER:WEIGHT") from None
            pairs.append((Path(part), 1.0))  # a colon that belongs to the path
    if not pairs or any(not 0 < weight < float("inf") for _, weight in pairs):
        raise UserError(f"--data {text!r}: expected FOLDER, or FOLDER:WEIGHT,FOLDER:WEIGHT,… with weights above 0")
    total = sum(weight for _, weight in pairs)
    return [(path, weight / total) for path, weight in pairs]
