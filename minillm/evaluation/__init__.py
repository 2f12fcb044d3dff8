"""How good a model is: its loss beside the floor, its answers beside the right ones."""

from minillm.evaluation.answers import exact_match
from minillm.evaluation.validation import Validation

__all__ = ["Validation", "exact_match"]
