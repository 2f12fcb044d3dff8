"""How the ranks share the work: which of them compute on the same rows, and which hold one copy of the state together.

    rank = ((replica · shard + s) · context + c) · tensor + t

Neighbouring ranks exchange most: tensor parallelism in every layer and both directions, context parallelism in every
attention, shards once a layer, replicas once a step. torchrun gives neighbouring numbers to the GPUs of one host.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.base.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Into how many parts the ranks divide what; what is left over are replicas. All 1: every rank has a whole copy."""

    shard: int = 1  # ranks with rows of their own that hold one copy of weights, gradients and optimizer together
    context: int = 1  # ranks that share a row by its tokens
    tensor: int = 1  # ranks that share a row by its tokens and, inside a layer, the heads and channels

    @property
    def row_ranks(self) -> int:
        """How many ranks compute on the same rows."""
        return self.context * self.tensor

    @property
    def holders(self) -> int:
        """How many ranks hold one copy of the state together."""
        return self.shard * self.row_ranks


UNDIVIDED = Layout()


class RowPart(NamedTuple):
    """Which tokens of a row one of the ranks has that share it.

    With 2 of `context` the row has 4 chunks, of which rank 0 has the first and the last, rank 1 those between:

        0 1 1 0

    So each has as many pairs of a query and a key before it as any other. Ranks of `tensor` divide what one of those
    has.
    """

    index: int  # of context · tensor ranks
    context: int = 1
    tensor: int = 1

    @property
    def chunks(self) -> tuple[int, int]:
        """The two of 2 · context chunks that this rank's context has."""
        number = self.index // self.tensor
        return number, 2 * self.context - 1 - number

    def padded(self, length: int) -> int:
        """How long rows must be for equal parts."""
        multiple = self.tensor if self.context == 1 else 2 * self.context * self.tensor
        return -(-length // multiple) * multiple

    def of_context(self, values: Tensor, dim: int = 1) -> Tensor:
        """Of whole rows what the ranks of this context have together; dim: that of the tokens."""
        if self.context == 1:
            return values
        chunks = values.chunk(2 * self.context, dim)
        return torch.cat([chunks[number] for number in self.chunks], dim)

    def of(self, values: Tensor) -> Tensor:
        """This rank's tokens of rows (B, T, …), which are padded by zeros to equal parts."""
        missing = self.padded(values.shape[1]) - values.shape[1]
        values = F.pad(values, (0, 0) * (values.dim() - 2) + (0, missing)) if missing else values
        return self.of_context(values).chunk(self.tensor, 1)[self.index % self.tensor]

    def in_order(self, values: Tensor) -> Tensor:
        """Whole rows (B, T, …) of the parts of all ranks, one after the other."""
        if self.context == 1:
            return values
        chunks = values.chunk(2 * self.context, 1)
        return torch.cat((*chunks[::2], *reversed(chunks[1::2])), 1)


def check_layout(layout: Layout, world: int) -> Layout:
    """The layout, if so many ranks can be divided so. Raises `UserError`."""
    asked = f"--shard {layout.shard} × --context_parallel {layout.context} × --tensor_parallel {layout.tensor}"
    if world % layout.holders:
        raise UserError(
            f"{asked} is {layout.holders} ranks to a copy of the model, but there are {world} rank(s): start a "
            f"multiple of {layout.holders} by torchrun, or choose divisors of {world}"
        )
    return layout


def read_shard(text: str) -> int | None:
    """The number of --shard; None for auto. Raises `UserError` for anything else."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--shard {text}: choose auto, or how many ranks hold one copy of the model together, from 1")
    return int(text)


def choose_shard(n_bytes: int, room: int, row_ranks: int, world: int) -> int:
    """The least shards that leave each rank its part of a state of `n_bytes` within `room` bytes.

    One if all of it has room; else the ranks of a host, which its links are made for; else the least that fit.
    row_ranks: ranks that share the rows of each shard. Raises `UserError` if even all ranks together have no room.
    """
    possible = [shard for shard in range(1, world // row_ranks + 1) if (world // row_ranks) % shard == 0]
    on_a_host = int(os.environ.get("LOCAL_WORLD_SIZE", world)) // row_ranks
    fitting = [shard for shard in possible if n_bytes / (shard * row_ranks) <= room]
    if not fitting:
        needed = -(-n_bytes // room)
        raise UserError(
            f"weights, gradients and optimizer are {n_bytes / 1e9:.1f} GB, and {world} rank(s) have {room / 1e9:.1f} "
            f"each: start at least {needed} ranks, choose a smaller model, or train few parameters over a base "
            "(--tune lora --base_bits 4)"
        )
    if fitting[0] > 1 and on_a_host in fitting:
        return on_a_host
    return fitting[0]
