"""Linear and cross-entropy in one against its specification: loss, gradients, chunks, layouts, torch.compile."""

import functools
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_cross_entropy, reference
from kernels.linear_cross_entropy import _op, chunk_rows
from kernels.shared import launch
from tests.kernels.check import DEVICE, DTYPES, FORWARD, compare, draw, error, layouts, poisoned, run, trying  # noqa: F401

# Interpreted: whatever lies in a row's padding.
pytestmark = pytest.mark.filterwarnings(r"ignore:(overflow|invalid value) encountered in \w+:RuntimeWarning")

OPTIONS = {
    "plain": {},
    "capped": dict(softcap=3.0),
    "z-loss": dict(z_loss=0.01),
    "all": dict(softcap=5.0, z_loss=0.02),
}


def ours(x, w, *rest, **options):
    """The whole loss, without that part of it beside it."""
    return loss_of(linear_cross_entropy.linear_cross_entropy(x, w, *rest, **options))


def loss_of(result):
    return result[0] if isinstance(result, tuple) else result


def labels(n, vocabulary, seed=0):
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def hold(x, w, targets, mask=None, grad=0.3, **options):
    """Loss and both gradients against the reference, and the z-loss in it."""
    compare(
        lambda x, w: ours(x, w, targets, mask, **options),
        lambda x, w: loss_of(reference.linear_cross_entropy(x, w, targets, mask, **options)),
        [x, w],
        [torch.tensor(grad, device=x.device)],
    )
    if "z_loss" in options:
        _, penalty = linear_cross_entropy.linear_cross_entropy(x, w, targets, mask, **options)
        _, exact = reference.linear_cross_entropy(x.double(), w.double(), targets, mask, **options)
        assert not penalty.requires_grad and penalty.dtype == torch.float32
        assert error(penalty, exact) <= FORWARD[x.dtype]


