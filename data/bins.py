"""Token bins while they are being written: what is valid so far, and when the folder is finished."""

import json
import os
import time
from pathlib import Path

import numpy as np

from minillm import UserError
from minillm.files import write_json_atomically
from minillm.tokenizer import Tokenizer

SPLITS = ("train", "val")


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def finished(out: Path, made_from: str) -> dict | None:
    """meta.json of a folder finished from the same input; raises UserError if from other input."""
    if not (out / "meta.json").exists():
        return None
    meta = _read_json(out / "meta.json")
    if meta.get("made_from") != made_from:
        raise UserError(
            f"--out {out}: holds a data set made from other input, options or tokenizer; "
            "choose another --out or delete the folder"
        )
    width = np.dtype(meta["dtype"]).itemsize
    for file in (file for kind in SPLITS for file in meta["files"][kind]):
        path = out / file["name"]
        if not path.is_file() or path.stat().st_size != file["tokens"] * width:
            raise UserError(
                f"{path}: not the {file['tokens'] * width:,} bytes of meta.json; delete {out} and start again"
            )
    return meta


def unfinished(out: Path, made_from: str, batch_bytes: int) -> dict:
    """How far an interrupted preparation of the same input got; what another one left is cleared away."""
    state = _read_json(out / "progress.json")
    bins = [file for kind in SPLITS for file in out.glob(f"{kind}-*.bin")]
    if not state and bins:
        raise UserError(f"{bins[0]}: not written by a preparation that could go on; choose another --out or delete it")
    if (state.get("made_from"), state.get("batch_bytes")) == (made_from, batch_bytes):
        return state
    for file in bins:
        file.unlink()
    return {}


class Bins:
    """The growing .bin files, and `progress.json`, which says up to where they are valid."""

    def __init__(self, out: Path, tokenizer: Tokenizer, shard_tokens: int, state: dict):
        self.out, self.tokenizer, self.shard_tokens = out, tokenizer, shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        empty = {"batches": 0, "files": {k: [] for k in SPLITS}, "bytes": dict.fromkeys(SPLITS, 0)}
        self.state = {**empty, "bad_lines": 0, "empty_documents": 0, "first_bad": [], **state}
        self.open = {}
        known = [file for kind in SPLITS for file in self.state["files"][kind]]
        for kind in SPLITS:
            for path in out.glob(f"{kind}-*.bin"):
                if path.name not in [file["name"] for file in known]:
                    path.unlink()
        for file in known:  # what came after the last record is written again
            path = out / file["name"]
            if not path.exists() or path.stat().st_size < file["tokens"] * self.dtype.itemsize:
                raise UserError(f"{path}: shorter than progress.json says; delete the folder and start again")
            os.truncate(path, file["tokens"] * self.dtype.itemsize)
        self.save()  # from now on, bins in this folder are known to be ours

    def tokens(self) -> int:
        return sum(file["tokens"] for kind in SPLITS for file in self.state["files"][kind])

    def add(self, kind: str, data: bytes, documents: int, text_bytes: int) -> None:
        files = self.state["files"][kind]
        if not files or files[-1]["tokens"] >= self.shard_tokens:
            if kind in self.open:
                self._sync(self.open.pop(kind))
            files.append({"name": f"{kind}-{len(files):05d}.bin", "tokens": 0, "documents": 0})
        path = self.out / files[-1]["name"]
        try:
            if kind not in self.open:
                self.open[kind] = path.open("ab")
            self.open[kind].write(data)
        except OSError as error:
            raise UserError(
                f"{path}: writing {len(data):,} bytes failed ({error.strerror}); make room, then run the same "
                "command again: it goes on from here"
            ) from None
        files[-1]["tokens"] += len(data) // self.dtype.itemsize
        files[-1]["documents"] += documents
        self.state["bytes"][kind] += text_bytes

    def save(self) -> None:
        for file in self.open.values():
            self._sync(file, close=False)
        write_json_atomically(self.out / "progress.json", self.state)
        self.saved_at = time.monotonic()

    def _sync(self, file, close: bool = True) -> None:
        file.flush()
        os.fsync(file.fileno())
        if close:
            file.close()

    def finish(self, about: dict) -> dict:
        """Write meta.json, by which the folder counts as complete."""
        self.save()
        for file in self.open.values():
            file.close()
        t, state = self.tokenizer, dict(self.state)
        for name in ("batches", "batch_bytes", "tokenizer"):
            state.pop(name)
        ids = {"bos_id": t.bos_id, "eos_id": t.eos_id, "pad_id": t.pad_id}
        meta = {"format": 1, "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "vocab_size": t.vocab_size}
        meta |= {"tokenizer_sha256": t.sha256, **ids, **about, **state}
        write_json_atomically(self.out / "meta.json", meta)
        (self.out / "progress.json").unlink()
        return meta
