"""Text to ids and back; vocabularies trained, merged, pruned and measured."""

from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tokenizer.train import train_tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]
