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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from minillm import UserError

LOADING = 10  # ranks wait for one another this many times --timeout_s before the first step
ANSWER_S = 2.0  # seconds in which a rank that is alive reports where it is


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

    def max(self, number: int) -> int:
        """The largest number of all ranks, so that all make the same decision."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
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

    device: auto, cpu, cuda, cuda:N or mps. timeout_s: a collective that a rank never joins is given up after `LOADING`
    times as long, unless a `Watchdog` has ended the run before.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        local = chosen.index or 0
        if world > 1:
            local = int(os.environ.get("LOCAL_RANK", 0))
            if chosen.index is not None:
                raise UserError(
                    f"--device {device}: is for one process; with torchrun choose GPUs by CUDA_VISIBLE_DEVICES"
                )
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"rank {rank} wants GPU {local}, but there are {torch.cuda.device_count()}: lower --nproc_per_node"
                )
        chosen = torch.device("cuda", local)  # with its number, which set_device needs
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    elif chosen.type == "cpu":
        _keep_freed_memory()
    if world > 1:
        _explain_lost_ranks(rank, world)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store = _new_store(timedelta(seconds=2 * timeout_s))
        patience = timedelta(seconds=LOADING * timeout_s)  # during training the watchdog acts sooner
        device_id = chosen if backend == "nccl" else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=patience, device_id=device_id
        )
    return Ranks(rank, world, chosen)


def pick_device(name: str) -> torch.device:
    """A torch device from a name; "auto" means CUDA if available, else the CPU. A GPU given by number becomes the
    current device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither cpu, cuda nor mps")
        if device.type == "cuda":  # ask the driver: a test tensor would take memory
            known = torch.cuda.device_count()
            if (device.index or 0) >= known:
                raise RuntimeError(f"{known} GPU(s) found")
            if device.index is not None:
                torch.cuda.set_device(device)  # streams, events and CUDA graphs are the current one's
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


def busy_cores() -> str:
    """What to do if other programs keep this machine's cores busy: torch's threads wait for one another. Else "".

    The load is that of the last minute, in which a run before this one may have kept as many cores busy as this will.
    """
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads == 1 or load < cores + threads:
        return ""
    return (
        f"the cores were busy in the last minute (load {load:.1f} on {cores}): if steps are slow, set OMP_NUM_THREADS "
        "to the number of cores that other programs leave free"
    )


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: on a CPU, new pages for each step cost a tenth of its time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of free heap


def micro_batch(batch_size: int, micro_batch_size: int | None, world: int) -> int:
    """Sequences per forward pass: as asked for, or the most up to 32 that divide a rank's share evenly.

    Raises `UserError` for a batch that does not divide evenly, before anything is built.
    """
    asked = micro_batch_size or 1
    if batch_size < 1 or (micro_batch_size is not None and micro_batch_size < 1) or batch_size % (asked * world):
        micro = "" if micro_batch_size is None else f"--micro_batch_size {micro_batch_size} × "
        raise UserError(
            f"--batch_size {batch_size} is no multiple of {micro}{world} rank(s): "
            f"choose a multiple of {max(1, asked) * world}"
        )
    share = batch_size // world
    return micro_batch_size or max(n for n in range(1, min(share, 32) + 1) if share % n == 0)


class Watchdog:
    """Ends this rank, naming the one that hangs, when no step has been finished for `limit_s` seconds.

    It watches from the first `tick` on; loading may take `LOADING` times as long.

    Without it a rank that hangs would leave all others waiting silently. Each rank reports through the group's
    key-value store which step it finished last and, when time is up, which line it is at: the one that hangs is at
    another line than those that wait for it, or reports nothing at all.
    """

    def __init__(self, ranks: Ranks, limit_s: float):
        self.ranks, self.limit_s, self.step, self.since = ranks, limit_s, 0, float("inf")
        self.store = _store() if ranks.world > 1 else None
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
        found = []
        asking = threading.Thread(target=lambda: found.append(self._places()), daemon=True)
        asking.start()
        asking.join(2 * ANSWER_S)  # the store does not answer if the hanging rank hosts it
        places = found[0] if found else "the rank that keeps the store (rank 0, without torchrun) gives no sign"
        _end(f"rank {self.ranks.rank}: no step finished for {self.limit_s:.0f} s after step {self.step}: {places}")

    def _places(self) -> str:
        """Which line each rank is at, as far as it reports it."""
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame.f_back is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        self.store.set(f"place/{self.ranks.rank}", f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        places = _answers(self.store, "place", self.ranks.world, ANSWER_S)
        steps = _answers(self.store, "step", self.ranks.world)
        return ", ".join(
            f"rank {rank} {f'is at {places[rank]}' if rank in places else 'gives no sign'} "
            f"(last finished step {steps.get(rank, 0)})"
            for rank in range(self.ranks.world)
        )


def _explain_lost_ranks(rank: int, world: int) -> None:
    """When a collective fails because another rank is gone, end this one with one line instead of a traceback."""
    before = sys.excepthook

    def explain(kind, problem, traceback):
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            return before(kind, problem, traceback)
        where = "the rank that keeps the store (rank 0, without torchrun) is gone"
        with contextlib.suppress(RuntimeError, ValueError):
            store = _store()
            store.set(f"lost/{rank}", "another rank")
            alive = _answers(store, "lost", world, ANSWER_S)
            gone = [str(other) for other in range(world) if other not in alive]
            steps = _answers(store, "step", world)
            what = "gives no sign" if "imed out" in str(problem) else "has failed or ended"
            where = f"rank {' and '.join(gone) or '?'} {what} after step {steps.get(rank, 0)}"
        words = str(problem).splitlines()[0].rpartition("] ")[2]
        _end(f"rank {rank}: {where} ({words[:80]}); the same command goes on from the newest checkpoint")

    sys.excepthook = explain


def _new_store(timeout: timedelta) -> dist.Store:
    """The store through which ranks find each other, without the entries of an earlier attempt.

    torchrun keeps one store over all restarts. It counts restarts on each machine separately, so the count tells
    attempts apart only if there is a single machine.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else 0}", store)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _answers(store: dist.Store, what: str, world: int, wait_s: float = 0.0) -> dict[int, str]:
    """What the ranks have set under `what`, by rank, once all have done so or `wait_s` seconds have passed."""
    until = time.monotonic() + wait_s
    while True:
        found = [rank for rank in range(world) if store.check([f"{what}/{rank}"])]
        if len(found) == world or time.monotonic() >= until:
            return {rank: store.get(f"{what}/{rank}").decode() for rank in found}
        time.sleep(0.05)


def _end(problem: str) -> None:
    """End this process at once: a thread that waits for another rank cannot be interrupted."""
    os.write(2, f"error: {problem}\n".encode())  # torch's exception hook has replaced sys.stderr by a buffer
    os._exit(3)
