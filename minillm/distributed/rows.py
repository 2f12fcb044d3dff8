"""Rows that several ranks share: tensor and context parallelism, applied to a model from outside.

    context c of 2                    tensor t of 2, of the first half
    tokens 0 … T/2 − 1                tokens 0 … T/4 − 1
                                      tokens T/4 … T/2 − 1
    tokens T/2 … T − 1

Outside attention and feed-forward network a rank has T/(context · tensor) tokens of each row: embedding, norms, the
residual stream and the loss see those alone. Around both, tensor parallelism gathers the T/context tokens; inside, each
of its ranks has some of the heads or channels; after them the sums over all channels are scattered by tokens again
(Korthikanti et al. 2022, "Reducing activation recomputation", arXiv:2205.05198, section 4.2.2). Context parallelism
gathers keys and values of the whole row, for queries of the rank's own tokens (Llama 3, arXiv:2407.21783, section 3.3).
So every operation on numbers is on plain tensors, the same as on one rank.

A pass over a cache is not divided: each rank has all tokens, and tensor parallelism adds up what its ranks computed.
"""

import dataclasses
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.distributed.layout import Layout

BY_ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")


class RowParts:
    """Which part of a row this rank has, and the groups of ranks that have the others."""

    def __init__(self, layout: Layout, rank: int, world: int):
        """Every rank must create one, with the same layout: it makes groups of ranks."""
        self.layout = layout
        self.tensor_index = rank % layout.tensor
        self.context_index = rank // layout.tensor % layout.context
        ranks = torch.arange(world).view(-1, layout.context, layout.tensor)
        self.tensor_group = _group_with(rank, ranks.flatten(0, 1))
        self.context_group = _group_with(rank, ranks.mT.flatten(0, 1))
        self.are_divided = True  # rows in the pass under way; over a cache they are not


def _group_with(rank: int, groups: Tensor):
    """torch's group of the ranks in a row of `groups` (n, size) that has `rank`; None if it is alone there."""
    if groups.shape[1] == 1:
        return None
    made = {tuple(ranks): dist.new_group(ranks) for ranks in groups.tolist()}
    return next(group for ranks, group in made.items() if rank in ranks)


# ---- the model


def check_shape(layout: Layout, config) -> None:
    """Raise `UserError` for a `ModelConfig` that so many ranks cannot divide."""
    if layout.row_ranks > 1 and config.positions == "learned":
        raise UserError(
            "--positions learned: is not supported with --tensor_parallel or --context_parallel; choose rope"
        )
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        if getattr(config, name) % layout.tensor:
            raise UserError(
                f"--tensor_parallel {layout.tensor}: does not divide the model's {name} {getattr(config, name)}: "
                "choose a divisor of it"
            )


def share_rows(model: nn.Module, parts: RowParts) -> None:
    """Let a model read a part of each row, in place; `Batch.part` gives it that. Weights are not sliced yet."""
    model.placement = MethodType(_placement_of(model.placement, parts), model)
    for layer in model.layers:
        if parts.context_group is not None:
            layer.self_attn.attend = _attend_of(layer.self_attn.attend, parts)
        if parts.tensor_group is not None:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_pre_hook(lambda module, args: _gathered(parts, *args))
                part.register_forward_hook(lambda module, args, output: _summed(parts, output))


def _placement_of(plain, parts: RowParts):
    """The places of a rank's tokens: those of the whole row, and of the angles the ones of its context."""

    def placement(model, length: int, documents: Tensor | None, cache, dtype: torch.dtype):
        parts.are_divided = cache is None
        if not parts.are_divided:
            return plain(length, documents, cache, dtype)
        whole = plain(length * parts.layout.row_ranks, documents, cache, dtype)
        n_tokens = length * parts.layout.tensor  # of a context
        begin = parts.context_index * n_tokens
        rotation = tuple(angles[..., begin : begin + n_tokens, :] for angles in whole.rotation)  # (…, T/context, D/2)
        return whole._replace(rotation=rotation)

    return placement


def _attend_of(plain, parts: RowParts):
    """Attention of a rank's queries over the keys of the row up to its last token."""

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, ends: Tensor | None) -> Tensor:
        if not parts.are_divided:
            return plain(q, k, v, spans, ends)
        end = (parts.context_index + 1) * q.shape[1]
        together = _Gather.apply(torch.cat((k, v), -1), parts.context_group)  # (B, T, K, 2 D)
        k, v = together[:, :end].chunk(2, -1)
        if spans is not None:
            spans = spans[:, :end].clamp(max=end)
        return plain(q, k.contiguous(), v.contiguous(), spans, ends)

    return attend


def _gathered(parts: RowParts, x: Tensor, *others) -> tuple:
    """The inputs of attention or feed-forward network, x (B, T/(context · tensor), C) as (B, T/context, C)."""
    return (_Gather.apply(x, parts.tensor_group) if parts.are_divided else x, *others)


def _summed(parts: RowParts, output: Tensor) -> Tensor:
    """Their output (B, T/context, C), added up over the ranks, of which each keeps its tokens."""
    if parts.are_divided:
        return _ScatterSum.apply(output, parts.tensor_group)
    dist.all_reduce(output, group=parts.tensor_group)
    return output


def slice_weights(model: nn.Module, parts: RowParts) -> dict[str, int]:
    """Keep of each layer's matrices the rows or columns of this rank's heads and channels; name → the dimension cut."""
    n_parts = parts.layout.tensor
    cut = {}
    for number, layer in enumerate(model.layers):
        for paths, dim in ((BY_ROWS, 0), (BY_COLUMNS, 1)):
            for path in paths:
                linear = layer.get_submodule(path)
                for name, parameter in list(linear.named_parameters(recurse=False)):
                    part = parameter.detach().chunk(n_parts, dim)[parts.tensor_index].clone()
                    setattr(linear, name, nn.Parameter(part, parameter.requires_grad))
                    cut[f"layers.{number}.{path}.{name}"] = dim
        config = layer.self_attn.config
        heads = dict(n_heads=config.n_heads // n_parts, n_kv_heads=config.n_kv_heads // n_parts)
        layer.self_attn.config = dataclasses.replace(config, **heads)
    model.cache_config = model.layers[0].self_attn.config
    return cut


# ---- exchanges that have a gradient


# torch 2.14 has renamed both
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(x: Tensor, group) -> Tensor:
    """The tokens of all ranks of a group: (B, T, …) → (B, n T, …)."""
    by_token = x.transpose(0, 1).contiguous()  # (T, B, …)
    gathered = by_token.new_empty(group.size() * len(by_token), *by_token.shape[1:])
    _gather_into(gathered, by_token, group=group)
    return gathered.transpose(0, 1).contiguous()


def _reduce_scatter(x: Tensor, group) -> Tensor:
    """The sum over the ranks of a group, of which each keeps its tokens: (B, n T, …) → (B, T, …)."""
    by_token = x.transpose(0, 1).contiguous()  # (n T, B, …)
    kept = by_token.new_empty(len(by_token) // group.size(), *by_token.shape[1:])
    _scatter_into(kept, by_token, group=group)
    return kept.transpose(0, 1).contiguous()


class _Gather(torch.autograd.Function):
    """`_all_gather`; each rank's gradient is the sum of what all have for its tokens."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _reduce_scatter(gradient, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    """`_reduce_scatter`, whose gradient is gathered."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _all_gather(gradient, ctx.group), None
