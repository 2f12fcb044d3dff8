"""Lesson 12, to be filled in; then `pytest docs/course/checks/dpo.py`."""

from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (u_w − u_l)) of each pair, (P,), with u = log π − log π_ref of a whole answer.

    chosen, rejected, ref_chosen, ref_rejected: (P,), log-probabilities by the policy and by the reference.
    """
    raise NotImplementedError


def push(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """How hard a step pushes the two answers apart: −∂loss / ∂log π of the chosen one, (P,). Work it out by hand."""
    raise NotImplementedError


# Both answers of a pair become 5 nats less likely. What happens to the loss? And if β is doubled, where the chosen
# answer has become likelier than the rejected one already (Δ > 0)? "falls", "stays" or "rises".
BOTH_FALL = ""
BETA_DOUBLED = ""
