"""Your own text → token bins for training.

    python data/prepare.py --input novels/ more.jsonl.gz --train_tokenizer 16000 --out data/novels
    python data/prepare.py --input big.jsonl --tokenizer data/novels --out data/big
    python train_pretrain.py --data data/novels

The folder `--out` gets train-00000.bin, val-00000.bin, … (each document's tokens between bos and eos), the tokenizer,
and meta.json, which is written last: without it the folder is unfinished, and the same command goes on where it
stopped.

Each input file has bins of its own; files of less than 16 MiB share them with their neighbours. Run the command again
after changing some files, options or the tokenizer: bins that this does not concern are kept, the others are made
again, as are damaged ones. The result is the same as in a new folder. (--train_tokenizer learns from the files: when
they change, all tokens may change. To keep the tokenizer, give --tokenizer the folder itself.)
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data.bin_folder import BinFolder, meta_of
from data.bin_writer import SPLITS, read_json, write_json
from data.choose_tokenizer import holds, learnt_tokenizer, next_command, usual_wrap, with_wrap
from data.contamination import Benchmark, check_texts, read_benchmarks, table
from data.held_out import NAME as HELD_OUT
from data.held_out import checksum_of, write_hashes
from data.sources import (
    ON_BAD_LINE,
    WRAPS,
    Group,
    Options,
    Source,
    checksum,
    grouped,
    read_sources,
    tokenizer_key,
)
from data.splits import check_files_of_each, share_for_validation
from data.tokenize_files import refuse_bad_lines, tokenize
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.files import write_json_atomically
from minillm.base.options import Options as BaseOptions
from minillm.base.options import option
from minillm.base.printing import visible
from minillm.base.process import RunLock, run_script
from minillm.checkpoint import run_folder
from minillm.datasets.files.text_files import BOUNDARIES, find_files, print_left_out, text_of
from minillm.tokenizer import train
from minillm.tokenizer.measure import TRIED, check_round_trip, control_texts
from minillm.tokenizer.tokenizer import Tokenizer

ROUND_TRIP = 1 << 20  # characters that are encoded and decoded first, to see whether the tokenizer loses some
FILES_NAMED = 5  # at most so many files are named per reason


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    val_inputs: Iterable[str | Path] | None = None,
    workers: int | None = None,
    **options,
) -> dict:
    """Tokenize text files into the folder `out` and return its meta.json.

    inputs: files or folders (.txt, .jsonl, .json holding an array, .gz of these, .parquet).
    tokenizer: path of an existing one; train_tokenizer: size of one to be learnt from the training documents.
    val_inputs: files of the validation split, kept in their order; without them val_fraction decides.
    workers: processes, all cores by default; the result does not depend on it.
    options: boundary, field, encoding, allow_lossy, on_bad_line, val_fraction, wrap: see `Options`.

    Only what has changed since an earlier preparation in `out` is done again, and a line says why.

    Raises UserError for bad input, naming file and line, and for an `out` that holds bins from elsewhere.
    """
    inputs, val_inputs, out = list(inputs), list(val_inputs or []), Path(out)
    options = Options(**options)

    # What can be wrong with the arguments is said before anything is written.
    options.check()
    _check_arguments(inputs + val_inputs, out, tokenizer, train_tokenizer, workers)
    left_out = Counter()
    files = find_files(inputs + val_inputs, left_out)
    n_train = len(find_files(inputs)) if val_inputs else len(files)
    print_left_out(left_out)
    given = None if tokenizer is None else Tokenizer.load(run_folder.tokenizer_folder(tokenizer))
    options = replace(options, wrap=options.wrap or usual_wrap(out, given))
    if given is not None:
        if options.wrap == "eos" and given.start_id != given.eos_id:
            print(f"{tokenizer}: its model knows texts that begin with bos; to go on like that, give --wrap bos_eos")
        tokenizer = with_wrap(given, options.wrap)

    lock = RunLock(out)
    try:
        run_folder.clean_stale(out)
        bin_folder = BinFolder(out, given.sha256 if given else "")
        sources = read_sources(files, options, n_train if val_inputs else None)

        # Which documents are for validation: a share of all, or those of files of their own, without copies elsewhere.
        if not val_inputs:
            options = replace(options, val_fraction=share_for_validation(sources, options.val_fraction))
            sources = [source._replace(options=options) for source in sources]
        learnt_from = ""  # a tokenizer that is given was learnt elsewhere
        if given is None:
            learnt_from = checksum([train_tokenizer, [(s.sha256, s.options.of(s.path)) for s in sources[:n_train]]])
        if val_inputs:
            held_out = write_hashes(sources[n_train:], out)
            for_train = replace(options, val_fraction=0.0, held_out=(held_out, checksum_of(held_out)))
            sources[:n_train] = [source._replace(options=for_train) for source in sources[:n_train]]
            check_files_of_each(sources[:n_train], sources[n_train:])
        if given is None:
            tokenizer = learnt_tokenizer(bin_folder, train_tokenizer, sources[:n_train], learnt_from)
            tokenizer = with_wrap(tokenizer, options.wrap)
        about = {
            "wrap": options.wrap,
            "options": options.recorded(),
            "source": [visible(str(path)) for path in inputs],
            "val_source": [visible(str(path)) for path in val_inputs],
            "learnt_from": learnt_from,
        }
        groups = [*grouped(sources[:n_train], tokenizer), *grouped(sources[n_train:], tokenizer)]
        return _make(bin_folder, groups, tokenizer, about, workers or _cores())
    except (UserError, KeyboardInterrupt):
        if (out / "meta.json").exists():
            print(f"{out}: what was finished there before stays as it was")
        raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; fix that and run the same command again") from None
    finally:
        lock.release()


def _check_arguments(
    inputs: list[str | Path],
    out: Path,
    tokenizer: str | Path | None,
    train_tokenizer: int | None,
    workers: int | None,
) -> None:
    """Raises UserError for what does not go together, numbers that are too small, and an `out` inside the input."""
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("tokenizer: give either --tokenizer PATH or --train_tokenizer N")
    for name, count, least in (("workers", workers, 1), ("train_tokenizer", train_tokenizer, train.SMALLEST)):
        if count is not None and count < least:
            raise UserError(f"--{name} {count}: at least {least} is needed")
    for folder in map(Path, inputs):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies inside the input {folder} and would be read again; choose another")


def _make(folder: BinFolder, groups: list[Group], tokenizer: Tokenizer, about: dict, workers: int) -> dict:
    """Make what is missing of the bins of these groups; returns meta.json."""
    # Nothing has changed, except perhaps the names of files or what happens to bad lines.
    records = folder.finished_records(groups, tokenizer.id_dtype.itemsize)
    if records is not None and holds(folder.out, tokenizer.sha256):
        print(f"{folder.out}: already prepared from the same input, nothing to do")
        refuse_bad_lines(records, about["options"])
        meta = meta_of(groups, records, tokenizer, about)
        if meta != read_json(folder.out / "meta.json"):
            write_json(folder.out / "meta.json", meta)
        folder.clean()
        return meta

    sources = [source for group in groups for source in group.sources]
    allow_lossy = any(source.options.allow_lossy for source in sources)
    check_round_trip(tokenizer, _first_texts(sources), "the texts", allow_lossy)
    if found := control_texts(tokenizer, _first_texts(sources)):
        print(f"the first documents hold the text of control pieces, encoded as letters like any other text: {found}")

    # Keep what is there of the bins and make the others. Only then is anything changed that was finished before.
    tokenizer.save(folder.new_tokenizer)
    whole = folder.whole_records(groups, tokenizer.id_dtype.itemsize)
    missing = [group for group in groups if group.key not in whole]
    _explain(folder, groups, missing, tokenizer)
    refuse_bad_lines(whole.values(), about["options"])
    whole |= tokenize(missing, folder, tokenizer, workers)
    meta = meta_of(groups, [whole[group.key] for group in groups], tokenizer, about)
    folder.put_together(meta)
    return meta


def _explain(folder: BinFolder, groups: list[Group], missing: list[Group], tokenizer: Tokenizer) -> None:
    """Print how many files' tokens are kept, and why the others' are not."""
    earlier = folder.earlier_sources()
    if not earlier:
        return
    made_once = folder.earlier_keys()
    files_of: dict[str, list[str]] = {}  # reason → files
    for group in missing:
        for source in group.sources:
            reason = _reason(source, earlier.get(source.name), tokenizer)
            if not reason:
                reason = "damaged or lost" if group.key in made_once else "in one bin with a file that changed"
            files_of.setdefault(reason, []).append(source.name)
    files = [source.name for group in groups for source in group.sources]
    gone = sorted(earlier.keys() - set(files))
    if gone:
        files_of["no longer an input"] = gone

    n_missing = sum(len(group.sources) for group in missing)
    print(f"{folder.out}: {len(files) - n_missing:,} of {len(files):,} files are tokenized already; the others:")
    for reason, names in files_of.items():
        more = f" and {len(names) - FILES_NAMED:,} more" if len(names) > FILES_NAMED else ""
        print(f"  {reason}: {', '.join(names[:FILES_NAMED])}{more}")


def _reason(source: Source, earlier: dict | None, tokenizer: Tokenizer) -> str:
    """Why the tokens of a file are not what they were earlier; "" if that is not known from the file."""
    if earlier is None:
        return "new"
    options = source.options.of(source.path)
    changes = []
    if earlier["sha256"] != source.sha256:
        changes.append("text")
    if earlier["options"] != options:
        new = [option for option in options.split(", ") if option not in earlier["options"].split(", ")]
        changes.append(f"options (now {', '.join(new)})")
    if earlier["tokenizer"] != tokenizer_key(tokenizer):
        changes.append("tokenizer")
    return f"{' and '.join(changes)} changed" if changes else ""


def _first_texts(sources: list[Source]) -> Iterator[str]:
    """The first documents of each file, TRIED characters or a little more, until ROUND_TRIP of all."""
    size = 0
    for source in sources:
        of_source = 0
        for record in source.records():
            with contextlib.suppress(UserError):  # reported when it is tokenized
                text = text_of(record.kind, record.raw, source.options.field)[:TRIED]
                of_source += len(text)
                yield text
            if of_source >= TRIED:
                break
        size += of_source
        if size >= ROUND_TRIP:
            return


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- command line


def report(meta: dict) -> None:
    """What a preparation gave, in a few lines."""
    special = 2 if meta["wrap"] == "bos_eos" else 1  # tokens of a document that stand for no text
    for split in SPLITS:
        documents = sum(file["documents"] for file in meta["files"][split])
        tokens = sum(file["tokens"] for file in meta["files"][split])
        per_token = meta["bytes"][split] / max(tokens - special * documents, 1)
        print(f"{split:5} {documents:,} documents, {tokens:,} tokens, {per_token:.2f} bytes of text per token")
    if meta["copies_of_validation"]:
        print(f"left out of training: {meta['copies_of_validation']:,} copies of validation documents")
    if meta["bad_lines"] or meta["empty_documents"]:
        print(f"left out: {meta['bad_lines']:,} bad lines, {meta['empty_documents']:,} empty documents")
        for message in meta["first_bad"]:
            print(visible(f"  {message}"))


@dataclass(frozen=True)
class Config(BaseOptions):
    input: tuple[str, ...] = option(help="files or folders: .txt .jsonl .json (.gz) .parquet", group="texts")
    out: str = option(help="where the token bins go, e.g. data/novels", group="texts")
    split: str = option(
        Options.boundary,
        "a .txt document ends at blank lines, with each line (lines), or with its file (file)",
        BOUNDARIES,
        group="texts",
    )
    field: str = option(Options.field, "key or column that holds the text", group="texts")
    encoding: str = option(Options.encoding, "of .txt and JSON: gb18030, big5, utf-16 …", group="texts")
    on_bad_line: str = option(
        Options.on_bad_line, "stop at a bad line, or skip and count it", ON_BAD_LINE, group="texts"
    )
    tokenizer: str | None = option(
        None,
        "an existing one: .model, a folder with tokenizer.model or .json, or a run; none: see --train_tokenizer",
        group="tokenizer",
    )
    train_tokenizer: int | None = option(
        None,
        "learn a tokenizer of so many pieces from the training documents",
        at_least=train.SMALLEST,
        group="tokenizer",
    )
    wrap: str | None = option(
        None,
        "documents end in eos, or also begin with bos (bos_eos); none: as --out was prepared before, else as the model "
        "of --tokenizer knows texts, else bos_eos",
        WRAPS,
        group="tokenizer",
    )
    allow_lossy: bool = option(
        False, "take a tokenizer that loses more than 0.1 % of the characters of a text", group="tokenizer"
    )
    val_input: tuple[str, ...] = option((), "files of the validation split, in place of a share", group="validation")
    val_fraction: float = option(
        Options.val_fraction, "share of documents for validation", at_least=0, below=1, group="validation"
    )
    check_against: tuple[str, ...] = option(
        (),
        "benchmarks (.jsonl .json .csv .tsv .parquet, or folders): count their rows that stand in training documents",
        group="check",
    )
    check_field: str | None = option(
        None,
        "key that holds a benchmark's question; none: the usual ones, such as question",
        only_with=("check_against", ()),
        group="check",
    )
    workers: int | None = option(None, "processes; none: all cores", at_least=1, group="machine")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.val_input and self.val_fraction != type(self).val_fraction:
            problems.append(f"--val_fraction {self.val_fraction}: means nothing with --val_input; leave one out")
        return problems


def main() -> None:
    config = parse(Config, __doc__)
    benchmarks = read_benchmarks(config.check_against, config.check_field)  # faults in them before the long work
    meta = prepare(
        config.input,
        config.out,
        tokenizer=config.tokenizer,
        train_tokenizer=config.train_tokenizer,
        val_inputs=config.val_input,
        workers=config.workers,
        boundary=config.split,
        field=config.field,
        on_bad_line=config.on_bad_line,
        encoding=config.encoding,
        allow_lossy=config.allow_lossy,
        val_fraction=config.val_fraction,
        wrap=config.wrap,
    )
    report(meta)
    if benchmarks:
        _check(config, benchmarks, meta["options"]["val_fraction"])
    print(f"{config.out}: next: {next_command(config.out, config.tokenizer)}")


def _check(config: Config, benchmarks: list[Benchmark], val_fraction: float) -> None:
    """Print how many rows of benchmarks stand in the training documents, and write down which."""
    options = Options(
        boundary=config.split,
        field=config.field,
        encoding=config.encoding,
        val_fraction=0 if config.val_input else val_fraction,
    )
    if config.val_input:  # copies of its documents were left out of training
        held_out = str(Path(config.out) / HELD_OUT)
        options = replace(options, held_out=(held_out, checksum_of(held_out)))
    found = check_texts(benchmarks, find_files(config.input), options, config.workers or _cores())
    print(table(found))
    path = Path(config.out) / "contamination.json"
    write_json_atomically(path, found)
    print(f"all that were found: {path}")


if __name__ == "__main__":
    sys.exit(run_script(main))
