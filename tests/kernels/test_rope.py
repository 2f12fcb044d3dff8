"""RoPE, alone and after QK-norm, against its specification: forward, gradients, layouts, torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.rope import _norm_backward_op, _op, rope
from kernels.shared import launch
from tests.kernels.check import DEVICE, DTYPES, compare, draw, error, layouts, poisoned, run, trying  # noqa: F401

EPS = 0.1  # large enough that the gradient of a head of two numbers is no difference of equals


def tables(*shape: int, seed: int = 5):
    """cos and sin of any angles, (..., T, D/2)."""
    angle = draw(*shape, seed=seed, scale=3.0)
    return angle.cos(), angle.sin()


def ours(cos, sin):
    return lambda q, k, *weights: rope(q, k, cos, sin, *weights, EPS) if weights else rope(q, k, cos, sin)


def spec(cos, sin):
    def run(q, k, *weights):
        if weights:
            q, k = (reference.rms_norm(x, w, EPS) for x, w in zip((q, k), weights, strict=True))
        return reference.rope(q, k, cos, sin)

    return run


def inputs(batch, length, heads, kv_heads, size, dtype=torch.float32, normed=False, seed=0):
    """Inputs (q, k and the weights of their norms) and the gradients of both outputs."""
    q, dq = (draw(batch, length, heads, size, dtype=dtype, seed=seed + i) for i in (0, 1))
    k, dk = (draw(batch, length, kv_heads, size, dtype=dtype, seed=seed + i) for i in (2, 3))
    weights = [draw(size, dtype=dtype, seed=seed + i) for i in (4, 5)] if normed else []
    return [q, k, *weights], [dq, dk]


def check(cos, sin, tensors, grads):
    compare(ours(cos, sin), spec(cos, sin), tensors, grads)


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 6, 40, 64, 80, 96, 112, 128, 256])
def test_agrees_with_the_reference(size, dtype, normed, poisoned):  # noqa: F811
    check(*tables(5, size // 2), *inputs(2, 5, 4, 2, size, dtype, normed))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (12, 12), (32, 4), (16, 1), (2, 5)])
def test_any_number_of_heads(heads, kv_heads, normed, poisoned):  # noqa: F811
    check(*tables(7, 8), *inputs(2, 7, heads, kv_heads, 16, normed=normed))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 4, 64), (12, 12, 64), (32, 8, 128), (40, 40, 128), (96, 8, 128), (8, 1, 256)]
)
def test_the_settings_of_a_gpu(heads, kv_heads, size, normed, monkeypatch, poisoned):  # noqa: F811
    """Among them heads that are shared among programs, the last of which have fewer or none."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    check(*tables(3, size // 2), *inputs(1, 3, heads, kv_heads, size, torch.bfloat16, normed))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_a_program_takes_many_tokens(normed, poisoned):  # noqa: F811
    op, chosen = ("rope_norm_backward", {"PROGRAMS": 1}) if normed else ("rope", {})
    with trying(op, {"TOKENS": 2, "Q_HEADS": 2, "K_HEADS": 2, "num_warps": 4, **chosen}):
        check(*tables(13, 4), *inputs(2, 13, 4, 2, 8, normed=normed))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_each_row_may_have_its_own_positions(normed, poisoned):  # noqa: F811
    check(*tables(3, 4, 8), *inputs(3, 4, 4, 2, 16, normed=normed))
    cos, sin = tables(3, 16, 8)
    check(cos[:, ::4], sin[:, ::4], *inputs(3, 4, 4, 2, 16, normed=normed))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
@pytest.mark.parametrize("grad_as", ["contiguous", "transposed", "rows apart", "inside"])
@pytest.mark.parametrize("given_as", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout_of_input_and_gradient(given_as, grad_as, normed, poisoned):  # noqa: F811
    (q, k, *weights), grads = inputs(2, 3, 4, 2, 8, normed=normed)
    q, k = layouts(q)[given_as], layouts(k)[grad_as]
    check(*tables(3, 4), [q, k, *weights], [layouts(grad)[grad_as] for grad in grads])


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_heads_first_and_gradients_of_stride_zero(normed, poisoned):  # noqa: F811
    (q, k, *weights), (dq, dk) = inputs(2, 5, 4, 2, 8, normed=normed)
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, dq, dk)]
    check(*tables(5, 4), [*first[:2], *weights], first[2:])
    check(*tables(5, 4), [q, k, *weights], [x[:1, :1, :1, :1].expand_as(x) for x in (dq, dk)])


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_queries_and_keys_of_one_projection(normed, poisoned):  # noqa: F811
    weights = inputs(1, 1, 1, 1, 16, normed=normed)[0][2:]
    _, grads = inputs(2, 5, 4, 2, 16)
    cos, sin = tables(5, 8)

    def split(function):
        def run(joined, *weights):
            q, k, _ = joined.split((64, 32, 32), -1)
            return function(q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16)), *weights)

        return run

    compare(split(ours(cos, sin)), split(spec(cos, sin)), [draw(2, 5, 128), *weights], grads)


