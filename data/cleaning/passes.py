"""Runs the stages over all pieces of all files, with many processes. A finished piece stays on the disk.

A file is cut into pieces of about PIECE_BYTES, at the same places whatever the number of processes. The name of a
piece is a checksum of all that it depends on, so a killed run goes on where it was, and after a change only what
depends on it is done again.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.cleaning import reading
from data.cleaning.judging import judge_piece
from data.cleaning.mending import How, mend_piece
from data.cleaning.reading import Raw
from data.cleaning.text.lines import recurring as recurring_of
from data.decontaminate import Index
from data.sources import checksum
from minillm.base.errors import UserError
from minillm.base.files import SCRATCH, discard, sha256, write_json_atomically
from minillm.base.json_door import read_json
from minillm.base.printing import visible

PIECE_BYTES = 4 << 20  # raw bytes of documents (one document may be more)
POOL_FROM = 16 << 20  # bytes of input; below, starting processes takes longer than the work
ROOT = Path(__file__).parents[2]
# What the pieces depend on: the code of cleaning, of tokens and their hashes, and of reading files and conversations.
CODE = [ROOT / "data" / "decontaminate.py", ROOT / "minillm" / "datasets" / "messages.py"]
CODE += [*Path(__file__).parent.rglob("*.py"), *(ROOT / "minillm" / "datasets" / "files").glob("*.py")]
CODE.sort()


class Source(NamedTuple):
    """An input file, or several small ones in a row.

    size: bytes together. key: of their contents, the options and the code. is_val: their documents are for validation.
    share: of the documents that are read.
    """

    paths: tuple[Path, ...]
    size: int
    key: str
    is_val: bool
    share: float = 1.0

    def name(self, file: int) -> str:
        """The path of one of its files, as it is written down."""
        return visible(str(self.paths[file]))


class Piece(NamedTuple):
    """Some documents of a file, mended on the disk."""

    source: Source
    number: int
    stem: Path  # without the ending


def read_sources(files: list[Path], how: How, n_val: int) -> list[Source]:
    """The files in their order, small ones gathered. n_val: how many, from the first, are for validation.

    Where small files end to be gathered is drawn from the hash of each, so that a file that is added or changed moves
    no other border.
    """
    code = hashlib.sha256(b"".join(path.read_bytes() for path in CODE)).hexdigest()
    sizes = [path.stat().st_size for path in files]
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        hashes = list(pool.map(sha256, files))
    groups: list[list[int]] = []
    has_ended = True
    for number, (size, digest) in enumerate(zip(sizes, hashes, strict=True)):
        if has_ended or size >= PIECE_BYTES or number == n_val:
            groups.append([])
        groups[-1].append(number)
        has_ended = int(digest[:12], 16) / 16**12 < size / PIECE_BYTES
    sources = []
    for group in groups:
        paths = tuple(files[number] for number in group)
        parts = [(hashes[number], reading.kind_of(files[number])) for number in group]
        size = sum(sizes[number] for number in group)
        sources.append(Source(paths, size, checksum([parts, how, code])[:24], group[0] < n_val))
    return sources


def sampled(sources: list[Source], folder: Path, share: float, least: int) -> list[Source]:
    """The sources with a share of their documents; whole if all were read before, or are below `least` bytes."""
    is_small = sum(source.size for source in sources) < least
    if is_small or all(_done(folder, source).exists() for source in sources):
        return sources
    return [source._replace(key=f"{source.key}-{share:g}", share=share) for source in sources]


# ---- Processes.

_shared: tuple = ()  # in a worker: what every task needs


def _start_worker(shared: tuple) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us

    def end_with_parent() -> None:  # after a kill −9 of the parent we would wait forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _with_shared(function: Callable, arguments: tuple):
    return function(*arguments, *_shared)


def in_order(function: Callable, tasks: Iterable[tuple], shared: tuple, workers: int) -> Iterator[tuple[tuple, object]]:
    """(arguments, function(*arguments, *shared)) of each task, in order; a bounded number is in flight."""
    if workers == 1:
        yield from ((task, function(*task, *shared)) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(shared,)) as pool:
        in_flight: deque = deque()
        try:
            for task in tasks:
                in_flight.append((task, pool.submit(_with_shared, function, task)))
                if len(in_flight) > 2 * workers:
                    oldest, future = in_flight.popleft()
                    yield oldest, future.result()
            while in_flight:
                oldest, future = in_flight.popleft()
                yield oldest, future.result()
        except BrokenExecutor:
            raise UserError("a worker process died, perhaps out of memory; run again with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def worth_a_pool(sources: list[Source], workers: int) -> int:
    """How many processes to use."""
    return workers if sum(source.size for source in sources) >= POOL_FROM else 1


# ---- First pass: from files to mended texts.


def mend(sources: list[Source], folder: Path, how: How, workers: int) -> list[Piece]:
    """The pieces of all files, in order; those that are not there yet are made."""
    unread = {source.key: source for source in sources if not _done(folder, source).exists()}
    n_bytes = sum(source.size for source in unread.values())
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="reading", mininterval=0.5, disable=not unread)
    tasks = _raw_pieces(unread.values(), folder, how.boundary, bar)
    for (stem, raws, _), _ in in_order(_mend, tasks, (how,), worth_a_pool(sources, workers)):
        if stem.name.endswith(ENDS):
            write_json_atomically(stem.with_suffix(".json"), {"pieces": raws})
    bar.close()
    pieces = []
    for source in sources:
        n_pieces = read_json(_done(folder, source))["pieces"]
        pieces += [Piece(source, number, _stem(folder, source, number)) for number in range(n_pieces)]
    return pieces


ENDS = "-ends"  # the name of a task that stands after a file's last piece


def _done(folder: Path, source: Source) -> Path:
    """The file that says how many pieces a source has, once all are there."""
    return folder / f"{source.key}{ENDS}.json"


def _stem(folder: Path, source: Source, number: int) -> Path:
    return folder / f"{source.key}-{number:06d}"


def _raw_pieces(
    sources: Iterable[Source], folder: Path, boundary: str, bar: tqdm
) -> Iterator[tuple[Path, object, bool]]:
    """(stem, raw documents, whether they are to be mended) of each piece, then (…-ends, number of pieces, False)."""
    for source in sources:
        number = 0
        for raws in _cut(_documents(source, boundary, bar)):
            stem = _stem(folder, source, number)
            if not stem.with_suffix(".npz").exists():
                yield stem, raws, True
            number += 1
        yield folder / f"{source.key}{ENDS}", number, False


def _documents(source: Source, boundary: str, bar: tqdm) -> Iterator[Raw]:
    """Those documents of a source's files that are read."""
    for number, path in enumerate(source.paths):
        n_read = 0
        for raw in reading.raw_documents(path, boundary):
            bar.update(raw.n_read - n_read)
            n_read = raw.n_read
            if source.share == 1 or zlib.crc32(f"{number} {raw.number}".encode()) < source.share * 2**32:
                yield raw._replace(file=number)


