"""Lesson 12, one way to do it."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """See the exercise."""
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def push(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """See the exercise."""
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    return beta * (-beta * delta).sigmoid()  # d/dz −log σ(z) = −σ(−z)


BOTH_FALL = "stays"  # the loss knows their difference alone
BETA_DOUBLED = "falls"
