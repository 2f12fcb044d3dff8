"""One optimizer step: what it reads, the state that it changes, its dropout's seed, the clipping of its gradient."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.checkpoint import train_state
from minillm.distributed import fsdp
from minillm.distributed.diloco import Diloco
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import is_sharded, local, settle


class LossScale:
    """The factor of the loss in float16, where small gradients would otherwise become zero; 1 where not `enabled`.

    It is halved after a step whose gradient was infinite, and doubled after 2,000 in a row that were not (Micikevicius
    et al. 2018, arXiv:1710.03740, section 3.2; the numbers are those of `torch.amp.GradScaler`). That scaler would look
    at a rank's own part of the gradient alone; here the caller says what all ranks have seen.
    """

    FIRST = 65536.0
    GOOD_STEPS = 2000  # in a row, before it is doubled

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.factor = self.FIRST if enabled else 1.0
        self.n_good = 0

    def update(self, is_finite: bool) -> None:
        """Take note of a step; is_finite: whether its loss and gradient were."""
        if not self.enabled:
            return
        self.n_good = self.n_good + 1 if is_finite else 0
        if not is_finite:
            self.factor /= 2
        elif self.n_good == self.GOOD_STEPS:
            self.factor *= 2
            self.n_good = 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint records, under the names that torch's scaler has; empty where it is not enabled."""
        return {"scale": self.factor, "_growth_tracker": self.n_good} if self.enabled else {}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Go on from what `state_dict`, or torch's scaler, has recorded."""
        self.factor, self.n_good = float(saved["scale"]), int(saved["_growth_tracker"])


