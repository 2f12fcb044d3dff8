"""Your own text → token bins for training.

    python data/prepare.py --input novels/ more.jsonl.gz --train_tokenizer 16000 --out data/novels
    python data/prepare.py --input big.jsonl --tokenizer data/novels --out data/big
    python train_pretrain.py --data data/novels

The folder `--out` gets train-00000.bin, val-00000.bin, … (each document's tokens, then eos), the tokenizer, and
meta.json, which is written last: without it the folder is unfinished, and the same command goes on where it stopped.

Run it again after changing some files, options or the tokenizer: only what that affects is tokenized again. parts.json
records with checksums what each input file gave, and damaged parts are made again. The result is the same as in a new
folder. (--train_tokenizer learns from the files: when they change, all tokens may change. To keep the tokenizer, give
--tokenizer the folder itself.)
"""

import argparse
import os
import random
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from data.bin_writer import SPLITS, Bins, Origin, Parts, checksum, refuse_foreign
from data.tokenize_files import ON_BAD_LINE, WRAPS, Options, Source, is_val, refuse_bad, text_size, tokenize
from minillm.base.command_line import Parser
from minillm.base.errors import UserError
from minillm.base.files import sha256
from minillm.base.process import RunLock, run_script
from minillm.checkpoint import run_folder
from minillm.datasets.text_files import TXT_SPLITS, find_files, records, text_of
from minillm.tokenizer import train
from minillm.tokenizer.tokenizer import Tokenizer

TOKENIZER_SAMPLE = 16 << 20  # bytes of text that a tokenizer is learnt from


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
    wrap: str = "eos",
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
    wrap: "eos" ends each document in eos; "bos_eos" also begins it with bos, as Llama and Mistral know texts.

    Only what has changed since an earlier preparation in `out` is done again, and a line says why.

    Raises UserError for bad input, naming file and line, and for an `out` that holds bins from elsewhere.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("tokenizer: give either --tokenizer PATH or --train_tokenizer N")
    inputs, val_inputs, out = list(inputs), list(val_inputs or []), Path(out)
    for folder in map(Path, inputs + val_inputs):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies inside the input {folder} and would be read again; choose another")
    n_train = len(find_files(inputs))
    files = find_files(inputs + val_inputs)
    options = Options(split, field, on_bad_line, val_fraction, shard_tokens, wrap)
    options.check()
    for name, count, least in (("workers", workers, 1), ("train_tokenizer", train_tokenizer, train.SMALLEST)):
        if count is not None and count < least:
            raise UserError(f"--{name} {count}: at least {least} is needed")
    given = Tokenizer.load(run_folder.tokenizer_folder(tokenizer)) if tokenizer is not None else None

    lock = RunLock(out)
    try:
        refuse_foreign(out)
        sources = _sources(files, options, n_train if val_inputs else None)
        given, learnt = (given, "") if given is not None else _learn(out, train_tokenizer, sources[:n_train])
        if wrap == "bos_eos" and given.bos_id == given.eos_id:
            raise UserError("--wrap bos_eos: the tokenizer has no bos piece; choose --wrap eos")
        if wrap == "eos" and given.start_id != given.eos_id:
            print(f"{tokenizer}: its model knows texts that begin with bos; to go on like that, give --wrap bos_eos")
        if given.start_id != (given.bos_id if wrap == "bos_eos" else given.eos_id):
            given = given.with_settings(add_bos=wrap == "bos_eos")
        origins = [Origin(s.sha256, s.options.of(s.path), given.sha256, str(s.path)) for s in sources]
        bins = Bins(out, given, origins, shard_tokens=shard_tokens, learnt=learnt)
        if bins.finished:
            print(f"{out}: already prepared from the same input, nothing to do")
        else:
            bins.explain()
        if not bins.finished or not _holds(out, given.sha256):
            (out / "meta.json").unlink(missing_ok=True)
            given.save(out)
        refuse_bad([*bins.parts, *(bins.aside.parts[i] for i in bins.reused.values())], options)
        if not bins.finished:
            tokenize(sources, bins, options, workers or _cores())
        source = {"source": [str(path) for path in inputs], "val_source": [str(path) for path in val_inputs]}
        return bins.finish(source, {"wrap": wrap, "options": asdict(options)})
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; fix that and run the same command again") from None
    finally:
        lock.release()