def _cut(documents: Iterator[Raw]) -> Iterator[list[Raw]]:
    """Documents in lists of about PIECE_BYTES."""
    piece: list[Raw] = []
    size = 0
    for raw in documents:
        piece.append(raw)
        size += len(raw.value) if isinstance(raw.value, bytes) else len(str(raw.value))
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _mend(stem: Path, raws: list[Raw], is_piece: bool, how: How) -> None:
    if is_piece:
        mend_piece(stem, raws, how)


# ---- Second pass: lines that recur, then the numbers that decisions are made from.


def recurring_lines(pieces: list[Piece], least: int) -> np.ndarray:
    """Hashes of the lines that at least `least` documents hold, copies of a document counted once, (n,) uint64.

    least: 0 for none.
    """
    if not least:
        return np.zeros(0, np.uint64)
    hashes = np.concatenate([np.zeros(0, np.uint64), *(_arrays_of(piece)["hashes"] for piece in pieces)])
    is_first = np.zeros(len(hashes), bool)
    is_first[np.unique(hashes, return_index=True)[1]] = True

    def of_first_copies() -> Iterator[np.ndarray]:
        n_before = 0
        for piece in pieces:
            arrays = _arrays_of(piece)
            is_counted = is_first[n_before : n_before + len(arrays["n_lines"])]
            yield arrays["lines"][np.repeat(is_counted, arrays["n_lines"])]
            n_before += len(arrays["n_lines"])

    return recurring_of(of_first_copies, least)


def _arrays_of(piece: Piece) -> dict[str, np.ndarray]:
    with np.load(piece.stem.with_suffix(".npz")) as arrays:
        return dict(arrays)


class Shared(NamedTuple):
    """What every piece is judged with: see `judge_piece`."""

    recurring: np.ndarray
    index: Index | None
    with_signatures: bool
    is_sft: bool
    menus: np.ndarray

    def key(self) -> str:
        """A checksum of it."""
        parts = [self.recurring.tobytes(), b"" if self.index is None else self.index.hashes.tobytes()]
        parts += [bytes([self.with_signatures]), self.menus.tobytes()]
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:12]


def judge(pieces: list[Piece], shared: Shared, workers: int) -> list[Path]:
    """For each piece the file with what describes its documents; those that are not there yet are made."""
    key = shared.key()
    judged = [piece.stem.with_suffix(f".judged-{key}.npz") for piece in pieces]
    missing = {path: piece.stem for piece, path in zip(pieces, judged, strict=True) if not path.exists()}
    tasks = ((stem, path) for path, stem in missing.items())
    sources = [piece.source for piece in pieces]
    bar = tqdm(total=len(missing), unit="piece", desc="judging", mininterval=0.5, disable=not missing)
    n_workers = worth_a_pool(list(dict.fromkeys(sources)), workers)
    for _ in in_order(judge_piece, tasks, tuple(shared), n_workers):
        bar.update()
    bar.close()
    return judged


def clean_up(folder: Path, pieces: list[Piece], described: list[Path]) -> None:
    """Delete pieces of other files, options or code. described: the files that describe what is in the pieces."""
    kept = {path.name for path in described}
    kept |= {piece.stem.name + ending for piece in pieces for ending in (".jsonl", ".npz")}
    kept |= {_done(folder, piece.source).name for piece in pieces}
    for path in folder.iterdir():
        is_ours = path.suffix in (".jsonl", ".npz", ".json") or SCRATCH.fullmatch(path.name)
        if is_ours and path.name not in kept:
            discard(path)
