"""Attention against its specification: every option, shape, dtype and layout, forward and all gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.attention.attention import _op, attention
from tests.kernels.check import DEVICE, DTYPES, compare, draw, error, layouts, poisoned, run, trying  # noqa: F401


def inputs(batch=1, q_len=70, k_len=70, heads=2, kv_heads=1, size=32, dtype=torch.float32, seed=0):
    q = draw(batch, q_len, heads, size, dtype=dtype, seed=seed)
    k, v = (draw(batch, k_len, kv_heads, size, dtype=dtype, seed=seed + i) for i in (1, 2))
    return [q, k, v], draw(batch, q_len, heads, size, dtype=dtype, seed=seed + 3)


def spans_of(batch: int, length: int, seed: int = 0, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, n, (batch, length), generator=generator).sort(dim=1).values
    return reference.document_spans(documents).to(DEVICE)


def check(tensors, grad, **options):
    def ours(q, k, v):
        return attention(q, k, v, **options)

    def spec(q, k, v):
        return reference.attention(q, k, v, **options)[0]

    compare(ours, spec, tensors, [grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 40, 64, 80, 96, 112, 128, 256])
def test_head_sizes(size, dtype, poisoned):  # noqa: F811
    check(*inputs(size=size, dtype=dtype), causal=size % 32 > 0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)])
def test_groups_of_heads(heads, kv_heads, poisoned):  # noqa: F811
    check(*inputs(batch=2, heads=heads, kv_heads=kv_heads, size=16))


@pytest.mark.parametrize("where", range(2))
def test_nan_is_not_taken_for_nothing_seen(where):
    tensors, grad = inputs(size=16)
    tensors[where][0, 30, 0, 5] = float("nan")
    (out,), grads = run(attention, tensors, [grad])
    wrong = out.isnan().all(-1)[0]
    assert torch.equal(wrong, out.isnan().any(-1)[0])
    if where == 0:  # a query's number is that query's alone
        assert wrong[30, 0] and wrong.sum() == 1
    else:  # a key's is that of all queries from there on
        assert wrong[30:].all() and not wrong[:30].any()
    assert all(g.isnan().any() for g in grads)


LENGTHS = [(1, 1), (3, 3), (63, 63), (64, 64), (65, 65), (113, 203), (203, 113), (239, 239), (1, 300), (5, 130)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_lengths(q_len, k_len, causal, poisoned):  # noqa: F811
    check(*inputs(q_len=q_len, k_len=k_len, size=16), causal=causal)


@pytest.mark.parametrize(("q_len", "k_len"), [(799, 799), (1023, 1024)])
def test_long_ones(q_len, k_len, poisoned):  # noqa: F811
    check(*inputs(q_len=q_len, k_len=k_len, heads=1, size=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_options_together(softcap, packed, window, causal, dtype, poisoned):  # noqa: F811
    tensors, grad = inputs(q_len=130, k_len=140, heads=1, size=16, dtype=dtype)
    spans = spans_of(1, 140) if packed else None
    check(tensors, grad, causal=causal, window=window, spans=spans, softcap=softcap)


def test_scale(poisoned):  # noqa: F811
    check(*inputs(size=16), scale=0.7)


def test_blocks_outside_are_skipped_not_masked():
    """NaN in keys that no query of a block sees does not reach it."""
    (q, k, v), _ = inputs(q_len=256, k_len=256, size=16)
    spans = reference.document_spans(torch.arange(256)[None] // 128).to(DEVICE)
    clean = attention(q, k, v, spans=spans)
    k[:, :128] = float("nan")
    assert torch.equal(attention(q, k, v, spans=spans)[:, 128:], clean[:, 128:])
    (q, k, v), _ = inputs(q_len=256, k_len=256, size=16)
    clean = attention(q, k, v)
    v[:, 128:] = float("nan")
    assert torch.equal(attention(q, k, v)[:, :128], clean[:, :128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing_give_zeros(dtype, poisoned):  # noqa: F811
    tensors, grad = inputs(q_len=90, k_len=20, size=16, dtype=dtype)
    outs, grads = run(lambda *t: attention(*t, return_lse=True), tensors, [grad, torch.zeros(1, 2, 90, device=DEVICE)])
    assert not outs[0][:, :70].any() and (outs[1][..., :70] == -torch.inf).all() and outs[1][..., 70:].isfinite().all()
    assert not grads[0][:, :70].any() and all(g.isfinite().all() for g in grads)
    outs, grads = run(lambda *t: attention(*t, window=0), tensors, [grad])
    assert not outs[0].any() and not any(g.any() for g in grads)


def test_log_sum_exp_and_its_gradient(poisoned):  # noqa: F811
    tensors, grad = inputs(size=16)
    lse_grad = draw(1, 2, 70, seed=9)
    compare(lambda *t: attention(*t, return_lse=True), lambda *t: reference.attention(*t), tensors, [grad, lse_grad])


NAMES = ["contiguous", "transposed", "rows apart", "inside"]


@pytest.mark.parametrize(("given_as", "grad_as"), list(itertools.product(NAMES, NAMES)))
def test_any_layout_of_input_and_gradient(given_as, grad_as, poisoned):  # noqa: F811
    tensors, grad = inputs(batch=2, q_len=20, k_len=20, size=16)
    check([layouts(t)[given_as] for t in tensors], layouts(grad)[grad_as])


def test_parts_of_one_projection_and_a_gradient_of_stride_zero(poisoned):  # noqa: F811
    whole = draw(2, 40, 4 * 16)
    q, k, v = whole.view(2, 40, 4, 16).split([2, 1, 1], dim=2)
    check([q, k, v], torch.ones((), device=DEVICE).expand(2, 40, 2, 16))


def test_two_runs_are_equal_and_inputs_stay():
    tensors, grad = inputs(q_len=200, k_len=200, heads=4, size=16, dtype=torch.bfloat16)
    copies = [t.clone() for t in tensors]
    first, second = (run(attention, tensors, [grad]) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_nothing_at_all():
    for q_len, k_len in ((0, 5), (5, 0)):
        tensors, grad = inputs(q_len=q_len, k_len=k_len, size=16)
        outs, grads = run(attention, tensors, [grad])
        assert not outs[0].any() and not any(g.any() for g in grads)


# Heads from 8 on: of one number, a gradient is a difference of equals. Single sizes down to 1 are tested above.
@settings(max_examples=12, deadline=None)
@given(
    q_len=st.integers(1, 150),
    more=st.integers(0, 60),
    size=st.integers(8, 40),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    packed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(q_len, more, size, groups, causal, window, packed, dtype, seed):
    heads, kv_heads = groups
    tensors, grad = inputs(1, q_len, q_len + more, heads, kv_heads, size, dtype, seed)
    spans = spans_of(1, q_len + more, seed) if packed else None
    check(tensors, grad, causal=causal, window=window, spans=spans)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_no_number_of_one_sequence_reaches_another():
    """Not even where a tile holds rows of both: the first sequence's results are the same beside large ones."""
    q, k, v, dout = (draw(2, 20, 2, 64, seed=seed) for seed in range(4))
    large = [torch.cat((x[:1], x[1:] * 30)) for x in (q, k, v, dout)]
    for a, b in zip(run(attention, [q, k, v], [dout]), run(attention, large[:3], large[3:]), strict=True):
        assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