def _sources(files: list[Path], options: Options, val_from: int | None) -> list[Source]:
    """val_from: files from this number on are validation files; None: each file has its share of both."""
    sides = [options] * len(files)
    if val_from is not None:
        sides = [replace(options, val_fraction=float(number >= val_from)) for number in range(len(files))]
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        return list(map(Source, files, pool.map(sha256, files), sides))


def _learn(out: Path, size: int, sources: list[Source]) -> tuple[Tokenizer, str]:
    """A tokenizer of the training documents, and what it was learnt from; the one in `out` if it is just that."""
    learnt = checksum([size, [(s.sha256, s.options.of(s.path)) for s in sources]])
    state = Parts(out).state
    if state.get("learnt") == learnt and _holds(out, state["tokenizer"]):
        return Tokenizer.load(out), learnt
    print(f"{out}: learning a tokenizer of {size:,} pieces", flush=True)
    (out / "meta.json").unlink(missing_ok=True)  # it would not fit the bins that are there
    how = dict(sample_bytes=TOKENIZER_SAMPLE, option="--train_tokenizer")
    return train.train_tokenizer(_sample(sources), size, out, **how), learnt


def _holds(out: Path, tokenizer: str) -> bool:
    files = [out / name for name in ("tokenizer.model", "tokenizer.json")]  # SentencePiece's, a byte-level BPE's
    return any(file.is_file() and sha256(file) == tokenizer for file in files)


def _sample(sources: list[Source]) -> Iterator[str]:
    """Training documents for the tokenizer, all or a uniform sample; only those taken are decoded."""
    size = sum(text_size(source.path) for source in sources)
    rate, draw = 2 * TOKENIZER_SAMPLE / max(size, 1), random.Random(0).random
    for path, _, options in sources:
        for record in records(path, split=options.split, field=options.field):
            if rate < 1 and draw() > rate:
                continue
            try:
                text = text_of(record.kind, record.raw, options.field)
                if not is_val(text.encode(), options):
                    yield text
            except UserError:
                pass  # reported when it is tokenized


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- command line


def report(meta: dict) -> None:
    """What a preparation gave, in a few lines."""
    for kind in SPLITS:
        tokens, documents = (sum(file[count] for file in meta["files"][kind]) for count in ("tokens", "documents"))
        per_token = meta["bytes"][kind] / max(tokens - documents * (2 if meta["wrap"] == "bos_eos" else 1), 1)
        print(f"{kind:5} {documents:,} documents, {tokens:,} tokens, {per_token:.2f} bytes of text per token")
    if meta["bad_lines"] or meta["empty_documents"]:
        print(f"left out: {meta['bad_lines']:,} bad lines, {meta['empty_documents']:,} empty documents")
        for message in meta["first_bad"]:
            print(f"  {message}")


def main() -> None:
    about = __doc__.split("\n\n")
    looks = dict(epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(description=about[0], allow_abbrev=False, **looks)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files or folders: .txt .jsonl .json (.gz) .parquet")
    add("--out", required=True, metavar="FOLDER", help="where the token bins go, e.g. data/novels")
    add("--tokenizer", metavar="PATH", help="an existing one: .model, a folder with tokenizer.model or .json, or a run")
    add("--train_tokenizer", type=int, metavar="N", help="learn a tokenizer of N pieces from the training documents")
    add("--val_input", nargs="+", metavar="PATH", help="files of the validation split (instead of --val_fraction)")
    add("--val_fraction", type=float, default=0.01, help="share of documents for validation (default 0.01)")
    ends = "a .txt document ends at blank lines (default), with each line, or with its file"
    add("--split", choices=TXT_SPLITS, default="blank", help=ends)
    add("--field", default="text", help="key or column that holds the text (default text)")
    add("--on_bad_line", choices=ON_BAD_LINE, default="error", help="stop at a bad line (default) or count it")
    add("--wrap", choices=WRAPS, default="eos", help="documents end in eos (default), or also begin with bos")
    add("--workers", type=int, help="processes (default: all cores)")
    add("--shard_tokens", type=int, default=1 << 30, help="begin a new .bin after this many tokens (default 2^30)")
    options = vars(parser.parse_args())
    inputs, val_inputs = options.pop("input"), options.pop("val_input")
    report(prepare(inputs, options.pop("out"), val_inputs=val_inputs, **options))


if __name__ == "__main__":
    sys.exit(run_script(main))
