"""Lesson 15, to be filled in; then `pytest docs/course/checks/scaling.py`."""


def compute_optimal(n_flops: float, tokens_per_parameter: float = 20.0) -> tuple[float, float]:
    """Parameters N and tokens D of the model that a budget is best spent on, by C = 6 N D and D = 20 N.

    n_flops: C, the operations that can be paid for.
    """
    raise NotImplementedError


def fewest_gpus(n_parameters: float, gpu_bytes: float, bytes_of_activations: float) -> int:
    """How many GPUs must share weights, gradients and AdamW's moments, 16 bytes a parameter, so that all fit.

    gpu_bytes: memory of a GPU. bytes_of_activations: what each GPU needs besides, which sharing does not make less.
    """
    raise NotImplementedError


# A row has twice as many tokens, the step the same number. What becomes of the operations a token of `tiny` that 6 N
# counts, and of those of attention? "same" or "twice".
OF_6_N = ""
OF_ATTENTION = ""
