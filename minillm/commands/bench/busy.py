"""Tokens a second of a training step on a CPU beside programs that keep its cores busy.

In turns, threads wait for one another as torch has them and as a run chooses. The neighbours are processes that do
nothing but compute. A run of t threads beside n of them is entitled to t / (t + n) of the cores: its fair share.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minillm.base import waiting
from minillm.base.device import keep_freed_memory
from minillm.base.options import Options, option
from minillm.commands.bench.measure import machine, vocab_size_of
from minillm.distributed.ranks import Ranks
from minillm.model import config as shapes
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.training.optim import build_optimizers
from minillm.training.step import TrainState

NEIGHBOUR = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with the benchmark


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("tiny", "the model's shape", tuple(shapes.PRESETS))
    rows: int = option(16, "sequences of a step", at_least=1)
    seq_len: int = option(128, "tokens of a sequence", at_least=1)
    neighbours: tuple[int, ...] = option(
        (0, 1, 2, 4, 8), "busy programs beside it: a row of the table each", at_least=0, at_most=1024
    )
    seconds: float = option(4.0, "of one measurement", at_least=0.01)
    repeats: int = option(5, "measurements of each side", at_least=1)


@contextlib.contextmanager
def as_minillm_does() -> Iterator[None]:
    """Context in which a run's way of waiting is chosen all the time."""
    openmp = waiting.gnu_openmp(torch.get_num_threads())
    if openmp is None:  # there is no choice
        yield
        return
    chosen = waiting.Waiting(openmp)
    chosen.start()
    chosen.try_out()
    try:
        yield
    finally:
        chosen.stop()


SIDES = {"as torch": contextlib.nullcontext, "as minillm": as_minillm_does}


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[list[subprocess.Popen]]:
    """Context in which so many other processes compute, on one thread each."""
    processes = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def training_step(config: Config) -> Callable[[], None]:
    """A step of the usual training, of a new model on random tokens."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    keep_freed_memory()  # as the scripts do
    vocab_size = vocab_size_of(config.preset)
    model = Transformer(shapes.preset(config.preset, vocab_size=vocab_size, max_seq_len=config.seq_len))
    model.init_weights()
    print(f"{config.preset}: {n_parameters(model.config):,} parameters, {machine(ranks.device)}")
    state = TrainState(model, build_optimizers(model, "muon", lr=1e-4, weight_decay=0.1), ranks, torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (config.rows, config.seq_len + 1))
    x = tokens[:, :-1].contiguous()  # (B, T)
    y = tokens[:, 1:].contiguous()

    def step() -> None:
        state.backward(model(x, y), y.numel())
        state.update(grad_clip=1.0)

    return step


def run(config: Config) -> None:
    step = training_step(config)
    step()  # unmeasured: it allocates
    n_threads = torch.get_num_threads()
    n_cores = n_cpus()
    print(
        f"steps of {config.rows} x {config.seq_len} tokens, {n_threads} thread(s) on {n_cores} core(s), medians of "
        f"{config.repeats} measurements of {config.seconds:g} s; in brackets: of the fair share"
    )
    print("neighbours" + "".join(f"{name:>24}" for name in SIDES), flush=True)

    idle = None  # steps a second of the better side, without neighbours
    for count in sorted({0, *config.neighbours}):
        with busy_neighbours(count):
            speeds = steps_per_second(step, config)
        idle = idle or max(speeds.values())
        fair = idle * fair_share(n_threads, count, n_cores)
        row = f"{count:10}"
        for speed in speeds.values():
            row += f"{speed * config.rows * config.seq_len:11,.0f} tok/s ({speed / fair:4.0%})"
        print(row, flush=True)


def fair_share(n_threads: int, n_neighbours: int, n_cores: int) -> float:
    """The share of its idle speed that a run may expect beside neighbours, if all threads get equal time."""
    could_use = min(n_threads, n_cores)
    its_cores = n_cores * n_threads / (n_threads + n_neighbours)
    return min(1.0, its_cores / could_use)


def n_cpus() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def steps_per_second(step: Callable[[], None], config: Config) -> dict[str, float]:
    """The median speed of each side, measured in turns."""
    measured: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(config.repeats):
        for name, side in SIDES.items():
            with side():
                n_steps, begin = 0, time.perf_counter()
                while time.perf_counter() - begin < config.seconds:
                    step()
                    n_steps += 1
                measured[name].append(n_steps / (time.perf_counter() - begin))
    return {name: statistics.median(speeds) for name, speeds in measured.items()}
