"""Tokenizes the documents of files into bins, by one process or several, in the same order."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.bin_writer import SPLITS, Bins, Origin
from minillm.base.errors import UserError
from minillm.datasets.text_files import TXT_SPLITS, Record, records, text_of
from minillm.tokenizer.tokenizer import Tokenizer

BATCH = 1 << 20  # raw bytes of documents that one worker gets at a time (one document may be more)
POOL_FROM = 64 << 20  # bytes of input; below, starting processes takes longer than the work
GZIP_RATIO = 3  # assumed size of a text relative to its .gz
ON_BAD_LINE, WRAPS = ("error", "skip"), ("eos", "bos_eos")
FIRST_BAD = 5  # bad lines quoted of each file
SAVE_EVERY = 5.0  # seconds between two records of progress


@dataclass(frozen=True)
class Options:
    """What determines the result, besides the files and the tokenizer; workers need it too."""

    split: str
    field: str
    on_bad_line: str
    val_fraction: float
    shard_tokens: int
    wrap: str

    def check(self) -> None:
        """Raises UserError for a value that is not possible."""
        for name, known in (("split", TXT_SPLITS), ("on_bad_line", ON_BAD_LINE), ("wrap", WRAPS)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)}: choose one of {', '.join(known)}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: choose one from 0 to below 1")
        if self.shard_tokens < 1:
            raise UserError(f"--shard_tokens {self.shard_tokens}: at least 1 is needed")

    def of(self, path: Path) -> str:
        """Those options that determine which tokens this file gives."""
        text = path.name.removesuffix(".gz").endswith(".txt")
        where = f"split {self.split}" if text else f"field {self.field}"
        return f"{where}, val_fraction {self.val_fraction}, wrap {self.wrap}, in batches of {BATCH}"


class Source(NamedTuple):
    """An input file."""

    path: Path
    sha256: str
    options: Options  # of a file that is train or validation as a whole, val_fraction is 0 or 1


def _batches(source: Source) -> Iterator[tuple[int, bool, list[Record]]]:
    """(bytes of the file read so far, whether this is the last batch, documents), about BATCH bytes of them each."""
    batch, size = [], 0
    for record in records(source.path, split=source.options.split, field=source.options.field):
        batch.append(record)
        size += len(record.raw) if isinstance(record.raw, bytes | str) else 100
        if size >= BATCH:
            yield record.position, False, batch
            batch, size = [], 0
    yield source.path.stat().st_size, True, batch


def is_val(data: bytes, options: Options) -> bool:
    """Whether a document with these UTF-8 bytes is for validation: the same for each copy, in any file."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < options.val_fraction * 2**64


def encode_batch(batch: list[Record], tokenizer: Tokenizer, options: Options, threads: int = 1) -> dict:
    """Tokens of a batch: for each split (bytes of the bin, UTF-8 bytes of its text), and what was left out."""
    texts, sides, bad, empty = [], [], [], 0
    sizes = dict.fromkeys(SPLITS, 0)
    for record in batch:
        try:
            text = text_of(record.kind, record.raw, options.field)
            data = text.encode()
        except UserError as error:
            bad.append(f"{'item' if record.kind == 'value' else 'line'} {record.number}: {error}")
            continue
        if not text:
            empty += 1
            continue
        texts.append(text)
        sides.append(SPLITS[is_val(data, options)])
        sizes[sides[-1]] += len(data)
    rows = tokenizer.encode_many(texts, threads=threads)
    begin = [tokenizer.bos_id] if options.wrap == "bos_eos" else []
    result = {"bad": bad, "empty": empty}
    for kind in SPLITS:
        inside = [row for row, side in zip(rows, sides, strict=True) if side == kind]
        data = b"".join(np.array([*begin, *row, tokenizer.eos_id], tokenizer.id_dtype) for row in inside)
        result[kind] = (data, sizes[kind])
    return result


