"""What all kernel tests share: where they run, how far off a result may be, and the ways to lay a tensor out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.shared import launch

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; the plain norm where nothing is expected; NaN and inf stay.

    Computed where `actual` is: a GPU takes a moment for what copying and summing on the host would make the longest
    part of a test.
    """
    actual, expected = actual.detach().double(), expected.detach().to(actual.device).double()
    assert actual.shape == expected.shape
    size = expected.norm()
    return ((actual - expected).norm() / (size if size > 0 else 1)).item()


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal numbers times scale, the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def trying(op: str, candidate: dict | None):
    """Context in which the kernels of an op take these settings; None: their own."""
    return launch.choosing(lambda name, key, default: (candidate or default) if name == op else default)


def run(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of function(*inputs), and the gradients of all floating inputs for the given output gradients."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [x for x in inputs if x.requires_grad]
    return outputs, list(
        torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    )


def compare(ours: Callable, reference: Callable, inputs: list[Tensor], grads: list[Tensor]) -> None:
    """Hold outputs and gradients of ours to the reference in fp64.

    Each within the tolerance of the inputs' lowest precision, and within twice the error that the reference itself
    makes in that precision (plus what rounding the result costs).
    """
    exact = run(reference, [x.double() if x.is_floating_point() else x for x in inputs], [g.double() for g in grads])
    same = run(reference, inputs, grads)
    mine = run(ours, inputs, grads)
    dtype = max((x.dtype for x in inputs if x.is_floating_point()), key=lambda d: torch.finfo(d).eps)
    for part, limit in ((0, FORWARD[dtype]), (1, GRADIENT[dtype])):
        for number, (a, b, c) in enumerate(zip(mine[part], same[part], exact[part], strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            allowed = min(limit, 2 * error(b, c) + torch.finfo(dtype).eps)
            allowed = max(allowed, 4 * torch.finfo(torch.float32).eps)
            if not c.any():  # nothing to be relative to: rounding of each number
                allowed = 4 * torch.finfo(dtype).eps * c.numel() ** 0.5
            got = error(a, c)
            kind = ("output", "gradient")[part]
            assert got <= allowed, f"{kind} {number}: error {got:.2e}, torch {error(b, c):.2e}, limit {allowed:.2e}"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values stored in other ways: contiguous, transposed, every second row, inside a larger tensor."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 1:-2] = x
    apart = torch.full((x.shape[0] * 2, *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
    apart[::2] = x
    return {
        "contiguous": x.contiguous(),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "rows apart": apart[::2],
        "inside": wide[..., 1:-2],
    }


@pytest.fixture
def poisoned():
    """Every tensor that torch hands out uninitialized is full of NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
