"""From one score an answer to an advantage for each of its tokens.

An answer is judged as a whole, and its distance from the reference policy costs something at each token:

    reward of token t     r_t = −β k_t + [t is the last] score                (Ziegler et al. 2019; Ouyang et al. 2022)
    surprise              δ_t = r_t + γ V_{t+1} − V_t
    advantage             A_t = δ_t + γλ A_{t+1}                              (GAE: Schulman et al. 2015)
    return                R_t = A_t + V_t                                     what the value model learns

V_t is the value of the state *before* token t. Beyond an answer's last token V and A are 0: the episode is over.

All tensors of tokens are (N, T) fp32 with a mask (N, T) bool, True on an answer's tokens, which lie together in a row.
What stands outside the mask, NaN as well, never reaches a result: there it is 0.
"""

import math

import torch
from torch import Tensor

KL_ESTIMATES = ("k1", "abs", "k2", "k3")
SMALLEST_VARIANCE = 1e-8


def kl_per_token(log_probs: Tensor, reference: Tensor, mask: Tensor, kind: str = "k1") -> Tensor:
    """An estimate of KL(policy ‖ reference) at each sampled token, (N, T); 0 outside the mask.

    log_probs, reference: of the sampled tokens, (N, T), at the same temperature. With d = log π − log π_ref,

        k1 = d   abs = |d|   k2 = d²/2   k3 = e^{−d} − 1 + d                   (Schulman 2020, "Approximating KL")

    k1 and k3 have the KL as their mean; k1 is the one whose sum in the reward makes E[r] − β KL the objective.
    """
    d = (log_probs - reference).masked_fill(~mask, 0.0)
    if kind == "k1":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind {kind!r}: choose one of {', '.join(KL_ESTIMATES)}")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r (N, T): −β k at each token, and the answer's score (N,) added at its last one.

    The last one is the eos, if the answer ended by itself: it is a token of the answer and is learned as such. (trl's
    later PPO follows OpenAI's code and puts the score one place after the eos.)
    """
    is_last = mask.clone()
    is_last[:, :-1] &= ~mask[:, 1:]
    return (-beta * kl).masked_fill(~mask, 0.0) + is_last * scores[:, None]


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimates A (N, T), not whitened; 0 outside the mask.

    rewards: r (N, T). values: V (N, T), of the state before each token. gamma: the discount γ. lam: λ, from 0, where
    only the next value is trusted, to 1, where only the rewards are (Schulman et al. 2015, equation 16).
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    n_rows, length = rewards.shape
    next_value = rewards.new_zeros(n_rows)
    next_advantage = rewards.new_zeros(n_rows)
    result = torch.zeros_like(rewards)
    for t in reversed(range(length)):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]  # (N,)
        next_advantage = (surprise + gamma * lam * next_advantage).masked_fill(~mask[:, t], 0.0)
        next_value = values[:, t]
        result[:, t] = next_advantage
    return result


def whitened(values: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """Values (N, T) with mean 0 and variance 1 over all tokens of the mask; 0 outside it.

    The variance is the unbiased one. moments: of `moments_of`, added up over ranks, if others hold more of the tokens.
    """
    count, total, squares = (moments_of(values, mask) if moments is None else moments).tolist()
    if count < 2:  # one token has no spread
        return torch.zeros_like(values)
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return ((values - mean) / math.sqrt(variance + SMALLEST_VARIANCE)).masked_fill(~mask, 0.0)


def moments_of(values: Tensor, mask: Tensor) -> Tensor:
    """(number, sum, sum of squares) of the values in the mask: (3,) fp64, which ranks can add up."""
    chosen = values[mask].double()
    return torch.stack([chosen.new_tensor(len(chosen)), chosen.sum(), chosen.square().sum()])


def lowered_if_cut(scores: Tensor, ended: Tensor, missing_eos: str = "subtract", penalty: float = 1.0) -> Tensor:
    """Scores (N,) in which an answer that never ended is worth less. ended: (N,) bool, whether it ends in an eos.

    missing_eos: "subtract" the penalty (trl), or "replace" the score by −penalty, whatever was said (Stiennon et al.
    2020, where it is −1). The reward model has never seen a cut answer, so its score of one means little.
    """
    if missing_eos == "subtract":
        return scores - penalty * ~ended
    if missing_eos == "replace":
        return scores.masked_fill(~ended, -penalty)
    raise ValueError(f"missing_eos {missing_eos!r}: choose subtract or replace")


class AdaptiveKL:
    """A β that follows a target: raised while the KL of an answer is above it, lowered while it is below.

        β ← β (1 + clip(KL / target − 1, ±0.2) · n / horizon)                  (Ziegler et al. 2019, section 2.2)

    KL: summed over an answer's tokens, mean of the n answers of a step. horizon: answers in which β can change by 20 %.
    """

    MOST = 0.2  # relative error that counts

    def __init__(self, beta: float, target: float | None, horizon: float = 10_000):
        """beta: to begin with. target: nats an answer; None: β stays as it is."""
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_answers: int) -> float:
        """Take note of a step's mean KL; returns the β of the next."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -self.MOST), self.MOST)
            self.beta *= 1 + error * min(1.0, n_answers / self.horizon)  # never below 0, whatever the horizon
        return self.beta
