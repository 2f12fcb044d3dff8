"""How the benchmark measures: runs in turns, timed on the GPU itself, with cold caches; and what the GPU can do.

A GPU works through a queue, so its own events are asked for the time, not the CPU's clock. Its clock moves with heat
and power by several per cent within a minute: therefore all sides of a comparison take turns (`in_turns`), and the
ceilings are measured again before each op. Before each run a buffer of several times the L2 cache is written: no side
finds its inputs there, and each has as much of others' data to write back as it leaves behind of its own.
"""

import datetime
import gc
import math
import platform
import statistics
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

QUEUE_SECONDS = 100e-6  # for each run: how long the GPU waits, so that the CPU has queued it by then
CYCLES_A_SECOND = 1.7e9


def cold_buffer(device: torch.device) -> Tensor:
    """What is written before each run to empty the L2 cache: five times its size, at least 256 MB."""
    size = max(256 << 20, 5 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size // 4, dtype=torch.int32, device=device)


def timed(run: Callable[[], object], times: int, cold: Tensor) -> list[float]:
    """Milliseconds that each of `times` runs took on the GPU, queued one after the other."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda._sleep(int(QUEUE_SECONDS * CYCLES_A_SECOND * times))
    for begin, end in pairs:
        cold.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def in_turns(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    least_ms: float,
    timer: Callable[[Callable[[], object], int], list[float]],
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Milliseconds of every run, side by side: in each round each side runs for at least `least_ms`, from another
    side on each time, so that neither a slow moment nor what ran before meets one side alone.

    timer(run, times) gives the milliseconds of each of so many runs. The first calls, which may compile, are not
    counted. Also returns what was raised by the sides that could not run.
    """
    # How often each side runs in a round.
    counts: dict[str, int] = {}
    failures: dict[str, Exception] = {}
    for name, run in runs.items():
        try:
            timer(run, 1)
            milliseconds = max(statistics.median(timer(run, 3)), 1e-3)
            counts[name] = max(1, math.ceil(least_ms / milliseconds))
        except Exception as problem:  # whatever a side raises becomes one line of the report
            failures[name] = problem

    names = list(counts)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            try:
                times[name] += timer(runs[name], counts[name])
            except Exception as problem:  # memory may be enough for one run and not for the next
                failures[name] = problem
                del times[name]
    return times, failures


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run holds at its peak beyond what was held before, its results included."""
    gc.collect()  # a first call leaves its frames in cycles, its results with them
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()  # kept until the peak is read
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def ceilings(device: torch.device, cold: Tensor, rounds: int, least_ms: float) -> dict[str, float]:
    """What this GPU reaches now: "GB/s" of a large copy, read and written; "TFLOP/s" of an 8192³ product in bf16."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    n = 1 << min(30, int(math.log2(free_bytes / 8)))  # bytes: 1 GiB, or as much as is surely free
    source = torch.empty(n, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = min(8192, 1 << int(math.log2(n / 16) / 2))
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    runs = {"GB/s": lambda: target.copy_(source), "TFLOP/s": lambda: torch.mm(a, b, out=out)}
    times, failures = in_turns(runs, rounds, least_ms, lambda run, n_runs: timed(run, n_runs, cold))
    for problem in failures.values():
        raise problem
    work = {"GB/s": 2 * n, "TFLOP/s": 2 * side**3}
    return {unit: rate(work[unit], unit, statistics.median(times[unit])) for unit in work}


def rate(work: float, unit: str, milliseconds: float) -> float:
    """work (bytes or operations) in so many milliseconds, in its unit."""
    return work / milliseconds / (1e6 if unit == "GB/s" else 1e9)


def machine(device: torch.device) -> dict[str, str]:
    """What numbers were taken with: GPU, power limit, clocks, driver and versions."""
    import triton

    facts = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "power limit": "unknown", "clock now": "unknown", "highest clock": "unknown", "driver": "unknown",
    }  # fmt: skip
    if device.type == "cuda":
        fields = "power.limit,clocks.sm,clocks.max.sm,driver_version"
        card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", card, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            facts.update(zip(list(facts)[1:], said.strip().split(", "), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError):
            pass
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return facts | versions | {"date": datetime.datetime.now().isoformat(" ", "minutes")}
