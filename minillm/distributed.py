"""Ranks: one process alone, or several started by torchrun.

python train_pretrain.py                                  one process
torchrun --nproc_per_node 4 train_pretrain.py             four GPUs (or CPU processes) of one machine
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_pretrain.py
"""

import contextlib
import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from minillm import UserError


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added over all ranks, in fp64, the same on every rank."""
        if self.world == 1:
            return list(values)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=wide, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: int) -> int:
        """The largest flag of all ranks, so that they decide alike."""
        if self.world == 1:
            return flag
        largest = torch.tensor(flag, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def micro_batches(self, step: int, batch_size: int, micro_batch_size: int) -> list[np.ndarray]:
        """Data positions of this rank's micro-batches in step `step` (0-based): arrays of int64.

        The global batch k is positions [k·B, (k+1)·B) whatever the number of ranks; each takes its own slice.
        """
        mine = batch_size // self.world
        first = step * batch_size + self.rank * mine
        return [
            np.arange(i, min(i + micro_batch_size, first + mine)) for i in range(first, first + mine, micro_batch_size)
        ]


def start(device: str = "auto", timeout_s: float = 600.0) -> Ranks:
    """Join the other ranks (nccl on CUDA, gloo elsewhere) and take a device.

    device: auto, cpu, cuda, cuda:N or mps. timeout_s: after how many seconds a collective that one rank never
    joins is given up.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        if world > 1:
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"rank {rank} wants GPU {local}, but there are {torch.cuda.device_count()}: lower --nproc_per_node"
                )
            chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    elif chosen.type == "cpu":
        _keep_freed_memory()
    if world > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(seconds=timeout_s), device_id=chosen if backend == "nccl" else None
        )
    return Ranks(rank, world, chosen)


def pick_device(name: str) -> torch.device:
    """A torch device from a name; "auto" takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":  # asked of the driver, since a tensor would take memory there
            known = torch.cuda.device_count()
            if (device.index or 0) >= known:
                raise RuntimeError(f"{known} GPU(s) found")
        else:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try auto or cpu") from None
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: on a CPU, new pages for each step cost a tenth of its time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: of which up to 1 GiB is not given back


def check_batch(batch_size: int, micro_batch_size: int, world: int) -> None:
    """Refuse a batch that does not divide evenly, before anything is built."""
    if batch_size < 1 or micro_batch_size < 1 or batch_size % (micro_batch_size * world):
        raise UserError(
            f"--batch_size {batch_size} is no multiple of --micro_batch_size {micro_batch_size} × {world} "
            f"rank(s): choose a multiple of {max(1, micro_batch_size) * world}"
        )


class Watchdog:
    """Ends this rank, naming the slowest, when no step has been finished for `limit_s` seconds.

    Each rank tells the others its step through the group's key-value store; whoever waits too long reads
    them. Without it a rank that hangs would leave all others waiting without a word.
    """

    def __init__(self, ranks: Ranks, limit_s: float):
        self.ranks, self.limit_s, self.step, self.since = ranks, limit_s, 0, time.monotonic()
        self.store = dist.distributed_c10d._get_default_store() if ranks.world > 1 else None
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def tick(self, step: int) -> None:
        """This rank has finished `step`."""
        self.step, self.since = step, time.monotonic()
        if self.store is not None:
            self.store.set(f"step/{self.ranks.rank}", str(step))

    def pause(self) -> None:
        """Training is over: watch no more."""
        self.since = float("inf")

    def _watch(self) -> None:
        while time.monotonic() - self.since < self.limit_s:
            time.sleep(min(1.0, self.limit_s / 4))
        steps = {}
        for rank in range(self.ranks.world):
            key = f"step/{rank}"
            steps[rank] = int(self.store.get(key)) if self.store.check([key]) else 0
        slowest = min(steps, key=steps.get)
        print(
            f"error: rank {self.ranks.rank}: no step finished for {self.limit_s:.0f} s after step {self.step}; "
            f"rank {slowest} is behind (last finished step {steps[slowest]}); ending all ranks",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)
