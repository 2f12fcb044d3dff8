"""`bench train` under torchrun: a step of the training scripts on several ranks.

Printed are the speed, each rank's peak memory, and the share of the step in which a rank talks to others: all of it,
and what of it computing does not hide. The shares come from torch's profiler, over a few steps after those that are
timed, since it slows them.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minillm.base.device import autocast, peak_flops, pick_dtype
from minillm.base.errors import UserError
from minillm.commands.bench.measure import REPEATS, machine, vocab_size_of
from minillm.datasets.batch import Batch
from minillm.distributed import ranks as distributed
from minillm.distributed.parallelize import parallelize
from minillm.distributed.ranks import Ranks
from minillm.model import ops
from minillm.model.config import preset
from minillm.model.size import flops_per_token, n_parameters
from minillm.training import sharding, starting_model
from minillm.training.config import TrainingConfig
from minillm.training.optim import build_optimizers
from minillm.training.run import begin
from minillm.training.step import TrainState
from minillm.tuning.options import TuningConfig

WARM_UP = 3  # steps that compile, fill the optimizer's state and settle the memory
PROFILED = 3  # steps
MOST_ROWS = 16  # of the table; of more ranks only the extremes are listed


@dataclass(frozen=True)
class RunOptions(TuningConfig, TrainingConfig):
    """What a training script without data of its own would have."""


def run(config) -> None:
    """Measure and print; config: of `bench train`. Every rank calls this."""
    if config.json:
        raise UserError(
            f"--json {config.json}: is for one process, since plan adds communication by itself; leave out torchrun"
        )
    # ranks, layout and model as the scripts make them
    row_ranks = config.tensor_parallel * config.context_parallel
    n_rows = config.rows * max(1, distributed.world_size() // row_ranks)  # of a step
    options = RunOptions(
        device=config.device,
        shard=config.shard,
        tensor_parallel=config.tensor_parallel,
        context_parallel=config.context_parallel,
        batch_size=n_rows,
        micro_batch_size=config.rows,
        seq_len=config.seq_len,
        compile=config.compile,
        resume="none",
    )
    options, ranks, finish_kernel_check = begin(options)
    vocab_size = config.vocab_size or vocab_size_of(config.preset)
    longest = ranks.row_part.padded(config.seq_len)  # `Batch.part` pads rows to equal parts
    shape = preset(config.preset, vocab_size=vocab_size, max_seq_len=longest)
    options = sharding.choose_layout(options, shape, ranks)
    finish_kernel_check()
    model = starting_model.make_model(options, shape, None, None, ranks)
    step = training_step(options, ranks, model)

    # time it, then profile it
    for _ in range(WARM_UP):
        step()
    seconds = statistics.median(slowest(ranks, step) for _ in range(REPEATS))
    talking, exposed = communication(ranks, step)
    of_all = ranks.exchange([peak_memory(ranks.device), talking, exposed])

    # the table
    if ranks.main:
        dtype = pick_dtype("auto", ranks.device)
        print(f"{config.preset}: {n_parameters(shape):,} parameters, {dtype}, {machine(ranks.device)}")
        names = ("shard", "tensor_parallel", "context_parallel")
        layout = " ".join(f"--{name} {getattr(options, name)}" for name in names)
        print(f"{ranks.world} ranks, {layout}; a step of {n_rows} x {config.seq_len} tokens")
        print(f"{ops.describe(ranks.device)}; medians of {REPEATS}")
        speed = n_rows * config.seq_len / ranks.world / seconds
        peak = peak_flops(ranks.device, dtype) if ranks.device.type == "cuda" else None
        mfu = f", MFU {speed * flops_per_token(shape, config.seq_len) / peak:.1%}" if peak else ""
        print(f"  {speed:,.0f} tok/s a rank, {speed * ranks.world:,.0f} of all{mfu}")
        print("\n".join(table(of_all)), flush=True)
    distributed.stop()


def training_step(options: RunOptions, ranks: Ranks, model: torch.nn.Module) -> Callable[[], None]:
    """A step on random tokens: forward, backward, clipping and AdamW, done when it returns.

    Each rank has (B, T) of them, or its part of rows that it shares with others.
    """
    dtype = pick_dtype(options.dtype, ranks.device)
    state = TrainState(model, build_optimizers(model, "adamw", lr=1e-4, weight_decay=0.1), ranks, dtype)
    parallel_model = parallelize(model, ranks, options.compile)
    generator = torch.Generator().manual_seed(ranks.data_rank)
    shape = (options.micro_batch_size, options.seq_len + 1)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None).part(ranks.row_part).to(ranks.device)

    def step() -> None:
        with autocast(ranks.device, dtype):
            loss = parallel_model(batch.x, batch.y, mask=batch.mask)  # the sum
        state.backward(loss, batch.n_targets() * ranks.world)
        state.update(1.0)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def slowest(ranks: Ranks, step: Callable[[], None]) -> float:
    """Seconds of a step on the slowest rank."""
    ranks.barrier()
    began = time.perf_counter()
    step()
    return ranks.max(int(1e9 * (time.perf_counter() - began))) / 1e9


def peak_memory(device: torch.device) -> int:
    """The most bytes that this rank has had: on a GPU in tensors, else of the whole process (0 on Windows: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- communication


def communication(ranks: Ranks, step: Callable[[], None]) -> tuple[float, float]:
    """Shares of the time of some steps: in which this rank talks, and in which it talks and computes nothing."""
    on_gpu = ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ranks.barrier()
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(PROFILED):
            step()
        microseconds = 1e6 * (time.perf_counter() - began)
    talking, computing = [], []
    for event in profiler.events():
        span = event.time_range.start, event.time_range.end
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        if event.name.startswith("gloo:") or "nccl" in event.name:
            talking.append(span)
        elif on_gpu or event.name.startswith("aten::"):
            computing.append(span)
    covered, exposed = talked_and_exposed(talking, computing)
    return covered / microseconds, exposed / microseconds


def talked_and_exposed(talking: list, computing: list) -> tuple[float, float]:
    """How long any of the spans `talking` lasts, and how long while none of `computing` does; spans: (begin, end)."""
    computed = length(computing)
    return length(talking), length([*talking, *computing]) - computed


def length(spans: Iterable[tuple[float, float]]) -> float:
    """How long any of these spans (begin, end) lasts: what several cover counts once."""
    total, reached = 0.0, float("-inf")
    for first, end in sorted(spans):
        total += max(0.0, end - max(first, reached))
        reached = max(reached, end)
    return total


def table(of_all: list[tuple[int, float, float]]) -> list[str]:
    """A line for each rank: peak bytes, share of talking, and of talking while nothing is computed."""
    lines = [f"  {'rank':>6}{'peak memory':>14}{'communication':>16}{'not hidden':>13}"]
    shown = range(len(of_all))
    if len(of_all) > MOST_ROWS:  # the extremes of each column
        shown = sorted({choose(shown, key=lambda r, c=c: of_all[r][c]) for c in range(3) for choose in (min, max)})
    for rank in shown:
        n_bytes, talking, exposed = of_all[rank]
        memory = f"{n_bytes / 2**30:.2f} GiB" if n_bytes else "unknown"
        lines.append(f"  {rank:>6}{memory:>14}{talking:>16.1%}{exposed:>13.1%}")
    return lines
