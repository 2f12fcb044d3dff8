"""SwiGLU against its specification: forward, gradients, layouts, torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.shared import launch
from kernels.swiglu import _backward_op, _op, block_settings, swiglu
from tests.kernels.check import DEVICE, DTYPES, compare, draw, error, layouts, poisoned, run  # noqa: F401

spec = reference.swiglu


def inputs(*shape, dtype=torch.float32, seed=0):
    """gate, up and the gradient of the output; gates up to ±8, beyond which SiLU is a straight line."""
    scales = (2.0, 1.0, 1.0)
    return [draw(*shape, dtype=dtype, seed=seed + i, scale=scale) for i, scale in enumerate(scales)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 100, 512, 2048, 2816, 11008])
def test_agrees_with_the_reference(width, dtype, poisoned):  # noqa: F811
    gate, up, grad = inputs(5, width, dtype=dtype)
    compare(swiglu, spec, [gate, up], [grad])


@pytest.mark.parametrize("width", [100, 5632, 11008])
def test_the_settings_of_a_gpu(width, monkeypatch, poisoned):  # noqa: F811
    monkeypatch.setattr(launch, "INTERPRETED", False)
    gate, up, grad = inputs(2, 3, width, dtype=torch.bfloat16)
    compare(swiglu, spec, [gate, up], [grad])


@pytest.mark.parametrize(
    ("width", "columns"),
    [(2048, 2048), (5632, 512), (8192, 2048), (11008, 1024), (14336, 2048), (3000, 1024), (96, 128)],
)
def test_few_columns_of_a_block_are_idle(width, columns):
    assert block_settings("swiglu_forward", width, torch.device(DEVICE))["BLOCK"] == columns


@pytest.mark.parametrize("given_as", ["contiguous", "transposed", "rows apart", "inside"])
@pytest.mark.parametrize("grad_as", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout_of_input_and_gradient(given_as, grad_as, poisoned):  # noqa: F811
    gate, up, grad = inputs(3, 5, 24)
    compare(swiglu, spec, [layouts(gate)[given_as], layouts(up)[grad_as]], [layouts(grad)[grad_as]])


def test_two_halves_of_one_projection_and_a_gradient_of_stride_zero(poisoned):  # noqa: F811
    both = draw(2, 6, 80)
    grad = torch.ones((), device=DEVICE).expand(2, 6, 40)
    compare(lambda x: swiglu(*x.chunk(2, -1)), lambda x: spec(*x.chunk(2, -1)), [both], [grad])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_too_large_for_the_exponential(dtype):
    gate = torch.tensor([-1e4, -100.0, -90.0, 0.0, 90.0, 1e4], dtype=dtype, device=DEVICE)
    up, grad = torch.ones_like(gate), torch.ones_like(gate)
    (mine,), gradients = run(swiglu, [gate, up], [grad])
    assert mine.tolist() == gradients[1].tolist() == [0, 0, 0, 0, gate[4], gate[5]]
    assert gradients[0].tolist() == [0, 0, 0, 0.5, 1, 1]


def test_inputs_stay_as_they_were_and_runs_are_equal():
    gate, up, grad = inputs(40, 96)
    copies = gate.clone(), up.clone(), grad.clone()
    first, second = run(swiglu, [gate, up], [grad]), run(swiglu, [gate, up], [grad])
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip((gate, up, grad), copies, strict=True))


@pytest.mark.parametrize("shape", [(1, 32), (4, 16), (32,), (2, 2, 32)])
def test_two_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must have one shape"):
        swiglu(draw(4, 32), draw(*shape))


def test_no_rows():
    gate, up = (torch.empty(0, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    swiglu(gate, up).sum().backward()
    assert gate.grad.shape == up.grad.shape == (0, 16)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(1, 600), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape(rows, width, dtype, seed):
    gate, up, grad = inputs(rows, width, dtype=dtype, seed=seed)
    compare(swiglu, spec, [gate, up], [grad])


def test_is_a_sound_torch_op():
    gate, up, grad = inputs(4, 32)
    torch.library.opcheck(_op, (gate.requires_grad_(), up.requires_grad_()))
    torch.library.opcheck(_backward_op, (grad, gate.detach(), up.detach()))


def test_compiles_without_a_graph_break():
    gate, up, grad = inputs(4, 32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, [gate, up], [grad]), run(swiglu, [gate, up], [grad]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """131,073 rows of two halves of 8,192 numbers are 2³¹ and more: the last rows must be what they are alone."""
    both = torch.randn(131073, 16384, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(131073, 8192, device=DEVICE, dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)
    last = slice(-3, None)
    assert error(swiglu(gate, up)[last], swiglu(gate[last], up[last])) < 1e-2
    for whole, alone in zip(_backward_op(grad, gate, up), _backward_op(grad[last], gate[last], up[last]), strict=True):
        assert error(whole[last], alone) < 1e-2
