"""A function on several ranks at once: processes forked from one that has imported torch, joined by gloo."""

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from minillm.distributed.ranks import Ranks
from tests import launch


def on_ranks(world: int, work: Callable, *arguments) -> None:
    """Call work(ranks, *arguments) on each of `world` ranks; work: a function of a module. A failure is raised here."""
    launch.server()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one, args=(world, folder, work, arguments), nprocs=world, start_method="forkserver")


def _one(rank: int, world: int, folder: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        work(Ranks(rank, world, torch.device("cpu")), *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
