"""Memory-mapped token bins that give shifted X/Y pairs, in an order that is a pure function of the seed.

A data position is a number: position p always means the same window, whatever the number of ranks and
however often the run was stopped, because the order is computed (a keyed permutation), not stored.
"""

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm import UserError

SCANNED_TOKENS = 1 << 28  # bins up to this size are checked for bad ids when opened, larger ones as they are read
SAMPLES = 1024  # evenly spaced tokens that go into a raw .bin's fingerprint: each may be a page to read
MIXTURE_SLOTS = 256  # each block of this many windows has a mixture's exact shares


class Batch(NamedTuple):
    """The examples at some data positions.

    x, y: (B, T) int64, y[t] the token after x[t]. mask: (B, T) bool, True where y counts as a target
    (None: everywhere). documents: (B, T) int32, the number of the document that x[t] is in,
    non-decreasing along a row (None: attention sees the whole row).
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """On CUDA the copy is from pinned memory and does not block."""
        if device.type != "cuda":
            return Batch(*(t if t is None else t.to(device) for t in self))
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))

    def n_targets(self) -> int:
        return self.y.numel() if self.mask is None else int(self.mask.sum())

    def with_placeholders(self, n: int) -> "Batch":
        """The batch with n positions (id 0, no targets) before each document, for a model's n virtual tokens.

        Without `documents` each row is one document. Rows become as wide as the one with most documents needs; the
        others end in padding with mask False.
        """
        if n == 0:
            return self
        begins = torch.zeros_like(self.x)
        begins[:, 0] = 1
        if self.documents is not None:
            begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        index = torch.arange(self.x.shape[1]) + n * begins.cumsum(1)  # where each token goes, (B, T)
        width = int(index.max()) + 1

        def spread(values: Tensor, index: Tensor = index) -> Tensor:
            return values.new_zeros(len(values), width).scatter(1, index, values)

        mask = torch.ones_like(self.x, dtype=torch.bool) if self.mask is None else self.mask
        documents = None if self.documents is None else spread(begins, index - n).cumsum(1).int()
        return Batch(spread(self.x), spread(self.y), spread(mask), documents)


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of range(n), keyed by any integer, evaluated only where asked.

    A four-round Feistel network over the smallest even number of bits that holds n; values outside
    the range go through it again until they are inside ("cycle walking", Black & Rogaway 2002).

    index: int array of values in [0, n); returns int64 of the same shape.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key % (1 << 128)).generate_state(4, np.uint64)
    out = np.array(index, dtype=np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(half), out[outside] & low
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # an odd multiplier spreads every bit upwards
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= np.uint64(n)
    return out.astype(np.int64)


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


class TokenWindows:
    """The pretraining set: windows of seq_len + 1 tokens, overlapping by one, so that every token is a target once.

    (The last window of a file is moved back to end with the file, so a few targets there occur twice per epoch.)
    """

    def __init__(self, mixture: list[tuple[TokenBins, float]], seq_len: int, *, seed: int, documents: bool = False):
        """mixture: opened bins with shares that sum to one. seq_len: T in tokens. documents: number the
        documents in each batch, so that attention stays inside them.
        """
        self.sources = [bins for bins, _ in mixture]
        self.seq_len, self.seed, self.documents = seq_len, seed, documents
        for bins in self.sources:
            for tokens, name in zip(bins.arrays, bins.names, strict=True):
                if len(tokens) < seq_len + 1:
                    raise UserError(f"{name}: {len(tokens)} tokens are fewer than one window of {seq_len} + 1")
            if bins.ids() != self.sources[0].ids():
                raise UserError(
                    f"{bins.path}: prepared with another tokenizer or --wrap than {self.sources[0].path}; "
                    "mix like with like"
                )
            if documents and bins.eos_id is None:
                raise UserError(f"{bins.path}: the end-of-document id is unknown, so --document_attention cannot be")
        # cumulative number of windows per file, for each source: [0, w0, w0 + w1, …]
        self.edges = [
            np.cumsum([0] + [-(-(len(tokens) - 1) // seq_len) for tokens in bins.arrays]) for bins in self.sources
        ]
        shares = np.array([share for _, share in mixture])
        self.slots = np.round(np.cumsum([0.0, *shares]) * MIXTURE_SLOTS).astype(np.int64)
        if (np.diff(self.slots) == 0).any():
            raise UserError(f"--data: a share below 1/{MIXTURE_SLOTS} would never be drawn; raise its weight")

    @property
    def n_windows(self) -> int:
        """Windows in one pass over every source."""
        return int(sum(edges[-1] for edges in self.edges))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, window in that source) of each position: int64 arrays of the same shape, (B,)."""
        sources, turns = self._deal(positions)
        windows = np.empty_like(positions)
        for source in np.unique(sources):
            windows[sources == source] = self._shuffle(int(source), turns[sources == source])
        return sources, windows

    def _deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which source each position reads, and its turn: how many positions before it read the same source.

        Of a:3,b:1 each block of 256 positions, shuffled, gives slots 0 … 191 to a and the rest to b. So if position
        256 + 5 has slot 200, it reads b, whose turns 64 … 127 are in this block: turn 64 + 200 − 192.
        """
        if len(self.sources) == 1:
            return np.zeros_like(positions), positions
        blocks, places = np.divmod(positions, MIXTURE_SLOTS)
        keys = [_key(self.seed, 1, block) for block in blocks]
        slots = np.array([permute(place, MIXTURE_SLOTS, key) for place, key in zip(places, keys, strict=True)])
        sources = np.searchsorted(self.slots, slots, side="right") - 1
        return sources, blocks * np.diff(self.slots)[sources] + slots - self.slots[sources]

    def _shuffle(self, source: int, turns: np.ndarray) -> np.ndarray:
        """The window that each turn of a source reads: each epoch permutes the windows differently.

        Of 100 windows, turn 99 reads π₀(99), turn 100 reads π₁(0), turn 203 reads π₂(3).
        """
        n = int(self.edges[source][-1])
        epochs, index = np.divmod(turns, n)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permute(index[epochs == epoch], n, _key(self.seed, 2, epoch, source))
        return index

    def batch(self, positions: np.ndarray) -> Batch:
        """The windows at these positions, (B,) int64: a pure function of seed and positions."""
        rows = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)
        for row, source, window in zip(rows, *self.locate(np.asarray(positions)), strict=True):
            bins, edges = self.sources[source], self.edges[source]
            number = int(np.searchsorted(edges, window, side="right")) - 1
            tokens = bins.arrays[number]
            start = min(int(window - edges[number]) * self.seq_len, len(tokens) - self.seq_len - 1)
            row[:] = tokens[start : start + self.seq_len + 1]
            if bins.n_tokens > SCANNED_TOKENS:
                bins.check_ids(row, number, start)
        documents = documents_in(rows[:, :-1], self.sources[0].start_id) if self.documents else None
        return shifted(rows, documents=documents)


def shifted(rows: np.ndarray, mask: np.ndarray | None = None, documents: np.ndarray | None = None) -> Batch:
    """A Batch of X and Y from rows of T + 1 tokens, (B, T + 1) int64; mask and documents: (B, T)."""
    tokens = torch.from_numpy(rows)
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        None if mask is None else torch.from_numpy(mask),
        None if documents is None else torch.from_numpy(documents.astype(np.int32)),
    )


def documents_in(x: np.ndarray, start_id: int) -> np.ndarray:
    """Number of the document each input token belongs to: (B, T) int32.

    start_id: bos if every document begins with one, else eos. As an input, the eos that ends a document then counts as
    the beginning of the next: the next document's first token is predicted from it, without seeing the document
    before. This matches generation, which starts from a single bos or eos.
    """
    return np.cumsum(x == start_id, axis=1).astype(np.int32)


class ValidationPart(NamedTuple):
    """A fixed part of the validation split, as whole documents."""

    rows: np.ndarray  # (n, T + 1) int64: windows that overlap by one
    mask: np.ndarray  # (n, T) bool: True on the targets of those documents
    n_documents: int

    def batches(self, rows_per_batch: int, documents: bool, start_id: int | None):
        for i in range(0, len(self.rows), rows_per_batch):
            rows = self.rows[i : i + rows_per_batch]
            inside = documents_in(rows[:, :-1], start_id) if documents else None
            yield shifted(rows, self.mask[i : i + rows_per_batch], inside)


def validation_part(bins: TokenBins, seq_len: int, max_tokens: int) -> ValidationPart:
    """The first whole documents of up to `max_tokens` tokens, over all files, every token a target exactly once.

    An eos is put before the first document, as there is one before every other. Where documents begin with bos, none
    is needed, and bos is not a target, since it carries no information. If no eos is known, or the first document alone
    is longer, the part is simply the first tokens. Raises `UserError` for a part without a target.
    """
    begins = accumulate((len(tokens) for tokens in bins.arrays), initial=0)
    parts = [tokens[: max(0, max_tokens - begin)] for tokens, begin in zip(bins.arrays, begins, strict=False)]
    tokens = np.concatenate(parts).astype(np.int64)
    n_documents = 0
    if bins.eos_id is not None:
        ends = np.flatnonzero(tokens == bins.eos_id)
        if len(ends):
            tokens, n_documents = tokens[: ends[-1] + 1], len(ends)
        if bins.start_id == bins.eos_id:
            tokens = np.concatenate([[bins.eos_id], tokens])
    if len(tokens) < 2:
        needed = "raise --eval_tokens (of eval, --max_tokens)"
        raise UserError(f"{bins.path}: {len(tokens)} token to validate on leaves no target; {needed}")
    n_rows = -(-(len(tokens) - 1) // seq_len)
    padded = np.zeros(n_rows * seq_len + 1, dtype=np.int64)
    padded[: len(tokens)] = tokens
    rows = np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len].copy()
    mask = np.arange(1, n_rows * seq_len + 1).reshape(n_rows, seq_len) < len(tokens)
    if bins.start_id != bins.eos_id:
        mask &= rows[:, 1:] != bins.start_id
    return ValidationPart(rows, mask, n_documents)


def _key(*parts: int) -> int:
    """One integer from a few, each below 2³²."""
    key = 0
    for part in parts:
        key = (key << 32) | (int(part) & 0xFFFFFFFF)
    return key
