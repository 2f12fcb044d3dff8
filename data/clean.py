"""A pile of text of doubtful quality → documents worth training on, and a report of what went and why.

    python data/clean.py --input pages/ old.jsonl.gz --out data/cleaned
    python data/prepare.py --input data/cleaned --train_tokenizer 16000 --out data/mine

Reads .txt .md .html .jsonl .json .csv .parquet and WARC, packed by gzip or zstd, in any encoding that is recognized.
Mends what can be mended, masks personal data, cuts boilerplate lines, drops documents by the thresholds of
data/cleaning/rules.toml (or --rules FILE), and keeps one of each set of copies. Nothing is sent anywhere.

Two scores are optional: bits per byte by a model trained here (--score_model), and a classifier learnt from samples of
your own (--good, --bad).

`--out` gets kept-00000.jsonl …, dropped/<rule>.jsonl, report.json and report.html. The working files in .cleaning stay:
the same command goes on after a kill, and another threshold takes seconds (--dry_run shows what it would do).
"""

import re
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.cleaning import duplicates, outcomes, passes, reading, scores, writing
from data.cleaning import report as reports
from data.cleaning.judging import MENU_FROM
from data.cleaning.mending import How, mended_documents
from data.cleaning.model_score import ModelScore
from data.cleaning.page import page
from data.cleaning.quality import Quality
from data.cleaning.rules import read_rules
from data.cleaning.text.features import FEATURES, LANGUAGES, features
from data.contamination import read_benchmarks
from data.decontaminate import Index, build_index
from minillm.base.command_line import parse
from minillm.base.device import n_cores
from minillm.base.errors import UserError
from minillm.base.files import own_folder, write_file, write_json_atomically
from minillm.base.options import Options, option
from minillm.base.printing import clipped, visible
from minillm.base.process import RunLock, run_script
from minillm.datasets.files.text_files import BOUNDARIES, CLEANED, REPORT, find_files, print_left_out

DRY_SHARE = 0.01  # of the documents, for a dry run without a run before
NOT_REPORTED = ("out", "workers", "dry_run", "explain")  # the result does not depend on them
NOT_OF_ROWS = ("field", "split", "rules", "languages", "recurring")  # options that --sft makes no use of
DRY_FROM = 64 << 20  # bytes of input; less is read as a whole
LONG_TEXT = 1 << 20  # bytes of a .txt in which blank lines are counted
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
MANY_PARTS = 100  # which blank lines cut a .txt into, that may be as many documents


@dataclass(frozen=True)
class Config(Options):
    input: tuple[str, ...] = option((), "files or folders of texts", group="texts")
    out: str | None = option(None, "where the result goes, e.g. data/cleaned; none: with --explain", group="texts")
    field: str = option("text", "key or column that holds the text", group="texts")
    split: str = option(
        "file", "a .txt document ends with its file, at blank lines or with each line", BOUNDARIES, group="texts"
    )
    val_input: tuple[str, ...] = option(
        (), "texts for validation: cleaned alike, into OUT/val; no copy of one stays in training", group="texts"
    )
    sft: bool = option(False, "rows are instructions and conversations, as train_sft.py reads them", group="texts")
    rules: str | None = option(None, "a .toml with thresholds that differ from data/cleaning/rules.toml", group="rules")
    languages: tuple[str, ...] = option(("zh", "en"), "wanted; texts in others are dropped", LANGUAGES, group="rules")
    recurring: int = option(10, "cut lines that so many documents hold; 0: none", at_least=0, group="rules")
    near_duplicates: str = option(
        "keep_one",
        "of texts that are nearly the same; repeat: as often as FineWeb2 does by their number",
        ("keep_one", "repeat", "off"),
        group="rules",
    )
    check_against: tuple[str, ...] = option(
        (),
        "files of benchmarks: a text that holds 13 tokens in a row of one of their questions is dropped",
        group="rules",
    )
    score_model: str | None = option(
        None, "a run or model folder: drop texts that it predicts too well or too badly", group="scores"
    )
    score_low: float = option(
        0.02, "share of a language's texts with the fewest bits per byte to drop", at_least=0, at_most=1, group="scores"
    )
    score_high: float = option(
        0.95,
        "share of a language's texts that have fewer bits than those to drop",
        at_least=0,
        at_most=1,
        group="scores",
    )
    good: tuple[str, ...] = option(
        (), "files of texts such as you want; with --bad: learn a classifier", group="scores"
    )
    bad: tuple[str, ...] = option((), "files of texts such as you do not want", group="scores")
    least_quality: float = option(
        0.5, "probability of being good below which it drops a text", at_least=0, at_most=1, group="scores"
    )
    mask: bool = option(True, "mask mail addresses, mobile and identity numbers", group="rules")
    dry_run: bool = option(
        False,
        "write nothing but the table: of an earlier run's features, else of a hundredth of the texts",
        group="machine",
    )
    explain: str | None = option(
        None, "FILE:LINE; show all features of one document and what they lead to", group="machine"
    )
    workers: int | None = option(None, "processes; none: all cores", at_least=1, group="machine")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.explain is None and (not self.input or self.out is None):
            problems.append("--input and --out: give both, or --explain FILE:LINE")
        if bool(self.good) != bool(self.bad):
            problems.append("--good and --bad: a classifier needs samples of both; give both or none")
        if self.score_low >= self.score_high:
            problems.append(f"--score_low {self.score_low:g}: must be below --score_high {self.score_high:g}")
        if self.sft and (self.score_model or self.good):
            problems.append("--sft: conversations are not scored; leave out --score_model, --good and --bad")
        for name in self._changed(NOT_OF_ROWS if self.sft else ()):
            given = getattr(self, name)
            shown = " ".join(given) if isinstance(given, tuple) else given
            problems.append(f"--{name} {shown}: means nothing with --sft, which has rules of its own; leave it out")
        for name in self._without_scores():
            problems.append(f"--{name}: means nothing without {'--good' if 'qual' in name else '--score_model'}")
        return problems

    def _without_scores(self) -> list[str]:
        """Options that were changed, and are of a score that is not asked for."""
        names = () if self.score_model else ("score_low", "score_high")
        names += () if self.good else ("least_quality",)
        return self._changed(names)

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of these options that do not have their default value."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]


