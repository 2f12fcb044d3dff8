"""How large a model is, counted on its modules: what a reader adds to them is counted without another line."""

import dataclasses
import functools

import torch
from torch import nn

from minillm.base.errors import UserError
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

MOST_LAYERS = 2048  # building them, to be counted, takes seconds; the deepest models have a thousand


def empty_model(config: ModelConfig) -> Transformer:
    """The model without memory for its weights (torch's meta device). Raises `UserError` for impossible shapes."""
    if config.n_layers > MOST_LAYERS:
        raise UserError(f"model: n_layers is {config.n_layers:,}: choose at most {MOST_LAYERS:,}")
    try:
        with torch.device("meta"):
            return Transformer(config)
    except RuntimeError:
        raise UserError(f"model: {config}: larger than any memory") from None


@functools.lru_cache(maxsize=64)
def _counts(config: ModelConfig) -> tuple[int, int]:
    """Number of parameters, and how many of them multiply: all but embeddings that are only looked up."""
    model = empty_model(config)
    n_all = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    factors = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    n_lookup = sum(weight.numel() for weight in embeddings - factors)
    return n_all, n_all - n_lookup


def n_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters of a whole model (a tied embedding counts once)."""
    return _counts(config)[0]


@functools.lru_cache(maxsize=64)
def linear_shapes(shape: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear maps of a layer by name, as the modules themselves have them."""
    (layer,) = empty_model(dataclasses.replace(shape, n_layers=1)).layers
    linears = {name: module for name, module in layer.named_modules() if hasattr(module, "in_features")}
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def layer_parameters(shape: ModelConfig) -> int:
    """Number of trainable parameters of one layer."""
    one, two = (n_parameters(dataclasses.replace(shape, n_layers=n)) for n in (1, 2))
    return two - one


def flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Floating-point operations of forward and backward for one trained token.

    6 N + 12 L H D T, where N counts every parameter that multiplies (not the input embedding, which is looked up) and
    attention is counted in full, without the causal mask's half, as in PaLM's appendix B (Chowdhery et al. 2022,
    arXiv:2204.02311). `seq_len` is T in tokens; where attention stays inside documents, their mean (`mean_span`). A
    sliding window is the most that counts of it.
    """
    _, n_multiplying = _counts(config)
    n_keys = min(seq_len, config.window or seq_len)  # that a token's query is multiplied by
    attention = 12 * config.n_layers * config.n_heads * config.head_dim * n_keys
    return 6 * n_multiplying + attention
