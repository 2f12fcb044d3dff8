"""The report of a proof, for people (prove.md) and for programs (prove.csv): whole at every moment.

Both are written again after every line, to a file beside them that then takes their name, so that whoever reads them,
or ends us, never meets half of one.
"""

import csv
import io
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kernels.prove.goals import Comparison, Row
from kernels.prove.lines import Line
from kernels.prove.process import PASSED

TAIL_LINES = 40
TAIL_BYTES = 16 << 10
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor movements of a terminal
WAITING, RUNNING, NOT_RUN = "waiting", "running", "not run"
COLUMNS = ("kind", "line", "name", "part", "side", "verdict", "value", "unit", "goal", "share", "seconds", "exit_code",
           "note")  # fmt: skip


@dataclass
class Outcome:
    """What a line came to so far. note: a few words; tail: the last lines of its output."""

    line: Line
    commands: list[list[str]]
    verdict: str = WAITING
    seconds: float = 0.0
    exit_code: int | None = None
    note: str = ""
    tail: str = ""

    @property
    def summary(self) -> str:
        """Verdict, seconds and what else is to be told, in a line."""
        seconds = f" after {self.seconds:.0f} s" if self.seconds else ""
        return ": ".join(filter(None, (f"{self.verdict}{seconds}", self.note or self.last_words)))

    @property
    def last_words(self) -> str:
        lines = [line.strip() for line in self.tail.splitlines() if line.strip()]
        return lines[-1][:160] if lines else ""


@dataclass
class Report:
    """All that is known. state: "Unfinished", "Finished" or by what it was interrupted."""

    machine: dict[str, str]
    outcomes: list[Outcome]
    rows: list[Row]
    comparisons: list[Comparison]
    state: str
    seconds: float

    def write(self, folder: Path) -> None:
        replace(folder / "prove.md", self.markdown())
        replace(folder / "prove.csv", self.csv())

    def markdown(self) -> str:
        sections = [
            f"# minillm's kernels on {self.machine['gpu']}",
            f"{self.state} after {self.seconds:.0f} s. {counted(self.outcomes)}",
            markdown_table(("", ""), self.machine.items()),
            "## Lines",
            markdown_table(("line", "verdict", "s", "exit code", "what it shows", "note", "last words"), (
                (o.line.name, o.verdict, f"{o.seconds:.0f}", code(o.exit_code), o.line.shows, o.note, o.last_words)
                for o in self.outcomes
            )),
            *self._goals(),
            *self._failures(),
            *self._rows(),
            "## Commands",
            "\n".join(f"    {shlex.join(command)}" for o in self.outcomes for command in o.commands),
        ]  # fmt: skip
        return "\n\n".join(sections) + "\n"

    def _goals(self) -> Iterable[str]:
        if not self.comparisons:
            return
        yield "## Beside the goals"
        yield markdown_table(("row", "side", "measured", "goal", "of the goal", "which is", "line"), (
            (f"{c.row.op} {c.row.case} {c.what}", c.row.side, f"{c.measured:,.0f} {c.unit}", f"{c.goal:,.0f}",
             f"{c.share:.0%}{'' if c.share >= 1 else ', short'}", c.against, c.row.line)
            for c in self.comparisons
        ))  # fmt: skip

    def _failures(self) -> Iterable[str]:
        for outcome in self.outcomes:
            if outcome.tail and outcome.verdict not in (PASSED, RUNNING):
                yield f"## {outcome.line.name}: {outcome.verdict}"
                yield "\n".join(f"    {line}" for line in outcome.tail.splitlines())

    def _rows(self) -> Iterable[str]:
        if not self.rows:
            return
        yield "## All that was measured"
        yield markdown_table(("row", "side", "rate", "extra memory", "line"), (
            (f"{r.op} {r.case} {r.part}", r.side, f"{r.rate:,.0f} {r.unit}",
             "" if r.extra_mib is None else f"{r.extra_mib:,.0f} MiB", r.line)
            for r in self.rows
        ))  # fmt: skip

    def csv(self) -> str:
        """A row for each fact about the machine, each line, each comparison with a goal, and each measured rate."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerow({"kind": "proof", "verdict": self.state, "seconds": f"{self.seconds:.1f}"})
        for name, value in self.machine.items():
            writer.writerow({"kind": "machine", "name": name, "value": value})
        for o in self.outcomes:
            writer.writerow({
                "kind": "line", "line": o.line.name, "name": o.line.shows, "verdict": o.verdict,
                "seconds": f"{o.seconds:.1f}", "exit_code": code(o.exit_code), "note": o.note or o.last_words,
            })  # fmt: skip
        for c in self.comparisons:
            writer.writerow({
                "kind": "goal", "line": c.row.line, "name": f"{c.row.op} {c.row.case}".strip(), "part": c.what,
                "side": c.row.side, "verdict": "reached" if c.share >= 1 else "short", "value": f"{c.measured:.6g}",
                "unit": c.unit, "goal": f"{c.goal:.6g}", "share": f"{c.share:.4f}", "note": c.against,
            })  # fmt: skip
        for r in self.rows:
            writer.writerow({
                "kind": "row", "line": r.line, "name": f"{r.op} {r.case}".strip(), "part": r.part, "side": r.side,
                "value": f"{r.rate:.6g}", "unit": r.unit,
            })  # fmt: skip
        return text.getvalue()


def counted(outcomes: list[Outcome]) -> str:
    """ "7 lines passed, 1 timed out, 2 not run." """
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return f"Of {len(outcomes)} lines: {counts}."


def code(exit_code: int | None) -> str:
    return "" if exit_code is None else str(exit_code)


def markdown_table(header: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def tail(path: Path) -> str:
    """The last lines of a file of output, as a terminal would have left them."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = ESCAPES.sub("", file.read().decode("utf-8", errors="replace"))
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]  # a progress bar's last state
    printable = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in lines]
    return "\n".join(printable[-TAIL_LINES:]).strip("\n")


def replace(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
