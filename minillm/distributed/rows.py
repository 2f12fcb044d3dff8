"""Rows that several ranks share: tensor and context parallelism, applied to a model from outside.

    context c of 2                                tensor t of 2, of the first context
    tokens 0 … T/4 − 1 and 3T/4 … T − 1           tokens 0 … T/4 − 1
                                                  tokens 3T/4 … T − 1
    tokens T/4 … 3T/4 − 1

Outside attention and feed-forward network a rank has T/(context · tensor) tokens of each row: embedding, norms, the
residual stream and the loss see those alone. Around both, tensor parallelism gathers the T/context tokens; inside, each
of its ranks has some of the heads or channels (`slices.py`); after them the sums over all channels are scattered by
tokens again (Korthikanti et al. 2022, "Reducing activation recomputation", arXiv:2205.05198, section 4.2.2). Context
parallelism gathers keys and values of the whole row, for queries of the rank's own tokens (Llama 3, arXiv:2407.21783,
section 3.3). An early and a late chunk of the row together see as many keys as any other two (`RowPart`). So every
operation on numbers is on plain tensors, the same as on one rank.

A pass that stores keys and values is not divided: each rank has all tokens, and tensor parallelism adds up what its
ranks computed. Virtual tokens, whose keys and values are there before, stand before the first part of a row.

Some losses need whole rows, such as DPO's. They depend on one number a token, log π or a score. All ranks of a row
collect these numbers (log π by `whole_rows`, scores in the model itself), and each computes the loss of the whole row.
So a sum over all ranks counts every row once for each of its ranks, in the loss and in the number of targets alike:
their quotient is right, and so is its gradient.
"""

from collections.abc import Callable
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.distributed.exchanges import gather, group_with, scatter_sum, sum_on_all
from minillm.distributed.layout import Layout, RowPart


class RowParts:
    """Which part of a row this rank has, and the groups of ranks that have the others."""

    def __init__(self, layout: Layout, rank: int, world: int):
        """Every rank must create one, with the same layout: it makes groups of ranks."""
        self.layout = layout
        self.tensor_index = rank % layout.tensor
        ranks = torch.arange(world).view(-1, layout.context, layout.tensor)
        self.tensor_group = group_with(rank, ranks.flatten(0, 1))
        self.context_group = group_with(rank, ranks.mT.flatten(0, 1))
        self.row_group = group_with(rank, ranks.flatten(1))
        self.first_rank = rank - rank % layout.row_ranks  # of the row
        self.row_part = RowPart(rank % layout.row_ranks, layout.context, layout.tensor)
        self.are_divided = True  # rows in the pass under way


def sublayers(layer: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Attention and feed-forward network of a layer, each with its path, also where an adapter stands around it."""
    found = {}
    for name in ("self_attn", "mlp"):
        module, path = getattr(layer, name), name
        if hasattr(module, "base_layer"):
            module, path = module.base_layer, f"{name}.base_layer"
        found[name] = path, module
    return found


# ---- the model


def check_shape(layout: Layout, config) -> None:
    """Raise `UserError` for a `ModelConfig` that so many ranks cannot divide."""
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        if getattr(config, name) % layout.tensor:
            raise UserError(
                f"--tensor_parallel {layout.tensor}: does not divide the model's {name} {getattr(config, name)}: "
                "choose a divisor of it"
            )


def share_rows(model: nn.Module, parts: RowParts) -> None:
    """Let a model read a part of each row, in place; `Batch.part` gives it that. Weights are not sliced yet.

    One with a score head is given whole rows, and gives the scores of whole rows.
    """
    model.row_parts = parts
    model.attention_metadata = MethodType(_metadata_of(model.attention_metadata, parts), model)
    if model.config.score_head:
        model.forward = _scores_of_whole_rows(model.forward, parts)
    for layer in model.layers:
        modules = {name: module for name, (_, module) in sublayers(layer).items()}
        if parts.context_group is not None:
            modules["self_attn"].attend = _attend_of(modules["self_attn"].attend, parts)
        if parts.tensor_group is not None:
            for module in modules.values():
                module.register_forward_pre_hook(lambda module, args: _gathered(parts, *args))
                module.register_forward_hook(lambda module, args, output: _summed(parts, output))


def _metadata_of(plain: Callable, parts: RowParts) -> Callable:
    """`Transformer.attention_metadata` for a rank's part of each row.

    It is that of the whole row, with the angles of the rank's context. Learned positions, which are added before the
    layers, are those of the rank's own tokens.
    """

    def attention_metadata(model, length: int, documents: Tensor | None, cache, dtype: torch.dtype):
        parts.are_divided = cache is None or not cache.stores
        if not parts.are_divided:
            return plain(length, documents, cache, dtype)
        part, n_tokens = parts.row_part, length * parts.layout.row_ranks
        whole = plain(n_tokens, documents, cache, dtype)
        if whole.positions is not None:
            positions = whole.positions  # (B, T), or a slice
            if isinstance(positions, slice):
                positions = torch.arange(positions.stop, device=model.norm.weight.device)[None, positions]
            return whole._replace(positions=part.of(positions))
        rotation = tuple(part.of_context(angles, -2) for angles in whole.rotation)  # (…, T/context, D/2)
        return whole._replace(rotation=rotation)

    return attention_metadata


def _attend_of(plain: Callable, parts: RowParts) -> Callable:
    """Attention of a rank's queries, in two chunks, each over the keys of the row up to its end."""

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, ends: Tensor | None) -> Tensor:
        if not parts.are_divided:
            return plain(q, k, v, spans, ends)

        # those of the row's tokens: virtual ones before them are here already
        n_virtual = k.shape[1] - q.shape[1]
        together = torch.cat((k, v), -1)  # (B, n + T/context, K, 2 D)
        before, own = together.split((n_virtual, q.shape[1]), 1)
        row = parts.row_part.in_order(gather(own, parts.context_group))  # (B, T, K, 2 D)

        outputs = []
        for number, queries in zip(parts.row_part.chunks, q.chunk(2, 1), strict=True):
            end = (number + 1) * queries.shape[1]
            k, v = torch.cat((before, row[:, :end]), 1).chunk(2, -1)
            seen = None if spans is None else _up_to(end, queries.shape[1], spans)
            outputs.append(plain(queries.contiguous(), k.contiguous(), v.contiguous(), seen, ends))
        return torch.cat(outputs, 1)  # (B, T/context, H, D)

    return attend


