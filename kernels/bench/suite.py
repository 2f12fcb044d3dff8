"""Our kernels compared with the alternatives on this GPU, results first, then speed: `python -m kernels.bench`."""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kernels.bench import attention, optimizers, quant, report, rows
from kernels.bench import measure as bench_measure
from kernels.bench.case import OURS, Function, Place, Side, Update
from kernels.bench.report import Measurement
from kernels.shared import launch

OPS: dict[str, Callable[[Place], Iterator[Function | Update]]] = {
    "attention": attention.attention,
    "decode": attention.decode,
    "rms_norm": rows.rms_norm,
    "rope": rows.rope,
    "swiglu": rows.swiglu,
    "loss": rows.loss,
    "quant_matmul": quant.quant_matmul,
    "adamw": optimizers.adamw,
    "muon": optimizers.muon,
}
OTHERS_MAY_ERR = 5  # times our own limit: to see that a side computes the same thing at all
QUICK_SECONDS = 70  # --quick: after this time no other side is compiled any more

EXAMPLES = """examples:
  python -m kernels.bench                         all ops; table, out/bench/kernels.csv, out/bench/<op>.png
  python -m kernels.bench --quick                 the same in less than two minutes, fewer shapes
  python -m kernels.bench attention --only "D 128"   what has these words in its line
  python -m kernels.bench attention --without sm_90  but for the sides with this word in their name
  TRITON_INTERPRET=1 python -m kernels.bench --check     are they right? Without a GPU, through Triton's interpreter

A side that is not installed, cannot take a shape, or does not fit in memory is one line, and the others go on. Ours is
not timed where it is wrong, and the command then ends with code 1.
"""


class Bench:
    """A run of the benchmark: what was asked for, and what was found so far."""

    def __init__(self, place: Place, rounds: int, least_ms: float):
        self.place, self.rounds, self.least_ms = place, rounds, least_ms
        self.began = time.monotonic()
        self.cold = bench_measure.cold_buffer(place.device)
        self.measurements: list[Measurement] = []
        self.wrong: list[str] = []

    def timer(self, run: Callable, times: int) -> list[float]:
        return bench_measure.timed(run, times, self.cold)

    def case(self, case: Function | Update, ceiling: float) -> None:
        """Check every side, time those that are right, print a table for each part."""
        torch.compiler.reset()  # torch.compile gives up on a function after some shapes
        runs: dict[str, dict[str, Callable]] = {}
        errors: dict[str, float] = {}
        for name, side in case.sides.items():
            late = time.monotonic() - self.began > QUICK_SECONDS and self.place.size == "quick"
            if late and side.compiled:
                print(f"  {name}: left out, for --quick's time is used up")
                continue
            function, worst, problem = checked(case, name, side)
            if problem:
                self.note(case, name, problem)
                continue
            try:
                runs_of_parts = case.runs(function, side)
            except Exception as error:  # whatever a side raises becomes one line of the report
                self.note(case, name, reason(error))
                continue
            errors[name] = worst
            for part, run in runs_of_parts.items():
                runs.setdefault(part, {})[name] = run
        vars(case).pop("expected", None)  # may be large
        for part, sides in runs.items():
            self.part(case, part, sides, errors, ceiling)

    def note(self, case: Function | Update, name: str, problem: str) -> None:
        print(f"  {name}: {problem}", flush=True)
        if name.startswith(OURS):
            self.wrong.append(f"{case.op} {case.name}, {name}: {problem}")

    def part(
        self, case: Function | Update, part: str, sides: dict[str, Callable], errors: dict[str, float], ceiling: float
    ) -> None:
        """Time the sides of one part in turns and print its table."""
        times_of, failures = bench_measure.in_turns(sides, self.rounds, self.least_ms, self.timer)
        for name, problem in failures.items():
            self.note(case, name, reason(problem))
        group = []
        for name, times in times_of.items():
            median = statistics.median(times)
            tenths = statistics.quantiles(times, n=10) if len(times) > 1 else times
            group.append(Measurement(
                op=case.op, case=case.name, part=part, side=name,
                milliseconds=median, low_ms=tenths[0], high_ms=tenths[-1], runs=len(times),
                rate=bench_measure.rate(case.work[part], case.unit, median), unit=case.unit, ceiling=ceiling,
                beside_best=None, extra_bytes=self.extra_bytes(case, name, sides[name]),
                error=errors[name],
            ))  # fmt: skip
        if group:
            group = report.beside_best(group)
            self.measurements += group
            print(report.table(group), flush=True)

    def extra_bytes(self, case: Function | Update, name: str, run: Callable) -> int | None:
        """What a side holds at its peak; None, and a line, if it fails in this further run."""
        try:
            return bench_measure.peak_memory(run, self.place.device)
        except Exception as problem:  # its times are measured, and the other sides go on
            self.note(case, name, f"memory not measured: {reason(problem)}")
            return None


