"""The decoder, its ops, and what it takes in memory."""

from minillm.model.config import ModelConfig, preset
from minillm.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "preset"]
