"""Your own text → token bins for training.

    python data/prepare.py --input novels/ more.jsonl.gz --train_tokenizer 16000 --out data/novels
    python data/prepare.py --input big.jsonl --tokenizer data/novels --out data/big
    python train_pretrain.py --data data/novels

In `--out` lie train-00000.bin, val-00000.bin, … (each document's tokens, then eos), the tokenizer, and meta.json,
which is written last: without it the folder is unfinished, and the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.bins import SPLITS, Bins, finished, unfinished
from minillm import UserError
from minillm.readers import find_files, records, text_of
from minillm.run import RunLock, run_script
from minillm.tokenizer import Tokenizer
from minillm.vocab import train_tokenizer as learn_tokenizer

BATCH = 1 << 20  # raw bytes of documents that one worker gets at a time (one document may be more)
POOL_FROM = 64 << 20  # bytes of input; below, starting processes takes longer than the work
TOKENIZER_SAMPLE = 16 << 20  # bytes of text that a tokenizer is learnt from
GZIP_RATIO = 3  # how much larger than its .gz a text is taken to be
TXT_SPLITS, ON_BAD_LINE = ("blank", "lines", "file"), ("error", "skip")
SAVE_EVERY = 5.0  # seconds between two records of how far it has got


@dataclass(frozen=True)
class Options:
    """What decides the result, beside the files and the tokenizer; a worker needs it all."""

    split: str
    field: str
    on_bad_line: str
    val_fraction: float
    val_from: int | None  # files from this number on are validation files, which leaves val_fraction without meaning
    shard_tokens: int

    def check(self) -> None:
        """Raises UserError for a value that means nothing."""
        for name, value, known in (("split", self.split, TXT_SPLITS), ("on_bad_line", self.on_bad_line, ON_BAD_LINE)):
            if value not in known:
                raise UserError(f"--{name} {value}: choose one of {', '.join(known)}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: choose one from 0 to below 1")
        if self.shard_tokens < 1:
            raise UserError(f"--shard_tokens {self.shard_tokens}: at least 1 is needed")


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    val_inputs: Iterable[str | Path] | None = None,
    val_fraction: float = 0.01,
    split: str = "blank",
    field: str = "text",
    on_bad_line: str = "error",
    workers: int | None = None,
    shard_tokens: int = 1 << 30,
) -> dict:
    """Tokenize text files into the folder `out` and return its meta.json.

    inputs: files or folders (.txt, .jsonl, .json holding an array, .gz of these, .parquet).
    tokenizer: path of an existing one; train_tokenizer: size of one to be learnt from the training documents.
    val_inputs: files of the validation split, kept in their order; without them, each document whose hash falls
        below val_fraction is validation, so that copies of a document never lie on both sides.
    split: "blank", "lines" or "file": where a document of a .txt ends. field: where JSON or parquet has the text.
    on_bad_line: "error", or "skip" to leave out and count documents that cannot be read.
    workers: processes, all cores by default; the result does not depend on it.
    shard_tokens: a new .bin begins once one holds this many.

    Raises UserError for bad input, naming file and line, and for an `out` made from something else.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("tokenizer: give either --tokenizer PATH or --train_tokenizer N")
    inputs, val_inputs, out = list(inputs), list(val_inputs or []), Path(out)
    for folder in map(Path, inputs + val_inputs):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies inside the input {folder} and would be read again; choose another")
    train_files = find_files(inputs)
    files = find_files(inputs + val_inputs)
    options = Options(split, field, on_bad_line, val_fraction, len(train_files) if val_inputs else None, shard_tokens)
    options.check()
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    made_from = _fingerprint(files, options, given.sha256 if given else train_tokenizer)

    lock = RunLock(out)
    try:
        if (meta := finished(out, made_from)) is not None:
            print(f"{out}: already prepared from the same input, nothing to do")
            return meta
        state = unfinished(out, made_from, BATCH)
        if state:
            given = Tokenizer.load(out)
        elif given is None:
            print(f"{out}: learning a tokenizer of {train_tokenizer:,} pieces", flush=True)
            texts = _sample(train_files, options)
            given = learn_tokenizer(texts, train_tokenizer, out, sample_bytes=TOKENIZER_SAMPLE)
        else:
            given.save(out)
        if given.sha256 != state.get("tokenizer", given.sha256):
            raise UserError(f"{out}/tokenizer.model: changed since the preparation began; delete {out} and start again")
        state |= {"made_from": made_from, "batch_bytes": BATCH, "tokenizer": given.sha256}
        bins = Bins(out, given, shard_tokens, state)
        _tokenize(files, bins, options, max(1, workers or _cores()))
        source = {"source": [str(path) for path in inputs], "val_source": [str(path) for path in val_inputs]}
        return bins.finish(source | {"options": asdict(options)})
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; mend that and run the same command again"
        ) from None
    finally:
        lock.release()


