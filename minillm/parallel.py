"""Parallelism, applied to a finished single-device model from outside, in one function."""

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed import Ranks


def parallelize(model: nn.Module, ranks: Ranks, compile: bool) -> nn.Module:
    """The module to call in training: compiled if asked, then replicated over the ranks (DDP).

    The weights stay shared with `model`, which is still the one to save and to evaluate.
    """
    trained = torch.compile(model) if compile else model
    if ranks.world > 1:
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        trained = DistributedDataParallel(trained, device_ids=devices, gradient_as_bucket_view=True)
        trained.broadcast_buffers = False  # the rotary tables: alike on every rank, no need to send them each pass
    return trained


def gradients_synced(model: nn.Module, last: bool):
    """Context of one micro-batch: gradients are added up over the ranks only in the last one of a step."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
