"""From the rewards of a group of answers to their advantages: how much better than the group each answer is.

A policy gradient needs a baseline, and a group of answers to one prompt brings its own, where PPO learns a value model:

    grpo         A_i = (r_i − mean) / (std + 1e-4)      std of the group, unbiased        Shao et al. 2024, equation 3
    dr_grpo      A_i = r_i − mean                       a std would weigh easy and hard prompts more      Liu 2025
    rloo         A_i = r_i − mean of the others                                               Ahmadian et al. 2024
    reinforce    A_t = what is still to come, whitened over all tokens of the batch                     Hu et al. 2025

A group whose rewards are all equal says nothing: its advantages are zero.
"""

import torch
from torch import Tensor

from minillm.alignment.token_rewards import advantages as generalised_advantages
from minillm.alignment.token_rewards import moments_of, token_rewards, whitened
from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks

SMALLEST_STD = 1e-4  # added to it
SCALED = ("grpo", "bnpo", "dapo", "gspo", "cispo")  # losses whose advantages are divided by the group's std
OF_TOKENS = ("reinforce", "reinforce_baseline")  # losses whose tokens have advantages of their own


def has_spread(rewards: Tensor) -> Tensor:
    """Whether the rewards of a group differ: (P,) bool from (P, G)."""
    return rewards.amax(1) > rewards.amin(1)


def group_advantages(rewards: Tensor, loss: str, scale_by: Tensor | None = None) -> Tensor:
    """The advantage of each answer among those to its prompt, (P, G), as the loss of this name has it.

    rewards: (P, G) fp32, which may have a cost of the distance to the reference in them. scale_by: (P, G), the rewards
    without it, whose std is divided by (None: these). With one answer a group has no other: its advantage is 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if rewards.shape[1] == 1:
        return centred
    if loss == "rloo":  # r − mean of the others, without the cancellation of computing that mean
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    if loss in SCALED:
        std = (rewards if scale_by is None else scale_by).std(1, keepdim=True)  # (P, 1), unbiased
        return centred / (std + SMALLEST_STD)
    return centred


def token_advantages(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float, ranks: Ranks) -> Tensor:
    """REINFORCE++: −β k_t and, at the last token, r; summed from each token on, and whitened over the whole batch.

    rewards: (N,) of the answers, perhaps less their group's mean ("reinforce_baseline"). kl: (N, T), an estimate at
    each token. mask: (N, T) bool. Returns (N, T), 0 outside the mask, with mean 0 and variance 1 over all ranks.
    """
    rewards_of_tokens = token_rewards(rewards, kl, mask, beta)  # (N, T)
    returns = generalised_advantages(rewards_of_tokens, torch.zeros_like(kl), mask, gamma=1.0, lam=1.0)
    moments = torch.tensor(ranks.sum_of_rows(*moments_of(returns, mask).tolist()), dtype=torch.float64)
    return whitened(returns, mask, moments)


def overlong_penalty(lengths: Tensor, most: int, cushion: int) -> Tensor:
    """DAPO's soft punishment of long answers, to be added to their rewards: (N,) in [−1, 0]  (Yu et al. 2025, eq. 13).

    lengths: (N,) in tokens, the end included. most: --max_new_tokens. cushion: how many of the last tokens before that
    cost something, 1/cushion each.
    """
    if not 0 < cushion <= most:
        raise UserError(f"--overlong_cushion {cushion}: must be between 1 and --max_new_tokens {most}")
    return ((most - cushion - lengths) / cushion).clamp(-1.0, 0.0)
