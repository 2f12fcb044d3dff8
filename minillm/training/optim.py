"""Optimizers, and what a run must know of each to choose it by name: `OPTIMIZERS`.

On GPUs where our kernels run, they compute the steps of AdamW (one launch for all tensors) and Muon; elsewhere AdamW is
torch's and Muon is written here. The state is the same, so a checkpoint can move from one to the other.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minillm.base.errors import UserError
from minillm.distributed.owners import deal, group_of_copies, on_owners, results_of_all
from minillm.distributed.shards import cut_of, is_sharded, local, settle, whole_shape
from minillm.model import ops
from minillm.model.layouts import orthogonalizing
from minillm.tuning.options import TUNING_LR

# Coefficients of the quintic iteration, chosen by its author for speed: singular values end in about
# [0.7, 1.2], not at 1 (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

NEWTON_SCHULZ_STEPS = 5
MUON_ELEMENTS = 1 << 26  # numbers orthogonalized at a time: the iteration needs three copies of them


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Bring all singular values of each matrix near 1, by Newton–Schulz iteration.

    matrices: (n, rows, columns), any float dtype; returns the same shape and dtype. Works in bf16 on
    CUDA (the iteration is stable there) and in fp32 on a CPU.
    """
    x = matrices.to(_iterated_in(matrices))  # (n, rows, columns)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT  # the Gram matrix of the shorter side is the smaller one
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values into [0, 1]
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):  # each singular value s becomes a s + b s³ + c s⁵
        gram = x @ x.mT  # (n, shorter, shorter)
        x = a * x + (b * gram + c * gram @ gram) @ x
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype)


