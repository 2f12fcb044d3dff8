"""What needs a whole matrix, of matrices that are dealt out: each is put together by one rank, its owner, for a moment.

    round 1    matrix 0 → rank 0    matrix 1 → rank 1    …    matrix R − 1 → rank R − 1
    round 2    matrix R → rank 0    …

In a round every rank sends each owner its part and gets back its part of the result. So of N numbers a rank sends
2 (N/R) (R − 1)/R, holds one whole matrix at a time, and computes on one matrix in R.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed import shards


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


def shape_of(place: tuple[slice, ...]) -> torch.Size:
    """The shape of a rectangle."""
    return torch.Size(side.stop - side.start for side in place)
