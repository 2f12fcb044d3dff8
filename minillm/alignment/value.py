"""The value model: what reward a policy's unfinished answer can still expect.

A trunk, whose states after the last norm know the tokens so far, and a head, a number for each state. V_t is read at
the input x_t, so it knows the prompt and the answer before token y_t, not y_t itself.
"""

import copy

import torch
from torch import Tensor, nn

from minillm.model.transformer import Transformer
from minillm.tuning.adapter import active_adapter, set_adapter


class ValueModel(nn.Module):
    """tokens (N, T) → values (N, T) fp32, one of the state after each token."""

    def __init__(self, trunk: Transformer):
        """trunk: trained in full or by an adapter, whatever its own head. The head here is new: see `start_at_zero`."""
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.dim, 1, bias=True).to(trunk.norm.weight.device)
        self.start_at_zero()

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """V = 0 everywhere, so that the first advantages are the rewards themselves (Huang et al. 2023, "N+")."""
        self.head.weight.zero_()
        self.head.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.trunk.hidden(tokens)  # (N, T, C)
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()  # (N, T, 1) → (N, T)


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


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over the mask: 1 for perfect values, 0 for none better than the mean, NaN for equal R."""
    returns, errors = returns[mask].double(), (returns - values)[mask].double()
    spread = float(returns.var(unbiased=False)) if len(returns) else 0.0
    return 1 - float(errors.var(unbiased=False)) / spread if spread > 0 else float("nan")


def over_same_weights(model: Transformer) -> Transformer:
    """Another model over the very same frozen weights, without an adapter: it takes one of its own by `attach`.

    So policy, value and reward model stand side by side in the memory of one base, none switches another's adapter off,
    and what shares a weight shares its quantization too. `model` keeps its adapter.
    """
    adapter = active_adapter(model)
    adapters = vars(model).get("adapters", {})
    name = next((name for name, other in adapters.items() if other is adapter), None)
    set_adapter(model, None)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(adapters)] = {}
    try:
        return copy.deepcopy(model, shared)
    finally:
        set_adapter(model, name)