def _up_to(end: int, n_queries: int, spans: Tensor) -> Tensor:
    """What the last n_queries of a row's first `end` tokens see of these; spans: of the row's documents, or a mask."""
    if spans.dim() == 4:  # (B, 1, T, T)
        return spans[:, :, end - n_queries : end, :end]
    return spans[:, :end].clamp(max=end)  # (B, end, 2)


def _gathered(parts: RowParts, x: Tensor, *others) -> tuple:
    """The inputs of attention or feed-forward network, x (B, T/(context · tensor), C) as (B, T/context, C)."""
    return (gather(x, parts.tensor_group) if parts.are_divided else x, *others)


def _summed(parts: RowParts, output: Tensor) -> Tensor:
    """Their output (B, T/context, C), added up over the ranks, of which each keeps its tokens."""
    exchange = scatter_sum if parts.are_divided else sum_on_all
    return exchange(output, parts.tensor_group)


def _scores_of_whole_rows(plain: Callable, parts: RowParts) -> Callable:
    """tokens (B, T) → scores (B, T), of which each rank has computed its own part."""

    def forward(tokens: Tensor, targets: Tensor | None = None, *, documents: Tensor | None = None, cache=None, **more):
        if cache is not None and cache.stores:
            return plain(tokens, targets, documents=documents, cache=cache, **more)
        scores = plain(parts.row_part.of(tokens), targets, documents=documents, cache=cache, **more)  # (B, T/ranks)
        return parts.row_part.in_order(gather(scores, parts.row_group))[:, : tokens.shape[1]]

    return forward


# ---- for those who need whole rows


def parts_of(model: nn.Module) -> RowParts | None:
    """How a model's rows are shared; None: each rank has its own."""
    return getattr(model, "row_parts", None)


def own_part(model: nn.Module, batch):
    """This rank's tokens of a `Batch` of whole rows."""
    parts = parts_of(model)
    return batch if parts is None else batch.part(parts.row_part)


@torch.no_grad()
def whole_rows(model: nn.Module, values: Tensor, length: int) -> Tensor:
    """Values (B, T) of whole rows of `length` tokens, from those of each rank's tokens; without a gradient."""
    parts = parts_of(model)
    return values if parts is None else parts.row_part.in_order(gather(values, parts.row_group))[:, :length]


def own_gradient(model: nn.Module, gradient: Tensor) -> Tensor:
    """For this rank's tokens, the gradient of all ranks' losses; each has that of its own loss, for whole rows (B, T).

    The ranks of a row have the same loss, so it counts as often as there are of them.
    """
    parts = parts_of(model)
    return gradient if parts is None else parts.row_part.of(gradient) * parts.layout.row_ranks


@torch.no_grad()
def from_first(model: nn.Module, values: Tensor) -> Tensor:
    """What the first rank of a row has, on each of them: so that all go on alike where rounding or chance decides."""
    parts = parts_of(model)
    if parts is not None:
        dist.broadcast(values, parts.first_rank, group=parts.row_group)
    return values


def own_heads(model: nn.Module, states: Tensor) -> Tensor:
    """Keys or values (…, K, D) of the heads that tensor parallelism has left to this rank."""
    parts = parts_of(model)
    return states if parts is None else states.chunk(parts.layout.tensor, -2)[parts.tensor_index]