def tokenize(sources: list[Source], bins: Bins, options: Options, workers: int) -> None:
    """Put the tokens of all files into the bins, from where these end. Raises UserError, e.g. for a bad line."""
    sizes = [0, *itertools.accumulate(source.path.stat().st_size for source in sources)]
    if bins.parts:
        print(f"{bins.out}: going on after {bins.tokens():,} tokens")
    left = [source.path for i, source in enumerate(sources) if i >= bins.done and i not in bins.reused]
    pool = None
    if workers > 1 and sum(map(text_size, left)) >= POOL_FROM:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(bins.out,))
    started, made = time.monotonic(), 0
    bar = tqdm(total=sizes[-1], unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5)
    try:
        for number, position, last, result in _results(sources, bins, pool, workers):
            if number in bins.reused:
                bins.copy(number)
            else:
                made += _add(result, bins, bins.begin(number), options)
                if last:
                    bins.end()
            if time.monotonic() - bins.saved_at > SAVE_EVERY:
                bins.save()
            bar.set_postfix_str(f"{made / (time.monotonic() - started) / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(sizes[number] + position - bar.n)
    except BrokenExecutor:
        raise UserError("a worker process died, perhaps out of memory; run again with fewer --workers") from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    _check_splits(bins, options)


def _results(sources: list[Source], bins: Bins, pool, workers: int) -> Iterator[tuple[int, int, bool, dict]]:
    """(number of the file, bytes of it read, whether that is all, tokens) of each batch, in order.

    Only a bounded number of batches is in flight. A file that is reused gives one empty batch.
    """
    waiting: deque = deque()
    for number, source in enumerate(sources[bins.done :], bins.done):
        skip = bins.parts[number]["batches"] if number < len(bins.parts) else 0
        reused = [(source.path.stat().st_size, True, [])] if number in bins.reused else None
        for position, last, batch in reused or itertools.islice(_batches(source), skip, None):
            if pool:
                work = pool.submit(_work, batch, source.options).result
            else:
                work = partial(encode_batch, batch, bins.tokenizer, source.options, workers)
            waiting.append((number, position, last, work))
            if len(waiting) > (2 * workers if pool else 0):
                *what, work = waiting.popleft()
                yield *what, work()
    for *what, work in waiting:
        yield *what, work()


_worker: Tokenizer  # what each worker process holds


def _start_worker(tokenizer: Path) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # each of us is one of --workers; the library reads this at each call
    )
    _worker = Tokenizer.load(tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us

    def end_with_parent() -> None:  # after a kill −9 of the parent we would wait forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(batch: list[Record], options: Options) -> dict:
    return encode_batch(batch, _worker, options)


def _add(result: dict, bins: Bins, part: dict, options: Options) -> int:
    """Put a batch's tokens into the bins; returns their number."""
    if result["bad"] and options.on_bad_line == "error":
        bins.save()  # so that what came before is not done again
    refuse_bad([{"origin": part["origin"], "first_bad": result["bad"]}], options)
    before = bins.tokens()
    part["first_bad"] += result["bad"][: FIRST_BAD - len(part["first_bad"])]
    for kind in SPLITS:
        bins.add(kind, *result[kind])
    part["batches"] += 1
    part["bad_lines"] += len(result["bad"])
    part["empty_documents"] += result["empty"]
    return bins.tokens() - before


def refuse_bad(parts: list[dict], options: Options) -> None:
    """Raises UserError for the first bad line recorded in any of these parts, unless bad lines are skipped."""
    for part in parts:
        if part["first_bad"] and options.on_bad_line == "error":
            bad = f"{Origin(*part['origin']).file}, {part['first_bad'][0]}"
            raise UserError(f"{bad}; fix it, or leave such documents out with --on_bad_line skip")


def _check_splits(bins: Bins, options: Options) -> None:
    counts = {kind: sum(file["documents"] for file in bins.files[kind]) for kind in SPLITS}
    if not counts["train"]:
        bad = sum(part["bad_lines"] for part in bins.parts)
        raise UserError(f"{bins.out}: no document is left to train on ({bad:,} bad lines left out); give other files")
    if not counts["val"] and options.val_fraction:
        raise UserError(
            f"{bins.out}: none of {counts['train']} documents fell into the validation split; raise --val_fraction, "
            "name --val_input files, or cut the text into more documents (--split)"
        )


def text_size(file: Path) -> int:
    """About how many bytes of text a file holds."""
    return file.stat().st_size * (GZIP_RATIO if file.suffix in (".gz", ".parquet") else 1)
