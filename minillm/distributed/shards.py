"""Where the numbers of a sharded tensor lie: which part of the whole each rank holds, and how the whole comes together.

A layer's matrix may be cut twice. Tensor parallelism (`Cut`) gives each of its ranks some rows or some columns. FSDP
then deals the rows of that part out, in chunks of one size of which the last may be smaller or empty (torch.chunk's
rule). So what a rank holds is a rectangle of the whole tensor:

    place_of(parameter)      the rectangle as an index: whole[place_of(parameter)] is local(parameter)

A tensor that is not sharded is its own whole, and every rank holds all of it.
"""

import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Cut(NamedTuple):
    """How tensor parallelism has divided a parameter among its ranks, whose numbers follow one another."""

    dim: int | None  # the dimension that is divided; None: each of these ranks holds all of it
    index: int  # which of the parts is here
    parts: int
    group: object = None  # torch's process group of all ranks that hold the whole together
    peers: object = None  # and of those that tensor parallelism has divided it among


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which each rank holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second, and without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of a sharded one, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def cut_of(parameter: Tensor) -> Cut:
    """How tensor parallelism has divided a parameter; without it: in one part."""
    return getattr(parameter, "cut", Cut(None, 0, 1))


def mark_cut(parameter: Tensor, cut: Cut) -> None:
    """Note at a parameter, as it is after sharding, how tensor parallelism has divided it."""
    parameter.cut = cut


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole tensor, whatever of it lies here."""
    shape = list(parameter.shape)  # of a DTensor: before FSDP has dealt out the rows
    cut = cut_of(parameter)
    if cut.dim is not None:
        shape[cut.dim] *= cut.parts
    return torch.Size(shape)


def rows_of_part(n_rows: int, index: int, parts: int) -> slice:
    """The rows that part `index` gets when n rows are dealt out to so many parts, by torch.chunk's rule."""
    size = -(-n_rows // parts)
    begin = min(index * size, n_rows)
    return slice(begin, min(begin + size, n_rows))


def holders(parameter: Tensor, rank: int | None = None) -> dict[int, tuple[slice, ...]]:
    """rank → its rectangle of the whole tensor: ranks that together hold the whole, each number once.

    If others hold the same numbers (replicas), these are the ones nearest to `rank`, itself among them (None: to this
    rank). Parts may be empty. Without sharding it is the rank alone, with all of the tensor.
    """
    rank = _own_rank() if rank is None else rank
    whole = tuple(slice(0, size) for size in parameter.shape)
    if not is_sharded(parameter):
        return {rank: whole}
    cut = cut_of(parameter)

    # the ranks that FSDP deals the rows of one part out to
    mesh = parameter.device_mesh.mesh  # (shards,) or (replicas, shards): ranks with this rank's index in `cut`
    replicas = mesh.view(-1, mesh.shape[-1]) - cut.index  # the same for index 0
    own_index = rank % cut.parts
    (row,) = [ranks for ranks in replicas.tolist() if rank - own_index in ranks]

    # the rectangle of each, in each of the parts
    found = {}
    indices = [own_index] if cut.dim is None else range(cut.parts)
    for shard, first in enumerate(row):
        rows = rows_of_part(parameter.shape[0], shard, len(row))
        for index in indices:
            place = [rows, *whole[1:]]
            if cut.dim is not None:
                offset = index * parameter.shape[cut.dim]
                place[cut.dim] = slice(place[cut.dim].start + offset, place[cut.dim].stop + offset)
            found[first + index] = tuple(place)
    return found


def group_of(parameter: Tensor):
    """torch's process group of the ranks that `holders` names, in their order."""
    group = cut_of(parameter).group
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1) if group is None else group


def place_of(parameter: Tensor) -> tuple[slice, ...]:
    """The rectangle of the whole tensor that this rank holds."""
    return holders(parameter)[_own_rank()]


def counts_here(parameter: Tensor) -> bool:
    """Whether this rank's part counts in a sum over all ranks to which each number of the whole shall add once."""
    if not is_sharded(parameter):
        return _own_rank() == 0
    *replica, _ = parameter.device_mesh.get_coordinate()
    cut = cut_of(parameter)
    return not any(replica) and (cut.dim is not None or cut.index == 0)


def gather_to(parameter: Tensor, owner: int, values: Tensor | None = None) -> Tensor | None:
    """The whole tensor on rank `owner`, None elsewhere. Every rank must call this, in the same order of parameters.

    values: what is gathered in place of the parameter's own numbers, of the shape of `local(parameter)`, such as a
    moment of its optimizer. Other memory than one whole tensor is not taken, nor is a tensor sent that is not sharded.
    """
    values = local(parameter).detach() if values is None else values
    rank = _own_rank()
    if not is_sharded(parameter):
        return values if rank == owner else None
    places = holders(parameter, owner)
    if rank != owner:
        if rank in places and values.numel():
            _exchange([dist.P2POp(dist.isend, values.contiguous(), owner)])
        return None

    whole = torch.empty(whole_shape(parameter), dtype=values.dtype, device=values.device)
    whole[places[owner]] = values
    parts = {other: torch.empty_like(whole[place]) for other, place in places.items() if other != owner}
    parts = {other: part.contiguous() for other, part in parts.items() if part.numel()}
    _exchange([dist.P2POp(dist.irecv, part, other) for other, part in parts.items()])
    for other, part in parts.items():
        whole[places[other]] = part
    return whole


def full(parameter: Tensor, values: Tensor | None = None) -> Tensor:
    """The whole tensor on every rank; every rank must call this. values: see `gather_to`."""
    values = local(parameter).detach() if values is None else values
    if not is_sharded(parameter):
        return values
    # each number from the rank that holds it nearest to rank 0; the others add nothing
    whole = torch.zeros(whole_shape(parameter), dtype=values.dtype, device=values.device)
    place = holders(parameter, 0).get(_own_rank())
    if place is not None:
        whole[place] = values
    dist.all_reduce(whole)
    return whole


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter its value: of the whole tensor each rank keeps what it holds."""
    here = local(parameter)
    here.copy_(whole[place_of(parameter)] if is_sharded(parameter) else whole)


def settle(model: nn.Module) -> None:
    """Let a sharded model hold its own parts again, after passes without a backward pass.

    Such a pass leaves embedding, head and last norm whole, for the next. To be called before its parameters are listed.
    """
    if is_sharded_model(model):
        model.reshard()


def gather(model: nn.Module) -> None:
    """Make whole, on every rank, what lies outside the layers of a sharded model, until `settle` or a backward pass."""
    if is_sharded_model(model):
        model.unshard()


def without_gradients(model: nn.Module):
    """Context for passes that no backward pass follows.

    A sharded model gathers its weights into tensors that training uses again, which those of inference mode are not.
    """
    return torch.no_grad() if is_sharded_model(model) else torch.inference_mode()


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a model's parameters are dealt out over ranks, so that every rank must take part in every pass."""
    return hasattr(model, "reshard")


def _own_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _exchange(operations: list) -> None:
    """Send and receive, and wait for the end."""
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
