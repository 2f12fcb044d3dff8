"""Parallelism, applied to a finished single-device model from outside, in one function."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed.ranks import Ranks


def parallelize(model: nn.Module, ranks: Ranks, compile: bool) -> nn.Module:
    """The module to call in training: compiled if asked, then replicated over the ranks (DDP).

    The weights stay shared with `model`, which is still the one to save and to evaluate.
    """
    parallel_model = compiled(model) if compile else model
    if ranks.world == 1:
        return parallel_model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    parallel_model = DistributedDataParallel(Replica(parallel_model), device_ids=devices, gradient_as_bucket_view=True)
    parallel_model.broadcast_buffers = False  # the rotary tables: equal on every rank, so not to be sent in each pass
    parallel_model().backward()  # settles the order of adding: see `Replica`
    model.zero_grad(set_to_none=True)
    return parallel_model


class Replica(nn.Module):
    """The model as DDP wraps it; called without inputs, it returns the sum of all trained parameters.

    After its first backward pass DDP reassigns gradients to buckets in the order in which they became ready, and the
    place in a bucket decides in which order three or more ranks add a gradient up. A backward pass through that sum,
    before training, costs one all-reduce and gives all steps the same buckets, so that a resumed run is bit-identical.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs, **options) -> torch.Tensor:
        """The model's output."""
        if inputs:
            return self.model(*inputs, **options)
        return sum(p.sum() for p in self.model.parameters() if p.requires_grad)


def compiled(model: nn.Module | Callable) -> nn.Module | Callable:
    """torch.compile(model), or of one of its methods, whose first call compiles.

    torch 2.11 formats a debug message for each custom op with everything its inputs were computed from, recursively:
    the time doubles with every layer. So the message is shortened; later versions format it only when it is read.
    """
    if torch.__version__.startswith("2.11."):
        from torch._inductor.exc import OperatorIssue

        OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: str(target))
    return torch.compile(model)


def gradients_synced(model: nn.Module, last: bool):
    """Context of one micro-batch: gradients are added up over the ranks only in the last one of a step."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def marked_last(items: Sequence) -> Iterator[tuple]:
    """Each item, and whether it is the last."""
    for i, item in enumerate(items, 1):
        yield item, i == len(items)
