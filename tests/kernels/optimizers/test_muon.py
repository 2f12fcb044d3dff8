"""Muon's step against the formula: momentum, look-ahead, orthogonalization, decay, clipping, layouts, dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.errors import TritonError

from kernels import reference
from kernels.optimizers.muon import _op, muon
from tests.kernels.check import DEVICE, draw, error, layouts, poisoned, trying  # noqa: F401

MUON = (3.4445, -4.7750, 2.0315)
OPTIONS = dict(rate=0.1, momentum=0.9, decay=0.01, steps=5, coefficients=MUON)
SMALL = {"CHUNK": 512, "BLOCK": 128, "num_warps": 1}
BF16 = torch.bfloat16


def parts(shape=(24, 40), count=3, dtype=torch.float32, seed=0):
    """Parameters, gradients and momentum."""
    return [[draw(*shape, dtype=dtype, seed=seed + 10 * i + j) for i in range(count)] for j in range(3)]


def expected(params, grads, buffers, factor=1.0):
    """New parameters and momentum, in fp64."""
    new_params, new_buffers = [], []
    for w, g, m in zip(params, grads, buffers, strict=True):
        w, g, m = w.double(), factor * g.double(), m.double()
        m = 0.9 * m + g
        u = reference.newton_schulz((g + 0.9 * m)[None], 5, MUON)[0]
        new_params.append(w - 0.01 * w - 0.1 * u)
        new_buffers.append(m)
    return new_params, new_buffers


def moved(new, old):
    return [a.double() - b.double() for a, b in zip(new, old, strict=True)]


@pytest.mark.parametrize("chosen", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33), (1, 7)], ids=str)
def test_agrees_with_the_formula(shape, chosen, poisoned):  # noqa: F811
    lists = parts(shape)
    copies = [[x.clone() for x in column] for column in lists]
    new_params, new_buffers = expected(*lists)
    with trying("muon", chosen):
        muon(*lists, **OPTIONS)
    for p, m, old, w, b in zip(lists[0], lists[2], copies[0], new_params, new_buffers, strict=True):
        assert error(m, b) < 1e-6
        assert error(p.double() - old.double(), w - old.double()) < 3e-2  # O is computed in bf16
    assert all(torch.equal(g, h) for g, h in zip(lists[1], copies[1], strict=True))


def test_without_a_gradient_only_decay_is_left():
    lists = parts()
    for column in lists[1:]:
        for x in column:
            x.zero_()
    before = [p.clone() for p in lists[0]]
    muon(*lists, **OPTIONS)
    for p, old in zip(lists[0], before, strict=True):
        assert error(p, 0.99 * old.double()) < 1e-7


def test_clipping_factor_is_read_from_the_device():
    ours, theirs, factor = parts(), parts(), torch.tensor(0.25, device=DEVICE)
    muon(*ours, grad_scale=factor, **OPTIONS)
    muon(theirs[0], [g * factor for g in theirs[1]], theirs[2], **OPTIONS)
    for a, b in zip(ours[0] + ours[2], theirs[0] + theirs[2], strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_other_dtypes(dtype, poisoned):  # noqa: F811
    lists = parts(dtype=dtype)
    new_params, new_buffers = expected(*lists)
    muon(*lists, **OPTIONS)
    for p, m, w, b in zip(lists[0], lists[2], new_params, new_buffers, strict=True):
        assert p.dtype == m.dtype == dtype and error(m, b) < 5e-3 and error(p, w) < 5e-3


@pytest.mark.parametrize("which", range(3), ids=["parameter", "gradient", "momentum"])
@pytest.mark.parametrize("layout", ["transposed", "rows apart", "inside"])
def test_any_layout(which, layout, poisoned):  # noqa: F811
    lists, same = parts(), parts()
    lists[which][1] = layouts(lists[which][1])[layout]
    muon(*lists, **OPTIONS)
    muon(*same, **OPTIONS)
    for a, b in zip(lists, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_that_begin_anywhere():
    lists, same = parts(), parts()
    bucket = torch.zeros(3 * 960 + 3, device=DEVICE)
    for i in range(3):
        view = bucket[i * 961 + 1 : i * 961 + 961].view(24, 40)
        lists[1][i] = view.copy_(lists[1][i])
    muon(*lists, **OPTIONS)
    muon(*same, **OPTIONS)
    assert all(torch.equal(x, y) for x, y in zip(lists[0], same[0], strict=True))


# From 4 on: one number of momentum can be a difference of equals.
@settings(max_examples=15, deadline=None)
@given(shape=st.tuples(st.integers(4, 60), st.integers(4, 60)), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_shape(shape, count, seed):
    lists = parts(shape, count, seed=seed)
    new_buffers = expected(*lists)[1]
    with trying("muon", SMALL):
        muon(*lists, **OPTIONS)
    assert all(error(m, b) < 1e-6 for m, b in zip(lists[2], new_buffers, strict=True))
    assert all(p.isfinite().all() for p in lists[0])


def test_nothing_to_do_and_what_does_not_go_together():
    muon([], [], [], **OPTIONS)
    muon(*parts((0, 4)), **OPTIONS)
    a, b = parts(), parts((40, 24))
    with pytest.raises(ValueError, match="one shape"):
        muon(*(x + y for x, y in zip(a, b, strict=True)), **OPTIONS)
    with pytest.raises(ValueError, match="one shape"):
        muon(a[0], a[1], [m.bfloat16() for m in a[2]], **OPTIONS)
    with pytest.raises(ValueError, match="may be fp32"):
        muon(*([x.double() for x in column] for column in a), **OPTIONS)


def test_is_a_sound_torch_op_and_runs_are_equal():
    torch.library.opcheck(_op, (*parts(count=2), None, 0.1, 0.9, 0.01, 2, list(MUON)))
    first, second = parts(), parts()
    muon(*first, **OPTIONS)
    muon(*second, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_settings_that_would_write_beyond_a_chunk_are_refused():
    with trying("muon", {"CHUNK": 64, "BLOCK": 128, "num_warps": 4}), pytest.raises(TritonError):
        muon(*parts(), **OPTIONS)


def test_compiles_without_a_graph_break():
    def step(params, grads, buffers):
        muon(params, grads, buffers, **OPTIONS)
        return [p * 2 for p in params]

    eager, compiled = parts(), parts()
    a = step(*eager)
    b = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(x, y) for x, y in zip(a + eager[2], b + compiled[2], strict=True))
