"""Tokenizes the documents of files into bins, by one process or several, in the same order."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.bin_folder import BinFolder
from data.bin_writer import SPLITS, BinWriter
from data.held_out import document_hash, is_held_out
from data.sources import Group, Options, Source
from minillm.base.errors import UserError
from minillm.datasets.files.text_files import Record, text_of
from minillm.tokenizer.tokenizer import Tokenizer

PIECE_BYTES = 1 << 20  # raw bytes of documents that one worker gets at a time (one document may be more)
LONG_TEXT = 1 << 20  # characters; a list of its ids would take much memory
POOL_FROM = 64 << 20  # bytes of input; below, starting processes takes longer than the work


# ---- Documents become tokens.


class SplitTokens(NamedTuple):
    """Some documents of one split."""

    data: bytes  # their tokens, as in a bin
    sizes: np.ndarray  # (n documents,) int64: UTF-8 bytes of the text of each


class EncodedPiece(NamedTuple):
    """A piece as tokens, and what was left out of it."""

    splits: dict[str, SplitTokens]
    bad: list[str]  # what is wrong with each document that cannot be read
    n_empty: int
    n_held_out: int  # copies of validation documents


def is_val(data: bytes, options: Options) -> bool:
    """Whether a document with these UTF-8 bytes is for validation: the same for each copy, in any file."""
    return document_hash(data) < options.val_fraction * 2**64


def encode_piece(documents: list[Record], tokenizer: Tokenizer, options: Options, threads: int = 1) -> EncodedPiece:
    """The tokens of each split, the documents in their order."""
    # Decode and check each document.
    texts: list[str] = []
    split_of: list[str] = []
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    n_empty = 0
    n_held_out = 0
    for record in documents:
        try:
            text = text_of(record.kind, record.raw, options.field)
            data = text.encode()
        except UserError as error:
            bad.append(fault(record, error))
            continue
        if not text:
            n_empty += 1
            continue
        if options.held_out and is_held_out(data, options.held_out):
            n_held_out += 1
            continue
        split = "val" if is_val(data, options) else "train"
        texts.append(text)
        split_of.append(split)
        sizes[split].append(len(data))

    # Tokenize all of them at once, then put each split's end to end.
    begin, end = (np.array([i], tokenizer.id_dtype).tobytes() for i in (tokenizer.bos_id, tokenizer.eos_id))
    begin = begin if options.wrap == "bos_eos" else b""
    encoded: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    rows = tokenizer.encode_many([text if len(text) <= LONG_TEXT else "" for text in texts], threads=threads)
    for split, text, ids in zip(split_of, texts, rows, strict=True):
        if len(text) > LONG_TEXT:  # by itself, as an array
            ids = tokenizer.pieces.encode_array(text, tokenizer.id_dtype, threads)
        ids = np.asarray(ids, tokenizer.id_dtype)
        encoded[split] += [begin, ids.tobytes(), end]
    splits = {split: SplitTokens(b"".join(encoded[split]), np.array(sizes[split], dtype=np.int64)) for split in SPLITS}
    return EncodedPiece(splits, bad, n_empty, n_held_out)


# ---- All documents of some groups.


class Piece(NamedTuple):
    """Documents of one file, about PIECE_BYTES bytes of them."""

    group: Group
    source_number: int  # in its group
    documents: list[Record]
    n_read: int  # bytes of the file read since the piece before
    ends_group: bool

    @property
    def source(self) -> Source:
        return self.group.sources[self.source_number]


def tokenize(groups: list[Group], folder: BinFolder, tokenizer: Tokenizer, workers: int) -> dict[str, dict]:
    """Make the bins of these groups; returns key → record. Raises UserError, e.g. for a bad line.

    The folder holds it as the new tokenizer, which worker processes load from there.
    """
    # Processes, where there is enough to do; else this one, with the tokenizer's own threads.
    sources = [source for group in groups for source in group.sources]
    pool = None
    if workers > 1 and sum(source.text_size for source in sources) >= POOL_FROM:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(folder.new_tokenizer,))

    n_bytes = sum(source.size for source in sources)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5)
    started = time.monotonic()
    n_tokens = 0
    records_made: dict[str, dict] = {}
    writer = None  # of the group that the next piece belongs to
    try:
        for piece, encoded in _encoded(groups, tokenizer, pool, workers):
            if encoded.bad and piece.source.options.on_bad_line == "error":
                raise bad_line_error(piece.source.name, encoded.bad[0])
            if writer is None:
                writer = BinWriter(folder.unfinished, piece.group, tokenizer)
            writer.note_left_out(piece.source_number, encoded.bad, encoded.n_empty, encoded.n_held_out)
            for split, tokens in encoded.splits.items():
                writer.add(split, *tokens)
                n_tokens += len(tokens.data) // tokenizer.id_dtype.itemsize
            if piece.ends_group:
                records_made[piece.group.key] = writer.finish()
                writer = None
            bar.set_postfix_str(f"{n_tokens / (time.monotonic() - started) / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(piece.n_read)
    except BrokenExecutor:
        raise UserError("a worker process died, perhaps out of memory; run again with fewer --workers") from None
    finally:
        bar.close()
        if writer:
            writer.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    return records_made


def fault(record: Record, error: UserError) -> str:
    """What is wrong with a document that cannot be read, and its place in the file."""
    place = "item" if record.kind == "value" else "line"
    return f"{place} {record.number}: {error}"


def bad_line_error(file: str, what: str) -> UserError:
    """The error for a document that cannot be read, where such are not skipped."""
    return UserError(f"{file}, {what}; fix it, or leave such documents out with --on_bad_line skip")


def refuse_bad_lines(records: Iterable[dict], options: dict) -> None:
    """Raises UserError for the first bad line on record, unless bad lines are skipped."""
    if options["on_bad_line"] == "skip":
        return
    for record in records:
        for source in record["sources"]:
            for bad in source["first_bad"]:
                raise bad_line_error(source["file"], bad)


def _pieces(groups: list[Group]) -> Iterator[Piece]:
    """All documents of all groups, in order; at least one piece, perhaps empty, of each file."""
    for group in groups:
        for number, source in enumerate(group.sources):
            documents: list[Record] = []
            size = 0
            n_read = 0
            for record in source.records():
                documents.append(record)
                size += len(record.raw) if isinstance(record.raw, bytes | str) else 100
                if size >= PIECE_BYTES:
                    yield Piece(group, number, documents, record.position - n_read, ends_group=False)
                    documents = []
                    size = 0
                    n_read = record.position
            is_last = number == len(group.sources) - 1
            yield Piece(group, number, documents, source.size - n_read, ends_group=is_last)


def _encoded(groups: list[Group], tokenizer: Tokenizer, pool, workers: int) -> Iterator[tuple[Piece, EncodedPiece]]:
    """Each piece with its tokens, in order. Only a bounded number of pieces is in flight."""
    if pool is None:
        for piece in _pieces(groups):
            yield piece, encode_piece(piece.documents, tokenizer, piece.source.options, workers)
        return
    in_flight: deque[tuple[Piece, Future]] = deque()
    for piece in _pieces(groups):
        future = pool.submit(_encode_in_worker, piece.documents, piece.source.options)
        in_flight.append((piece._replace(documents=[]), future))
        if len(in_flight) > 2 * workers:
            oldest, future = in_flight.popleft()
            yield oldest, future.result()
    for piece, future in in_flight:
        yield piece, future.result()


# ---- What a worker process does.

_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_folder: Path) -> None:
    global _worker_tokenizer
    # each worker is one of --workers, so it uses one thread; the library reads this at each call
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.load(tokenizer_folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us

    def end_with_parent() -> None:  # after a kill −9 of the parent we would wait forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_in_worker(documents: list[Record], options: Options) -> EncodedPiece:
    return encode_piece(documents, _worker_tokenizer, options)