def checked(case: Function | Update, name: str, side: Side) -> tuple[Callable | None, float, str]:
    """A side's function, its largest error, and why it is not to be timed ("" if it is)."""
    slack = 1 if name.startswith(OURS) else OTHERS_MAY_ERR
    try:
        function = side.load()
        errors = case.errors(function, side)
    except Exception as problem:  # whatever a side raises becomes one line of the report
        return None, 0.0, reason(problem)
    wrong = [
        f"{what} is off by {error:.1e}, not {slack * limit:.0e}"
        for what, (error, limit) in errors.items()
        if not error <= slack * limit
    ]
    problem = "WRONG, so not timed: " + ", ".join(wrong) if wrong else ""
    return function, max(error for error, _ in errors.values()), problem


def reason(problem: Exception) -> str:
    """Why a side cannot take part, in a line."""
    if isinstance(problem, ModuleNotFoundError):
        return f"not installed ({problem.name})"
    if isinstance(problem, torch.OutOfMemoryError):
        return "does not fit in memory"
    lines = str(problem).strip().splitlines() or [""]
    return f"cannot: {type(problem).__name__}: {lines[0][:150]}"


def check(place: Place, ops: list[str], only: str, without: str = "") -> int:
    """Our own results against the reference, case by case. Returns how many were wrong."""
    wrong = 0
    for case in cases(place, ops, only, without):
        for name, side in case.sides.items():
            if name.startswith(OURS):
                _, worst, problem = checked(case, name, side)
                wrong += bool(problem)
                print(f"{case.op} {case.name}, {name}: {problem or f'right, error at most {worst:.1e}'}", flush=True)
    return wrong


def cases(place: Place, ops: list[str], only: str, without: str = "") -> Iterator[Function | Update]:
    """The cases of the ops whose names have `only` in them, without the sides whose names have `without` in them."""
    for op in ops:
        for case in OPS[op](place):
            if without:
                case.sides = {name: side for name, side in case.sides.items() if without.lower() not in name.lower()}
            if only.lower() in f"{case.op} {case.name}".lower():
                yield case
            del case
            gc.collect()  # tensors of gigabytes
            if place.device.type == "cuda":
                torch.cuda.empty_cache()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"all (the default), or some of {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds: less than two minutes")
    parser.add_argument("--check", action="store_true", help="only check that our results are right; exit code 0 or 1")
    parser.add_argument("--only", default="", metavar="WORD", help="only cases whose line has WORD in it")
    parser.add_argument("--without", default="", metavar="WORD", help="leave out sides with WORD in their name")
    parser.add_argument("--rounds", type=int, help="turns of each side (default 5, --quick 3)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for CSV and PNG (%(default)s)")
    return parser


def chosen_ops(names: list[str]) -> list[str]:
    """Ops by their names, with or without underscores; all of them for none or "all". Raises ValueError."""
    plain = {op.replace("_", ""): op for op in OPS}
    names = [name.lower().replace("_", "").replace("-", "") for name in names]
    unknown = [name for name in names if name not in plain and name != "all"]
    if unknown:
        raise ValueError(f"unknown op {', '.join(unknown)}; there are {', '.join(OPS)}, all")
    return list(OPS) if not names or "all" in names else [plain[name] for name in dict.fromkeys(names)]


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    try:
        ops = chosen_ops(options.ops)
    except ValueError as problem:
        parser.error(str(problem))
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    on_cpu = launch.INTERPRETED or not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu" and not (options.check and launch.INTERPRETED):
        print(
            "times need a CUDA GPU, and none is used here; on the CPU our results can be checked, by "
            "`TRITON_INTERPRET=1 python -m kernels.bench --check`"
        )
        return 1
    if on_cpu:  # fp32: the interpreter corrects each product of bf16 numbers by itself, slowly
        place = Place(device, torch.float32, "small")
    else:
        place = Place(device, torch.bfloat16, "quick" if options.quick else "full")
    if options.check:
        return 1 if check(place, ops, options.only, options.without) else 0
    return measure(place, ops, options)


def measure(place: Place, ops: list[str], options: argparse.Namespace) -> int:
    """Measure, print, and write CSV and PNGs; the exit code."""
    quick = place.size == "quick"
    machine = bench_measure.machine(place.device)
    bench = Bench(place, options.rounds or (3 if quick else 5), 10.0 if quick else 25.0)
    print(report.heading(machine), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for op in ops:
        ceilings = None  # measured when there is a first case
        for case in cases(place, [op], options.only, options.without):
            if ceilings is None:
                ceilings = bench_measure.ceilings(place.device, bench.cold, bench.rounds, bench.least_ms)
                rates = f"{ceilings['GB/s']:,.0f} GB/s, {ceilings['TFLOP/s']:,.0f} TFLOP/s"
                print(f"\n{op}: ceilings now {rates}", flush=True)
            bench.case(case, ceilings[case.unit])
            # after each case: a benchmark that is ended at a time limit keeps what it has measured
            report.write_csv(options.out / "kernels.csv", bench.measurements, machine)
        of_this_op = [m for m in bench.measurements if m.op == op]
        if of_this_op:
            try:
                report.draw(options.out / f"{op}.png", of_this_op, machine)
            except ImportError as problem:
                print(problem)
    print(f"\n{time.monotonic() - bench.began:.0f} s, {len(bench.measurements)} numbers in {options.out}/kernels.csv")
    for line in bench.wrong:
        print(line, file=sys.stderr)
    return 1 if bench.wrong else 0
