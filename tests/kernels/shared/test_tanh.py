"""tanh against torch's in fp64."""

import math

import pytest
import torch
import triton
import triton.language as tl

from kernels.shared import launch
from kernels.shared.tanh import tanh
from tests.kernels.check import DEVICE


@triton.jit
def _kernel(X, Y, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tanh(tl.load(X + at), EXACT))


def ours(x: torch.Tensor, exact: bool) -> torch.Tensor:
    y = torch.empty_like(x)
    launch.run(_kernel, (1,), x, y, EXACT=exact, BLOCK=len(x))
    return y.double().cpu()


def test_precision():
    size = torch.logspace(-6, 2, 2048, dtype=torch.float64)
    x = torch.cat((size, -size)).to(DEVICE, torch.float32)
    right = torch.tanh(x.double().cpu())
    assert ((ours(x, True) - right) / right).abs().max() < 1e-6
    assert (ours(x, False) - right).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_no_number_and_what_is_too_large(exact):
    x = torch.tensor([0.0, 3e38, math.inf, -math.inf, math.nan, -3e38, 1e-45, -0.0], device=DEVICE)
    y = ours(x, exact)
    assert y[[0, 1, 2, 3, 5, 7]].tolist() == [0, 1, 1, -1, -1, 0] and y[4].isnan() and abs(y[6]) < 1e-40
