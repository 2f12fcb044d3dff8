"""The files of benchmarks: one folder a benchmark, in it the files as they are published, in any folders.

data/eval/arc_easy/ARC-Easy-Test.jsonl                      the file's name says its split
data/eval/hellaswag/data/validation-00000-of-00001.parquet
data/eval/cmmlu/test/agronomy.csv                           or its folder does; each file is a subject
data/eval/mmlu/anatomy/test-00000-of-00001.parquet          or a subject is a folder
"""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minillm.base.errors import MissingError, UserError, naming
from minillm.datasets.files import json_rows, tables
from minillm.evaluation.benchmarks import BENCHMARKS, VALIDATION, Benchmark, Question
from minillm.evaluation.loglikelihood import Request

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz")
TRAINING = "train"  # in the name of a folder whose files are of no other split, whatever they are called
DRAWN_FROM = 1234  # the seed of examples
PART = re.compile(r"-(?P<number>\d{5})-of-(?P<of>\d{5})$")  # the part of a split in a file's name, from Hugging Face


class Task(NamedTuple):
    """A benchmark, or one subject of it, as it is asked. name: such as mmlu_anatomy. n_all: questions in its files."""

    name: str
    benchmark: Benchmark
    questions: list[Question]
    shots: int
    n_all: int


def read_tasks(name: str, folder: Path, shots: int | None, limit: int | None) -> list[Task]:
    """The tasks of a benchmark: one for each subject, or one. folder: where the folders of all benchmarks are.

    shots: examples before each question (see `_shown_before`); None: what is usual. limit: questions of each task, the
    first. Raises `MissingError` where files of questions or examples are not there, `UserError` for all that is wrong
    in one.
    """
    benchmark = BENCHMARKS[name]
    shots = benchmark.shots if shots is None else shots
    tested = _files_of_split(benchmark, folder / name, benchmark.tested)
    if not tested:
        raise MissingError(
            f"{name}: no file of the split {' or '.join(benchmark.tested)} in {folder / name}; "
            f"put it there from {benchmark.source}"
        )
    shown = _files_of_split(benchmark, folder / name, benchmark.shown) if shots else {}
    tasks = []
    for subject, files in tested.items():
        introduction = benchmark.introduction
        if benchmark.subjects:
            introduction = introduction.format(benchmark.subjects(subject))
        examples = _questions(benchmark, shown.get(subject, [])) if shots else []
        if shots and len(examples) < shots + _n_spare(benchmark):
            raise MissingError(
                f"{name}: {len(examples)} examples in files of the split {' or '.join(benchmark.shown)}"
                f"{f' of {subject}' if subject else ''}, too few for --shots {shots}; ask for fewer or add the file"
            )
        questions = _questions(benchmark, files)
        if not questions:
            raise UserError(f"{files[0]}: holds no question")
        asked = []
        of_each = _shown_before(benchmark, examples, shots)
        for question, its_examples in zip(questions[:limit], of_each, strict=False):
            asked.append(_after(introduction + its_examples, question))
        tasks.append(Task(f"{name}_{subject}" if subject else name, benchmark, asked, shots, len(questions)))
    return tasks


def _shown_before(benchmark: Benchmark, examples: list[Question], shots: int) -> Iterator[str]:
    """The examples before each question, without end: of an exam the first ones, else some that are drawn for each.

    They are drawn as lm-evaluation-harness does it, by Python's own generator from one seed, once a question in the
    order of the file. LAMBADA has one split, so its examples are drawn from the questions, of which each may be its
    own example.
    """
    draw = random.Random(DRAWN_FROM)
    while True:
        chosen = examples[:shots]
        if shots and not benchmark.subjects:
            chosen = draw.sample(examples, shots + _n_spare(benchmark))[:shots]
        yield "".join(f"{example.example(benchmark.joint)}\n\n" for example in chosen)


def _n_spare(benchmark: Benchmark) -> int:
    """How many more examples are drawn than shown: of a set asked from its validation split the harness draws one more,
    in case that the question is among them. It never is, since examples come from another split."""
    return int(benchmark.tested == VALIDATION)


