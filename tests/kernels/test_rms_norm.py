"""RMSNorm against its specification: forward, gradients, layouts, torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.rms_norm import FUSED_WIDTH, _op, add_rms_norm, backward, forward, rms_norm
from tests.kernels.check import DEVICE, DTYPES, compare, draw, error, layouts, poisoned, run  # noqa: F401

EPS = 0.1  # large enough that the gradient of a row of one or two numbers is no difference of equals
WIDTHS = [1, 3, 64, 100, 768, 1000, 2048, 4096, 8192]


def ours(x, w):
    return rms_norm(x, w, EPS)


def spec(x, w):
    return reference.rms_norm(x, w, EPS)


def ours_added(x, d, w):
    return add_rms_norm(x, d, w, EPS)


def spec_added(x, d, w):
    return reference.add_rms_norm(x, d, w, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_agrees_with_the_reference(width, dtype, poisoned):  # noqa: F811
    x, w, g = draw(7, width, dtype=dtype), draw(width, dtype=dtype, seed=1), draw(7, width, dtype=dtype, seed=2)
    compare(ours, spec, [x, w], [g])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 768])
def test_with_the_residual_agrees_with_the_reference(width, dtype, poisoned):  # noqa: F811
    x, d, w = draw(5, width, dtype=dtype), draw(5, width, dtype=dtype, seed=1), draw(width, dtype=dtype, seed=2)
    compare(ours_added, spec_added, [x, d, w], [draw(5, width, dtype=dtype, seed=s) for s in (3, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [FUSED_WIDTH + 1, 32768])
def test_wide_rows(width, dtype, poisoned):  # noqa: F811
    x, d, *grads = (draw(3, width, dtype=dtype, seed=seed) for seed in range(4))
    w = draw(width, dtype=dtype, seed=4)
    compare(ours, spec, [x, w], grads[:1])
    compare(ours_added, spec_added, [x, d, w], grads)


@pytest.mark.parametrize("width", [100, FUSED_WIDTH + 1])
def test_a_weight_that_is_not_trained(width, poisoned):  # noqa: F811
    w = draw(width, seed=1)
    compare(lambda x: ours(x, w), lambda x: spec(x, w.to(x.dtype)), [draw(3, width)], [draw(3, width, seed=2)])


@pytest.mark.parametrize("given_as", ["contiguous", "transposed", "rows apart", "inside"])
@pytest.mark.parametrize("grad_as", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout_of_input_and_gradient(given_as, grad_as, poisoned):  # noqa: F811
    x, g, w = layouts(draw(3, 5, 24))[given_as], layouts(draw(3, 5, 24, seed=1))[grad_as], draw(24, seed=2)
    compare(ours, spec, [x, w], [g])


def test_a_gradient_of_stride_zero(poisoned):  # noqa: F811
    x, w = draw(6, 40), draw(40, seed=1)
    compare(ours, spec, [x, w], [torch.ones((), device=DEVICE).expand(6, 40)])


def test_only_the_sum_or_only_the_norm_may_be_used(poisoned):  # noqa: F811
    x, d, w = draw(4, 32), draw(4, 32, seed=1), draw(32, seed=2)
    for number in (0, 1):

        def mine(x, d, w, number=number):
            return add_rms_norm(x, d, w, EPS)[number] + 0 * w.sum()

        def theirs(x, d, w, number=number):
            return reference.add_rms_norm(x, d, w, EPS)[number] + 0 * w.sum()

        compare(mine, theirs, [x, d, w], [draw(4, 32, seed=3)])


def test_mixed_dtypes_of_a_residual_stream(poisoned):  # noqa: F811
    x, d, w = draw(4, 64), draw(4, 64, dtype=torch.bfloat16, seed=1), draw(64, seed=2)
    x.requires_grad_(), d.requires_grad_()
    s, y = add_rms_norm(x, d, w, EPS, torch.bfloat16)
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert error(s, x + d) < 1e-7 and error(y, spec(x + d, w)) < 1e-2
    (s.sum() + y.float().sum()).backward()
    assert x.grad.dtype == torch.float32 and d.grad.dtype == torch.bfloat16


def test_inputs_stay_as_they_were_and_runs_are_equal():
    x, w, g = draw(40, 96), draw(96, seed=1), draw(40, 96, seed=2)
    copies = x.clone(), w.clone(), g.clone()
    first, second = run(ours, [x, w], [g]), run(ours, [x, w], [g])
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip((x, w, g), copies, strict=True))


@pytest.mark.parametrize(
    ("delta", "weight"), [((4, 32), (16,)), ((2, 32), (32,)), ((4, 16), (32,)), ((4, 32), (1, 32))]
)
def test_shapes_that_do_not_go_together_are_refused(delta, weight):
    with pytest.raises(ValueError, match="are needed"):
        ours_added(draw(4, 32), draw(*delta), draw(*weight))
    if weight != (32,):
        with pytest.raises(ValueError, match="needs a weight"):
            ours(draw(4, 32), draw(*weight))


def test_no_rows():
    x = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    w = draw(16).requires_grad_()
    rms_norm(x, w, EPS).sum().backward()
    assert x.grad.shape == (0, 16) and not w.grad.any()


# From 8 on: the gradient through one or two numbers is a difference of equals, in torch too.
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(8, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape(rows, width, dtype, seed):
    x, w = draw(rows, width, dtype=dtype, seed=seed), draw(width, dtype=dtype, seed=seed + 1)
    compare(ours, spec, [x, w], [draw(rows, width, dtype=dtype, seed=seed + 2)])


def test_is_a_sound_torch_op():
    x, w = draw(4, 32).requires_grad_(), draw(32, seed=1).requires_grad_()
    torch.library.opcheck(_op, (x, None, w, EPS, torch.float32))
    torch.library.opcheck(_op, (x, draw(4, 32, seed=2).requires_grad_(), w, EPS, torch.float32))


def test_compiles_without_a_graph_break():
    x, w, g = draw(4, 32), draw(32, seed=1), draw(4, 32, seed=2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, [x, w], [g]), run(ours, [x, w], [g]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8192, 16384])
def test_offsets_beyond_int32(width):
    """More than 2³¹ numbers: the last rows must be what they are alone."""
    x = torch.randn((1 << 31) // width + 5, width, device=DEVICE, dtype=torch.bfloat16)
    w = draw(width, dtype=torch.bfloat16)
    y, r = forward(x, None, w, EPS, x.dtype)[1:]
    dx, _, _ = backward(x, None, x, w, r, False)
    last = x[-3:].clone()
    assert error(y[-3:], spec(last, w)) < 1e-2
    assert error(dx[-3:], backward(last, None, last, w, r[-3:], False)[0]) < 1e-2
