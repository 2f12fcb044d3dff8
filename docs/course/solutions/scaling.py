"""Lesson 15, one way to do it."""

import math


def compute_optimal(n_flops: float, tokens_per_parameter: float = 20.0) -> tuple[float, float]:
    """See the exercise."""
    n_parameters = math.sqrt(n_flops / (6 * tokens_per_parameter))  # C = 6 N (20 N)
    return n_parameters, tokens_per_parameter * n_parameters


def fewest_gpus(n_parameters: float, gpu_bytes: float, bytes_of_activations: float) -> int:
    """See the exercise."""
    return math.ceil(16 * n_parameters / (gpu_bytes - bytes_of_activations))


OF_6_N = "same"
OF_ATTENTION = "twice"  # each token looks at twice as many
