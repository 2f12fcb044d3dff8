"""Token bins while they are being written, and a record of which part of them came from which input file.

The bins hold the tokens of the input files one after another. For each file parts.json records what its part was made
from (the SHA-256 of its bytes, the options, the tokenizer) and what it gave (tokens, documents, their SHA-256); it has
a checksum of its own. So a part can be recognized and verified, and is reused as long as none of that changes. Bins of
which other parts must be tokenized again are moved to old/ until the new ones are complete.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.base.errors import UserError
from minillm.base.files import write_json_atomically
from minillm.tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "val")
READ = 1 << 24  # bytes of a bin read at a time
NAMED = 5  # at most so many files are named per reason


class Origin(NamedTuple):
    """What a part is made from. The file's name does not count: a file may be moved."""

    text: str  # SHA-256
    options: str
    tokenizer: str  # SHA-256
    file: str


def checksum(value) -> str:
    """SHA-256 of any value that JSON can represent."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_json(file: Path) -> dict:
    """The JSON object in a file; {} if it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


class Parts:
    """The parts in a folder according to its parts.json; none if that is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder, self.state = folder, read_json(folder / "parts.json")
        if self.state.pop("checksum", None) != checksum(self.state):
            self.state = {}
        self.parts: list[dict] = self.state.get("parts", [])
        self.origins = [Origin(*part["origin"]) for part in self.parts]
        self.starts = {k: list(accumulate((part[k]["tokens"] for part in self.parts), initial=0)) for k in SPLITS}

    def read(self, number: int, kind: str) -> Iterator[bytes]:
        """A part's tokens of one split, piece by piece. Raises OSError if a bin is missing."""
        width = self.state["width"]
        start, left = self.starts[kind][number], self.parts[number][kind]["tokens"]
        for file in self.state["files"][kind]:
            tokens = min(left, max(0, file["tokens"] - start))
            if tokens:
                with (self.folder / file["name"]).open("rb") as stream:
                    stream.seek(start * width)
                    for position in range(0, tokens * width, READ):
                        yield stream.read(min(READ, tokens * width - position))
            left, start = left - tokens, max(0, start - file["tokens"])

    def digest(self, number: int, kind: str):
        """The running SHA-256 of these tokens."""
        digest = hashlib.sha256()
        for data in self.read(number, kind):
            digest.update(data)
        return digest

    def verified(self, number: int) -> bool:
        """Whether a part's tokens are as they were written."""
        try:
            return all(self.digest(number, kind).hexdigest() == self.parts[number][kind]["sha256"] for kind in SPLITS)
        except OSError:
            return False