def clean(config: Config) -> dict:
    """Clean the texts as the configuration says; returns what report.json holds."""
    rules = [] if config.sft else read_rules(config.rules, config.languages)
    left_out: Counter[str] = Counter()
    val_files = find_files(config.val_input, suffixes=reading.SUFFIXES)
    files = val_files + find_files(config.input, left_out, reading.SUFFIXES)
    print_left_out(left_out, reading.SUFFIXES)
    out = Path(config.out)
    for folder in map(Path, (*config.input, *config.val_input)):
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out}: lies inside the input {folder} and would be read again; choose another")

    lock = RunLock(out)
    try:
        folder = own_folder(out / CLEANED)
        workers = config.workers or n_cores()

        # Documents, mended; then what describes them; then what becomes of them.
        how = How(config.field, config.split, config.sft, config.mask)
        scorers, held_out = _scorers(config, how)
        sources = passes.read_sources(files, how, len(val_files))
        if config.dry_run:
            sources = passes.sampled(sources, folder, DRY_SHARE, DRY_FROM)
        pieces = passes.mend(sources, folder, how, workers)
        least = 0 if config.sft else config.recurring  # an answer's lines are no boilerplate
        recurring = passes.recurring_lines(pieces, least)
        with_signatures = config.near_duplicates != "off"
        menus = passes.recurring_lines(pieces, MENU_FROM if with_signatures and not config.sft else 0)
        index = _benchmark_index(config.check_against)
        shared = passes.Shared(recurring, index, with_signatures, config.sft, menus)
        judged = passes.judge(pieces, shared, workers)
        found = outcomes.outcomes(pieces, judged, rules)
        outcomes.refuse_if_unread(found, pieces)
        described = list(judged)
        scored = {}
        for scorer in scorers:
            scored[scorer.name], files = scores.score(found, pieces, recurring, scorer, workers)
            described += files
        scores.mark(found, scored, scores.Limits(config.score_low, config.score_high, config.least_quality))
        duplicates.mark_exact(found)
        if with_signatures and config.sft:
            duplicates.mark_near_prompts(found, judged)
        elif with_signatures:
            duplicates.mark_near(found, judged, folder)
        outcomes.settle_copies(found)
        outcomes.count_flags(found, judged, rules)

        options = {name: _printable(value) for name, value in asdict(config).items() if name not in NOT_REPORTED}
        result = {"options": options, **reports.report(pieces, found, rules)}
        result |= {"held_out": held_out} if held_out else {}
        if config.dry_run:
            return result
        result["written_bytes"] = writing.write_all(
            out, pieces, judged, found, (config.field, rules, recurring, config.near_duplicates == "repeat"), workers
        )
        report_page = page(result, pieces, judged, found, rules, (recurring,))
        write_file(out / "report.html", lambda path: path.write_text(report_page, encoding="utf-8"))
        write_json_atomically(out / REPORT, result)  # last: it says that the folder is whole
        passes.clean_up(folder, pieces, described)
        return result
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; fix that and run the same command again") from None
    finally:
        lock.release()


