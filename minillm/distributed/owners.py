"""What needs a whole matrix is computed by one rank, its owner, and the others get the result.

Of matrices that are dealt out each is put together by its owner for a moment (`on_owners`):

    round 1    matrix 0 → rank 0    matrix 1 → rank 1    …    matrix R − 1 → rank R − 1
    round 2    matrix R → rank 0    …

In a round every rank sends each owner its part and gets back its part of the result. So of N numbers a rank sends
2 (N/R) (R − 1)/R, holds one whole matrix at a time, and computes on one matrix in R.

Of matrices that every rank has a copy of, all ranks of a machine would compute the same. There each computes for some
of them (`deal`), and all get all results (`results_of_all`): a rank sends N/R numbers, and takes in N (R − 1)/R. It is
the ranks of one machine, as its links are quick; what goes between machines is what it would be without.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import hosts, shards
from minillm.distributed.exchanges import gather, group_with
from minillm.distributed.ranks import Ranks


def on_owners(parameters: list[Tensor], values: list[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """This rank's parts of compute(whole matrix), for each of some sharded matrices that are cut alike.

    parameters: of one shape; they say where the parts lie. values: this rank's part of each matrix, of the shape of
    `local(parameter)`. compute: from a matrix to one of the same shape and dtype. Every rank must call this.
    """
    group = shards.group_of(parameters[0])
    n_ranks, rank = group.size(), group.rank()
    shape = shards.whole_shape(parameters[0])
    places = list(shards.holders(parameters[0]).values())  # of each rank of the group, in its order
    parts = [shape_of(place) for place in places]
    sizes = [part.numel() for part in parts]

    results = []
    for begin in range(0, len(values), n_ranks):
        members = values[begin : begin + n_ranks]
        is_owner = rank < len(members)

        # to the owners: the part of matrix j to rank j
        sent = torch.cat([value.flatten() for value in members])
        n_sent = [sizes[rank] if owner < len(members) else 0 for owner in range(n_ranks)]
        n_received = sizes if is_owner else [0] * n_ranks
        received = sent.new_empty(sum(n_received))
        dist.all_to_all_single(received, sent, n_received, n_sent, group=group)

        # there: the whole matrix, and what becomes of it
        if is_owner:
            whole = received.new_empty(shape)
            for place, numbers, part in zip(places, received.split(sizes), parts, strict=True):
                whole[place] = numbers.view(part)
            whole = compute(whole)
            received = torch.cat([whole[place].flatten() for place in places])

        # and back
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, received, n_sent, n_received, group=group)
        own_parts = returned.split([sizes[rank]] * len(members))
        results += [numbers.view_as(value) for numbers, value in zip(own_parts, members, strict=True)]
    return results


# ---- copies


def share_work(model: nn.Module, ranks: Ranks) -> None:
    """Note at a model's parameters that the ranks of a machine have copies of them, which take the same steps.

    Every rank must call this. Where machines have unequal numbers of ranks, or one each, nothing is noted.
    """
    _, n_here = hosts.place_on_host()
    if not ranks.agree(n_here) or n_here == 1:
        return
    is_all = n_here == ranks.world  # then a group of its own would be one more set of NCCL's buffers
    group = dist.group.WORLD if is_all else group_with(ranks.rank, torch.arange(ranks.world).view(-1, n_here))
    for parameter in model.parameters():
        parameter.group_of_copies = group


def group_of_copies(parameter: Tensor):
    """torch's process group of the ranks with copies of a parameter that share work; None for a rank that is alone."""
    return getattr(parameter, "group_of_copies", None)


@functools.cache  # the same in each step
def deal(costs: tuple[int, ...], n_owners: int) -> list[list[int]]:
    """The numbers of the pieces of work that each rank gets: the dearest first, each to the rank with least so far."""
    owned: list[list[int]] = [[] for _ in range(n_owners)]
    loads = [0] * n_owners
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owner = loads.index(min(loads))
        owned[owner].append(number)
        loads[owner] += costs[number]
    return owned


def results_of_all(own: list[Tensor], shapes: list[list[tuple[int, ...]]], like: Tensor, group) -> list[list[Tensor]]:
    """What each rank of a group has computed, on all of them: by one exchange, in which all send as much as the most.

    own: this rank's results. shapes: of the results of each rank. like: a tensor of the dtype in which they are sent,
    on their device. Every rank of the group must call this.
    """
    sizes = [[math.prod(shape) for shape in of_owner] for of_owner in shapes]
    longest = max(map(sum, sizes))
    sent = like.new_zeros(1, longest)
    if own:
        torch.cat([result.flatten().to(like.dtype) for result in own], out=sent[0, : sum(sizes[group.rank()])])
    received = gather(sent, group).view(len(shapes), longest)
    return [
        [numbers.view(shape) for numbers, shape in zip(row[: sum(each)].split(each), of_owner, strict=True)]
        for row, each, of_owner in zip(received, sizes, shapes, strict=True)
    ]


def shape_of(place: tuple[slice, ...]) -> torch.Size:
    """The shape of a rectangle."""
    return torch.Size(side.stop - side.start for side in place)