def _after(before: str, question: Question) -> Question:
    """The question with the introduction and the examples before it."""
    requests = [Request(before + context, continuation) for context, continuation in question.requests]
    return question._replace(requests=requests)


# ---- which files


def _files_of_split(benchmark: Benchmark, folder: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    """The files of the first of these splits that has some, by subject ("" where the benchmark has none)."""
    files = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(KINDS))
    for split in splits:
        found: dict[str, list[Path]] = {}
        for path in files:
            subject = _subject_in(path.relative_to(folder), split)
            if subject is not None:
                found.setdefault(subject if benchmark.subjects else "", []).append(path)
        for subject, paths in found.items():
            _refuse_ambiguous(paths, f"{split} {subject}".strip(), folder)
        if found:
            return found
    return {}


def _refuse_ambiguous(paths: Sequence[Path], split: str, folder: Path) -> None:
    """Raises `UserError` unless these are one file, or each of the parts of one split once."""
    parts = [PART.search(_stem(path)) for path in paths]
    n_parts = int(parts[0]["of"]) if parts[0] else 1
    is_of_it = all(part and int(part["of"]) == n_parts for part in parts) and len({path.parent for path in paths}) == 1
    numbers = [int(part["number"]) for part in parts if part]
    if len(paths) > 1 and (not is_of_it or len(set(numbers)) < len(paths)):
        names = ", ".join(str(path.relative_to(folder)) for path in paths)
        raise UserError(f"{folder}: {names} all seem to be the split {split}; leave one of them there")
    if len(paths) < n_parts:
        there = ", ".join(path.name for path in paths)
        raise UserError(
            f"{paths[0].parent}: of {n_parts} parts of the split {split} only {there} is there; add the others"
        )


def _subject_in(path: Path, split: str) -> str | None:
    """The subject that a file of this split is about, by its name or its folder's; None for one of another split.

    anatomy_test.csv, test/anatomy.csv and anatomy/test-00000-of-00001.parquet are about anatomy.
    """
    stem = PART.sub("", _stem(path))
    folder = path.parent.name
    if TRAINING in _words(folder) and split not in _words(folder):  # auxiliary_train/mc_test.csv of MMLU
        return None
    if split in _words(stem):
        name = re.sub(rf"[-_.]?{split}$", "", stem, flags=re.IGNORECASE)
        return name or folder
    return stem if folder.lower() == split else None


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _stem(path: Path) -> str:
    """A file's name without the ends that say its kind."""
    return path.name.removesuffix(".gz").rpartition(".")[0]


# ---- what is in them


def _questions(benchmark: Benchmark, files: Sequence[Path]) -> list[Question]:
    """The questions of all rows of some files. Raises `UserError` with the file and the row."""
    questions = []
    for path in files:
        rows = _rows(path, benchmark.columns)
        labels = _labels_beside(path)
        if labels and len(labels) != len(rows):
            raise UserError(f"{path}: {len(rows)} rows, but {len(labels)} labels in the file beside it")
        for number, row in enumerate(rows, 1):
            with naming(f"{path}, row {number}"):
                if not isinstance(row, dict):
                    raise row if isinstance(row, UserError) else UserError("no object with names")
                questions.append(benchmark.question({**row, "label": labels[number - 1]} if labels else row))
    return questions


def _rows(path: Path, columns: tuple[str, ...] | None) -> list[dict]:
    """The rows of a file. columns: the names of those of a CSV whose first line is a row already."""
    if columns and path.suffix.lower() == ".csv":
        with json_rows.naming_file(path), path.open("rb") as file:
            return list(tables.csv_rows(json_rows.unpacked(file), ",", columns))
    rows = []
    with json_rows.open_rows(path) as file:
        for number, _, line in json_rows.numbered_lines(file):
            with naming(f"{path}, row {number}"):
                rows.append(json_rows.parse_line(line))
    return rows


def _labels_beside(path: Path) -> list[str]:
    """The right choices that PIQA publishes in a file of their own: valid.jsonl and valid-labels.lst."""
    file = path.with_name(f"{_stem(path)}-labels.lst")
    if not file.is_file():
        return []
    with json_rows.naming_file(file):
        return file.read_text(encoding="utf-8-sig").split()