def _printable(value: object) -> object:
    """An option's value as it can be written down: names of files may hold bytes that are no text."""
    if isinstance(value, tuple):
        return [_printable(item) for item in value]
    return visible(value) if isinstance(value, str) else value


def _scorers(config: Config, how: How) -> tuple[list[ModelScore | Quality], dict]:
    """What scores texts, and how a classifier judged samples that it had not seen, which is printed."""
    scorers: list[ModelScore | Quality] = []
    held_out = {}
    if config.score_model:
        scorers.append(ModelScore.of(config.score_model))
    if config.good:
        quality, measured = scores.learnt_quality(config.good, config.bad, how, config.least_quality)
        print(measured.said(config.least_quality))
        scorers.append(quality)
        held_out = measured._asdict()
    return scorers, held_out


def _benchmark_index(paths: tuple[str, ...]) -> Index | None:
    """The index of the questions in these files; None without files."""
    rows = [row for benchmark in read_benchmarks(paths) for row in benchmark.rows]
    return build_index(rows) if rows else None


def explain(config: Config) -> str:
    """All features of one document of a file, FILE:LINE, and what they lead to."""
    name, _, line = config.explain.rpartition(":")
    if not line.isdigit():
        raise UserError(f"--explain {config.explain}: give FILE:LINE, such as pages.jsonl:17 (1 for a whole file)")
    (path,) = find_files([name], suffixes=reading.SUFFIXES)
    rules = read_rules(config.rules, config.languages)
    raws = reading.raw_documents(path, config.split)
    raw = next((raw for raw in raws if raw.number == int(line)), None)
    if raw is None:
        raise UserError(f"--explain {config.explain}: the file has no document there")
    (document,) = mended_documents([raw], How(config.field, config.split, config.sft, config.mask))
    if "bad" in document:
        return f"{config.explain}: dropped as {': '.join(document['bad'])}"
    lines = [clipped(visible(document["text"]).replace("\n", "⏎"), 400)]
    if config.sft:  # rules of rows know no numbers: what one drops was said above
        return "\n".join([*lines, *_mended_and_flags(document), "kept, unless it is a copy"])
    scorers, _ = _scorers(config, How(config.field, config.split, config.sft, config.mask))
    values = features([document["text"]], np.array([document["known"]], float))[0]
    lines += _mended_and_flags(document)
    for number, (feature, meaning) in enumerate(FEATURES.items()):
        concerned = [rule for rule in rules if rule.feature == feature]
        marks = [
            f"{'✗' if rule.holds(values[None])[0] else '✓'} {rule.name}: {rule.do} {rule.limit()}" for rule in concerned
        ]
        lines.append(f"{feature:<16} {values[number]:>10.4f}  {'; '.join(marks) or '–':<36} {meaning}")
    for scorer in scorers:
        value = scorer.scores([document["text"]])[0]
        lines.append(f"{scorer.name:<16} {value:>10.4f}  {'–':<36} {scores.MEANING[scorer.name]}")
    return "\n".join(lines)


def _mended_and_flags(document: dict) -> list[str]:
    """A line for each of the two, where a document has some."""
    named = {"mended": document["mended"], "flags": document.get("flags", [])}
    return [f"{name}: {', '.join(values)}" for name, values in named.items() if values]


def texts_of_many(config: Config) -> list[Path]:
    """The .txt that were each read as a single document, though blank lines cut them into many parts."""
    if config.split != "file" or config.sft:
        return []
    found = []
    for path in find_files(config.input, suffixes=reading.SUFFIXES):
        if path.suffix.lower() == ".txt":
            with path.open("rb") as file:
                beginning = file.read(LONG_TEXT)
            if len(BLANK_LINE.findall(beginning)) >= MANY_PARTS:
                found.append(path)
    return found


def main() -> None:
    config = parse(Config, __doc__)
    if config.explain is not None:
        print(explain(config))
        return
    result = clean(config)
    print(reports.table(result))
    if whole := texts_of_many(config):
        more = f" and {len(whole) - 1:,} more .txt" if len(whole) > 1 else ""
        print(
            f"{whole[0]}{more}: read as one document each; if they hold many, --split blank ends one at each empty line"
        )
    if not config.dry_run:
        step = f"data/prepare.py --input {shlex.quote(config.out)} …"
        if config.sft:
            step = f"train_sft.py --data {shlex.quote(f'{config.out}/kept-00000.jsonl')}"
        print(f"{config.out}: kept-*.jsonl, dropped/, report.html; next: python {step}")


if __name__ == "__main__":
    sys.exit(run_script(main))
