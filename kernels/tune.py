"""Find faster settings of a kernel for this GPU and keep them: `python -m kernels.tune attention --head_dim 128`."""

import argparse
import inspect
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

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
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for other in others:
            if low <= other <= high and (other > value or name == "num_stages" or value % 2 == 0):
                yield settings | {name: other}


def search(shipped: dict, relative_time: Callable[[dict], float], most: int = MOST_CANDIDATES) -> tuple[dict, float]:
    """The best settings found from `shipped` on, neighbour by neighbour, and their time over that of `shipped`.

    relative_time(candidate): infinite for one that fails.
    """
    best, best_time = shipped, 1.0
    tried = [shipped]
    while True:
        around = [candidate for candidate in neighbours(best) if candidate not in tried][: most + 1 - len(tried)]
        times = [relative_time(candidate) for candidate in around]
        tried += around
        if not times or min(times) >= 0.99 * best_time:
            return best, best_time
        best_time = min(times)
        best = around[times.index(best_time)]


class Choice:
    """The settings in `chosen`, else a kernel's own, which are noted in `asked`; both by (op, key)."""

    def __init__(self):
        self.asked: dict[tuple[str, tuple], dict] = {}
        self.chosen: dict[tuple[str, tuple], dict] = {}

    def __call__(self, op: str, key: tuple, default: dict) -> dict:
        self.asked[op, key] = default
        return self.chosen.get((op, key), default)


def tune(case: Function | Update, timer: Callable, rounds: int = 5, least_ms: float = 10.0) -> dict[str, dict | None]:
    """{name: settings, or None where the shipped ones are best} of every kernel that our side of a case starts.

    timer: see `bench.measure.in_turns`.
    """
    side = case.sides["ours"]
    function = side.load()
    found: dict[str, dict | None] = {}
    choice = Choice()
    with launch.choosing(choice):
        for part, run in case.runs(function, side).items():
            choice.asked.clear()
            run()
            for pair, shipped in list(choice.asked.items()):
                name = launch.settings_name(*pair)
                if name in found:
                    continue
                print(f"{name}, {part}: shipped {shipped}", flush=True)

                def relative_time(candidate: dict, pair=pair, shipped=shipped, run=run) -> float:
                    choice.chosen[pair] = candidate
                    try:
                        _check(case, function)
                        return _beside(shipped, candidate, choice, pair, run, timer, rounds, least_ms)
                    except Exception as problem:  # the compiler's, or too little shared memory: it is no candidate
                        why = (str(problem).strip().splitlines() or [repr(problem)])[0][:100]
                        print(f"  {candidate}: left out, {why}", flush=True)
                        return math.inf

                best, time = search(shipped, relative_time)
                found[name] = best if time < WORTH_KEEPING else None
                choice.chosen[pair] = found[name] or shipped
                print(f"  {time:.3f}: {best}" if found[name] else "  the shipped settings are best", flush=True)
    return found


def _check(case: Function | Update, function: Callable) -> None:
    """Raise ArithmeticError if the results are wrong."""
    for what, (error, limit) in case.errors(function, case.sides["ours"]).items():
        if not error <= limit:
            raise ArithmeticError(f"wrong: {what} is off by {error:.1e}")


def _beside(shipped, candidate, choice, pair, run, timer, rounds, least_ms) -> float:
    """The candidate's time over that of the shipped settings, both timed in turns."""

    def with_settings(settings: dict) -> None:
        choice.chosen[pair] = settings
        run()

    sides = {"shipped": lambda: with_settings(shipped), "candidate": lambda: with_settings(candidate)}
    taken, failed = measure.in_turns(sides, rounds, least_ms, timer)
    for problem in failed.values():
        raise problem
    milliseconds = {name: statistics.median(times) for name, times in taken.items()}
    ratio = milliseconds["candidate"] / milliseconds["shipped"]
    print(f"  {candidate}: {milliseconds['candidate']:.4f} ms, {ratio:.3f} of the shipped time", flush=True)
    return ratio


def keep(path: Path, machine: str, found: dict[str, dict | None]) -> None:
    """Merge what was found into the file, whole or not at all; None removes an earlier finding."""
    try:
        everything = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        everything = {}
    mine = everything.get(machine, {}) | found
    everything[machine] = {name: settings for name, settings in mine.items() if settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(everything, file, indent=1)
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
    op, dtype = options.pop("op"), getattr(torch, options.pop("dtype"))
    if launch.INTERPRETED or not torch.cuda.is_available():
        print("tuning measures times, which needs a CUDA GPU, and none is used here; the shipped settings stay")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    cold = measure.cold_buffer(device)
    case = OPS[op](Place(device, dtype, "full"), **options)
    print(f"{launch.machine(device)}: {case.op} {case.name}, {dtype}", flush=True)
    found = tune(case, lambda run, times: measure.timed(run, times, cold))
    keep(launch.tuned_file(), launch.machine(device), found)
    print(f"{sum(map(bool, found.values()))} of {len(found)} kernels have new settings, in {launch.tuned_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
