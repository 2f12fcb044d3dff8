"""Ranks: one process alone, or several started by torchrun.

python train_pretrain.py                                  one process
torchrun --nproc_per_node 4 train_pretrain.py             four GPUs (or CPU processes) of one machine
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_pretrain.py
"""

import hashlib
import json
import math
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minillm.base import waiting
from minillm.base.device import keep_freed_memory, keep_to_quota, pick_device
from minillm.base.errors import UserError
from minillm.distributed.layout import UNDIVIDED, Layout, RowPart
from minillm.distributed.watchdog import LOADING, explain_lost_ranks

MOST_AT_ONCE = 32  # sequences a forward pass, unless --micro_batch_size says otherwise


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    layout: Layout = UNDIVIDED  # of which it matters here which ranks, neighbours in number, share rows

    @property
    def row_ranks(self) -> int:
        """How many ranks compute on the same rows, each on some of the tokens."""
        return self.layout.row_ranks

    @property
    def data_rank(self) -> int:
        """The number of this rank among those with other rows than its neighbours."""
        return self.rank // self.row_ranks

    @property
    def data_world(self) -> int:
        """Into how many parts the rows of a batch are dealt out."""
        return self.world // self.row_ranks

    def share(self, n: int) -> list[tuple[int, bool]]:
        """This rank's of n batches, as many on each rank: (number, True), or (0, False) where one is lacking.

        So every rank makes as many forward passes as any other, which those of a sharded model need.
        """
        numbers = range(self.data_rank, -(-n // self.data_world) * self.data_world, self.data_world)
        return [(number, True) if number < n else (0, False) for number in numbers]

    @property
    def row_part(self) -> RowPart:
        """Which tokens of a row this rank computes on: see `Batch.part`."""
        return RowPart(self.rank % self.row_ranks, self.layout.context, self.layout.tensor)

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added over all ranks, in fp64, the same on every rank."""
        if self.world == 1:
            return list(values)
        return self.summed(torch.tensor(values, dtype=self.wide, device=self.device)).tolist()

    def summed(self, value: Tensor) -> Tensor:
        """Numbers on the device added over all ranks, in fp64, the same on every rank; does not wait for the device."""
        total = value.to(self.wide, copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: fp64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum_of_rows(self, *values: float) -> list[float]:
        """Each value added over the ranks with rows of their own; those that share rows have the same values."""
        return [total / self.row_ranks for total in self.sum(*values)]

    def max(self, number: int) -> int:
        """The largest number of all ranks, so that all make the same decision."""
        (largest,) = self.maxima(number)
        return largest

    def maxima(self, *numbers: int) -> list[int]:
        """The largest of all ranks in each place, by one exchange."""
        if self.world == 1:
            return list(numbers)
        largest = torch.tensor(numbers, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def exchange(self, value) -> list:
        """Each rank's value, of those that JSON can hold, in the order of the ranks; the same list on every rank."""
        if self.world == 1:
            return [value]
        written = json.dumps(value).encode()
        length = self.max(len(written))
        padded = bytearray(written.ljust(length))  # JSON may end in spaces
        mine = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)  # (length,)
        of_all = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(of_all, mine)
        return [json.loads(bytes(one.tolist())) for one in of_all]

    def agree(self, value: object) -> bool:
        """Whether all ranks have the same value, of any kind whose `repr` tells it apart."""
        number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
        return self.max(number) == -self.max(-number)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def micro_batches(self, step: int, batch_size: int, micro_batch_size: int) -> list[np.ndarray]:
        """Data positions of this rank's micro-batches in step `step` (0-based): arrays of int64.

        The global batch k is positions [k·B, (k+1)·B) whatever the number of ranks; each takes its own slice.
        """
        share = batch_size // self.data_world
        first = step * batch_size + self.data_rank * share
        end = first + share
        return [np.arange(i, min(i + micro_batch_size, end)) for i in range(first, end, micro_batch_size)]


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str = "auto", timeout_s: float = 600.0) -> Ranks:
    """Join the other ranks (nccl on CUDA, gloo elsewhere) and take a device.

    device: auto, cpu, cuda, cuda:N or mps. timeout_s: a collective that a rank never joins is given up after `LOADING`
    times as long, unless a `Watchdog` has ended the run before.
    """
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = _own_gpu(chosen, rank, world)
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    elif chosen.type == "cpu":
        keep_freed_memory()
        keep_to_quota()
        waiting.of_this_process()

    if world > 1:
        explain_lost_ranks(rank, world)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store = _new_store(timedelta(seconds=2 * timeout_s))
        _check_kind(store, rank, chosen.type)
        if rank == 0 and _would_not_come_back():
            print(
                "torchrun: a machine that is started again cannot join this run; for that, "
                "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine before torchrun",
                flush=True,
            )
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=LOADING * timeout_s),  # during training the watchdog acts sooner
            device_id=chosen if backend == "nccl" else None,
        )
    return Ranks(rank, world, chosen)


def _check_kind(store: dist.Store, rank: int, kind: str) -> None:
    """Refuse a device of another kind than rank 0's: the kinds talk in different ways, and would wait for ever."""
    if rank == 0:
        store.set("device", f"{kind} {socket.gethostname()}")
        return
    kind_of_main, main_host = store.get("device").decode().split()
    if kind != kind_of_main:
        raise UserError(
            f"--device auto: rank {rank} on {socket.gethostname()} would take its {kind}, but rank 0 on {main_host} "
            f"has taken its {kind_of_main}; give --device cpu, or mend the GPUs there (nvidia-smi)"
        )


def _would_not_come_back() -> bool:
    """Whether several machines share torchrun's own store over its restarts: one that comes back waits there for
    entries of the earlier attempt, until all end (pytorch#135712)."""
    given = os.environ
    machines, restarts = int(given.get("GROUP_WORLD_SIZE", 1)), int(given.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return machines > 1 and restarts > 0 and given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _own_gpu(chosen: torch.device, rank: int, world: int) -> torch.device:
    """The GPU of this rank, with its number, which `set_device` needs."""
    if world == 1:
        return torch.device("cuda", chosen.index or 0)
    if chosen.index is not None:
        raise UserError(f"--device {chosen}: is for one process; with torchrun choose GPUs by CUDA_VISIBLE_DEVICES")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} wants GPU {local_rank}, but there are {torch.cuda.device_count()}: lower --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def micro_batch(batch_size: int, most: int | None, world: int) -> int:
    """Sequences per forward pass: what cuts a rank's share into the fewest parts of at most `most` (None: 32).

    The last part may be smaller: a share of 37 is computed as 19 and 18. Raises `UserError` for a batch that does not
    divide evenly among ranks, before anything is built.
    """
    share, rest = divmod(batch_size, world)
    if rest or share < 1:
        raise UserError(f"--batch_size {batch_size} is no multiple of {world} rank(s): choose a multiple of {world}")
    n_parts = math.ceil(share / (MOST_AT_ONCE if most is None else most))
    return math.ceil(share / n_parts)


def _new_store(timeout: timedelta) -> dist.Store:
    """The store through which ranks find each other, without the entries of an earlier attempt.

    torchrun keeps one store over all restarts. It counts restarts on each machine separately, so the count tells
    attempts apart only if there is a single machine.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_machine else 0
    return dist.PrefixStore(f"attempt {attempt}", store)
