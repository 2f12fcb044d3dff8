"""Log-probabilities of answers, and losses that are any function of them, without the whole matrix of logits.

Every loss of this folder depends on the model through the log-probabilities log π(y_t) of the answers' tokens alone.
So its gradient is

    ∇L = Σ_t c_t ∇log π(y_t),    c_t = ∂L / ∂log π(y_t)

and can be computed in two cheap parts. First the log-probabilities, a few rows of logits at a time, nothing kept for
autograd; then c, by autograd through the small tensor (B, T) of log-probabilities. What remains, Σ c_t log π(y_t), is
a cross-entropy whose rows are weighted by −c, which `ops.linear_cross_entropy` computes without keeping logits either.
The layers are passed once. Only answer tokens go through the head: those of the prompt have c = 0.

Where ranks share rows (rows.py), each computes the log-probabilities of its own tokens, and gets those of the others.
So a loss is always given whole rows, and of its gradient c a rank takes the part of its own tokens.

At a temperature τ, π is softmax(z / τ) of the logits z = cap · tanh(W h / cap), as the sampler has it. Dividing the
states h and the cap by τ gives the same, so both parts take h / τ.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.datasets.batch import Batch
from minillm.distributed.parallelize import compiled
from minillm.distributed.rows import own_gradient, own_part, whole_rows
from minillm.distributed.shards import gather, is_sharded_model
from minillm.model import ops
from minillm.model.loss import target_log_probs
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import FilledCache, virtual_tokens

LossOf = Callable[[Tensor], Tensor]  # (B, T) fp32 log-probabilities → the summed loss, a scalar


@torch.no_grad()
def answer_log_probs(
    model: Transformer, batch: Batch, *, temperature: float = 1.0, with_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log π of each answer token: (B, T) fp32, 0 where batch.mask is False; no gradient, and no dropout.

    batch: on the model's device. with_entropy: also the entropy in nats at each answer token, (B, T) fp32.
    """
    was_training = model.training
    model.eval()
    own = own_part(model, batch)
    hidden, targets, where = _answer_states(model, own, model.hidden)
    model.train(was_training)

    log_probs, entropy = target_log_probs(
        hidden,
        model.lm_head.weight,
        targets,
        temperature=temperature,
        softcap=model.config.softcap,
        with_entropy=with_entropy,
    )
    found = [values for values in (log_probs, entropy) if values is not None]
    found = [whole_rows(model, _placed(values, where, own), batch.y.shape[1]) for values in found]  # (B, T) each
    return tuple(found) if with_entropy else found[0]


def loss_through_log_probs(
    model: Transformer,
    batch: Batch,
    loss_of: LossOf,
    *,
    temperature: float = 1.0,
    pass_through: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`loss_of` the answers' log-probabilities (B, T), with its gradient in the model; one pass through the layers.

    loss_of: from log π of each answer token (fp32, 0 where batch.mask is False) to a scalar. It is called once, and
    may note what it sees. pass_through: what to call in place of `model.hidden`, such as that compiled. Returns the
    scalar, whose backward pass gives Σ c ∇log π: see the head of this file.
    """
    own = own_part(model, batch)
    hidden, targets, where = _answer_states(model, own, pass_through or model.hidden)  # (N, C), (N,)
    weight, softcap = model.lm_head.weight, model.config.softcap

    # the log-probabilities as a leaf, and the loss's gradient with respect to them
    log_probs, _ = target_log_probs(hidden, weight, targets, temperature=temperature, softcap=softcap)
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        leaf = whole_rows(model, _placed(log_probs, where, own), batch.y.shape[1]).requires_grad_()  # (B, T)
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf) if loss.requires_grad else (torch.zeros_like(leaf),)

    # Σ c log π, whose gradient is the loss's
    if batch.mask is not None:
        gradient = gradient * batch.mask
    c = own_gradient(model, gradient).flatten()[where]  # (N,)
    cap = None if softcap is None else softcap / temperature
    weighted = ops.linear_cross_entropy(hidden / temperature, weight, targets, -c, cap)
    return loss.detach() + (weighted - weighted.detach())


class Policy(nn.Module):
    """A model whose call is `loss_through_log_probs`: what `parallelize` wraps, since DDP needs one forward a loss.

    With `compile` the pass through the layers is compiled; the loss, which is Python of the caller, is not. The layers
    of a sharded model are so one by one already.
    """

    def __init__(self, model: Transformer, compile: bool = False):
        super().__init__()
        self.model = model
        self.pass_through = compiled(model.hidden) if compile and not is_sharded_model(model) else model.hidden

    def forward(self, batch: Batch, loss_of: LossOf, temperature: float = 1.0) -> Tensor:
        """The loss, a scalar in fp32."""
        return loss_through_log_probs(
            self.model, batch, loss_of, temperature=temperature, pass_through=self.pass_through
        )


# ---- parts of both


def _answer_states(
    model: Transformer, batch: Batch, pass_through: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The states that predict answer tokens (N, C), these tokens (N,), and their places among the B·T (N,) int64.

    A batch without any gives one place, so that every parameter gets a gradient, which is then zero.
    """
    # virtual tokens stand before each row; the model's own forward pass puts them there by a hook
    virtual = virtual_tokens(model)
    cache = None
    if virtual is not None:
        gather(model)  # they lie outside the layers, and are read before the pass that would gather them
        cache = FilledCache(*virtual.keys_values(model))
    hidden = pass_through(batch.x, documents=batch.documents, cache=cache)  # (B, T, C)

    where = batch.with_places().places if batch.places is None else batch.places
    return hidden.flatten(0, 1)[where], batch.y.flatten()[where], where


def _placed(values: Tensor, where: Tensor, batch: Batch) -> Tensor:
    """Values (N,) at their places in (B, T), zeros elsewhere."""
    placed = values.new_zeros(batch.y.numel())
    placed[where] = values
    placed = placed.view(batch.y.shape)
    return placed if batch.mask is None else placed * batch.mask