def _iterated_in(matrices: Tensor) -> torch.dtype:
    """The dtype that holds all of an orthogonalized matrix, and in which it is sent: see `orthogonalize`."""
    return torch.bfloat16 if matrices.is_cuda else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: w ← w − lr (0.2 √max(rows, columns) · O(g + βm) + λ w), m ← βm + g.

    For the matrices inside the layers, and stacks of them, as a layer of experts may have. The factor gives an update
    the root mean square of AdamW's, so that both can share one learning rate and weight decay (Liu et al.
    2025, arXiv:2502.16982, section 2.2).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]

            # of a sharded matrix each rank has some rows; of a sharded stack some matrices, each of them whole
            cut = [p for p in params if is_sharded(p) and p.dim() == 2]
            for kind in dict.fromkeys(map(_kind, cut)):
                self._update_parts([p for p in cut if _kind(p) == kind], group)
            whole = [p for p in params if not (is_sharded(p) and p.dim() == 2)]
            if whole:
                self._update_whole(whole, group)

    def _update_whole(self, params: list[Tensor], group: dict) -> None:
        """Step matrices, and stacks of them, that are here as wholes."""
        matrices = Matrices(
            matrices_of([local(p) for p in params]),
            matrices_of([local(p.grad) for p in params]),
            matrices_of(self._buffers(params)),
        )
        copies = group_of_copies(params[0])
        if copies is not None and pays_to_share(matrices.params):
            _step_together(matrices, group, copies)
            return
        for batch in matrices.batches(range(len(matrices.params))):
            batch.apply(_orthogonalized(*batch.look_ahead(group["momentum"])), group)

    def _update_parts(self, params: list[Tensor], group: dict) -> None:
        """Step sharded parameters of one shape, each rank its own parts.

        All but the orthogonalization is done number by number. That needs whole matrices, each of which one rank puts
        together: one rank's part of a matrix, orthogonalized alone, would be another step.
        """
        parts = [local(p) for p in params]
        updates = _look_ahead([local(p.grad) for p in params], self._buffers(params), group["momentum"])
        updates = [update.to(_iterated_in(update)) for update in updates]  # as what is done there, so it travels
        updates = on_owners(params, updates, lambda matrix: orthogonalize(matrix[None])[0])
        updates = [update.to(parts[0].dtype) for update in updates]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(whole_shape(params[0]))))

    def _buffers(self, params: list[Tensor]) -> list[Tensor]:
        """The momentum of each parameter, or of what this rank holds of it."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(local(p))
        return [self.state[p]["momentum_buffer"] for p in params]


class Matrices(NamedTuple):
    """Matrices with gradients and momentum. Those of a batch have one shape, and are computed on as one tensor."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]

    def batches(self, numbers: Iterable[int]) -> "Iterator[Matrices]":
        """Some of them by shape, each time so many that the iteration has memory for its copies."""
        by_shape: dict[torch.Size, list[int]] = {}
        for number in numbers:
            by_shape.setdefault(self.params[number].shape, []).append(number)
        for shape, alike in by_shape.items():
            n_at_once = max(1, MUON_ELEMENTS // max(1, shape.numel()))
            for begin in range(0, len(alike), n_at_once):
                members = alike[begin : begin + n_at_once]
                yield Matrices(*([column[number] for number in members] for column in self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, rows, columns) of a batch."""
        return len(self.params), *self.params[0].shape

    def look_ahead(self, momentum: float) -> tuple[Tensor, Tensor | None]:
        """m ← βm + g of a batch; returns g + βm, (n, rows, columns), and from our kernels the norms (n,) of these."""
        if ops.fused(self.params[0]):
            return ops.muon().look_ahead(*self, momentum)
        return torch.stack(_look_ahead(self.grads, self.buffers, momentum)), None

    def apply(self, updates: Tensor, group: dict) -> None:
        """Step a batch by its orthogonalized updates (n, rows, columns)."""
        decay = group["lr"] * group["weight_decay"]
        rate = group["lr"] * 0.2 * math.sqrt(max(self.params[0].shape))
        if ops.fused(self.params[0]):
            ops.muon().apply(self.params, updates, rate, decay)
        else:
            torch._foreach_mul_(self.params, 1 - decay)
            torch._foreach_add_(self.params, list(updates.to(self.params[0].dtype).unbind(0)), alpha=-rate)


def matrices_of(tensors: list[Tensor]) -> list[Tensor]:
    """The matrices of a list, and those of which its stacks (n, rows, columns) consist, sharing their memory."""
    return [matrix for tensor in tensors for matrix in ([tensor] if tensor.dim() == 2 else tensor.unbind(0))]


def _kind(p: Tensor) -> tuple:
    """What sharded matrices must have in common to be stepped at once: their shape, and how they are cut."""
    return whole_shape(p), cut_of(p).dim


def _look_ahead(grads: list[Tensor], buffers: list[Tensor], momentum: float) -> list[Tensor]:
    """Nesterov's update of each, g + βm after m ← βm + g."""
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads)
    return torch._foreach_add(grads, buffers, alpha=momentum)


def _orthogonalized(updates: Tensor, norms: Tensor | None) -> Tensor:
    """`orthogonalize`, by our kernels where these have given the norms."""
    if norms is None:
        return orthogonalize(updates)
    return ops.muon().newton_schulz(updates, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ, norms)


# ---- ranks with copies of the same matrices

# Sharing pays from so many operations for each byte of a result on: about what a rank computes while it sends a byte.
# cpu: measured with two gloo ranks on one core, CPU time of both for a step, shared and not: 396 operations a byte
# (width 64) 8.4 and 8.0 ms, 753 (preset tiny) 54 and 93 ms, 1,522 (5m) 468 and 870 ms. cuda: calculated, 128 TFLOP/s
# over the 25.6 GB/s of a card with PCIe; with NVLink a quarter would do, but matrices as small as that take no time.
OPERATIONS_A_BYTE = {"cpu": 400, "cuda": 5000}


def pays_to_share(matrices: list[Tensor]) -> bool:
    """Whether orthogonalizing takes longer than sending the results: a matter of sizes alone, so alike on all ranks.

    An m × n matrix takes 20 m + 10 m²/n operations a number, m ≤ n; so the shorter sides decide, and the factors of an
    adapter, of 8 rows, stay with all ranks. What R ranks save is (1 − 1/R) of both.
    """
    operations = sum(orthogonalizing(*matrix.shape) for matrix in matrices)
    n_bytes = sum(matrix.numel() for matrix in matrices) * _iterated_in(matrices[0]).itemsize
    return operations > OPERATIONS_A_BYTE.get(matrices[0].device.type, math.inf) * n_bytes


def _step_together(matrices: Matrices, group: dict, copies) -> None:
    """Step matrices of which all ranks of a group have copies: each rank orthogonalizes some of them for all.

    Of R ranks each is spared 1 − 1/R of these products. For N numbers of b bytes (2 in bfloat16) it sends b N/R bytes,
    and holds all results at once, b N bytes: as much as autocast's copies of the matrices took before. Every rank keeps
    the whole momentum, so that a checkpoint is the same as on one rank; that is 14 of the step's 24 bytes of memory
    traffic a number.
    """
    # the same momentum on all ranks; the update of each batch from its owner
    costs = tuple(orthogonalizing(*matrix.shape) for matrix in matrices.params)
    batches = [list(matrices.batches(numbers)) for numbers in deal(costs, copies.size())]  # of each owner
    own = []
    for owner, of_owner in enumerate(batches):
        for batch in of_owner:
            ahead = batch.look_ahead(group["momentum"])
            if owner == copies.rank():
                own.append(_orthogonalized(*ahead))

    # all updates on all ranks
    like = matrices.params[0].new_empty(0, dtype=_iterated_in(matrices.params[0]))
    results = results_of_all(own, [[batch.shape for batch in of_owner] for of_owner in batches], like, copies)
    for of_owner, updates_of_owner in zip(batches, results, strict=True):
        for batch, updates in zip(of_owner, updates_of_owner, strict=True):
            batch.apply(updates, group)


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); our kernel computes its step where it runs.

    params: a list of groups, all on one device.
    """

    def __init__(self, params: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.95)):
        first = params[0]["params"][0]
        # torch's fused step counts on the device; ours counts on the CPU, where the step is a number to compute with
        super().__init__(params, lr=lr, betas=betas, fused=not ops.fused(first))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            by_kernel = ops.fused(params[0]) and not group["fused"]
            if not by_kernel and not is_sharded(params[0]):
                return super().step(closure)
            self._step_at_once(params, group, by_kernel)

    def _step_at_once(self, params: list[Tensor], group: dict, by_kernel: bool) -> None:
        """One launch, of our kernel or of torch's, for all parameters that have taken equally many steps.

        Of a sharded parameter each rank has its own part of value, gradient and moments, and steps that.
        """
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        by_step: dict[int, list[Tensor]] = {}  # one entry, unless parameters joined later
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(local(p))
                state["exp_avg_sq"] = torch.zeros_like(local(p))
            by_step.setdefault(int(state["step"]) + 1, []).append(p)
        for step, members in sorted(by_step.items()):
            states = [self.state[p] for p in members]
            # make all step counts at once: adding 1 to each tensor takes 2 µs a parameter, and the GPU would wait
            counts = torch.full((len(states),), float(step)).unbind()
            for state, count in zip(states, counts, strict=True):
                state["step"] = count
            tensors = [
                [local(p) for p in members],
                [local(p.grad) for p in members],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            ]
            if by_kernel:
                ops.adamw(*tensors, step=step, **options)
            else:
                _adamw_of_torch(*tensors, step=step, **options)


def _adamw_of_torch(*tensors: list[Tensor], step: int, betas: tuple[float, float], **options) -> None:
    """torch's fused step for lists of parameters, gradients and both moments; see `ops.adamw`."""
    before = [torch.full((), step - 1.0, device=p.device) for p in tensors[0]]  # it counts by itself
    beta1, beta2 = betas
    how = dict(amsgrad=False, maximize=False, fused=True)
    adamw(*tensors, [], before, beta1=beta1, beta2=beta2, **how, **options)


