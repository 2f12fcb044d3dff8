"""Lesson 13, to be filled in; then `pytest docs/course/checks/policy.py`."""

from torch import Tensor


def best_policy(log_ref: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """log π* of every answer, (A,), and J*: the policy that has the highest E[r] − β KL(π ‖ π_ref), and its J.

        π*(y) ∝ π_ref(y) e^{r(y)/β}

    log_ref: log π_ref, (A,). rewards: (A,). beta: may be as small as 0.001, where e^{r/β} is larger than any float.
    """
    raise NotImplementedError


# β is doubled. What happens to E[r] of the best policy, and to its KL from the reference? "falls", "stays" or "rises".
REWARD_OF_THE_BEST = ""
KL_OF_THE_BEST = ""

# All rewards are 10 higher. What happens to the gradient of one step (the same answers drawn, the first update),
# without a baseline and with GRPO's advantages? "changes" or "stays".
WITHOUT_BASELINE = ""
WITH_GRPO = ""