def test_is_a_sound_torch_op():
    tensors, _ = inputs(q_len=20, k_len=24, size=16)
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(_op, (*tensors, None, True, None, None, 0.25))
    torch.library.opcheck(_op, (*tensors, spans_of(1, 24), True, 7, 2.0, 0.25))


def test_compiles_without_a_graph_break():
    tensors, grad = inputs(q_len=30, k_len=30, size=16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, [grad]), run(attention, tensors, [grad]), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_what_cannot_be_is_said():
    (q, k, v), _ = inputs(heads=3, kv_heads=2, size=16)
    with pytest.raises(ValueError, match="do not go together"):
        attention(q, k, v)
    (q, k, v), _ = inputs(size=264)
    with pytest.raises(ValueError, match="head size 264"):
        attention(q, k, v)
    (q, k, v), _ = inputs(size=16)
    with pytest.raises(ValueError, match="one of fp32"):
        attention(q.half(), k, v)
    with pytest.raises(ValueError, match="spans"):
        attention(q, k, v, spans=spans_of(1, 69))
    with pytest.raises(ValueError, match="softcap 0"):
        attention(q, k, v, softcap=0.0)


@pytest.mark.gpu
def test_a_hundred_thousand_tokens_and_offsets_beyond_int32():
    """8 × 131,072 × 32 × 128 numbers are 2³²: the last row must be what it is alone."""
    q = torch.randn(8, 131072, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(8, 131072, 1, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = attention(q, k, v, window=256)
    alone = attention(q[7:, -512:, 31:].contiguous(), k[7:, -1024:], v[7:, -1024:], window=256)
    assert error(out[7:, -512:, 31:], alone) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_a_second_device():
    tensors, _ = inputs(size=64, dtype=torch.bfloat16)
    other = attention(*(t.to("cuda:1") for t in tensors))
    assert torch.equal(other.cpu(), attention(*tensors).cpu())


def test_the_interpreter_runs_shipped_blocks_too(poisoned):  # noqa: F811
    tensors, grad = inputs(q_len=150, k_len=150, size=16)
    with trying("attention_forward", {"BLOCK_M": 128, "BLOCK_N": 32}):
        check(tensors, grad, window=50)
