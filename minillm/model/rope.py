"""Rotary positions: tables of cos and sin, and how they are stretched to longer texts."""

import math

import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.model.config import ModelConfig

POSITIONS_AT_ONCE = 1 << 16


def rotary_tables(config: ModelConfig, device) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, fp32 (max_seq_len, D/2), with the config's scaling applied."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-half  # radians a token, (D/2,)
    scaling = config.rope_scaling
    magnitude = 1.0  # of cos and sin
    if scaling is not None and scaling.type == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.type == "llama3":
        # turns in the original context: few → stretched, many → kept, in between → blended
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequency = frequency * (blend + (1 - blend) / scaling.factor)
    elif scaling is not None:
        frequency = frequency * _yarn_blend(config)
        magnitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    cos = torch.empty(config.max_seq_len, len(frequency))  # (T_max, D/2)
    sin = torch.empty_like(cos)
    for begin in range(0, config.max_seq_len, POSITIONS_AT_ONCE):  # fp64 takes twice the memory of the tables
        piece = slice(begin, begin + POSITIONS_AT_ONCE)
        positions = torch.arange(begin, begin + len(cos[piece]), dtype=torch.float64)  # (T',)
        angle = positions[:, None] * frequency  # (T', D/2), radians
        cos[piece] = angle.cos() * magnitude
        sin[piece] = angle.sin() * magnitude
    if not frequency.is_meta and not (frequency * magnitude).isfinite().all():
        raise UserError(f"the rotary frequencies of {scaling or config.rope_theta} are not finite; check its values")
    return cos.to(device), sin.to(device)


def _yarn_blend(config: ModelConfig) -> Tensor:
    """YaRN's "NTK-by-parts" factor for each frequency, (D/2,) fp64 (arXiv:2309.00071, section 3.2)."""
    scaling = config.rope_scaling

    def dimension_of(turns: float) -> float:
        """The pair of dimensions that turns this often in the original context."""
        wavelength = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    # pairs before `low` keep their frequency, those after `high` are stretched, in between the two are blended
    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.head_dim - 1)
    pair = torch.arange(config.head_dim // 2, dtype=torch.float64)  # (D/2,)
    if high < low:  # programs differ in which pairs are then stretched
        raise UserError(f"{scaling}: every pair of dimensions turns less than beta_slow; check its values")
    stretched = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)  # (D/2,), 0 to 1
    return stretched / scaling.factor + (1 - stretched)
