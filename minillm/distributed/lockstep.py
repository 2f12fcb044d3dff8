"""Equally many passes on all ranks, where each has texts of its own, which end at different times or teach nothing.

A sharded model gathers its weights from all ranks in every pass, so a rank that made fewer would stop the others.
"""

import torch
import torch.distributed as dist
from torch import nn

from minillm.distributed.shards import is_sharded_model


class Lockstep:
    """Counts a rank in before each of its passes; one that has finished makes empty passes until all have.

    For a model that is not sharded this does nothing.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.is_needed = is_sharded_model(model)
        self.device = model.norm.weight.device

    def before_pass(self) -> None:
        """This rank is about to make a pass of its own."""
        if self.is_needed:
            self._others_go_on(1)

    def end(self) -> None:
        """This rank has made its last pass."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)  # as few as ranks can share a row of
        while self.is_needed and self._others_go_on(0):
            self.model.logits(self.model.hidden(tokens))

    def _others_go_on(self, passes: int) -> bool:
        """Whether any rank makes a pass now; passes: how many this one does."""
        total = torch.tensor(passes, device=self.device)
        dist.all_reduce(total)
        return bool(total)


def most_of_ranks(model: nn.Module, n: int) -> int:
    """How many passes each rank must make of those of which this one has n of its own: of a sharded model, the most
    that any rank has. Every rank must call this.
    """
    if not is_sharded_model(model):
        return n
    most = torch.tensor(n, device=model.norm.weight.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
