"""Weights, gradients and optimizer dealt out over the ranks: FSDP2, torch's `fully_shard`.

Each layer is a group: its parameters come together just before its forward pass and again before its backward pass, and
are given up after each. Its gradients are added up over the ranks as soon as they are there, of which each rank keeps
its own rows. What lies outside the layers (last norm, head, a tied embedding) is one group more, and an embedding that
is not tied another.

Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277.
"""

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import shards

# Methods of a model besides `forward` and `hidden`. Without gradients each gathers the weights by itself. With
# gradients it is called after `forward` or `hidden`, which leave the weights whole, and must not gather again: FSDP
# would take the gradient of its input for the sign that all gradients of the weights are there, while that of a tied
# embedding is still to come.
WITHOUT_GRADIENT = ("logits", "scores", "through_layers")


def shard(model: nn.Module, layer_mesh, outer_mesh, gather_dtype: torch.dtype | None) -> None:
    """Deal out a model's parameters, in place; gradients become sums over all ranks of a mesh.

    layer_mesh: a DeviceMesh of shards, or of replicas × shards, for the layers; outer_mesh: for all else. gather_dtype:
    in which a layer's weights are sent and computed with (None: as they are); its gradients are added up in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP warns of outputs that are views, since one changed in place would lose its hook; none is
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

    # FSDP would also convert what goes into a layer, the tables of angles among it, which must stay in fp32
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        if gather_dtype is not None:
            layer.forward = _computing_in(gather_dtype, layer_mesh.device_type, layer.forward)
        layer.forward = _with_what_it_leaves(layer.forward)
        fully_shard(layer, mesh=layer_mesh, mp_policy=narrow)
        layer.register_forward_hook(lambda layer, inputs, outputs: outputs[:2])  # after FSDP has seen all of them
    embedding = model.embed_tokens
    if not _shares(embedding, model):
        fully_shard(embedding, mesh=outer_mesh, mp_policy=whole)
    fully_shard(model, mesh=outer_mesh, mp_policy=whole)

    # sums in place of means: the loss is divided by the targets of all ranks already
    for group in groups(model):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    passes = _Passes(model)
    passes.gather_in(model, "hidden", with_gradient=True)
    for name in WITHOUT_GRADIENT:
        passes.gather_in(model, name, with_gradient=False)


def groups(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are dealt out together; none of a model that is not sharded."""
    return (module for module in model.modules() if hasattr(module, "set_requires_all_reduce"))


def _shares(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module's parameters are also those of another: a group of its own for each would be silently wrong."""
    own = {id(parameter) for parameter in module.parameters()}
    inside = {id(part) for part in module.modules()}
    others = (part for part in model.modules() if id(part) not in inside)
    return any(id(parameter) in own for part in others for parameter in part.parameters(recurse=False))


def _computing_in(dtype: torch.dtype, device_type: str, forward: Callable) -> Callable:
    """A layer's `forward` in the dtype of its weights, also where the caller, as generation, does not ask for it."""

    @functools.wraps(forward)
    def computing(*args, **kwargs):
        with torch.autocast(device_type, dtype):
            return forward(*args, **kwargs)

    return computing


def _with_what_it_leaves(forward: Callable) -> Callable:
    """A layer's `forward` that also returns the keys and values that it has left in a cache, with their gradients.

    FSDP gathers weights for a backward pass when the gradient of an output arrives. Of keys and values that leave a
    layer in another way, as those of trained virtual tokens do, it would not know.
    """

    @functools.wraps(forward)
    def showing(x, delta, metadata):
        outputs = forward(x, delta, metadata)
        cache = metadata.cache
        if cache is None or not cache.stores or not torch.is_grad_enabled():
            return outputs
        return *outputs, cache.keys[-1], cache.values[-1]

    return showing


class _Passes:
    """Lets methods of a model that others call gather weights as `forward` does, unless it is `forward` that calls.

    In a pass within a pass FSDP would give the weights up when the inner one ends, while the outer still needs them.
    """

    def __init__(self, model: nn.Module):
        self.under_way = False
        model.forward = self._within(model.forward)

    def gather_in(self, model: nn.Module, name: str, *, with_gradient: bool) -> None:
        """Let a method gather what it needs. with_gradient: whether it may be called by itself for training, too."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        gathering = self._within(getattr(model, name))

        @functools.wraps(plain)
        def method(*args, **kwargs):
            is_inner = self.under_way or (torch.is_grad_enabled() and not with_gradient)
            return (plain if is_inner else gathering)(*args, **kwargs)

        setattr(model, name, method)

    def _within(self, method: Callable) -> Callable:
        """A method during which a pass is under way."""

        @functools.wraps(method)
        def noted(*args, **kwargs):
            self.under_way = True
            try:
                return method(*args, **kwargs)
            finally:
                self.under_way = False

        return noted


# ---- gradients


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """The norm of the whole gradient, (), in fp64.

    parameters: sharded ones, with gradients. Each number counts once, and the squares are added up in fp64, over the
    ranks as well.
    """
    _add_up_over_peers(parameters)
    counted = [shards.local(p.grad) for p in parameters if shards.counts_here(p)]
    counted = [grad for grad in counted if grad.numel()]
    square = torch.zeros((), dtype=torch.float64, device=shards.local(parameters[0]).device)
    if counted:
        norms = torch._foreach_norm(counted, dtype=torch.float64)
        square += torch.stack(norms).square().sum()
    dist.all_reduce(square)
    return square.sqrt()


def _add_up_over_peers(parameters: list[Tensor]) -> None:
    """Complete the gradients of what tensor parallelism leaves whole in a layer: norms, which saw a part of the tokens
    or heads. All are exchanged as one tensor, once a step.
    """
    grads = [shards.local(p.grad) for p in parameters if shards.cut_of(p).parts > 1 and shards.cut_of(p).dim is None]
    peers = next((shards.cut_of(p).peers for p in parameters if shards.cut_of(p).peers is not None), None)
    if peers is None or not grads:
        return
    together = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(together, group=peers)
    for grad, total in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))
