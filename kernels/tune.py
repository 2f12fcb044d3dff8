"""Find faster settings of a kernel for this GPU and keep them: `python -m kernels.tune attention --head_dim 128`."""

import argparse
import inspect
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.shared.pipes import end_with_reader, need_triton

if __name__ == "__main__":
    need_triton()

from kernels.attention import backward
from kernels.bench import measure, optimizers, quant
from kernels.bench.attention import CACHE, cached, causal
from kernels.bench.case import Function, Place, Update
from kernels.bench.rows import ELEMENTS, gated, linear_loss, normed, turned
from kernels.shared import launch

MOST_CANDIDATES = 40
WORTH_KEEPING = 0.98  # of the shipped settings' time
LIMITS = {"num_warps": (1, 32), "num_stages": (1, 7), "BLOCK_M": (1, backward.LARGEST_BLOCK)}

EXAMPLES = """The search starts from the settings in a kernel's file. It halves or doubles one of them at a time (or
moves it by one), keeps the fastest variant, and repeats until none is faster. Each candidate's results are first
compared with the reference, and it is timed in turns with the shipped settings. Settings that are at least 2 % faster
are written to ~/.cache/minillm/kernels.json, for this GPU and version of Triton, never for one number of tokens.

examples:
  python -m kernels.tune attention --head_dim 128 --heads 32 --kv_heads 8
  python -m kernels.tune rms_norm --width 4096 --dtype float16
"""


def attention(place: Place, heads: int = 16, kv_heads: int = 16, head_dim: int = 128) -> Function:
    return causal(place, heads, kv_heads, head_dim, 4, 4096)


