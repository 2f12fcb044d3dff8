"""The best that any policy can reach, known before training.

With a reward r and a price β of the distance to a reference policy, the objective J(π) = E_π[r] − β KL(π ‖ π_ref) has a
maximum in closed form, at π*(y) ∝ π_ref(y) e^{r(y)/β}:

    J* = β log E_ref[e^{r/β}]                                   (Rafailov et al. 2023, arXiv:2305.18290, appendix A.1)

Here all are of one prompt, a policy's distribution being that of whole answers at the sampler's temperature.
"""

import math

import torch
from torch import Tensor

LEAST_DISTANCE = 0.1  # nats: a best policy that is nearer to the reference is no better for all one can measure


def right_wrong_optimum(log_p: Tensor, beta: float) -> Tensor:
    """J* of a reward that is 1 for right answers and 0 for others, exact: β log(1 + p (e^{1/β} − 1)), in fp64.

    log_p: log of the reference's probability p of a right answer, which for a single one is a sum over its tokens.
    """
    log_p = log_p.double()
    log_wrong = torch.log(-torch.expm1(log_p.clamp_max(-1e-300)))  # log(1 − p)
    return beta * torch.logaddexp(log_wrong, log_p + 1 / beta)


def estimated_optimum(rewards: Tensor, beta: float, kl: Tensor | None = None) -> Tensor:
    """J* of each prompt from G sampled answers, (P,) fp64: β log mean e^{r/β} of the reference's.

    rewards: (P, G). The logarithm of a mean is below the mean's on average, so the estimate is too low, the more the
    fewer answers and the smaller β: it does not know of good answers that the reference rarely gives. A policy that was
    trained finds those. kl: (P, G), log π − log π_ref of each answer, if they are a policy's; then it is

        β log mean e^{r/β − kl}      by importance sampling: E_ref[f] = E_π[f π_ref / π]

    too low on average as well, exact where π is π*, and by Jensen's inequality never below E[r] − β KL of the samples.
    """
    exponents = rewards.double() / beta
    if kl is not None:
        exponents = exponents - kl.double()
    return beta * (torch.logsumexp(exponents, 1) - math.log(rewards.shape[1]))


def objective(reward: float, kl: float, beta: float) -> float:
    """J = E[r] − β KL. kl: nats an answer, the sum over its tokens."""
    return reward - beta * kl


def share_of_optimum(before: float, after: float, optimum: float, beta: float) -> str:
    """J after training as a share of J*, in words, or why there is none. before: J of the reference, its E[r].

    J* − E_ref[r] is β KL(π_ref ‖ π*), so it says how far the best policy is from the reference. Where that is next to
    nothing, as with a reward that is always the same, J* is the reference's own value, and a share of it says nothing.
    """
    if optimum - before < LEAST_DISTANCE * beta:
        return (
            "no share of it: it is hardly above what the reference has, so this reward leaves next to nothing to learn"
        )
    if min(before, after) < 0:
        return "no share of it: a value is below 0"
    return f"{after / optimum:.1%} of it"