def _fingerprint(files: list[Path], options: Options, tokenizer: str | int) -> str:
    """Changes with the files, the options and the tokenizer; small files by content, large ones by their date."""
    rows = []
    for file in files:
        status = file.stat()
        small = status.st_size <= 32 << 20
        rows.append((file.name, status.st_size, _sha256(file) if small else status.st_mtime_ns))
    return hashlib.sha256(json.dumps([rows, asdict(options), tokenizer]).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- from documents to tokens


def _batches(files: list[Path], options: Options) -> Iterator[tuple[int, list[tuple]]]:
    """(bytes of the files read so far, [(number of the file, record), …]), about BATCH bytes each."""
    batch, size, before = [], 0, 0
    for number, path in enumerate(files):
        position = 0
        for record in records(path, split=options.split, field=options.field):
            batch.append((number, record))
            size += len(record.raw) if isinstance(record.raw, bytes | str) else 100
            position = record.position
            if size >= BATCH:
                yield before + position, batch
                batch, size = [], 0
        before += path.stat().st_size
    if batch:
        yield before, batch


def _is_val(data: bytes, file: int, options: Options) -> bool:
    if options.val_from is not None:
        return file >= options.val_from
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < options.val_fraction * 2**64


def encode_batch(batch: list[tuple], tokenizer: Tokenizer, options: Options, threads: int = 1) -> dict:
    """Tokens of a batch: for each split (bytes of the bin, documents, UTF-8 bytes), and what was left out."""
    texts, sides, bad, empty = [], [], [], 0
    sizes = dict.fromkeys(SPLITS, 0)
    for file, record in batch:
        try:
            text = text_of(record.kind, record.raw, options.field)
            data = text.encode()
        except UserError as error:
            bad.append((file, f"{'item' if record.kind == 'value' else 'line'} {record.number}", str(error)))
            continue
        if not text:
            empty += 1
            continue
        texts.append(text)
        sides.append(SPLITS[_is_val(data, file, options)])
        sizes[sides[-1]] += len(data)
    rows = tokenizer.encode_many(texts, threads=threads)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    result = {"bad": bad, "empty": empty}
    for kind in SPLITS:
        ends = [
            np.array([*row, tokenizer.eos_id], dtype) for row, side in zip(rows, sides, strict=True) if side == kind
        ]
        result[kind] = (b"".join(ends), len(ends), sizes[kind])
    return result


def _tokenize(files: list[Path], bins: Bins, options: Options, workers: int) -> None:
    total = sum(file.stat().st_size for file in files)
    done = bins.state["batches"]
    if done:
        print(f"{bins.out}: going on after {bins.tokens():,} tokens")
    pool = None
    if workers > 1 and sum(_text_size(file) for file in files) >= POOL_FROM:
        spawn = multiprocessing.get_context("spawn")
        initial = (str(bins.out / "tokenizer.model"), options)
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=initial)
    started, tokens_before = time.monotonic(), bins.tokens()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5)
    try:
        for number, (position, result) in enumerate(_results(files, bins, options, pool, workers, done), done + 1):
            _count_bad(result["bad"], files, bins, options)
            bins.state["empty_documents"] += result["empty"]
            for kind in SPLITS:
                if result[kind][1]:
                    bins.add(kind, *result[kind])
            bins.state["batches"] = number
            if time.monotonic() - bins.saved_at > SAVE_EVERY:
                bins.save()
            speed = (bins.tokens() - tokens_before) / (time.monotonic() - started)
            bar.set_postfix_str(f"{speed / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(position - bar.n)
    except BrokenProcessPool:
        raise UserError("a worker process died, likely for want of memory; run again with fewer --workers") from None
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    _check_splits(bins, options)


def _results(files, bins: Bins, options: Options, pool, workers: int, skip: int) -> Iterator[tuple[int, dict]]:
    """Each batch's result, in order, with a bounded number of batches on their way."""
    waiting: deque = deque()
    for number, (position, batch) in enumerate(_batches(files, options)):
        if number < skip:
            continue
        if pool is None:
            yield position, encode_batch(batch, bins.tokenizer, options, workers)
            continue
        waiting.append((position, pool.submit(_work, batch)))
        if len(waiting) >= 2 * workers:
            position, future = waiting.popleft()
            yield position, future.result()
    for position, future in waiting:
        yield position, future.result()


_worker: tuple[Tokenizer, Options]  # what each worker process holds


def _start_worker(tokenizer: str, options: Options) -> None:
    global _worker
    _worker = Tokenizer.load(tokenizer), options
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us

    def end_with_parent() -> None:  # a parent killed by −9 would leave us waiting for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(batch: list[tuple]) -> dict:
    return encode_batch(batch, *_worker)


def _count_bad(bad: list[tuple], files: list[Path], bins: Bins, options: Options) -> None:
    for file, place, reason in bad:
        message = f"{files[file]}, {place}: {reason}"
        if options.on_bad_line == "error":
            raise UserError(f"{message}; mend it, or leave such documents out with --on_bad_line skip")
        bins.state["bad_lines"] += 1
        if len(bins.state["first_bad"]) < 5:
            bins.state["first_bad"].append(message)


def _check_splits(bins: Bins, options: Options) -> None:
    files = bins.state["files"]
    counts = {kind: sum(file["documents"] for file in files[kind]) for kind in SPLITS}
    if not counts["train"]:
        raise UserError(f"{bins.out}: no document is left to train on; is the input empty?")
    if not counts["val"] and options.val_fraction:
        raise UserError(
            f"{bins.out}: none of {counts['train']} documents fell into the validation split; raise --val_fraction, "
            "name --val_input files, or cut the text into more documents (--split)"
        )


def _sample(files: list[Path], options: Options) -> Iterator[str]:
    """Training documents for the tokenizer, all or an even sample; only those taken are decoded."""
    size = sum(_text_size(file) for file in files)
    rate, draw = 2 * TOKENIZER_SAMPLE / max(size, 1), random.Random(0).random
    for _, batch in _batches(files, options):
        for file, record in batch:
            if rate < 1 and draw() > rate:
                continue
            try:
                text = text_of(record.kind, record.raw, options.field)
                if not _is_val(text.encode(), file, options):
                    yield text
            except UserError:
                pass  # spoken of when its turn comes


def _text_size(file: Path) -> int:
    return file.stat().st_size * (GZIP_RATIO if file.suffix in (".gz", ".parquet") else 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- command line


def report(meta: dict, print_line: Callable[[str], None] = print) -> None:
    """What a preparation gave, in a few lines."""
    for kind in SPLITS:
        tokens = sum(file["tokens"] for file in meta["files"][kind])
        documents = sum(file["documents"] for file in meta["files"][kind])
        per_token = meta["bytes"][kind] / max(tokens - documents, 1)
        print_line(f"{kind:5} {documents:,} documents, {tokens:,} tokens, {per_token:.2f} bytes of text per token")
    if meta["bad_lines"] or meta["empty_documents"]:
        print_line(f"left out: {meta['bad_lines']:,} bad lines, {meta['empty_documents']:,} empty documents")
        for message in meta["first_bad"]:
            print_line(f"  {message}")


def main() -> None:
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files or folders: .txt .jsonl .json (.gz) .parquet")
    add("--out", required=True, metavar="FOLDER", help="where the token bins go, e.g. data/novels")
    add("--tokenizer", metavar="PATH", help="an existing tokenizer.model, or a folder that holds one")
    add("--train_tokenizer", type=int, metavar="N", help="learn a tokenizer of N pieces from the training documents")
    add("--val_input", nargs="+", metavar="PATH", help="files of the validation split (instead of --val_fraction)")
    add("--val_fraction", type=float, default=0.01, help="share of documents for validation (default 0.01)")
    ends = "a .txt document ends at blank lines (default), with each line, or with its file"
    add("--split", choices=TXT_SPLITS, default="blank", help=ends)
    add("--field", default="text", help="key or column that holds the text (default text)")
    add("--on_bad_line", choices=ON_BAD_LINE, default="error", help="stop at a bad line (default) or count it")
    add("--workers", type=int, help="processes (default: all cores)")
    add("--shard_tokens", type=int, default=1 << 30, help="begin a new .bin after so many tokens (default 2^30)")
    options = vars(parser.parse_args())
    inputs, val_inputs = options.pop("input"), options.pop("val_input")
    report(prepare(inputs, options.pop("out"), val_inputs=val_inputs, **options))


if __name__ == "__main__":
    sys.exit(run_script(main))
