"""The symmetric products and Newton–Schulz iteration against plain torch, by relative norm; symmetric to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.optimizers.newton_schulz import _op, newton_schulz, symmetric_product
from tests.kernels.check import DEVICE, DTYPES, FORWARD, draw, error, layouts, poisoned, trying  # noqa: F401

BF16 = torch.bfloat16
MUON = (3.4445, -4.7750, 2.0315)
SHAPES = [(1, 1, 1), (2, 3, 5), (2, 64, 64), (1, 130, 40), (2, 40, 200), (1, 129, 257)]
STACKED = dict(STACK=2, BLOCK=32, STEP=32, num_warps=4, num_stages=2)
SINGLE = dict(STACK=1, BLOCK=64, STEP=64, num_warps=4, num_stages=2)


def gram(x):
    return x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x


def polynomial(g, coefficients):
    a, b, c = coefficients
    return a * torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) + b * g + c * g @ g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_agree_with_plain_torch_and_are_symmetric(shape, dtype, poisoned):  # noqa: F811
    x, scale = draw(*shape, dtype=dtype), torch.linspace(0.5, 2, shape[0], device=DEVICE)
    exact = gram(x.double())
    for factor in (None, scale):
        g = symmetric_product(x, factor)
        wanted = exact if factor is None else exact * factor.double()[:, None, None]
        assert g.dtype == dtype and torch.equal(g, g.mT) and error(g, wanted) <= FORWARD[dtype]
        assert error(g, wanted) <= 2 * error(wanted.to(dtype), wanted) + 1e-6
        s = (g.float() / g.float().norm(dim=(1, 2), keepdim=True)).to(dtype)
        p = symmetric_product(s, factor, MUON)
        wanted = polynomial(s.double(), MUON) * (1 if factor is None else factor.double()[:, None, None])
        assert torch.equal(p, p.mT) and error(p, wanted) <= 2 * error(wanted.to(dtype), wanted) + 1e-6


@pytest.mark.parametrize("chosen", [STACKED, SINGLE, None], ids=["stacked", "single", "shipped"])
@pytest.mark.parametrize("shape", [(2, 96, 64), (1, 72, 160), (1, 161, 200), (1, 264, 272)], ids=str)
def test_every_block_is_written_once_whatever_its_size(shape, chosen, poisoned):  # noqa: F811
    """Both with descriptors and, where rows are no multiple of 16 bytes, with pointers."""
    x = draw(*shape, dtype=BF16)
    with trying("newton_schulz", chosen):
        g = symmetric_product(x)
        assert torch.equal(g, g.mT) and error(g, gram(x.double())) < 5e-3
        g = (g.float() / g.float().norm(dim=(1, 2), keepdim=True)).to(BF16)
        p = symmetric_product(g, None, MUON)
        assert torch.equal(p, p.mT) and error(p, polynomial(g.double(), MUON)) < 5e-3


@pytest.mark.parametrize("shape", [(3, 16, 32), (3, 32, 16), (2, 24, 24)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout(layout, shape, poisoned):  # noqa: F811
    for dtype in (torch.float32, BF16):
        x = layouts(draw(*shape, dtype=dtype))[layout]
        assert error(symmetric_product(x), gram(x.double())) <= FORWARD[dtype]
        assert error(symmetric_product(x.mT), gram(x.mT.double())) <= FORWARD[dtype]
    one = draw(*shape[1:], dtype=BF16).expand(*shape)
    assert error(symmetric_product(one), gram(one.double())) <= FORWARD[BF16]


@pytest.mark.parametrize("shape", [(2, 48, 48), (1, 40, 100), (2, 100, 40), (1, 5, 3)], ids=str)
def test_newton_schulz_agrees_with_the_reference(shape, poisoned):  # noqa: F811
    x = draw(*shape)
    exact = reference.newton_schulz(x.double(), 5, MUON)
    copy = x.clone()
    assert error(newton_schulz(x, 5, MUON), exact) < 1e-4  # five steps enlarge what rounding does by 3.4 each
    assert torch.equal(x, copy)
    half = x.bfloat16()
    torchs = error(reference.newton_schulz(half, 5, MUON), exact)
    assert error(newton_schulz(half, 5, MUON), exact) <= torchs + 1e-3
    known = newton_schulz(half, 5, MUON, half.float().norm(dim=(1, 2)))
    assert torch.equal(known, newton_schulz(half, 5, MUON))


def test_singular_values_end_near_one_and_zero_stays_zero():
    u = newton_schulz(draw(2, 64, 96, scale=1e-3), 5, MUON)
    values = torch.linalg.svdvals(u.cpu())
    assert values.max() < 1.3 and values.median() > 0.6
    assert not newton_schulz(torch.zeros(1, 8, 8, dtype=BF16, device=DEVICE), 5, MUON).any()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    chosen=st.sampled_from([STACKED, None]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, chosen, seed):
    x = draw(*shape, dtype=dtype, seed=seed)
    with trying("newton_schulz", chosen):
        g = symmetric_product(x)
        assert torch.equal(g, g.mT) and error(g, gram(x.double())) <= FORWARD[dtype]


def test_two_runs_are_equal_and_no_matrices_are_none():
    x = draw(2, 70, 90, dtype=BF16)
    assert torch.equal(newton_schulz(x, 3, MUON), newton_schulz(x, 3, MUON))
    assert symmetric_product(x[:0]).shape == (0, 70, 70)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="give"):
        symmetric_product(draw(4, 4))
    with pytest.raises(ValueError, match="square"):
        symmetric_product(draw(1, 4, 5), None, MUON)
    with pytest.raises(ValueError, match="float16"):
        newton_schulz(draw(1, 4, 5, dtype=torch.float16), 5, MUON)


def test_numbers_of_squares_are_counted_along_the_rows():
    """As the kernel does, in fp32: the root is exact enough for a triangle of 4,000 rows."""
    number = torch.arange(4000 * 4001 // 2)
    row = ((torch.sqrt(8.0 * number.float() + 1.0) - 1.0) * 0.5).int()
    row = torch.where(row * (row + 1) // 2 > number, row - 1, row)
    row = torch.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    expected = torch.repeat_interleave(torch.arange(4000), torch.arange(1, 4001))
    assert torch.equal(row.long(), expected)


def test_is_a_sound_torch_op():
    torch.library.opcheck(_op, (draw(2, 16, 24), None, 0.0, 0.0, 0.0, False))
    torch.library.opcheck(_op, (draw(2, 16, 16), torch.ones(2, device=DEVICE), *MUON, True))


def test_compiles_without_a_graph_break():
    def ours(x):
        return newton_schulz(x, 2, MUON)

    x = draw(2, 16, 24, dtype=BF16)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))


@pytest.mark.gpu
def test_a_batch_of_more_elements_than_32_bits_count():
    x = torch.zeros(520, 2048, 2048, dtype=BF16, device="cuda")
    x[-1] = draw(2048, 2048, dtype=BF16)
    assert error(symmetric_product(x)[-1], gram(x[-1:].double())[0]) < 5e-3
