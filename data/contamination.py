"""How many rows of benchmarks stand in the texts to be trained on: `data/prepare.py --check_against FILES`.

What is looked for of a row is its question, not its choices: see `rows_of_benchmark`. What counts as found, says
data/decontaminate.py. A row that is found is no proof: a proverb or a definition stands in many texts. So each is
written down with the run of tokens that both have.
"""

import contextlib
import csv
import io
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.decontaminate import MOST_ROWS, SHORTEST, Index, Match, build_index, found_in
from data.held_out import is_held_out
from data.sources import Options
from data.tokenize_files import is_val
from minillm.base.errors import UserError
from minillm.base.printing import visible
from minillm.datasets.files import json_rows, tables
from minillm.datasets.files.text_files import records, text_of

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz")
# Where benchmarks have their questions, the most telling first: COPA's "question" is only "cause" or "effect".
QUESTION_KEYS = ("goal", "premise", "sentence", "question", "question_stem", "stem", "ctx", "query", "context_options")
QUESTION_KEYS += ("context", "text", "prompt", "problem", "instruction")
BLOCK_BYTES = 1 << 20  # of text that is looked through together
RUNS_SHOWN = 3  # of each file


class Benchmark(NamedTuple):
    """A file of a benchmark: the texts that stand for each of its rows."""

    path: Path
    rows: list[list[str]]


class Found(NamedTuple):
    """A row that was found: in how many documents, the first of them, and the run of tokens there."""

    n_documents: int
    document: str
    run: str


# ---- the rows of benchmarks


