"""Parallelism, applied to a finished single-device model from outside.

A copy on every rank: DDP adds up the gradients (`parallelize`). Less than a copy on each: `shard_model`, in place, when
the model is made.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed import fsdp, owners, rows, shards, slices
from minillm.distributed.layout import Layout
from minillm.distributed.ranks import Ranks


def shard_model(model: nn.Module, layout: Layout, ranks: Ranks, *, compile: bool, dtype: torch.dtype) -> None:
    """Leave of a model on each rank what the layout gives it, in place.

    The model may be on the CPU or on the meta device; then it gets memory, but no values, nor its tables of angles.
    dtype: of matrix products; layers are gathered in bfloat16 if that is what they compute in.
    """
    # the tokens of a row, and with tensor parallelism the layers' matrices
    parts = None
    cut = {}
    if layout.row_ranks > 1:
        rows.check_shape(layout, model.config)
        parts = rows.RowParts(layout, ranks.rank, ranks.world)
        rows.share_rows(model, parts)
    if layout.tensor > 1:
        cut = slices.slice_weights(model, parts)

    # the layers' own arithmetic, without what surrounds a call of them
    if compile:
        for layer in model.layers:
            layer.forward = _in_training(layer, compiled(layer.forward), layer.forward)

    # the parameters, dealt out
    layer_mesh, outer_mesh = meshes(layout, ranks)
    fsdp.shard(model, layer_mesh, outer_mesh, torch.bfloat16 if dtype == torch.bfloat16 else None)
    if model.norm.weight.is_meta:
        model.to_empty(device=ranks.device)
    if layout.tensor > 1:  # only now: with the memory come new parameters
        group = outer_mesh.get_group(outer_mesh.ndim - 1)
        for name, parameter in model.layers.named_parameters(prefix="layers"):
            how = cut.get(name), parts.tensor_index, layout.tensor, group, parts.tensor_group
            shards.mark_cut(parameter, shards.Cut(*how))


def meshes(layout: Layout, ranks: Ranks) -> tuple:
    """The ranks over which layers are dealt out, and those for what lies outside the layers; see `layout.py`."""
    from torch.distributed.device_mesh import DeviceMesh

    kind = ranks.device.type
    all_ranks = torch.arange(ranks.world).view(-1, layout.holders)  # (replicas, ranks of one copy)
    names = ("replicate", "shard") if len(all_ranks) > 1 else ("shard",)
    outer = DeviceMesh(kind, all_ranks.squeeze(0), mesh_dim_names=names)
    if layout.tensor == 1:
        return outer, outer

    # a layer's parts differ from one rank of tensor parallelism to the next: each has a mesh of its own
    by_part = all_ranks.view(len(all_ranks), -1, layout.tensor).permute(2, 0, 1)  # (tensor, replicas, the others)
    by_part = by_part if len(all_ranks) > 1 else by_part.squeeze(1)
    return DeviceMesh(kind, by_part, mesh_dim_names=("tensor", *names))[names], outer


def _in_training(layer: nn.Module, compiled_forward: Callable, plain_forward: Callable) -> Callable:
    """A layer's `forward` that is compiled in training alone: validation and generation have other shapes."""

    @functools.wraps(plain_forward)
    def forward(*args, **kwargs):
        return (compiled_forward if layer.training else plain_forward)(*args, **kwargs)

    return forward


def parallelize(model: nn.Module, ranks: Ranks, compile: bool) -> nn.Module:
    """The module to call in training: compiled if asked, then replicated over the ranks (DDP); a sharded one itself.

    The weights stay shared with `model`, which is still the one to save and to evaluate.
    """
    if next(fsdp.groups(model), None) is not None:
        return model
    parallel_model = compiled(model) if compile else model
    if ranks.world == 1:
        return parallel_model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    parallel_model = DistributedDataParallel(Replica(parallel_model), device_ids=devices, gradient_as_bucket_view=True)
    parallel_model.broadcast_buffers = False  # the rotary tables: equal on every rank, so not to be sent in each pass
    parallel_model.register_comm_hook(None, _summed)
    parallel_model().backward()  # settles the order of adding: see `Replica`
    model.zero_grad(set_to_none=True)
    owners.share_work(model, ranks)
    return parallel_model


def _summed(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's exchange of a bucket of gradients: their sum, where DDP by itself would take the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


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
    """Context of one micro-batch: gradients are added up over the replicas only in the last one of a step.

    Over shards they are added up in each, so that no rank ever keeps the gradient of more than its own part.
    """
    for group in fsdp.groups(model):
        group.set_requires_all_reduce(last, recurse=False)
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def marked_last(items: Sequence) -> Iterator[tuple]:
    """Each item, and whether it is the last."""
    for i, item in enumerate(items, 1):
        yield item, i == len(items)
