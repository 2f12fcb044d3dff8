"""Everything that is to be shown on a GPU, in one command with a time limit: `python -m kernels.prove`."""

import argparse
import datetime
import importlib.util
import os
import shlex
import signal
import time
from pathlib import Path

from kernels.prove import machine
from kernels.prove.lines import LINES, Line, pytest_workers, words
from kernels.prove.process import ROOT, Stop
from kernels.prove.proof import Proof

LEAST_MINUTES = 2.0  # the machine is asked for up to a minute and a half

EXAMPLES = """examples:
  python -m kernels.prove                          twelve minutes; the report is in out/prove/<date>/prove.md
  python -m kernels.prove --minutes 60             with all rows of the benchmark
  python -m kernels.prove --only tests attention   these lines alone
  python -m kernels.prove --list                   the lines, their limits and commands; needs no GPU

Each line runs in a process of its own and is ended at its limit; one for which no time is left is not begun. prove.md
and prove.csv are written after every line, also if Ctrl-C or SIGTERM ends the proof. Exit code: 0 if all lines that ran
passed, 1 if one did not or there is no GPU, 130 if interrupted.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.prove", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=minutes, default=12.0, metavar="N", help="for everything (default 12)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder for it all (default out/prove/<date>)")
    parser.add_argument("--only", nargs="+", choices=[line.name for line in LINES], metavar="NAME", help="these lines")
    parser.add_argument("--list", action="store_true", help="print the lines and end")
    return parser


def minutes(text: str) -> float:
    number = float(text)
    if not LEAST_MINUTES <= number <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} minutes: from {LEAST_MINUTES:.0f} to {24 * 60}")
    return number


def listing(lines: list[Line], workers: str) -> str:
    """The lines for people: name, limits, commands."""
    blocks = []
    for line in lines:
        commands = [f"    {shlex.join(words(command, Path('OUT'), workers))}" for command in line.commands]
        title = f"{line.name}: {line.shows} (about {line.usual_s:.0f} s, at most {line.limit_s:.0f})"
        blocks.append("\n".join([title, *commands]))
    return "\n".join(blocks)


def environment(out: Path) -> dict[str, str]:
    """Of the commands: on the GPU, not in Triton's interpreter, nothing remembered, and told where they hang."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {
        "PYTHONUNBUFFERED": "1",  # what is ended has said all it had to say
        "PYTHONFAULTHANDLER": "1",
        "XDG_CACHE_HOME": str(out / "cache"),  # the shipped settings, and a self-check of now
    }


def noting_signals() -> Stop:
    """From now on Ctrl-C, SIGTERM and a closed terminal are only noted; the proof looks for them."""
    stop = Stop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), stop.note)
    return stop


def main() -> int:
    began = time.monotonic()
    parser = build_parser()
    options = parser.parse_args()
    lines = [line for line in LINES if not options.only or line.name in options.only]
    workers = pytest_workers(machine.n_cores(), importlib.util.find_spec("xdist") is not None)
    if options.list:
        print(listing(lines, workers))
        return 0
    if not (ROOT / "train_pretrain.py").exists():
        parser.error(f"the lines run the scripts of a checkout, and there are none in {ROOT}")
    out = (options.out or Path("out/prove") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}").resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {options.out}: there is something already; name a new folder")

    stop = noting_signals()
    known, problem = machine.ask(stop, environment(out))
    if stop.signal:
        print(f"interrupted by {stop.signal.name} before the first line")
        return 130
    if problem:
        print(f"proving the kernels needs a CUDA GPU, and none answers here ({problem})")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    names = ", ".join(line.name for line in lines)
    print(f"{known['gpu']}, {options.minutes:g} minutes for {names}")
    print(f"the report is {out}/prove.md", flush=True)
    until = began + 60 * options.minutes
    exit_code = Proof(lines, known, out, until, environment(out), workers).run(stop)
    return 130 if stop.signal else exit_code
