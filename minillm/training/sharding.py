"""How a run's model is shared out over the ranks: the layout that its options ask for, and the model made so."""

import dataclasses
import os
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.device import pick_dtype
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.distributed import rows, shards
from minillm.distributed.layout import Layout, RowPart, check_layout, choose_shard, read_shard
from minillm.distributed.parallelize import shard_model
from minillm.distributed.ranks import Ranks, world_size
from minillm.model import memory
from minillm.model.config import ModelConfig
from minillm.model.quant import BLOCK
from minillm.model.size import empty_model, n_parameters
from minillm.model.transformer import Transformer

STATE_SHARE = 0.7  # of a GPU's memory, for weights, gradients and optimizer; the rest is for activations


def asked_layout(training_config) -> Layout:
    """The layout of a run's options, where --shard auto counts as 1. Raises `UserError` for a --shard that is none."""
    shard = read_shard(training_config.shard) or 1
    return Layout(shard, training_config.context_parallel, training_config.tensor_parallel)


def row_ranks(training_config) -> int:
    """How many ranks share a row. Raises `UserError` if the ranks that torchrun has started cannot be divided so."""
    return check_layout(asked_layout(training_config), world_size()).row_ranks


def choose_layout(training_config, model_config: ModelConfig, ranks: Ranks):
    """The options with --shard as a number, once it is clear that the ranks can be divided so and have room.

    Raises `UserError` if not, or for a combination that is not supported.
    """
    layout = asked_layout(training_config)
    check_layout(layout, ranks.world)
    if training_config.shard == "auto" and ranks.world > layout.row_ranks:
        shard = _shard_with_room(training_config, model_config, ranks)
        layout = dataclasses.replace(layout, shard=shard)
    rows.check_shape(layout, model_config)
    _check_blocks(training_config, model_config, layout)
    _check_rows_fit(training_config, model_config, layout)
    memory.check_memory(training_config, model_config, ranks.device, layout.holders)
    return dataclasses.replace(training_config, shard=str(layout.shard))


def _check_blocks(training_config, model_config: ModelConfig, layout: Layout) -> None:
    """Raise `UserError` for a base in 4 bits whose blocks of columns ranks would have to cut."""
    if training_config.base_bits != 4:
        return
    for side in ("n_heads × head_dim", "ffn_dim"):
        width = model_config.ffn_dim if side == "ffn_dim" else model_config.n_heads * model_config.head_dim
        if layout.tensor > 1 and width // layout.tensor % BLOCK:
            raise UserError(
                f"--base_bits 4: with --tensor_parallel {layout.tensor} a rank has {width // layout.tensor} of the "
                f"model's {side} {width} columns, no multiple of the {BLOCK} that share a scale; choose --base_bits 8, "
                "or divide the model by --shard"
            )


def _check_rows_fit(training_config, model_config: ModelConfig, layout: Layout) -> None:
    """Raise `UserError` if rows, padded so that their ranks get equal parts, are longer than the model's context."""
    before = training_config.virtual_positions
    part = RowPart(0, layout.context, layout.tensor)
    padded = before + part.padded(training_config.seq_len - before)
    if layout.row_ranks > 1 and padded > model_config.max_seq_len:
        raise UserError(
            f"--seq_len {training_config.seq_len}: {layout.row_ranks} ranks share a row, padded to {padded} tokens, "
            f"but the model's context is {model_config.max_seq_len}; choose a multiple of {part.padded(1)}"
        )


def _shard_with_room(training_config, model_config: ModelConfig, ranks: Ranks) -> int:
    """What --shard auto is: the same on all ranks, whose machines may have unequal memory or numbers of ranks."""
    if training_config.base_bits is not None:  # a quantized base stays whole on every rank
        return 1
    n_trained, n_read = training_config.n_models
    n_bytes = (n_trained + n_read) * sum(memory.weights(model_config).values())
    if training_config.tune == "full":
        n_bytes += n_trained * sum(memory.optimizer_state(n_parameters(model_config)).values())
    if ranks.device.type == "cuda":
        room = STATE_SHARE * torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        room = files.memory_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    least = -ranks.max(-int(min(room, 1 << 60)))
    return ranks.max(choose_shard(n_bytes, least, ranks.row_ranks, ranks.world))


def is_divided(training_config) -> bool:
    """Whether several ranks hold one copy of a run's models together."""
    return asked_layout(training_config).holders > 1


def loading_device(training_config, ranks: Ranks) -> torch.device:
    """Where a model that `shard` is given is read to: what is dealt out need not be on the GPU as a whole before."""
    return torch.device("cpu") if is_divided(training_config) else ranks.device


def shard(training_config, model: Transformer, ranks: Ranks) -> None:
    """Leave of a model on each rank what the run's layout gives it, in place; nothing happens if that is all of it."""
    layout = asked_layout(training_config)
    if is_divided(training_config):
        dtype = pick_dtype(training_config.dtype, ranks.device)
        shard_model(model, layout, ranks, compile=training_config.compile, dtype=dtype)


def made_in_shards(training_config, model_config: ModelConfig, folder: Path | None, ranks: Ranks) -> Transformer:
    """The model of a folder, or a new one (None) drawn by the seed, that is never whole in the memory of a rank.

    Its weights have the values that they have on one rank.
    """
    model = empty_model(model_config)
    shard(training_config, model, ranks)
    model.build_rotation()
    if folder is None:
        for name, value in empty_model(model_config).first_values(training_config.seed):
            shards.fill(model.get_parameter(name), value)
    else:
        huggingface.fill_model(model, folder)
    return model