# ---- which optimizer a name means, and its learning rate


@dataclass(frozen=True)
class Choice:
    """An optimizer that --optimizer can name: the classes that step the parameters, and its learning rates."""

    others: Callable[..., torch.optim.Optimizer]  # for all parameters, or all but those of `matrices`
    matrices: Callable[..., torch.optim.Optimizer] | None = None  # for the matrices inside the layers
    lr: float | None = None  # best peak rate of those tried at width 128 (docs/en/defaults.md), times √width
    adapter_lr: dict[str, float] = field(default_factory=dict)  # --tune → peak rate times width


OPTIMIZERS = {
    "muon": Choice(AdamW, matrices=Muon, lr=0.09, adapter_lr=TUNING_LR),  # its updates are as large as AdamW's
    "adamw": Choice(AdamW, lr=0.045, adapter_lr=TUNING_LR),
}


def default_lr(kind: str, tune: str, dim: int) -> float:
    """The peak learning rate of --optimizer `kind` with --tune `tune` at width `dim`, unless --lr gives one.

    For existing weights it falls as 1/√width from the width it was measured at, which is a rule of thumb, not measured;
    for new parameters as 1/width (`TUNING_LR`). Raises `UserError` if none is known.
    """
    choice = OPTIMIZERS[kind]
    if tune in ("full", "freeze"):
        if choice.lr is not None:
            return choice.lr / math.sqrt(dim)
    elif tune in choice.adapter_lr:
        return choice.adapter_lr[tune] / dim
    raise UserError(f"--optimizer {kind}: no learning rate is known for it with --tune {tune}; give one by --lr")


def optimizers_of(training_config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a model that --optimizer, --lr and --weight_decay ask for."""
    lr, weight_decay = training_config.lr, training_config.weight_decay
    return build_optimizers(model, training_config.optimizer, lr=lr, weight_decay=weight_decay)


def build_optimizers(model: nn.Module, kind: str, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: for "adamw" one, for "muon" Muon for the layers' matrices and AdamW for the rest.

    Weight decay is on matrices only (a norm's gain or a bias has nothing to gain from being small).
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"--optimizer {kind}: choose one of {', '.join(OPTIMIZERS)}")
    settle(model)  # a sharded model lists its own parts again, also if it has answered questions before
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("nothing to train: every parameter is frozen")
    choice = OPTIMIZERS[kind]
    optimizers = []

    # the matrices inside the layers, if the choice has another optimizer for them
    matrices = []
    if choice.matrices is not None:
        matrices = [p for name, p in trained if p.dim() in (2, 3) and ".layers." in f".{name}"]
    if matrices:
        optimizers.append(choice.matrices(matrices, lr=lr, weight_decay=weight_decay))

    # the rest, in two groups: with weight decay and without
    ids_of_matrices = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in ids_of_matrices]
    groups = [
        dict(params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(choice.others(groups, lr=lr))
    return optimizers
