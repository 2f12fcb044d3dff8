"""Running the lines of a proof, one after the other, in a given time, with a report after each."""

import sys
import time
from pathlib import Path

from kernels.prove import goals, process, report
from kernels.prove.lines import Line, obstacle, words
from kernels.prove.process import FAILED, KILL_S, PASSED, SETTLE_S, TERMINATE_S, Ending, Stop
from kernels.prove.report import NOT_RUN, RUNNING, Outcome, Report

RESERVE_S = SETTLE_S + TERMINATE_S + KILL_S + 4.0  # kept for ending the last line and for writing


class Proof:
    """Lines, what each came to, and the report of it all in the folder `out`.

    until: when everything must be over, by `time.monotonic`. workers: pytest's option for tests in parallel.
    """

    def __init__(
        self, lines: list[Line], machine: dict[str, str], out: Path, until: float, environment: dict[str, str],
        workers: str = "",
    ):  # fmt: skip
        self.machine = machine
        self.out = out
        self.until = until
        self.environment = environment
        self.began = time.monotonic()
        self.outcomes = [Outcome(line, [words(c, out, workers) for c in line.commands]) for line in lines]
        self.rows: list[goals.Row] = []

    def run(self, stop: Stop) -> int:
        """Run every line that fits. Returns 0 if something ran and all that ran passed, else 1."""
        for outcome in self.outcomes:
            outcome.note = self.reason_not_to_run(outcome.line, stop)
            if outcome.note:
                outcome.verdict = NOT_RUN
            else:
                outcome.verdict = RUNNING
                self.write("Unfinished")
                print(f"{outcome.line.name}: {outcome.line.shows} …", flush=True)
                self.run_line(outcome, stop)
                self.rows += self.measured(outcome)
            print(f"{outcome.line.name}: {outcome.summary}", flush=True)
            self.write("Unfinished")
        self.write(f"Interrupted by {stop.signal.name}" if stop.signal else "Finished")

        verdicts = {outcome.verdict for outcome in self.outcomes} - {NOT_RUN}
        return 0 if verdicts == {PASSED} else 1

    def reason_not_to_run(self, line: Line, stop: Stop) -> str:
        """Why a line is not begun; "" if it is."""
        if stop.signal:
            return "interrupted"
        if self.seconds_left() < line.usual_s:
            return f"no time left: it takes about {line.usual_s:.0f} s"
        return obstacle(line, self.machine)

    def seconds_left(self) -> float:
        """For commands; ending the last one and writing have time of their own."""
        return self.until - RESERVE_S - time.monotonic()

    def run_line(self, outcome: Outcome, stop: Stop) -> None:
        """Run a line's commands until one does not pass. They share the line's limit."""
        line = outcome.line
        log = self.log(line)
        began = time.monotonic()
        limit_s = min(line.limit_s, self.seconds_left())
        notes: list[str] = []
        for command in outcome.commands:
            ending = self.run_command(command, log, limit_s - (time.monotonic() - began), stop)
            notes += ending.notes
            if ending.verdict != PASSED:
                break

        outcome.verdict = ending.verdict
        outcome.exit_code = ending.exit_code
        said = log.read_text("utf-8", "replace")
        found = next((words for words in line.fails_on if words in said), "")
        if ending.verdict == PASSED and found:
            outcome.verdict = FAILED
            notes.append(f'it ended well, but said "{found}"')
        outcome.seconds = time.monotonic() - began
        outcome.note = "; ".join(notes)
        outcome.tail = report.tail(log)

    def run_command(self, command: list[str], log: Path, limit_s: float, stop: Stop) -> Ending:
        """Run a command by this Python, in which torch and Triton are those of the report."""
        python = [sys.executable] if command[0] == "python" else [command[0]]
        return process.run(python + command[1:], log, limit_s, stop, self.environment)

    def measured(self, outcome: Outcome) -> list[goals.Row]:
        """The rows that a line has measured, also one that was ended before its last."""
        line = outcome.line
        if line.results:
            return list(goals.read_rows(line.name, self.out / line.results / "kernels.csv"))
        if line.printed_as:
            with self.log(line).open(encoding="utf-8", errors="replace") as output:
                return list(goals.printed_rows(line.name, line.printed_as, output))
        return []

    def log(self, line: Line) -> Path:
        return self.out / f"{line.name}.txt"

    def write(self, state: str) -> None:
        comparisons = goals.compare(self.rows, self.machine["gpu"])
        seconds = time.monotonic() - self.began
        Report(self.machine, self.outcomes, self.rows, comparisons, state, seconds).write(self.out)