@pytest.fixture
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *_: 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocabulary", [7, 1000])
def test_agrees_with_the_reference(vocabulary, options, dtype, poisoned, chunks_of_16):  # noqa: F811
    n = 40
    x, w, y = draw(n, 24, dtype=dtype), draw(vocabulary, 24, dtype=dtype, seed=1), labels(n, vocabulary)
    mask = torch.arange(n, device=DEVICE) % 3 > 0
    hold(x, w, y, mask, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_a_real_vocabulary_by_the_blocks_a_gpu_runs(n, dtype, poisoned):  # noqa: F811
    x, w = draw(n, 16, dtype=dtype), draw(32000, 16, dtype=dtype, seed=1, scale=0.5)
    with trying("linear_cross_entropy", {"ROWS": 1, "BLOCK": 8192, "num_warps": 16}):
        hold(x, w, labels(n, 32000), softcap=30.0, z_loss=0.01)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("vocabulary", [127, 128, 129, 1025])
def test_blocks_and_vocabularies_that_do_not_match(vocabulary, rows, poisoned):  # noqa: F811
    x, w = draw(3, 8), draw(vocabulary, 8, seed=1)
    with trying("linear_cross_entropy", {"ROWS": rows, "BLOCK": 128, "num_warps": 4}):
        hold(x, w, labels(3, vocabulary))
        hold(x, w, torch.tensor([vocabulary - 1, 0, -100], device=DEVICE), **OPTIONS["all"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_rows_and_ignored_targets(dtype, poisoned, chunks_of_16):  # noqa: F811
    x, w, y = draw(40, 24, dtype=dtype), draw(100, 24, dtype=dtype, seed=1), labels(40, 100)
    y[::5] = -100
    weights = draw(40, seed=3).square()
    weights[7:20] = 0.0
    for mask in (weights, weights.double(), weights > 0, weights.repeat_interleave(2)[::2], None):
        hold(x, w, y, mask, **OPTIONS["all"])
    junk = torch.where(weights > 0, y, 1 << 40)  # a row that does not count may have any target
    assert torch.equal(ours(x, w, junk, weights), ours(x, w, y, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_a_weight_for_each_row(dtype):
    """1 / 2²⁰ is nothing in fp16, times a probability: the gradients must survive it."""
    n, scale = 40, 2.0**-20
    x, w, y = draw(n, 24, dtype=dtype), draw(100, 24, dtype=dtype, seed=1), labels(n, 100)
    small = torch.full((n,), scale, device=DEVICE)
    mean = run(lambda x, w: ours(x, w, y, small), [x, w], [torch.tensor(1 / scale, device=DEVICE)])
    whole = run(lambda x, w: ours(x, w, y), [x, w], [torch.ones((), device=DEVICE)])
    for a, b in zip(mean[1], whole[1], strict=True):
        assert error(a, b) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("count", ["masked", "ignored", "weightless", "absent"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_counts(count, dtype, poisoned):  # noqa: F811
    n = 0 if count == "absent" else 20
    x, w, y = draw(n, 8, dtype=dtype), draw(50, 8, dtype=dtype, seed=1), labels(n, 50)
    y = torch.full_like(y, -100) if count == "ignored" else y
    mask = {"masked": torch.zeros(n, dtype=torch.bool), "weightless": torch.zeros(n)}.get(count)
    mask = mask if mask is None else mask.to(DEVICE)
    (loss,), gradients = run(lambda x, w: ours(x, w, y, mask, z_loss=0.1), [x, w], [torch.ones((), device=DEVICE)])
    assert loss == 0 and [g.shape for g in gradients] == [x.shape, w.shape]
    assert not any(g.any() for g in gradients)


def test_a_target_outside_the_vocabulary_is_no_silent_error():
    for bad in (-1, 50):
        assert ours(draw(3, 8), draw(50, 8, seed=1), torch.tensor([1, bad, 2], device=DEVICE)).isnan()


@pytest.mark.parametrize("given_as", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout(given_as, poisoned, chunks_of_16):  # noqa: F811
    x, w = layouts(draw(20, 24))[given_as], layouts(draw(70, 24, seed=1))[given_as]
    targets = labels(40, 70)[::2]
    hold(x, w, targets)
    hold(draw(1, 24).expand(20, 24), w, targets)


def test_gradients_only_where_they_are_wanted(chunks_of_16):
    x, w, y = draw(40, 24), draw(50, 24, seed=1), labels(40, 50)
    both = torch.autograd.grad(ours(x.requires_grad_(), w.requires_grad_(), y), (x, w))
    assert torch.equal(torch.autograd.grad(ours(x, w.detach(), y), x)[0], both[0])
    assert torch.equal(torch.autograd.grad(ours(x.detach(), w, y), w)[0], both[1])
    with torch.no_grad():
        loss = ours(x, w, y)
    assert not loss.requires_grad and torch.equal(loss, ours(x, w, y).detach())


def test_without_gradients_no_work_is_done_for_them(monkeypatch):
    launched = []
    start = launch.run
    monkeypatch.setattr(launch, "run", lambda *a, **k: (launched.append(k["GRADIENT"]), start(*a, **k)))
    x, w, y = draw(4, 8), draw(50, 8, seed=1), labels(4, 50)
    ours(x, w, y)
    with torch.no_grad():
        ours(x.requires_grad_(), w, y)
    ours(x, w, y)
    assert launched == [False, False, True]


def test_tied_weights(chunks_of_16):
    """The embedding's own matrix as the last layer: its gradient is the sum of both uses."""
    table, tokens, y = draw(60, 24), labels(40, 60, seed=5), labels(40, 60)
    compare(
        lambda table: ours(table[tokens], table, y),
        lambda table: reference.linear_cross_entropy(table[tokens], table, y),
        [table],
        [torch.ones((), device=DEVICE)],
    )


def test_backward_twice_and_from_any_scalar():
    x, w, y = draw(6, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_(), labels(6, 50)
    loss = ours(x, w, y)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    halved = torch.autograd.grad(loss.expand(3).sum() / 6, (x, w))
    for a, b, c in zip(first, second, halved, strict=True):
        assert torch.equal(a, b) and error(c * 2, a) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_as_exact_as_torch(dtype, weight_dtype, chunks_of_16):
    x, w, y = draw(64, 32), draw(100, 32, dtype=weight_dtype, seed=1), labels(64, 100)
    one = [torch.ones((), device=DEVICE)]
    exact = run(lambda x, w: reference.linear_cross_entropy(x, w, y), [x.double(), w.double()], one)
    with torch.autocast(DEVICE, dtype):
        rough = run(lambda x, w: torch.nn.functional.cross_entropy((x @ w.T).float(), y, reduction="sum"), [x, w], one)
        mine = run(lambda x, w: ours(x, w, y), [x, w], one)
    assert mine[0][0].dtype == torch.float32
    assert [g.dtype for g in mine[1]] == [torch.float32, weight_dtype]
    for e, r, m in zip((*exact[0], *exact[1]), (*rough[0], *rough[1]), (*mine[0], *mine[1]), strict=True):
        assert error(m, e) <= 2 * error(r, e) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_lose_nothing_of_the_weights_gradient(dtype, chunks_of_16):
    """64 chunks, as exact as one product: sums in 16 bits would drift."""
    n = 1024
    x, w, y = draw(n, 8, dtype=dtype) + 1, draw(20, 8, dtype=dtype, seed=1), labels(n, 3)
    hold(x, w, y, grad=1.0)


def test_fp16_sums_beyond_its_range(chunks_of_16):
    """Σ over rows is beyond 65,504 until the incoming gradient is known, and small then."""
    x = torch.full((600, 4), 300.0, dtype=torch.float16, device=DEVICE)
    w, y = draw(8, 4, dtype=torch.float16, seed=1, scale=1e-3), labels(600, 1)
    small = [torch.tensor(1e-3, device=DEVICE)]
    exact = run(lambda w: reference.linear_cross_entropy(x.double(), w, y), [w.double()], small)[1][0]
    assert exact.abs().max() * 1e3 > 65504
    assert error(run(lambda w: ours(x, w, y), [w], small)[1][0], exact) < 2e-3


def test_inputs_stay_as_they_were_and_runs_are_equal(chunks_of_16):
    x, w, y, mask = draw(40, 24), draw(100, 24, seed=1), labels(40, 100), draw(40, seed=2).abs()
    copies = [t.clone() for t in (x, w, y, mask)]
    one = [torch.ones((), device=DEVICE)]
    first, second = (run(lambda x, w: ours(x, w, y, mask), [x, w], one) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip((x, w, y, mask), copies, strict=True))


# From 8 on: the gradient of one row by few numbers can be a difference of equals, in torch too.
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(8, 50), width=st.integers(8, 40), vocabulary=st.integers(8, 300), dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(list(OPTIONS)), masked=st.sampled_from(["no", "bool", "float"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(n, width, vocabulary, dtype, options, masked, seed):
    x = draw(n, width, dtype=dtype, seed=seed)
    w = draw(vocabulary, width, dtype=dtype, seed=seed + 1, scale=width**-0.5)
    weights = draw(n, seed=seed + 2).abs()
    mask = {"no": None, "bool": weights > 0.5, "float": weights}[masked]
    hold(x, w, labels(n, vocabulary, seed), mask, **OPTIONS[options])


def test_is_a_sound_torch_op():
    x, w, y = draw(6, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_(), labels(6, 50)
    mask = draw(6, seed=2).abs()
    torch.library.opcheck(_op, (x, w, y, None, None, 0.0, torch.float32, True, True))
    torch.library.opcheck(_op, (x, w, y, mask, 3.0, 0.1, torch.bfloat16, True, True))
    torch.library.opcheck(_op, (x, w.detach(), y, mask, 3.0, 0.1, torch.float32, True, False))


@pytest.mark.parametrize("options", ["plain", "all"])
def test_compiles_without_a_graph_break_with_ignored_labels(options):
    """The same bits as without: ignored labels, and Python's floats, which compilers have taken for fp64."""
    x, w, y, one = draw(20, 24), draw(100, 24, seed=1), labels(20, 100), [torch.ones((), device=DEVICE)]
    y[::4] = -100
    mask = draw(20, seed=2).abs()
    function = functools.partial(ours, targets=y, mask=mask, **OPTIONS[options])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    mine = run(compiled, [x, w], one)
    assert mine[0][0].dtype == torch.float32
    for a, b in zip(mine, run(function, [x, w], one), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(x, w), function(x, w))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_z_loss_is_palms_formula(softcap, chunks_of_16):
    """Σ m (−log p + ζ log² Z) and its gradients, written out in fp64; beside it the second term alone."""
    x, w, y, m = draw(40, 24), draw(100, 24, seed=1), labels(40, 100), draw(40, seed=2).abs()
    a, b = (tensor.double().requires_grad_() for tensor in (x, w))
    z = a @ b.T if softcap is None else softcap * torch.tanh(a @ b.T / softcap)
    log_z = z.exp().sum(-1).log()
    added = 0.01 * (m * log_z**2).sum()
    exact = (m * (log_z - z[torch.arange(40), y])).sum() + added
    x.requires_grad_(), w.requires_grad_()
    loss, penalty = linear_cross_entropy.linear_cross_entropy(x, w, y, m, softcap, 0.01)
    assert error(loss, exact) < 1e-6 and error(penalty, added) < 1e-6
    for ours_, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(exact, (a, b)), strict=True):
        assert error(ours_, theirs) < 1e-5
    plain = linear_cross_entropy.linear_cross_entropy(x, w, y, m, softcap)
    loss, penalty = linear_cross_entropy.linear_cross_entropy(x, w, y, m, softcap, 0.0)
    assert torch.equal(loss, plain) and penalty == 0


def test_compiled_with_options_that_change():
    x, w, y = draw(6, 8), draw(50, 8, seed=1), labels(6, 50)
    compiled = torch.compile(lambda s: ours(x, w, y, z_loss=s), fullgraph=True, backend="aot_eager")
    for s in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(s), ours(x, w, y, z_loss=s))


def test_says_what_is_wrong():
    x, w, y = draw(4, 8), draw(50, 8, seed=1), labels(4, 50)
    for bad, word in (
        ((x[None], w, y), "N, C"),
        ((x, w[:, :7], y), "V, C"),
        ((x, w, y[:3]), "targets"),
        ((x, w, y, y[:3] > 0), "mask"),
        ((x.double(), w, y), "float64"),
    ):
        with pytest.raises(ValueError, match=word):
            ours(*bad)


def test_chunks_are_as_large_as_the_docstring_says():
    tokens, h100 = 16384, 132
    sizes = {(768, 32000): 1152, (2048, 32000): 2048, (2048, 128256): 2048, (4096, 128256): 4096}
    assert {(c, v): chunk_rows(tokens, c, v, h100) for c, v in sizes} == sizes
    assert chunk_rows(1, 64, 32000, h100) == chunk_rows(1, 1 << 20, 1 << 20, 4) == 128
    assert chunk_rows(0, 64, 32000, h100) == 0


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31():
    n, vocabulary = 16384, 151936
    x, w, y = draw(n, 64, dtype=torch.bfloat16), draw(vocabulary, 64, dtype=torch.bfloat16, seed=1), labels(n, 151936)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "chunk_rows", lambda *_: n)
        whole = run(lambda x, w: ours(x, w, y), [x, w], [torch.ones((), device=DEVICE)])
    parts = run(lambda x, w: ours(x, w, y), [x, w], [torch.ones((), device=DEVICE)])
    for a, b in zip((*whole[0], *whole[1]), (*parts[0], *parts[1]), strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_on_a_second_device():
    x, w, y = draw(20, 24).to("cuda:1"), draw(100, 24, seed=1).to("cuda:1"), labels(20, 100).to("cuda:1")
    hold(x, w, y)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "vocabulary", "mib"), [(768, 32000, 196), (2048, 32000, 502)])
def test_memory_stays_within_what_the_docstring_counts(width, vocabulary, mib):
    n = 16384
    x, w = draw(n, width, dtype=torch.bfloat16), draw(vocabulary, width, dtype=torch.bfloat16, seed=1)
    x.requires_grad_(), w.requires_grad_()
    y = labels(n, vocabulary)
    ours(x, w, y).backward()
    x.grad = w.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(x, w, y).backward()
    assert torch.cuda.max_memory_allocated() - before <= mib << 20


def test_the_specification_is_torchs_and_its_gradient_true():
    x, w = (draw(n, 4, seed=n).double().requires_grad_() for n in (5, 6))
    y = labels(5, 6)
    y[2] = -100
    theirs = torch.nn.functional.cross_entropy(x @ w.T, y, reduction="sum")
    square = torch.logsumexp(x @ w.T, -1).square()[y >= 0].sum()
    torch.testing.assert_close(reference.linear_cross_entropy(x, w, y), theirs)
    with_z_loss = reference.linear_cross_entropy(x, w, y, z_loss=0.2)
    torch.testing.assert_close(with_z_loss, (theirs + 0.2 * square, 0.2 * square))
    weights = draw(5, seed=9).double()
    assert torch.autograd.gradcheck(
        lambda x, w: reference.linear_cross_entropy(x, w, y, weights, 2.0, z_loss=0.2)[0], (x, w)
    )


def peak_bytes(run, folder) -> int:
    """The most memory that `run` holds at once, its result included, by the profiler's record of every allocation."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        _ = run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's allocations")
def test_a_chunk_and_the_weights_gradient_in_its_own_dtype_are_not_held_together(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)  # the interpreter makes copies of its own
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *_: 128)
    n, width, vocabulary = 256, 2048, 1000
    x, w = (torch.ones(rows, width, dtype=torch.bfloat16) for rows in (n, vocabulary))
    targets = torch.zeros(n, dtype=torch.int64)
    options = (None, None, 0.0, torch.bfloat16, True, True)
    held = peak_bytes(lambda: linear_cross_entropy.forward(x, w, targets, *options), tmp_path)
    gradients = (4 + 2) * vocabulary * width + 2 * n * width  # the sums over chunks in fp32, and what is returned
    assert gradients <= held < gradients + 128 * vocabulary
