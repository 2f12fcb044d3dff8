"""Exchanges between ranks that have a gradient, and the groups of ranks among which they take place.

The loss is the sum of what all ranks compute. So the gradient of a number that several ranks have got is the sum of
what each of them has for it: each exchange's backward pass is the exchange the other way round.

torch.compile leaves them as they are: what lies between two of them is compiled.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 has renamed both
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_with(rank: int, groups: Tensor):
    """torch's group of the ranks in a row of `groups` (n, size) that has `rank`; None if it is alone there.

    Every rank must call this, with the same groups.
    """
    if groups.shape[1] == 1:
        return None
    made = {tuple(ranks): _group(tuple(ranks)) for ranks in groups.tolist()}
    return next(group for ranks, group in made.items() if rank in ranks)


@functools.cache  # several models of a run share them
def _group(ranks: tuple[int, ...]):
    return dist.new_group(list(ranks))


@torch.compiler.disable
def gather(x: Tensor, group) -> Tensor:
    """The tokens of all ranks of a group, in their order: (B, T, …) → (B, n T, …)."""
    return _Gather.apply(x, group)


@torch.compiler.disable
def scatter_sum(x: Tensor, group) -> Tensor:
    """The sum over the ranks of a group, of which each keeps its tokens: (B, n T, …) → (B, T, …)."""
    return _ScatterSum.apply(x, group)


@torch.compiler.disable
def sum_on_all(x: Tensor, group) -> Tensor:
    """The sum over the ranks of a group, on each of them."""
    return _SumOnAll.apply(x, group)


def _all_gather(x: Tensor, group) -> Tensor:
    by_token = x.transpose(0, 1).contiguous()  # (T, B, …)
    gathered = by_token.new_empty(group.size() * len(by_token), *by_token.shape[1:])
    _gather_into(gathered, by_token, group=group)
    return gathered.transpose(0, 1).contiguous()


def _reduce_scatter(x: Tensor, group) -> Tensor:
    by_token = x.transpose(0, 1).contiguous()  # (n T, B, …)
    kept = by_token.new_empty(len(by_token) // group.size(), *by_token.shape[1:])
    _scatter_into(kept, by_token, group=group)
    return kept.transpose(0, 1).contiguous()


def _all_reduce(x: Tensor, group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _reduce_scatter(gradient, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _all_gather(gradient, ctx.group), None


class _SumOnAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _all_reduce(gradient, ctx.group), None
