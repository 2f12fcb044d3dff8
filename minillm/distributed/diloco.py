"""DiLoCo: machines on slow links train alone for many steps, then exchange what they have learned.

Each rank, a *worker*, takes H steps of its own optimizer on its own part of each batch. Then all compare how far they
have come from the weights θ that they had in common. The mean of that is the gradient of one outer step, SGD with
Nesterov momentum m, and all go on from the same new weights:

    Δ = mean over the workers of (θ − θ_worker)
    m ← μ m + Δ
    θ ← θ − η (Δ + μ m)        θ_worker ← θ

So the network carries every number once in H steps, where data parallelism carries it in each step. The moments of its
own optimizer stay with each worker.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.distributed.ranks import Ranks

MOST_AT_ONCE = 1 << 26  # numbers that are sent in one exchange, so that a copy of the model is never needed
GROUP = "several machines on slow links"  # heading in --help


@dataclass(frozen=True)
class DilocoOptions(Options):
    """When the workers exchange what they have learned, and what is made of it."""

    diloco_steps: int = option(
        0, "steps that each rank takes alone between two exchanges; 0: gradients in every step", at_least=0, group=GROUP
    )
    diloco_lr: float = option(
        0.7, "learning rate of the outer step", above=0, at_most=2, only_with=("diloco_steps", ()), group=GROUP
    )
    diloco_momentum: float = option(
        0.9,
        "Nesterov momentum of the outer step; 0: none",
        at_least=0,
        below=1,
        only_with=("diloco_steps", ()),
        group=GROUP,
    )


def check_options(training_config, dtype: torch.dtype) -> None:
    """Raise `UserError` for options that do not fit workers that each train a whole model alone.

    dtype: of the matrix products.
    """
    if not _steps_alone(training_config):
        return
    asked = f"--diloco_steps {training_config.diloco_steps}"
    for name in ("shard", "tensor_parallel", "context_parallel"):
        value = getattr(training_config, name, 1)
        if str(value) not in ("auto", "1"):
            raise UserError(f"{asked}: each rank trains a whole model alone, so --{name} must be 1, not {value}")
    if dtype == torch.float16:
        raise UserError(
            f"{asked}: with float16 each worker would have a scale of the loss of its own; choose --dtype bfloat16 or "
            "float32"
        )


def _steps_alone(training_config) -> int:
    """--diloco_steps; 0 for a script that does not have it."""
    return getattr(training_config, "diloco_steps", 0)


def check_resumed(training_config, saved: dict, world: int) -> None:
    """Raise `UserError` if a checkpoint is of workers and the run is not, or the reverse, or of another number of them.

    saved: the checkpoint's training state; with step 0 there is none.
    """
    if not saved["step"]:
        return
    before = saved.get("config", {}).get("diloco_steps", 0)
    now = _steps_alone(training_config)
    remedy = "choose another --out, and begin there with its weights by --init_from"
    if bool(before) != bool(now):
        raise UserError(f"--diloco_steps {now}: the checkpoint was made with {before}, so it goes on so; or {remedy}")
    if now and saved.get("world", world) != world:
        raise UserError(
            f"{world} rank(s): the checkpoint holds an optimizer for each of {saved['world']} workers; start as many, "
            f"or {remedy}"
        )


class Rounds:
    """When the ranks of a run meet: after every step; with --diloco_steps at the end of a round of so many."""

    def __init__(self, training_config, ranks: Ranks, dtype: torch.dtype):
        """dtype: of the matrix products. Raises `UserError` for options that do not fit."""
        check_options(training_config, dtype)
        self.n_steps = training_config.steps
        self.length = _steps_alone(training_config) or 1  # of a round, in steps
        # the ranks that take a step together: all of them, or this one alone, which is then one of several workers
        self.step_ranks = Ranks(0, 1, ranks.device) if _steps_alone(training_config) else ranks
        self.n_workers = ranks.world // self.step_ranks.world
        self.is_unheard = self.step_ranks.main and not ranks.main  # a worker of whose steps rank 0 knows nothing

    def end_at(self, step: int) -> bool:
        """Whether the ranks meet after this step; they do after the last."""
        return step == self.n_steps or step % self.length == 0

    def due(self, step: int, every: int) -> bool:
        """True every so many steps (0: never), or at the first end of a round after that, and at the last step."""
        if step == self.n_steps:
            return True
        if every == 0 or not self.end_at(step):
            return False
        return step // every > (step - self.length) // every


def workers(
    training_config, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks
) -> "Diloco | None":
    """With --diloco_steps what the ranks exchange of a model that each trains alone; None without."""
    if not training_config.diloco_steps:
        return None
    return Diloco(model, optimizers, ranks, lr=training_config.diloco_lr, momentum=training_config.diloco_momentum)


class Diloco:
    """What the workers have in common: the weights of the last exchange, and the outer momentum."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks, *, lr: float, momentum: float
    ):
        """model: every worker begins with rank 0's weights. optimizers: this worker's own, which have taken no step."""
        self.ranks = ranks
        self.lr = lr
        self.momentum = momentum
        self.optimizers = optimizers
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if ranks.world > 1:
            for parameter in self.trained.values():  # another torch may have drawn others by the same seed
                dist.broadcast(parameter.detach(), src=0)
        self.common = {name: p.detach().clone() for name, p in self.trained.items()}
        self.moments = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self.counts: list[tuple[Tensor, Tensor]] = []  # of steps: where the optimizer keeps it, where it is saved from
        for optimizer in optimizers:
            _create_state(optimizer)

    @torch.no_grad()
    def exchange(self) -> None:
        """Give all workers the same new weights: the outer step. Every rank must call this after the same step."""
        for names in _groups(self.trained):
            ways = [(self.common[name] - self.trained[name]).flatten() for name in names]
            together = torch.cat(ways)
            if self.ranks.world > 1:
                dist.all_reduce(together)
            together /= self.ranks.world
            means = together.split([way.numel() for way in ways])
            for name, mean in zip(names, means, strict=True):
                gradient = mean.view_as(self.common[name])
                self.moments[name].mul_(self.momentum).add_(gradient)
                step = gradient + self.momentum * self.moments[name]
                self.common[name].sub_(self.lr * step)
                self.trained[name].copy_(self.common[name])

    # ---- what a checkpoint keeps, right after an exchange: all workers have the model's weights then

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File → tensors by name: the outer momentum once, and the state of each worker's own optimizers.

        The latter as if stacked over the workers, (workers, …), of which each rank holds its own.
        """
        names = {parameter: name for name, parameter in self.trained.items()}
        self.counts = []
        own = {}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    own[f"{names[parameter]}/{key}"] = self._one_of_workers(value)
        return {"outer": self.moments, "workers": own}

    def _one_of_workers(self, value: Tensor) -> Tensor:
        """A tensor as a row of one that is stacked over the workers, with the same memory if it is on the device."""
        here = value.to(self.ranks.device)
        if here is not value:  # AdamW may count its steps on the CPU
            self.counts.append((value, here))
        if self.ranks.world == 1:
            return here[None]
        from torch.distributed.device_mesh import DeviceMesh  # importing it takes a second
        from torch.distributed.tensor import DTensor, Shard

        if not hasattr(self, "mesh"):
            self.mesh = DeviceMesh(self.ranks.device.type, torch.arange(self.ranks.world))
        return DTensor.from_local(here[None], self.mesh, [Shard(0)], run_check=False)

    def take_restored(self) -> None:
        """Go on from what has been read into `tensors`; the model has its weights already."""
        for value, restored in self.counts:
            value.copy_(restored)
        for name, parameter in self.trained.items():
            self.common[name].copy_(parameter.detach())


def _groups(trained: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names of all parameters, in groups of at most `MOST_AT_ONCE` numbers or of a single parameter."""
    group: list[str] = []
    n_numbers = 0
    for name, parameter in trained.items():
        if group and n_numbers + parameter.numel() > MOST_AT_ONCE:
            yield group
            group = []
            n_numbers = 0
        group.append(name)
        n_numbers += parameter.numel()
    if group:
        yield group


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer create its state, all zero: by a step on gradients that are zero, at a learning rate of zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None
        for value in optimizer.state[parameter].values():
            value.zero_()
