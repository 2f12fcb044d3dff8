"""Losses of preferences: DPO and its family, of pairs and of single answers, each as its formula stands in its paper.

Of a pair, w is the chosen answer and l the rejected one; s = Σ_t log π(y_t) over the answer's n tokens, its eos among
them, and s_r the same by the reference policy; u = s − s_r, how much more likely the policy has made an answer; Δ =
u_w − u_l. β u is the reward that the policy implies (Rafailov et al. 2023, arXiv:2305.18290, equation 5): β says how
far it may go from the reference. σ is the logistic function.

A loss gives a number for each pair; a step takes their mean. Those that know a pair alone do not depend on how a step
is cut into micro-batches or over ranks. Two know more: `aot` sorts the pairs of a step, so they must be in one
forward pass, and `kto` compares with z, a mean over the whole step that the script computes beforehand.
`docs/en/dpo.md` says when to use which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """What the losses know of P pairs: (P,) fp32 each."""

    chosen: Tensor  # s of the chosen answers, with gradients
    rejected: Tensor
    ref_chosen: Tensor  # s_r; zeros for a loss that knows no reference
    ref_rejected: Tensor
    n_chosen: Tensor  # tokens of the answers
    n_rejected: Tensor

    @property
    def u_chosen(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def u_rejected(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        return self.u_chosen - self.u_rejected


@dataclass(frozen=True)
class LossOptions:
    """The numbers that a loss may know besides log-probabilities; `LOSSES` says which does."""

    beta: float = 0.1
    label_smoothing: float = 0.1  # ε, the share of pairs whose answers are thought to be swapped
    gamma: float = 1.0  # the margin that SimPO asks for
    tau: float = 0.05  # DiscoPOP's temperature
    divergence: str = "reverse_kl"  # what keeps the policy near the reference


DIVERGENCES = ("reverse_kl", "forward_kl", "js")
FARTHEST = 40.0  # nats: e^40 as a gradient has still a norm in fp32


def divergent_delta(pairs: Pairs, divergence: str) -> Tensor:
    """Δ under another f-divergence than the reverse KL: f'(π/π_r) in place of u (Wang et al. 2023, arXiv:2309.16240).

    For the reverse KL f' is u up to a constant, for the forward KL −e^(−u), for Jensen–Shannon log σ(u). A u below
    −FARTHEST counts as that.
    """
    if divergence == "forward_kl":
        chosen, rejected = (u.clamp(min=-FARTHEST) for u in (pairs.u_chosen, pairs.u_rejected))
        return torch.exp(-rejected) - torch.exp(-chosen)
    if divergence == "js":
        return logsigmoid(pairs.u_chosen) - logsigmoid(pairs.u_rejected)
    return pairs.delta


# ---- of pairs, with a reference


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """DPO: −log σ(βΔ) (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""
    return -logsigmoid(options.beta * divergent_delta(pairs, options.divergence))


def cdpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """Conservative DPO: −(1−ε) log σ(βΔ) − ε log σ(−βΔ) (Mitchell 2023, "A note on DPO with noisy preferences")."""
    z = options.beta * divergent_delta(pairs, options.divergence)
    noise = options.label_smoothing
    return -(1 - noise) * logsigmoid(z) - noise * logsigmoid(-z)


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """Without bias by noise: [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε) (Chowdhury et al. 2024, arXiv:2403.00409)."""
    z = options.beta * divergent_delta(pairs, options.divergence)
    noise = options.label_smoothing
    return (-(1 - noise) * logsigmoid(z) + noise * logsigmoid(-z)) / (1 - 2 * noise)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """SLiC's hinge on DPO's margin: max(0, 1 − βΔ) (Zhao et al. 2023, arXiv:2305.10425)."""
    return torch.relu(1 - options.beta * divergent_delta(pairs, options.divergence))


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """IPO on means over tokens: (u_w/n_w − u_l/n_l − 1/(2β))².

    The paper (Azar et al. 2023, arXiv:2310.12036) has sums, as `ipo_sum`; libraries take means, so that long answers do
    not decide alone.
    """
    mean_delta = pairs.u_chosen / pairs.n_chosen - pairs.u_rejected / pairs.n_rejected
    return (mean_delta - 1 / (2 * options.beta)).square()


def ipo_sum(pairs: Pairs, options: LossOptions) -> Tensor:
    """IPO: (Δ − 1/(2β))² (Azar et al. 2023, arXiv:2310.12036, equation 17)."""
    return (pairs.delta - 1 / (2 * options.beta)).square()


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> Tensor:
    """DPO on means over tokens: −log σ(β(u_w/n_w − u_l/n_l)) (Lambert et al. 2024, arXiv:2411.15124)."""
    mean_delta = pairs.u_chosen / pairs.n_chosen - pairs.u_rejected / pairs.n_rejected
    return -logsigmoid(options.beta * mean_delta)


def exo_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """EXO, a reverse KL to smoothed labels: q log(q/(1−ε)) + (1−q) log((1−q)/ε), q = σ(βΔ).

    Ji et al. 2024, arXiv:2402.00856, equation 16.
    """
    z = options.beta * pairs.delta
    noise = torch.tensor(options.label_smoothing, dtype=z.dtype, device=z.device)
    first = z.sigmoid() * (logsigmoid(z) - torch.log1p(-noise))
    second = (-z).sigmoid() * (logsigmoid(-z) - torch.log(noise))
    return first + second


def nca_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """NCA: −log σ(βu_w) − ½ log σ(−βu_w) − ½ log σ(−βu_l) (Chen et al. 2024, arXiv:2402.05369)."""
    chosen, rejected = options.beta * pairs.u_chosen, options.beta * pairs.u_rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """BCO, right or wrong by the answer alone: −log σ(βu_w) − log σ(−βu_l) (Jung et al. 2024, arXiv:2404.04656).

    Without its reward shift δ, a running mean over steps.
    """
    return -logsigmoid(options.beta * pairs.u_chosen) - logsigmoid(-options.beta * pairs.u_rejected)


def sppo_hard(pairs: Pairs, options: LossOptions) -> Tensor:
    """SPPO with hard labels: (u_w − 1/(2β))² + (u_l + 1/(2β))² (Wu et al. 2024, arXiv:2405.00675)."""
    goal = 1 / (2 * options.beta)
    return (pairs.u_chosen - goal).square() + (pairs.u_rejected + goal).square()


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """APO-zero, chosen up and rejected down: 1 − σ(βu_w) + σ(βu_l) (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""
    return (-options.beta * pairs.u_chosen).sigmoid() + (options.beta * pairs.u_rejected).sigmoid()


def apo_down(pairs: Pairs, options: LossOptions) -> Tensor:
    """APO-down, both down, the rejected more: σ(βu_w) + 1 − σ(βΔ) (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""
    return (options.beta * pairs.u_chosen).sigmoid() + (-options.beta * pairs.delta).sigmoid()


def aot(pairs: Pairs, options: LossOptions) -> Tensor:
    """AOT: DPO between the sorted margins of policy and reference (Melnyk et al. 2024, arXiv:2406.05882, paired)."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return -logsigmoid(options.beta * (policy - reference))


def aot_unpaired(pairs: Pairs, options: LossOptions) -> Tensor:
    """AOT between the sorted u of all chosen and of all rejected answers (Melnyk et al. 2024, arXiv:2406.05882)."""
    return -logsigmoid(options.beta * (pairs.u_chosen.sort().values - pairs.u_rejected.sort().values))


def discopop(pairs: Pairs, options: LossOptions) -> Tensor:
    """DiscoPOP: (1−m)(−log σ(z)) + m e^(−z), z = βΔ, m = σ(z/τ) (Lu et al. 2024, arXiv:2406.08414, LRML)."""
    z = options.beta * pairs.delta
    share = (z / options.tau).sigmoid()
    # m e^(−z) as one power: far below 0 its factors are 0 and ∞
    exponential = torch.exp(logsigmoid(z / options.tau) - z)
    return -(1 - share) * logsigmoid(z) + exponential


# ---- of pairs, without a reference


def sft(pairs: Pairs, options: LossOptions) -> Tensor:
    """Nothing of the pair: what is learned is the chosen answers, by the SFT term that this loss always has."""
    return torch.zeros_like(pairs.chosen)


def cpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """CPO: −log σ(β(s_w − s_l)), smoothed like `cdpo` if asked (Xu et al. 2024, arXiv:2401.08417); with an SFT term."""
    z = options.beta * (pairs.chosen - pairs.rejected)
    noise = options.label_smoothing
    return -(1 - noise) * logsigmoid(z) - noise * logsigmoid(-z)


def simpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """SimPO: −log σ(β(s_w/n_w − s_l/n_l) − γ) (Meng et al. 2024, arXiv:2405.14734, equation 6)."""
    mean_margin = pairs.chosen / pairs.n_chosen - pairs.rejected / pairs.n_rejected
    return -logsigmoid(options.beta * mean_margin - options.gamma)


def log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = e^mean, mean (P,) ≤ 0, the mean log-probability of a token.

    log(1 − e^mean) is log(−expm1) near 0 and log1p(−exp) below −log 2, where each is exact. A mean of 0 is taken as
    −1e-6: its odds would be infinite.
    """
    mean = mean.clamp(max=-1e-6)
    near_zero = mean > -0.6931
    close = torch.log(-torch.expm1(torch.where(near_zero, mean, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, mean)))
    return mean - torch.where(near_zero, close, far)


def orpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """ORPO: −λ log σ(log odds_w − log odds_l), λ = β (Hong et al. 2024, arXiv:2403.07691); it adds an SFT term."""
    odds_chosen = log_odds(pairs.chosen / pairs.n_chosen)
    odds_rejected = log_odds(pairs.rejected / pairs.n_rejected)
    return -options.beta * logsigmoid(odds_chosen - odds_rejected)


# ---- of single answers, good or bad


def kto(u: Tensor, is_good: Tensor, z: Tensor, weights: tuple[float, float], beta: float) -> Tensor:
    """KTO: good d_w (1 − σ(β(u − z))), bad d_l (1 − σ(β(z − u))), (N,) (Ethayarajh et al. 2024, arXiv:2402.01306).

    u: (N,). is_good: (N,) bool. z: (), `kto_reference_point`, without gradient. weights: (d_w, d_l), which make up for
    data with more of one kind: the paper advises d_w n_w / (d_l n_l) between 1 and 4/3.
    """
    weight_good, weight_bad = weights
    good = weight_good * (-beta * (u - z)).sigmoid()
    bad = weight_bad * (-beta * (z - u)).sigmoid()
    return torch.where(is_good, good, bad)


def kto_reference_point(mean_u: Tensor) -> Tensor:
    """z, an estimate of the KL: max(0, the mean of u over answers to other prompts). mean_u: over the whole step."""
    return mean_u.detach().clamp(min=0)


# ---- which name means which


@dataclass(frozen=True)
class Loss:
    """A loss that --loss can name, with what it knows and what its authors take."""

    of_pairs: Callable[[Pairs, LossOptions], Tensor] | None  # None: of single answers
    knows: tuple[str, ...] = ("beta",)  # names of `LossOptions`
    has_reference: bool = True
    sft_weight: float = 1.0  # of the SFT term, unless --sft_weight says otherwise
    defaults: LossOptions = LossOptions()
    sorts: bool = False  # whether it sorts the pairs of a step, so that a loss is of a place in an order and of no pair


_DIVERGENT = ("beta", "divergence")
_UNSMOOTHED = LossOptions(label_smoothing=0.0)
LOSSES = {
    "sigmoid": Loss(sigmoid, _DIVERGENT),
    "cdpo": Loss(cdpo, (*_DIVERGENT, "label_smoothing")),
    "robust": Loss(robust, (*_DIVERGENT, "label_smoothing")),
    "hinge": Loss(hinge, _DIVERGENT),
    "ipo": Loss(ipo),
    "ipo_sum": Loss(ipo_sum),
    "sigmoid_norm": Loss(sigmoid_norm),
    "exo_pair": Loss(exo_pair, ("beta", "label_smoothing"), defaults=LossOptions(label_smoothing=0.001)),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "aot": Loss(aot, sorts=True),
    "aot_unpaired": Loss(aot_unpaired, sorts=True),
    "discopop": Loss(discopop, ("beta", "tau")),
    "sft": Loss(sft, (), has_reference=False),
    "cpo": Loss(cpo, ("beta", "label_smoothing"), has_reference=False, defaults=_UNSMOOTHED),
    "simpo": Loss(simpo, ("beta", "gamma"), has_reference=False, sft_weight=0.0, defaults=LossOptions(beta=2.0)),
    "orpo": Loss(orpo, has_reference=False),
    "kto": Loss(None, ("beta", "good_weight", "bad_weight"), sft_weight=0.0),
    "apo_zero_unpaired": Loss(None, ("beta", "good_weight", "bad_weight"), sft_weight=0.0),  # KTO with z = 0
}


def losses_knowing(option: str) -> tuple[str, ...]:
    """The names of the losses that know an option."""
    return tuple(name for name, loss in LOSSES.items() if option in loss.knows)
