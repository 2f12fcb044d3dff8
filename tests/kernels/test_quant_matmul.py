"""Products with quantized weights against their specification: both formats, decoded by tiles or in a scratch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quant_matmul, reference
from kernels.quant_matmul import _op, block_settings
from kernels.shared import launch
from tests.kernels.check import DEVICE, DTYPES, compare, draw, error, layouts, poisoned, run, trying  # noqa: F401

BITS = (8, 4)
LAYOUTS = [
    ("contiguous", "transposed"),
    ("transposed", "inside"),
    ("rows apart", "contiguous"),
    ("inside", "rows apart"),
]


def integers(low, high, *shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE, dtype)


def weight(bits, n, k, kept=3, seed=0, kept_dtype=torch.bfloat16):
    """Any codes at all, of entries about 1/√K in size."""
    size = k**-0.5
    if bits == 8:
        columns = torch.randperm(k, generator=torch.Generator().manual_seed(seed))[: min(kept, k)].sort().values
        codes = integers(-127, 128, n, k, dtype=torch.int8, seed=seed).index_fill_(1, columns.to(DEVICE), 0)
        scale = draw(n, seed=seed + 1).abs() * size / 60
        return [codes, scale, draw(n, len(columns), seed=seed + 2).to(kept_dtype), columns.to(DEVICE)]
    blocks = -(-k // 64)
    codes = integers(0, 256, n, blocks * 32, dtype=torch.uint8, seed=seed)
    scale = integers(-127, 128, n, blocks, dtype=torch.int8, seed=seed + 1)
    coarse = draw(-(-n * blocks // 256), seed=seed + 2).abs() * size / 200
    return [codes, scale, coarse, torch.full((1,), 2 * size, device=DEVICE)]


def hold(x, w, g):
    compare(lambda x: quant_matmul.quant_matmul(x, w), lambda x: reference.quant_matmul(x, w), [x], [g])


@pytest.fixture(params=["fused", "scratch"])
def way(request, monkeypatch):
    """Both ways for every shape, whatever a GPU would choose."""
    monkeypatch.setattr(quant_matmul, "is_fused", lambda *_: request.param == "fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_reference(bits, dtype, way, poisoned):  # noqa: F811
    x, g = draw(5, 200, dtype=dtype), draw(5, 72, dtype=dtype, seed=1)
    hold(x, weight(bits, 72, 200), g)


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_by_the_tiles_a_gpu_runs(forward, bits, rows, monkeypatch, poisoned):  # noqa: F811
    x, w, g = draw(rows, 320, dtype=torch.float16), weight(bits, 80, 320), draw(rows, 80, dtype=torch.float16, seed=1)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    chosen = block_settings(next(t for t in (16, 128) if rows <= t), bits, 2, forward, x.device)
    monkeypatch.undo()
    monkeypatch.setattr(quant_matmul, "is_fused", lambda *_: True)
    with trying(f"quant_matmul_{'forward' if forward else 'backward'}", chosen):
        hold(x, w, g)


@pytest.mark.parametrize("kept_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0, 1, 32, 45, 96])
def test_columns_kept(kept, kept_dtype, way, poisoned):  # noqa: F811
    hold(draw(3, 96), weight(8, 40, 96, kept, kept_dtype=kept_dtype), draw(3, 40, seed=1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("given_as", "grad_as"), LAYOUTS)
def test_any_layout_of_input_and_gradient(given_as, grad_as, bits, way, poisoned):  # noqa: F811
    x, g = layouts(draw(3, 2, 70))[given_as], layouts(draw(3, 2, 24, seed=1))[grad_as]
    hold(x, weight(bits, 24, 70), g)


@pytest.mark.parametrize("bits", BITS)
def test_a_gradient_of_stride_zero(bits, way, poisoned):  # noqa: F811
    hold(draw(6, 40), weight(bits, 24, 40), torch.ones((), device=DEVICE).expand(6, 24))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 40), (40,), (2, 0, 40)])
def test_no_row_and_no_batch(shape, bits, way):
    hold(draw(*shape), weight(bits, 24, 40), draw(*shape[:-1], 24, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_one_number(bits, dtype, way):
    x, w = draw(1, 1, dtype=dtype), weight(bits, 1, 1, kept=0)
    assert torch.equal(quant_matmul.quant_matmul(x, w), reference.quant_matmul(x, w))


# From a few on: a single number can be a difference of equals, in torch too.
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(4, 40), n=st.integers(8, 90), k=st.integers(8, 300), bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES), fused=st.booleans(), kept=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(rows, n, k, bits, dtype, fused, kept, seed):
    x, g = draw(rows, k, dtype=dtype, seed=seed), draw(rows, n, dtype=dtype, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_matmul, "is_fused", lambda *_: fused)
        hold(x, weight(bits, n, k, kept, seed), g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_scratch_is_the_specifications_weight(bits, dtype, poisoned):  # noqa: F811
    w = weight(bits, 70, 150)
    assert torch.equal(quant_matmul.dequantize(w, 150, dtype), reference.dequantize(w, 150).to(dtype))


def test_which_way_is_taken():
    def fused(rows, width, dtype, forward=True):
        return quant_matmul.is_fused(torch.empty(rows, width, dtype=dtype), 64, forward)

    assert fused(256, 64, torch.bfloat16) and not fused(257, 64, torch.bfloat16)
    assert fused(256, 64, torch.float16, forward=False)
    for odd in (fused(17, 72, torch.bfloat16), fused(17, 64, torch.float32), fused(1, 72, torch.bfloat16, False)):
        assert not odd
    assert fused(16, 72, torch.bfloat16) and fused(16, 64, torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_backward_keeps_nothing_but_the_weight(bits):
    x, w = draw(4, 64).requires_grad_(), weight(bits, 32, 64)
    own, kept = {t.data_ptr() for t in w}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        quant_matmul.quant_matmul(x, w)
    assert set(kept) <= own


@pytest.mark.parametrize("bits", BITS)
def test_under_autocast_products_are_in_its_dtype(bits):
    x, w = draw(4, 64), weight(bits, 32, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        (y,), (dx,) = run(lambda x: quant_matmul.quant_matmul(x, w), [x], [draw(4, 32, seed=1)])
    assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32
    assert torch.equal(y, quant_matmul.quant_matmul(x.bfloat16(), w))


@pytest.mark.parametrize("bits", BITS)
def test_is_a_sound_torch_op_and_compiles_without_a_graph_break(bits):
    x, w, g = draw(3, 2, 80).requires_grad_(), weight(bits, 24, 80), draw(3, 2, 24, seed=1)
    torch.library.opcheck(_op, (x, w))
    compiled = torch.compile(quant_matmul.quant_matmul, fullgraph=True, backend="aot_eager", dynamic=True)
    mine, plain = (run(lambda x, f=f: f(x, w), [x], [g]) for f in (compiled, quant_matmul.quant_matmul))
    assert torch.equal(mine[0][0], plain[0][0]) and torch.equal(mine[1][0], plain[1][0])


def test_inputs_stay_as_they_were_and_runs_are_equal(way):
    x, w, g = draw(5, 80), weight(8, 24, 80), draw(5, 24, seed=1)
    copies = [t.clone() for t in (x, *w)]
    first, second = (run(lambda x: quant_matmul.quant_matmul(x, w), [x], [g]) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[1][0], second[1][0])
    assert all(torch.equal(a, b) for a, b in zip((x, *w), copies, strict=True))


def test_says_what_is_wrong():
    x, w = draw(4, 80), weight(4, 24, 80)
    for bad, word in (
        ((draw(4, 129), w), "96 bytes"),
        ((x.double(), w), "float64"),
        ((x, [w[0].int(), *w[1:]]), "int32"),
        ((x, [w[0].T.contiguous().T, *w[1:]]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=word):
            quant_matmul.quant_matmul(*bad)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 16, 64, 256, 257])
def test_a_layer_of_7b(rows, bits):
    x, g = draw(rows, 4096, dtype=torch.bfloat16), draw(rows, 11008, dtype=torch.bfloat16, seed=1)
    hold(x, weight(bits, 11008, 4096), g)


def test_the_specification_by_hand():
    """Two rows, one block and a bit: codes written out, weights by the formula."""
    values = reference.nf4_values().float()
    codes = torch.full((2, 64), 0x77, dtype=torch.uint8)
    codes[0, 0], codes[1, 33] = 0xF0, 0x2A  # row 0: columns 0 and 32; row 1, second block: columns 65 and 97
    scale = torch.tensor([[10, 0], [0, -20]], dtype=torch.int8)
    w = reference.dequantize([codes, scale, torch.tensor([0.1]), torch.tensor([3.0])], 98)
    expected = torch.zeros(2, 98)
    expected[0, 0], expected[0, 32] = -4.0, 4.0
    expected[1, 65], expected[1, 97] = values[10] * 1.0, values[2] * 1.0
    torch.testing.assert_close(w, expected)
    codes = torch.tensor([[1, 0, -3], [4, 0, 127]], dtype=torch.int8)
    kept, columns = torch.tensor([[9.0], [8.0]], dtype=torch.float16), torch.tensor([1])
    w = reference.dequantize([codes, torch.tensor([2.0, 0.5]), kept, columns], 3)
    assert w.tolist() == [[2, 9, -6], [2, 8, 63.5]]


def test_nf4_is_the_published_table():
    """Dettmers et al. 2023, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(reference.nf4_values(), torch.tensor(published).double(), atol=2e-7, rtol=0)


def test_errors_are_of_the_products_alone():
    """In fp32 the fused product is as near to fp64 as torch's own: decoding is exact."""
    x, w = draw(8, 256), weight(4, 64, 256)
    exact = x.double() @ reference.dequantize(w, 256).double().T
    assert error(quant_matmul.quant_matmul(x, w), exact) < 5e-7