def decode(place: Place, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Function:
    return cached(place, heads, kv_heads, head_dim, 1, CACHE)


def rms_norm(place: Place, width: int = 2048) -> Function:
    return normed(place, ELEMENTS // width, width)


def rope(place: Place, heads: int = 32, kv_heads: int = 4, head_dim: int = 64) -> Function:
    return turned(place, 8, 2048, heads, kv_heads, head_dim)


def swiglu(place: Place, width: int = 8192) -> Function:
    return gated(place, ELEMENTS // width, width)


def loss(place: Place, width: int = 2048, vocabulary: int = 32000) -> Function:
    return linear_loss(place, 16384, width, vocabulary)


def quant_matmul(place: Place, bits: int = 4, rows: int = 1, width: int = 11008, outputs: int = 4096) -> Function:
    return quant.quantized(place, bits, rows, outputs, width)


def adamw(place: Place) -> Update:
    return next(optimizers.adamw(place))


def muon(place: Place) -> Update:
    return next(optimizers.muon(place))


MAKERS = (attention, decode, rms_norm, rope, swiglu, loss, quant_matmul, adamw, muon)
OPS = {make.__name__: make for make in MAKERS}


def neighbours(settings: dict) -> Iterator[dict]:
    """Settings that differ in one number: stages by one, all others by a factor of two."""
    for name, value in settings.items():
        if type(value) is not int or value < 1:
            continue
        low, high = LIMITS.get(name, (1, 1 << 20))
        if name == "num_stages":
            others = [value - 1, value + 1]
        elif value % 2 == 0:
            others = [value // 2, value * 2]
        else:
            others = [value * 2]
        for other in others:
            if low <= other <= high:
                yield settings | {name: other}


def search(shipped: dict, relative_time: Callable[[dict], float], most: int = MOST_CANDIDATES) -> tuple[dict, float]:
    """The best settings found from `shipped` on, neighbour by neighbour, and their time over that of `shipped`.

    relative_time(candidate): infinite for one that fails.
    """
    best, best_time = shipped, 1.0
    tried = [shipped]
    while True:
        untried = [candidate for candidate in neighbours(best) if candidate not in tried]
        around = untried[: most + 1 - len(tried)]
        times = [relative_time(candidate) for candidate in around]
        tried += around
        if not times or min(times) >= 0.99 * best_time:
            return best, best_time
        best_time = min(times)
        best = around[times.index(best_time)]


class Choice:
    """The settings in `chosen`, else a kernel's own, which are noted in `shipped`; both by (op, key)."""

    def __init__(self):
        self.shipped: dict[tuple[str, tuple], dict] = {}
        self.chosen: dict[tuple[str, tuple], dict] = {}

    def __call__(self, op: str, key: tuple, default: dict) -> dict:
        self.shipped[op, key] = default
        return self.chosen.get((op, key), default)


def tune(case: Function | Update, timer: Callable, rounds: int = 5, least_ms: float = 10.0) -> dict[str, dict | None]:
    """{name: settings, or None where the shipped ones are best} of every kernel that our side of a case starts.

    timer: see `bench.measure.in_turns`.
    """
    side = case.sides["ours"]
    function = side.load()
    tuned: dict[str, dict | None] = {}
    choice = Choice()
    with launch.choosing(choice):
        for part, run in case.runs(function, side).items():
            choice.shipped.clear()
            run()  # every kernel of this part asks for its settings
            for kernel, shipped in list(choice.shipped.items()):
                name = launch.settings_name(*kernel)
                if name in tuned:
                    continue
                print(f"{name}, {part}: shipped {shipped}", flush=True)
                trial = Trial(case, function, run, choice, kernel, shipped, timer, rounds, least_ms)
                best, time = search(shipped, trial.relative_time)
                tuned[name] = best if time < WORTH_KEEPING else None
                choice.chosen[kernel] = tuned[name] or shipped
                print(f"  {time:.3f}: {best}" if tuned[name] else "  the shipped settings are best", flush=True)
    return tuned


@dataclass(frozen=True)
class Trial:
    """How the candidates of one kernel are tried. kernel: its (op, key) in `choice`; run: what starts it."""

    case: Function | Update
    function: Callable
    run: Callable[[], object]
    choice: Choice
    kernel: tuple[str, tuple]
    shipped: dict
    timer: Callable
    rounds: int
    least_ms: float

    def relative_time(self, candidate: dict) -> float:
        """The candidate's time over that of the shipped settings; infinite if it is wrong or cannot run."""
        self.choice.chosen[self.kernel] = candidate
        try:
            self.check()
            return self.beside_shipped(candidate)
        except Exception as problem:  # the compiler's, or too little shared memory: it is no candidate
            lines = str(problem).strip().splitlines() or [repr(problem)]
            print(f"  {candidate}: left out, {lines[0][:100]}", flush=True)
            return math.inf

    def check(self) -> None:
        """Raise ArithmeticError if the results are wrong."""
        for what, (error, limit) in self.case.errors(self.function, self.case.sides["ours"]).items():
            if not error <= limit:
                raise ArithmeticError(f"wrong: {what} is off by {error:.1e}")

    def run_with(self, settings: dict) -> None:
        self.choice.chosen[self.kernel] = settings
        self.run()

    def beside_shipped(self, candidate: dict) -> float:
        """The candidate's time over that of the shipped settings, both timed in turns."""
        sides = {"shipped": lambda: self.run_with(self.shipped), "candidate": lambda: self.run_with(candidate)}
        times, failures = measure.in_turns(sides, self.rounds, self.least_ms, self.timer)
        for problem in failures.values():
            raise problem
        shipped_ms = statistics.median(times["shipped"])
        candidate_ms = statistics.median(times["candidate"])
        ratio = candidate_ms / shipped_ms
        print(f"  {candidate}: {candidate_ms:.4f} ms, {ratio:.3f} of the shipped time", flush=True)
        return ratio


def keep(path: Path, machine: str, tuned: dict[str, dict | None]) -> None:
    """Merge tuned settings into the file, whole or not at all; None removes earlier ones."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        of_all_machines = {name: tuned for name, tuned in read.items() if isinstance(tuned, dict)}
    except (OSError, ValueError, AttributeError, RecursionError):  # there is none, or it is damaged
        of_all_machines = {}
    merged = of_all_machines.get(machine, {}) | tuned
    of_all_machines[machine] = {name: settings for name, settings in merged.items() if settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(of_all_machines, file, indent=1)
    Path(file.name).replace(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    ops = parser.add_subparsers(dest="op", required=True, metavar="OP", help=", ".join(OPS))
    for name, make in OPS.items():
        options = ops.add_parser(name)
        for parameter in list(inspect.signature(make).parameters.values())[1:]:
            options.add_argument(f"--{parameter.name}", type=int, default=parameter.default, help="default %(default)s")
        options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return parser


def main() -> int:
    options = vars(build_parser().parse_args())
    op = options.pop("op")
    dtype = getattr(torch, options.pop("dtype"))
    if launch.INTERPRETED or not torch.cuda.is_available():
        print("tuning measures times, which needs a CUDA GPU, and none is used here; the shipped settings stay")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    cold = measure.cold_buffer(device)
    case = OPS[op](Place(device, dtype, "full"), **options)
    print(f"{launch.machine(device)}: {case.op} {case.name}, {dtype}", flush=True)
    tuned = tune(case, lambda run, times: measure.timed(run, times, cold))
    keep(launch.tuned_file(), launch.machine(device), tuned)
    n_new = sum(1 for settings in tuned.values() if settings)
    print(f"{n_new} of {len(tuned)} kernels have new settings, in {launch.tuned_file()}")
    return 0


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