class Bins:
    """The growing bins of the folder `out`; they begin with what can be kept of an earlier preparation.

    done: how many parts, from the first on, are in place. finished: all are, and there is nothing to do.
    reused: number of each part that is copied from old/ → its number there.
    earlier: file → what its part was made from; forgotten: parts.json exists, but is damaged.
    """

    def __init__(self, out: Path, tokenizer: Tokenizer, origins: list[Origin], *, shard_tokens: int, learnt: str):
        """origins: of every part, in order. learnt: what the tokenizer was learnt from, "" for a given one."""
        self.out, self.tokenizer, self.origins, self.shard_tokens = out, tokenizer, origins, shard_tokens
        self.dtype = tokenizer.id_dtype
        self.frame = {"width": self.dtype.itemsize, "shard_tokens": shard_tokens}
        self.frame |= {"tokenizer": tokenizer.sha256, "learnt": learnt}
        if (out / "old" / "parts.json").exists() and not (out / "parts.json").exists():
            _move(_bins(out), out / "old")  # killed while they were stepping aside
        here, aside = Parts(out), Parts(out / "old")
        self.forgotten = (out / "parts.json").exists() and not here.state
        self.earlier = {origin.file: origin for origin in aside.origins + here.origins}
        kept = 0
        if here.state.get("shard_tokens") == shard_tokens:
            while kept < min(len(here.parts), len(origins)) and self._stays(here, kept):
                kept += 1
        self.parts, self.files = here.parts[:kept], here.state.get("files")
        self.done = kept - any(not part["whole"] for part in self.parts)
        self.finished = self.done == len(origins) == len(here.parts)
        self.reused: dict[int, int] = {}
        if not self.finished:
            self._take_over(here, aside)

    def _stays(self, here: Parts, number: int) -> bool:
        return here.origins[number][:3] == self.origins[number][:3] and here.verified(number)

    def _take_over(self, here: Parts, aside: Parts) -> None:
        (self.out / "meta.json").unlink(missing_ok=True)  # from now on the folder is unfinished
        wanted = {origin[:3] for origin in self.origins}
        if not aside.parts and any(origin[:3] in wanted for origin in here.origins[len(self.parts) :]):
            shutil.rmtree(self.out / "old", ignore_errors=True)
            (self.out / "old").mkdir()
            _move([self.out / "parts.json", *_bins(self.out)], self.out / "old")
            here, aside = Parts(self.out), Parts(self.out / "old")
            self.parts, self.done = [], 0
        there = {origin[:3]: i for i, origin in enumerate(aside.origins) if aside.parts[i]["whole"]}
        for number, origin in enumerate(self.origins[len(self.parts) :], len(self.parts)):
            if origin[:3] in there and aside.verified(there[origin[:3]]):
                self.reused[number] = there[origin[:3]]
        self.aside, self.open, self.at_document = aside, {}, dict.fromkeys(SPLITS, True)
        partly = len(self.parts) > self.done
        self.digests = {kind: here.digest(self.done, kind) if partly else hashlib.sha256() for kind in SPLITS}
        self.files = {kind: self._cut(here.state["files"][kind] if self.parts else [], kind) for kind in SPLITS}
        for path in _bins(self.out):  # cut what was written after the last record
            tokens = next((f["tokens"] for k in SPLITS for f in self.files[k] if f["name"] == path.name), 0)
            os.truncate(path, tokens * self.dtype.itemsize) if tokens else path.unlink()
        self.save()  # from now on, bins in this folder are known to be ours

    def _cut(self, files: list[dict], kind: str) -> list[dict]:
        """The entries of those bins, or beginnings of bins, that the kept parts fill."""
        left, documents = (sum(part[kind][count] for part in self.parts) for count in ("tokens", "documents"))
        kept = []
        for file in files:
            if left:
                inside = file["documents"] if file["tokens"] <= left else documents
                kept.append({"name": file["name"], "tokens": min(left, file["tokens"]), "documents": inside})
                left, documents = left - kept[-1]["tokens"], documents - inside
        return kept

    def explain(self) -> None:
        """Print how many files' tokens are kept, and why the others' are not."""
        if self.forgotten:
            print(f"{self.out}/parts.json: damaged, so nothing is known of the bins; everything is tokenized again")
        if not self.earlier:
            return
        files: dict[str, list[str]] = {}
        for number, origin in enumerate(self.origins):
            if number < len(self.parts) or number in self.reused:
                continue
            why, before = "new", self.earlier.get(origin.file)
            if before:
                options = ", ".join(set(origin.options.split(", ")) - set(before.options.split(", ")))
                pairs = zip(("text", f"options (now {options})", "tokenizer"), before[:3], origin[:3], strict=True)
                changed = [name for name, old, new in pairs if old != new]
                why = f"{' and '.join(changed)} changed" if changed else "tokens damaged or lost"
            files.setdefault(why, []).append(origin.file)
        gone = sorted(self.earlier.keys() - {origin.file for origin in self.origins})
        reused = len(self.parts) + len(self.reused)
        print(f"{self.out}: {reused:,} of {len(self.origins):,} files are tokenized already; the others:")
        for why, names in {**files, **({"no longer an input": gone} if gone else {})}.items():
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            print(f"  {why}: {', '.join(names[:NAMED])}{more}")

    def tokens(self) -> int:
        return sum(file["tokens"] for kind in SPLITS for file in self.files[kind])

    def begin(self, number: int) -> dict:
        """The part of this number; it is started if it has not been."""
        if len(self.parts) == number:
            empty = {kind: {"tokens": 0, "documents": 0, "bytes": 0, "sha256": ""} for kind in SPLITS}
            counts = {"batches": 0, "bad_lines": 0, "empty_documents": 0, "first_bad": []}
            self.parts.append({"origin": self.origins[number], "whole": False, **counts, **empty})
            self.digests = {kind: hashlib.sha256() for kind in SPLITS}
        return self.parts[number]

    def end(self) -> None:
        """Mark the last part as whole."""
        self.parts[-1] |= {"whole": True}
        for kind in SPLITS:
            self.parts[-1][kind]["sha256"] = self.digests[kind].hexdigest()

    def copy(self, number: int) -> None:
        """Copy a part from old/."""
        part, old = self.begin(number), self.reused[number]
        for kind in SPLITS:
            for data in self.aside.read(old, kind):
                self.add(kind, data, 0)
        part |= self.aside.parts[old] | {"origin": self.origins[number]}

    def add(self, kind: str, data: bytes, text_bytes: int) -> None:
        """Append tokens of one split, from `text_bytes` bytes of text. A bin ends with the document that fills it."""
        tokens, files, part = np.frombuffer(data, self.dtype), self.files[kind], self.parts[-1][kind]
        self.digests[kind].update(data)
        part["bytes"] += text_bytes
        while len(tokens):
            if not files or (files[-1]["tokens"] >= self.shard_tokens and self.at_document[kind]):
                if kind in self.open:
                    self._sync(self.open.pop(kind))
                files.append({"name": f"{kind}-{len(files):05d}.bin", "tokens": 0, "documents": 0})
            room = max(1, self.shard_tokens - files[-1]["tokens"])
            ends = np.flatnonzero(tokens[room - 1 :] == self.tokenizer.eos_id)
            now, tokens = np.split(tokens, [room + ends[0] if len(ends) else len(tokens)])
            self._write(kind, self.out / files[-1]["name"], now.tobytes())
            documents = int(np.count_nonzero(now == self.tokenizer.eos_id))
            self.at_document[kind] = bool(now[-1] == self.tokenizer.eos_id)
            for counts in (files[-1], part):
                counts["tokens"] += len(now)
                counts["documents"] += documents

    def _write(self, kind: str, path: Path, data: bytes) -> None:
        try:
            if kind not in self.open:
                self.open[kind] = path.open("ab")
            self.open[kind].write(data)
        except OSError as error:
            raise UserError(
                f"{path}: writing {len(data):,} bytes failed ({error.strerror}); make room, then run the same "
                "command again: it goes on from here"
            ) from None

    def save(self) -> None:
        """Record the progress in parts.json."""
        for file in self.open.values():
            self._sync(file, close=False)
        if self.parts and not self.parts[-1]["whole"]:
            for kind in SPLITS:
                self.parts[-1][kind]["sha256"] = self.digests[kind].hexdigest()
        state = {**self.frame, "files": self.files, "parts": self.parts}
        write_json_atomically(self.out / "parts.json", {"checksum": checksum(state), **state})
        self.saved_at = time.monotonic()

    def _sync(self, file, close: bool = True) -> None:
        file.flush()
        os.fsync(file.fileno())
        if close:
            file.close()

    def finish(self, source: dict, about: dict) -> dict:
        """Write meta.json, which marks the folder as complete. source: paths of the files; about: further entries."""
        if not self.finished:
            self.save()
            for file in self.open.values():
                file.close()
        t = self.tokenizer
        meta = {"format": 1, "dtype": f"uint{8 * self.dtype.itemsize}", "vocab_size": t.vocab_size}
        meta |= {"tokenizer_sha256": t.sha256, "bos_id": t.bos_id, "eos_id": t.eos_id, "pad_id": t.pad_id, **about}
        meta |= {"made_from": checksum([self.shard_tokens, [origin[:3] for origin in self.origins]])}
        meta |= {"files": self.files, "bytes": {k: sum(part[k]["bytes"] for part in self.parts) for k in SPLITS}}
        meta |= {name: sum(part[name] for part in self.parts) for name in ("bad_lines", "empty_documents")}
        named = zip(self.origins, self.parts, strict=True)
        meta["first_bad"] = [f"{origin.file}, {bad}" for origin, part in named for bad in part["first_bad"]][:5]
        if read_json(self.out / "meta.json") | source != meta | source:
            write_json_atomically(self.out / "meta.json", meta | source)
        shutil.rmtree(self.out / "old", ignore_errors=True)
        return read_json(self.out / "meta.json")


def _bins(folder: Path) -> list[Path]:
    return [path for kind in SPLITS for path in sorted(folder.glob(f"{kind}-*.bin"))]


def _move(files: list[Path], folder: Path) -> None:
    """Into another folder, in this order."""
    for file in files:
        file.replace(folder / file.name)


def refuse_foreign(out: Path) -> None:
    """Raises UserError if `out` has bins without a parts.json, made elsewhere or by an older version."""
    if (bins := _bins(out)) and not any((folder / "parts.json").exists() for folder in (out, out / "old")):
        raise UserError(f"{bins[0]}: no parts.json tells what it was made from; choose another --out or delete {out}")
