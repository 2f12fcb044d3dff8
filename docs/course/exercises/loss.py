"""Lesson 5, to be filled in; then `pytest docs/course/checks/loss.py`."""

from torch import Tensor


def smoothed_loss(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss of the targets that count, in nats, and its gradient for the logits, (N, V).

    With label smoothing s a target is not one-hot: it is t = (1 − s) onehot + s / V, and the loss of a row is
    −Σ_v t_v log p_v. By formula: without autograd and without torch's cross_entropy. The logits may be thousands.

    logits: (N, V). targets: (N,) int64. mask: (N,) bool, True where a target counts.
    """
    raise NotImplementedError


# A constant is added to all logits of a row. What happens to its loss? "falls", "stays" or "rises".
LOSS_WITH_CONSTANT = ""

# Two micro-batches have 10 and 1,000 targets. The step takes the mean of their two mean losses. How much does a target
# of the first count, compared with one of the second? "as much", "100 times as much" or "a hundredth".
TARGET_OF_THE_SHORT = ""
