"""Prompts in, new tokens out."""

from minillm.generation.completion import generate, stream
from minillm.generation.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
