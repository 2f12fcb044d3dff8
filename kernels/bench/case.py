"""What is compared: an op at one shape, the least work it takes, and everyone who can compute it.

A `Function` has outputs and gradients; an `Update` (an optimizer) writes to its tensors. Both tell how far a side's
results are from the reference (`errors`) and what is to be timed (`runs`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OURS = "ours"  # the names of our own sides begin so
LIMITS = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1e-2, 2e-2)}  # outputs, gradients


@dataclass(frozen=True)
class Place:
    """Where and how much is measured. size: "full", "quick" (few shapes), or "small" (to check on a CPU)."""

    device: torch.device
    dtype: torch.dtype
    size: str

    def choose(self, full, quick, small):
        return {"full": full, "quick": quick, "small": small}[self.size]

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers, others for each seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return numbers.normal_(0.0, scale, generator=generator)


@dataclass(frozen=True)
class Side:
    """Someone who can compute an op. load: imports what it needs and returns the function; may raise anything.

    compiled: its first call compiles for seconds. writes: it writes to its inputs, and so gets copies.
    """

    load: Callable[[], Callable]
    compiled: bool = False
    writes: bool = False


def compiled(load: Callable[[], Callable]) -> Side:
    """torch.compile of what `load` returns, for fixed shapes."""

    def compile() -> Callable:
        import torch._functorch.config as config

        config.donated_buffer = False  # else a graph's backward pass could be timed only once
        return torch.compile(load(), dynamic=False)

    return Side(compile, compiled=True)


def distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, summed in fp64; NaN stays."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float(), dtype=torch.float64)
    norm = torch.linalg.vector_norm(expected, dtype=torch.float64).clamp_min(1e-30)
    return (difference / norm).item()


def applied(function: Callable, inputs: list[Tensor], train: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves made from the inputs, and the outputs of function(*leaves)."""
    leaves = [x.detach().requires_grad_(train) for x in inputs]
    outputs = function(*leaves)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    return leaves, list(outputs)


def values(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of function(*inputs), and the inputs' gradients for those of the outputs (none given: none computed)."""
    leaves, outputs = applied(function, inputs, bool(grads))
    gradients = torch.autograd.grad(outputs, leaves, grads) if grads else ()
    return [x.detach() for x in outputs], list(gradients)


@dataclass
class Function:
    """A case with outputs and gradients.

    work: operations or bytes of "forward" and "backward", or of "step", both in one; unit: "TFLOP/s" or "GB/s".
    make: draws the inputs and the output gradients. reference: what is expected, computed in fp32 on each of `cuts`
    of inputs, outputs and gradients (where the whole would not fit in memory).
    """

    op: str
    name: str
    unit: str
    work: dict[str, float]
    make: Callable[[], tuple[list[Tensor], list[Tensor]]]
    reference: Callable
    sides: dict[str, Side]
    cuts: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x,)

    @functools.cached_property
    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.make()

    @functools.cached_property
    def expected(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        inputs, grads = self.tensors
        return [
            values(self.reference, [cut(x).float() for x in inputs], [cut(g).float() for g in grads])
            for cut in self.cuts
        ]

    def _copies(self, side: Side) -> tuple[list[Tensor], list[Tensor]]:
        inputs, grads = self.tensors
        if not side.writes:
            return inputs, grads
        return [x.clone() for x in inputs], [g.clone() for g in grads]

    def errors(self, function: Callable, side: Side) -> dict[str, tuple[float, float]]:
        """{what: (relative error, the most it may be)}"""
        outputs, gradients = values(function, *self._copies(side))
        output_limit, gradient_limit = LIMITS[self.tensors[0][0].dtype]
        errors = {}
        for number, actual in enumerate(outputs):
            right = [expected_outputs[number] for expected_outputs, _ in self.expected]
            errors[f"output {number}"] = self._largest_error(actual, right), output_limit
        for number, actual in enumerate(gradients):
            right = [expected_gradients[number] for _, expected_gradients in self.expected]
            errors[f"gradient {number}"] = self._largest_error(actual, right), gradient_limit
        return errors

    def _largest_error(self, actual: Tensor, right: list[Tensor]) -> float:
        """Of an output or gradient, over all cuts; right: of each cut."""
        if not actual.isfinite().all():
            return math.inf
        return max(distance(cut(actual), expected) for cut, expected in zip(self.cuts, right, strict=True))

    def runs(self, function: Callable, side: Side) -> dict[str, Callable[[], object]]:
        """{part: what is timed}, as in training: the forward pass keeps what the backward pass needs."""
        inputs, grads = self._copies(side)
        if "step" in self.work:
            return {"step": lambda: values(function, inputs, grads)}
        leaves, outputs = applied(function, inputs, bool(grads))
        parts: dict[str, Callable[[], object]] = {"forward": lambda: function(*leaves)}
        if "backward" in self.work:
            parts["backward"] = lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        return parts


@dataclass
class Update:
    """A case that writes to its tensors: an optimizer's step.

    make: lists of tensors, by name, "params" among them. A side's function binds such tensors and returns what makes
    a step. reference: what a step should make of params; compared for the first `few` tensors, by how far they move.
    """

    op: str
    name: str
    unit: str
    work: dict[str, float]
    make: Callable[[], dict[str, list[Tensor]]]
    reference: Callable[[dict[str, list[Tensor]]], list[Tensor]]
    sides: dict[str, Side]
    limit: float
    few: int = 3

    @functools.cached_property
    def tensors(self) -> dict[str, list[Tensor]]:
        return self.make()

    def errors(self, function: Callable, side: Side) -> dict[str, tuple[float, float]]:
        """As `Function.errors`."""
        some = {name: [x.clone() for x in tensors[: self.few]] for name, tensors in self.tensors.items()}
        before = [x.clone() for x in some["params"]]
        expected = self.reference(some)
        step = function(some)
        step()
        errors = {}
        for number, (old, new, right) in enumerate(zip(before, some["params"], expected, strict=True)):
            error = distance(new - old, right - old)
            errors[f"step of {number}"] = (math.inf if math.isnan(error) else error), self.limit
        return errors

    def runs(self, function: Callable, side: Side) -> dict[str, Callable[[], object]]:
        """As `Function.runs`."""
        return {"step": function(self.tensors)}