def test_one_of_the_outputs_may_be_unused(poisoned):  # noqa: F811
    cos, sin = tables(5, 4)
    for normed in (False, True):
        tensors, grads = inputs(2, 5, 4, 2, 8, normed=normed)
        for number in (0, 1):

            def alone(function, number=number):
                return lambda *t: function(*t)[number] + 0 * sum(x.sum() for x in t)

            compare(alone(ours(cos, sin)), alone(spec(cos, sin)), tensors, [grads[number]])


def test_weights_of_a_wider_dtype_than_the_heads(poisoned):  # noqa: F811
    """Under autocast: heads in bf16, weights in fp32."""
    (q, k), (dq, dk) = inputs(2, 5, 4, 2, 16, torch.bfloat16)
    weights = [draw(16, seed=s) for s in (4, 5)]
    (mine, _), gradients = run(ours(*tables(5, 8)), [q, k, *weights], [dq, dk])
    assert mine.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 2
    check(*tables(5, 8), [q, k, *(w.bfloat16() for w in weights)], [dq, dk])


def test_a_norm_without_epsilon_is_not_disturbed_by_heads_that_do_not_exist(poisoned):  # noqa: F811
    tensors, grads = inputs(1, 3, 3, 1, 6, normed=True)
    outputs, gradients = run(lambda q, k, *w: rope(q, k, *tables(3, 3), *w, 0.0), tensors, grads)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_inputs_stay_as_they_were_and_runs_are_equal(normed):
    tensors, grads = inputs(2, 40, 4, 2, 16, normed=normed)
    copies = [x.clone() for x in (*tensors, *grads)]
    function = ours(*tables(40, 8))
    first, second = run(function, tensors, grads), run(function, tensors, grads)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, *grads), copies, strict=True))


def test_no_tokens():
    tensors, grads = inputs(2, 0, 4, 2, 8, normed=True)
    outputs, gradients = run(ours(*tables(0, 4)), tensors, grads)
    assert outputs[0].shape == (2, 0, 4, 8) and not gradients[2].any()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 40), kv_heads=st.integers(1, 4), group=st.integers(1, 5),
    half=st.integers(1, 40), normed=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, length, kv_heads, group, half, normed, dtype, seed):
    check(*tables(length, half, seed=seed), *inputs(batch, length, kv_heads * group, kv_heads, 2 * half, dtype, normed))


def test_tables_of_another_shape_are_refused():
    (q, k), _ = inputs(2, 5, 4, 2, 8)
    for shape in ((4, 4), (5, 8), (3, 5, 4)):
        with pytest.raises(ValueError, match="needs"):
            rope(q, k, *tables(*shape))


def test_is_a_sound_torch_op():
    (q, k, *weights), grads = inputs(2, 5, 4, 2, 8, normed=True)
    cos, sin = tables(5, 4)
    torch.library.opcheck(_norm_backward_op, (*grads, q, k, cos, sin, *weights, EPS))
    q, k, *weights = (x.requires_grad_() for x in (q, k, *weights))
    torch.library.opcheck(_op, (q, k, cos, sin, None, None, 0.0, False))
    torch.library.opcheck(_op, (q, k, cos, sin, *weights, EPS, False))


@pytest.mark.parametrize("normed", [False, True], ids=["alone", "after QK-norm"])
def test_compiles_without_a_graph_break(normed):
    tensors, grads = inputs(2, 5, 4, 2, 8, normed=normed)
    plain = ours(*tables(5, 4))
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, grads), run(plain, tensors, grads), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """17 heads of 2²⁷ numbers each, stored head by head: the last tokens must be what they are alone."""
    q, k = (torch.randn(1, n, 1 << 20, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for n in (17, 1))
    cos, sin = tables(1 << 20, 64)
    weights = [draw(128, seed=s) for s in (1, 2)]
    last = slice(-3, None)
    whole = rope(q, k, cos, sin, *weights)
    alone = rope(q[:, last], k[:, last], cos[last], sin[last], *weights)
    assert all(error(a[:, last], b) < 1e-2 for a, b in zip(whole, alone, strict=True))
    whole = _norm_backward_op(*whole, q, k, cos, sin, *weights, EPS)
    alone = _norm_backward_op(*alone, q[:, last], k[:, last], cos[last], sin[last], *weights, EPS)
    assert all(error(a[:, last], b) < 1e-2 for a, b in zip(whole[:2], alone[:2], strict=True))
