"""minillm: train a language model yourself and understand every line of it."""

__version__ = "0.1.0"
