"""A function on several ranks: processes forked from one that has imported torch, connected by gloo."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import launch


def on_ranks(world: int, folder: Path, function, *arguments) -> list:
    """What function(rank, *arguments) returns on each of so many ranks. It must be one of a module, for pickling."""
    launch.server()
    folder.mkdir(parents=True, exist_ok=True)
    call = (world, str(folder), function, arguments)
    mp.start_processes(_one, args=call, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _one(rank: int, world: int, folder: str, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = function(rank, *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
