"""The value model: what reward a policy's unfinished answer can still expect.

It is a model with a score head: V_t is the score at the input x_t, so it knows the prompt and the answer before token
y_t, not y_t itself. It is of use to training alone.
"""

import copy
import dataclasses
import math

import torch
from torch import Tensor

from minillm.alignment.reference import is_base
from minillm.alignment.token_rewards import moments_of
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import local
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach, switched_off
from minillm.tuning.options import TuningConfig

ROUNDING = 1e-14  # of a sum of squares: what is left of less when the mean is taken off says nothing


def make_value_model(
    options: TuningConfig, policy: Transformer, source: Transformer | None, seed: int, keep_head: bool = False
) -> Transformer:
    """The value model beside a policy: tokens (N, T) → values (N, T) fp32, which are 0 until it is trained.

    Where the policy is an adapter over a base that it leaves as it was, this is another adapter over the same base.
    Else it is a model of its own, trained in full: a copy of `source`, the reward model, which knows what is judged
    (Ouyang et al. 2022, appendix C.4); None: of the policy. keep_head: its values are the scores of that reward model,
    which must be its source.
    """
    if is_base(policy):
        model = over_same_weights(policy)
        model.give_score_head(seed)
        attach(model, dataclasses.replace(options, modules_to_save=None, ensure_weight_tying=None), seed)
    else:
        with switched_off(policy):
            model = copy.deepcopy(source or policy)
        if not model.config.score_head:
            model.give_score_head(seed)
        model.float().requires_grad_(True)
    model.checkpoint_activations = policy.checkpoint_activations
    if not keep_head:
        start_at_zero(model)
    return model.train()


@torch.no_grad()
def start_at_zero(model: Transformer) -> None:
    """V = 0 everywhere, so that the first advantages are the rewards themselves (Huang et al. 2022, "37 details")."""
    model.score.weight.zero_()


@torch.no_grad()
def start_in_unit(model: Transformer, std: float) -> None:
    """Values that begin as a reward model's scores, over the spread that its rewards are divided by."""
    local(model.score.weight).div_(std)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """½ Σ max((V − R)², (clip(V, V_old ± clip) − R)²) over the mask, and how many tokens the clipped side decides.

    All (N, T). The clipping keeps V near what it was when the answers were sampled, as the policy's does (Huang et al.
    2022, "37 details", number 9). clip: in units of V; infinite: the plain squared error.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain = (values - returns).square()
    clipped = (near - returns).square()
    loss = torch.maximum(plain, clipped).masked_fill(~mask, 0.0).sum() / 2
    n_clipped = ((clipped > plain) & mask).sum()
    return loss, n_clipped


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, ranks: Ranks) -> float:
    """1 − Var(R − V) / Var(R) over the masks of all ranks, whose tensors are (N, T) each.

    It is 1 for perfect values, 0 for none better than the mean, NaN for equal R.
    """
    spreads = []
    for tensor in (returns, returns - values):
        count, total, squares = ranks.sum(*moments_of(tensor, mask).tolist())
        spread = squares - total**2 / max(1, count)  # n Var
        spreads.append(spread if spread > ROUNDING * squares else 0.0)
    of_returns, of_errors = spreads
    return 1 - of_errors / of_returns if of_returns else math.nan


# ---- several models in the memory of one


def over_same_weights(model: Transformer) -> Transformer:
    """Another model over the very same frozen weights, without an adapter: it takes one of its own by `attach`.

    So policy and value model stand side by side over one base, quantized or not, and none has to switch the other's
    adapter off. `model` keeps its adapter.
    """
    with switched_off(model):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        adapters = vars(model).get("adapters", {})
        shared[id(adapters)] = {}
        return copy.deepcopy(model, shared)


def share_equal_weights(model: Transformer, base: Transformer) -> int:
    """Let a frozen model use a base's own frozen tensors where it holds equal ones; returns how many bytes that frees.

    So a reward model that is an adapter over the policy's base costs its adapter alone. Both keep their adapters.
    """
    freed = 0
    with switched_off(model), switched_off(base):
        tensors = dict(base.named_parameters())
        for name, parameter in model.named_parameters():
            own = tensors.get(name)
            if own is None or own.requires_grad or own.dtype != parameter.dtype:
                continue
            if own.data_ptr() != parameter.data_ptr() and torch.equal(own.data, parameter.data):
                freed += parameter.nbytes
                parameter.data = own.data
    return freed