class TrainState:
    """What training changes and a checkpoint keeps: a model, its optimizers and, in float16, the scale of the loss.

    A step is one `backward` for each micro-batch, then one `update`, or several such updates. After it `loss`,
    `grad_norm` and `applied` tell of the last one, and `refused` of one that was not applied.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        ranks: Ranks,
        dtype: torch.dtype,
        beside: "dict[str, TrainState] | None" = None,
        outer: Diloco | None = None,
    ):
        """dtype: of the matrix products. With float16 the loss is scaled, since small gradients would become zero.

        beside: extra models trained in the same run (PPO's value model), by name, each with a state of its own. Each
        takes its own `backward` and `update`; a checkpoint keeps them under resume/. outer: what the workers of DiLoCo
        have in common; `ranks` is then this worker alone.
        """
        self.model = model
        self.optimizers = optimizers
        self.outer = outer
        self.beside = beside or {}
        self.ranks = ranks
        self.loss_scale = LossScale(enabled=dtype == torch.float16)
        # of the step under way
        self.loss_sum = torch.zeros((), device=ranks.device)
        self.z_loss_sum = torch.zeros((), device=ranks.device)
        self.n_targets = 0.0
        # of the last step
        self.loss = math.nan
        self.z_loss = 0.0
        self.grad_norm = math.nan
        self.applied = False
        self.refused: tuple[float, float] | None = None  # loss and norm of an update of it that was not applied

    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """Its own, and those of the models beside it; none of a worker of DiLoCo, whose state `outer` gives."""
        if self.outer is not None:
            return []
        return [*self.optimizers, *(optimizer for other in self.beside.values() for optimizer in other.optimizers)]

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of the model and, each name behind "value." or the like, of those beside it."""
        named = dict(self.model.named_parameters())
        for name, other in self.beside.items():
            named |= {f"{name}.{path}": parameter for path, parameter in other.model.named_parameters()}
        return named

    def trained_beside(self) -> dict[str, dict[str, nn.Parameter]]:
        """Name of each model beside this one → what is trained of it, by name; or what `outer` gives."""
        if self.outer is not None:
            return self.outer.tensors()
        return {
            name: {path: p for path, p in other.model.named_parameters() if p.requires_grad}
            for name, other in self.beside.items()
        }

    def restore(self, checkpoint: Path, saved: dict) -> None:
        """Take from a checkpoint what training keeps besides the model, which has been loaded; saved: its state."""
        train_state.restore_beside(checkpoint, self.trained_beside())
        if self.outer is not None:
            self.outer.take_restored()
        train_state.restore_optimizers(checkpoint, self.all_optimizers(), self.all_parameters())
        if self.loss_scale.enabled and saved.get("scaler"):  # empty if it was saved without --dtype float16
            self.loss_scale.load_state_dict(saved["scaler"])
            for name, other in self.beside.items():
                other.loss_scale.load_state_dict(saved.get("scalers", {})[name])

    def is_finite(self) -> bool:
        """Whether all weights are, on all ranks. A model that is dealt out holds its parts again afterwards."""
        for each in (self, *self.beside.values()):
            settle(each.model)
        finite = torch.stack([torch.isfinite(local(p)).all() for p in self.all_parameters().values()])
        return self.ranks.max(int(not finite.all())) == 0

    def scales(self) -> dict[str, dict]:
        """What a checkpoint records of the loss scales of float16; empty without."""
        others = {name: other.loss_scale.state_dict() for name, other in self.beside.items()}
        return {"scaler": self.loss_scale.state_dict()} | ({"scalers": others} if others else {})

    def backward(self, loss: Tensor, n_targets: float, z_loss: Tensor | float = 0.0) -> None:
        """Add a micro-batch's share to the gradient of the mean loss over all targets of the step.

        loss: (), summed over the targets of the micro-batch. n_targets: how many the whole step has, in all
        micro-batches of all ranks, so that the gradient does not depend on how the batch is cut. A step may have none,
        as when the only target is a bos: then loss and gradient are 0. z_loss: what of `loss` is z-loss; it is told
        apart, so that the state's `loss` stays comparable with that of a run without.
        """
        n_targets = max(1, n_targets)
        share = loss * (1 / n_targets)  # the ranks' shares are added up, not averaged
        (share * self.loss_scale.factor).backward()
        self.loss_sum += loss.detach() - z_loss
        self.z_loss_sum += z_loss
        self.n_targets = n_targets

    def update(self, grad_clip: float) -> float:
        """Clip the gradient and step; returns its norm before clipping.

        If loss or gradient is infinite or NaN, which all ranks see alike, no rank steps, and `applied` is False.
        grad_clip: the largest norm, 0 for no clipping. Raises `UserError` naming the parameters that got no gradient.
        """
        self._check_all_have_gradients()
        norm = gradient_norm(self.model, self.loss_scale.factor)
        sums = self.ranks.summed(torch.stack([self.loss_sum, self.z_loss_sum]))
        # the one place of an update that waits for the GPU
        self.grad_norm, loss_sum, z_loss_sum = torch.cat([norm.to(sums.dtype)[None], sums]).tolist()
        self.loss = loss_sum / self.n_targets
        self.z_loss = z_loss_sum / self.n_targets
        self.applied = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        if self.applied:
            shorten(self.model, norm, self.grad_norm, grad_clip)
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.refused = self.loss, self.grad_norm
        self.loss_scale.update(self.applied)
        self.model.zero_grad(set_to_none=True)
        self.loss_sum.zero_()
        self.z_loss_sum.zero_()
        return self.grad_norm

    def take_refused(self) -> list[str]:
        """Loss and norm of an update of the step that was not applied, and of one of each model beside; forgets them.

        A later update that was applied does not make up for it.
        """
        found = []
        for name, each in {"": self, **self.beside}.items():
            if each.refused is not None or not each.applied:
                loss, grad_norm = each.refused or (each.loss, each.grad_norm)
                found.append(f"{name}{' model: ' if name else ''}loss {loss}, gradient norm {grad_norm}")
            each.refused = None
        return found

    def skip(self) -> None:
        """A step on which there is nothing to learn: the weights, and the optimizers' moments, stay as they are."""
        self.loss = self.grad_norm = 0.0
        self.applied = True

    def _check_all_have_gradients(self) -> None:
        """One behaviour on any number of ranks: several would wait for the gradient, one would go on without."""
        idle = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            raise UserError(
                f"{', '.join(idle[:3])}{more}: trained, but the loss does not depend on it, so it gets no gradient; "
                "use it in every forward pass, or freeze it by requires_grad_(False)"
            )


class Ahead:
    """What steps read, made one step early, so that the GPU does not wait for it.

        queue passes k  →  prepare(k + 1)  →  update: wait for the GPU, clip, step  →  take(k + 1), queue passes k + 1
        GPU:  passes k ────────────────────────────────────────────→  clip, step

    The host only queues the passes of a step, and waits for them in `TrainState.update`. What it makes before that
    wait costs no time, and what it makes after the wait is time in which the GPU has nothing to do.
    """

    def __init__(self, make: Callable[[int], Any], last_step: int):
        """make: from a step's number to what it reads. It must depend on nothing else, and not talk to other ranks.

        last_step: of the run; nothing is made beyond it.
        """
        self.make = make
        self.last_step = last_step
        self.prepared: dict[int, Any] = {}

    def take(self, step: int) -> Any:
        """What the step reads. It is made now if it was not prepared, as before the first step of a run."""
        return self.prepared.pop(step) if step in self.prepared else self.make(step)

    def prepare(self, step: int) -> None:
        """Make now what a later step reads. What fails here fails again in `take`, once the step before is saved."""
        if step <= self.last_step:
            with contextlib.suppress(Exception):
                self.prepared[step] = self.make(step)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's dropout a function of (seed, step, rank), so that no random state has to be saved."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(drawn >> 1))  # torch takes 63 bits


def clip(model: nn.Module, limit: float, loss_scale: float = 1.0) -> float:
    """Undo the loss scale, clip the gradient's norm to `limit` (0: no clipping), and return the norm before that."""
    norm = gradient_norm(model, loss_scale)
    norm_before = float(norm)
    shorten(model, norm, norm_before, limit)
    return norm_before


def gradient_norm(model: nn.Module, loss_scale: float) -> Tensor:
    """Undo the loss scale, and return the gradient's norm, (), which the host does not know yet."""
    trained = [p for p in model.parameters() if p.grad is not None]
    if loss_scale != 1:
        torch._foreach_mul_([local(p.grad) for p in trained], 1 / loss_scale)
    if any(is_sharded(p) for p in trained):
        return fsdp.gradient_norm(trained)
    return torch.nn.utils.get_total_norm([p.grad for p in trained])


def shorten(model: nn.Module, norm: Tensor, norm_on_host: float, limit: float) -> None:
    """Scale the gradient down to the norm `limit` (0: no clipping), if `norm`, which is its own, is larger."""
    if not 0 < limit < norm_on_host + 1e-6:  # torch's clip_grad_norm_ would multiply all gradients by 1
        return
    trained = [p for p in model.parameters() if p.grad is not None]
    if any(is_sharded(p) for p in trained):
        torch._foreach_mul_([local(p.grad) for p in trained], limit / (norm_on_host + 1e-6))
    else:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