def read_benchmarks(paths: Iterable[str | Path], field: str | None = None) -> list[Benchmark]:
    """The benchmarks in these files, and in the files of these folders. field: see `rows_of_benchmark`."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(KINDS))
            if not inside:
                raise UserError(f"--check_against {path}: no file of a known kind in it ({', '.join(KINDS)})")
            files += inside
        elif not path.exists():
            raise UserError(f"--check_against {path}: no such file or folder")
        elif not path.name.lower().endswith(KINDS):
            raise UserError(f"--check_against {path}: not a known kind of file ({', '.join(KINDS)})")
        else:
            files.append(path)
    return [Benchmark(path, rows_of_benchmark(path, field)) for path in dict.fromkeys(files)]


def rows_of_benchmark(path: Path, field: str | None = None) -> list[list[str]]:
    """The texts that stand for each row of a file: its question, in several forms where the row gives them.

    field: the key that holds the question; None: the first of QUESTION_KEYS, in any case. A table without names of
    columns has its questions in the first one. Raises `UserError` with the file and the row.
    """
    questions = []
    for number, row in enumerate(_rows(path, field), 1):
        try:
            questions.append(_question_of(row, field))
        except UserError as problem:
            raise UserError(f"{path}, row {number}: {problem}") from None
    if not questions:
        raise UserError(f"--check_against {path}: holds no row")
    return questions


def _rows(path: Path, field: str | None) -> Iterator[object]:
    """The rows of a file as objects."""
    separator = tables.SEPARATORS.get(path.suffix.lower())
    if separator:
        with json_rows.naming_file(path), path.open("rb") as file:
            first_line = io.TextIOWrapper(json_rows.unpacked(file), encoding="utf-8", newline="")
            names = next(csv.reader(first_line, delimiter=separator), [])
        if field is None and not any(name.lower() in QUESTION_KEYS for name in names):
            names = [QUESTION_KEYS[0], *(f"column {number}" for number in range(2, len(names) + 1))]
            with json_rows.naming_file(path), path.open("rb") as file:
                yield from tables.csv_rows(json_rows.unpacked(file), separator, names)
            return
    with json_rows.open_rows(path) as file:
        for _, _, line in json_rows.numbered_lines(file):
            yield json_rows.parse_line(line)


def _question_of(row: object, field: str | None) -> list[str]:
    """The question of a row, as one text or several."""
    if not isinstance(row, dict):
        raise row if isinstance(row, UserError) else UserError("no object with names")
    key_of = {key.lower(): key for key in reversed(row) if row[key] is not None}
    if field is not None:
        key = field if row.get(field) is not None else None
    else:
        key = next((key_of[name] for name in QUESTION_KEYS if name in key_of), None)
    if key is None:
        wanted = repr(field) if field else "key of a question that is known"
        raise UserError(f"has no {wanted} (its keys: {', '.join(map(str, row))}); name the key with --check_field")
    value = row[key]
    if isinstance(value, dict):  # ARC's {"question": {"stem": …}}
        return _question_of(value, None)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{key} is {value!r:.40}, not a text")
    options = [row.get(name) for name in ("option1", "option2")]
    if all(isinstance(option, str) for option in options):  # WinoGrande's gap, and what may stand in it
        texts = [text.replace("_", option) for text in texts for option in options]
    return texts


# ---- looking for them


def check_texts(benchmarks: Sequence[Benchmark], files: Iterable[Path], options: Options, workers: int = 1) -> dict:
    """Which rows stand in the training documents of these files; returns what contamination.json says.

    workers: threads, since numpy's work runs outside Python's lock; the result does not depend on it.
    Documents that are not trained on, of the validation split (`options.val_fraction`) or copies of one
    (`options.held_out`), empty or not to be read, are passed over. Memory is bounded by the index (16 bytes a run) and
    some blocks of text, whatever the files hold.
    """
    files = list(files)
    index = build_index(row for benchmark in benchmarks for row in benchmark.rows)
    found: dict[int, Found] = {}  # by row
    n_documents = Counter()  # "all", "bad", and by number of a benchmark those that hold a row of it
    first_rows = [sum(len(b.rows) for b in benchmarks[:number]) for number in range(len(benchmarks))]
    for places, matches in _looked_through(index, files, options, workers, n_documents):
        for place, in_document in zip(places, matches, strict=True):
            holds = {_number_of(first_rows, match.row) for match in in_document}
            n_documents.update(holds)
            for row, run in in_document:
                before = found.get(row)
                found[row] = Found(1, place, run) if before is None else before._replace(n_documents=before[0] + 1)

    report = {"documents": n_documents["all"], "bad_documents": n_documents["bad"], "files": [], "rows": []}
    too_short = Counter(_number_of(first_rows, row) for row in index.too_short)
    for number, benchmark in enumerate(benchmarks):
        n_rows = len(benchmark.rows)
        its_rows = sorted(row for row in found if _number_of(first_rows, row) == number)
        counts = {"rows": n_rows, "too_short": too_short[number], "found": len(its_rows)}
        name = visible(str(benchmark.path))
        report["files"].append({"file": name, **counts, "documents": n_documents[number]})
        for row in its_rows:
            report["rows"].append({"file": name, "row": row - first_rows[number] + 1, **found[row]._asdict()})
    return report


def _number_of(first_rows: Sequence[int], row: int) -> int:
    """The number of the benchmark that a row of the index is from."""
    return sum(first <= row for first in first_rows) - 1


def _looked_through(
    index: Index, files: Sequence[Path], options: Options, workers: int, n_documents: Counter
) -> Iterator[tuple[list[str], list[list[Match]]]]:
    """(places of some documents, the matches in each), in the order of the files; numpy's work is in threads."""
    in_flight: deque[tuple[list[str], Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for places, texts in _blocks(files, options, n_documents):
            in_flight.append((places, pool.submit(found_in, index, texts)))
            if len(in_flight) > 2 * workers:
                oldest, future = in_flight.popleft()
                yield oldest, future.result()
        for places, future in in_flight:
            yield places, future.result()


def _blocks(files: Sequence[Path], options: Options, n_documents: Counter) -> Iterator[tuple[list[str], list[str]]]:
    """(places, texts) of training documents, BLOCK_BYTES or a little more together."""
    places: list[str] = []
    texts: list[str] = []
    size = 0
    n_bytes = sum(file.stat().st_size for file in files)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="checking", mininterval=0.5) as bar:
        n_before = 0
        for file in files:
            for record in records(file, boundary=options.boundary, field=options.field, encoding=options.encoding):
                n_documents["bad"] += 1
                with contextlib.suppress(UserError):
                    text = text_of(record.kind, record.raw, options.field)
                    n_documents["bad"] -= 1
                    data = text.encode()
                    is_copy = options.held_out is not None and is_held_out(data, options.held_out)
                    if not text or is_copy or (options.val_fraction and is_val(data, options)):
                        continue
                    n_documents["all"] += 1
                    places.append(f"{visible(str(file))}, record {record.number}")
                    texts.append(text)
                    size += len(data)
                if size >= BLOCK_BYTES:
                    yield places, texts
                    places, texts, size = [], [], 0
                    bar.update(n_before + record.position - bar.n)
            n_before += file.stat().st_size
        bar.update(n_bytes - bar.n)
    if texts:
        yield places, texts


# ---- shown


def table(report: dict) -> str:
    """The report as lines for the terminal: a line a file, and some of the runs that were found."""
    names = {entry["file"]: Path(entry["file"]).name for entry in report["files"]}
    width = max(len("benchmark"), *map(len, names.values()))
    lines = [f"rows of benchmarks in {report['documents']:,} training documents:"]
    lines.append(f"  {'benchmark':<{width}}     rows  too short    found   share  documents")
    for entry in report["files"]:
        share = entry["found"] / entry["rows"]
        lines.append(
            f"  {names[entry['file']]:<{width}} {entry['rows']:>8,} {entry['too_short']:>10,} {entry['found']:>8,} "
            f"{share:>7.2%} {entry['documents']:>10,}"
        )
    if any(entry["too_short"] for entry in report["files"]):
        lines.append(
            f"  too short: fewer than {SHORTEST} tokens, or only runs that {MOST_ROWS} others have; not looked for"
        )
    shown = Counter()
    for row in report["rows"]:
        shown[row["file"]] += 1
        if shown[row["file"]] <= RUNS_SHOWN:
            lines.append(f"  {names[row['file']]}, row {row['row']}: “{row['run']}” in {row['document']}")
    return "\n".join(lines)
