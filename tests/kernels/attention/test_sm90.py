"""The Hopper kernels without a Hopper GPU: their source runs in a model of Gluon, against the specification.

`pytest -m gpu` runs them on one. When that has passed, the version of Triton belongs into `TESTED_TRITON`.
"""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from kernels import reference
from kernels.attention import attention, sm90, sm90_backward, sm90_forward, sm90_tiles
from kernels.bench.attention import _sm90, expected
from kernels.shared import launch
from tests.kernels import gluon_model
from tests.kernels.attention.test_attention import inputs, spans_of
from tests.kernels.check import DEVICE, compare, draw, error, layouts, poisoned, run  # noqa: F401

written_for = f"these kernels are written for Triton {' and '.join(sorted(sm90.WRITTEN_FOR))}"
pytestmark = pytest.mark.skipif(not sm90.compiles(), reason=written_for)
MODULES = (sm90, sm90_forward, sm90_backward, sm90_tiles)
BF16 = torch.bfloat16
HOPPER = DEVICE == "cuda" and launch.architecture(torch.device("cuda", 0)) == 90
hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
by_model = pytest.mark.skipif(not launch.INTERPRETED, reason="is about the model, which runs on the CPU")


@pytest.fixture
def model(monkeypatch):
    """Without a GPU the kernels run in the model; on Hopper they run as they are; other GPUs cannot run them."""
    if launch.INTERPRETED:
        gluon_model.install(monkeypatch, MODULES, launch)
    elif not HOPPER:
        pytest.skip("needs a Hopper GPU, or none")


def check(tensors, grad, spans=None):
    """Against the specification, a thousand queries at a time: several processes share a GPU's memory."""
    compare(_sm90(spans), lambda *t: expected(*t, spans), tensors, [grad])


def test_many_short_rows_are_few_enough_programs_in_y(monkeypatch):
    grids = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *_, **__: grids.append(grid))
    q, lse = (torch.empty(shape, dtype=BF16, device="meta") for shape in ((4096, 128, 32, 64), (4096, 32, 128)))
    sm90.backward(q, q, q, q, q, lse.float(), None, causal=True, scale=0.125)
    assert grids and all(size <= 65535 for _, *rest in grids for size in rest)


@pytest.mark.parametrize(
    ("length", "dtype"), [(128, BF16), (129, torch.float16), (200, BF16), (256, torch.float16), (447, BF16)], ids=str
)
@pytest.mark.parametrize("size", [64, 128])
def test_lengths(size, length, dtype, model, poisoned):  # noqa: F811
    check(*inputs(1, length, length, 2, 2, size, dtype))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2)])
def test_groups_of_heads_and_rows_of_the_batch(heads, kv_heads, size, model, poisoned):  # noqa: F811
    check(*inputs(2, 260, 260, heads, kv_heads, size, BF16))


@pytest.mark.parametrize(("n", "kv_heads"), [(1, 2), (3, 1), (5, 2), (40, 1)])
@pytest.mark.parametrize("size", [64, 128])
def test_packed_documents(size, n, kv_heads, model, poisoned):  # noqa: F811
    check(*inputs(2, 390, 390, 2, kv_heads, size, BF16), spans_of(2, 390, n, n))


def test_three_warpgroups_of_queries(model, monkeypatch, poisoned):  # noqa: F811
    long = sm90.forward_settings(64, 4096, False)
    assert long["COMPUTERS"] == 3
    monkeypatch.setattr(sm90, "forward_settings", lambda *_: long)
    for length in (128, 320, 577):
        check(*inputs(1, length, length, 2, 1, 64, BF16))


def test_log_sum_exp_and_its_gradient(model, poisoned):  # noqa: F811
    tensors, grad = inputs(1, 200, 200, 2, 1, 64, BF16)
    scale, dlse = 64**-0.5, draw(1, 2, 200, seed=9)
    out, lse = sm90.forward(*tensors, None, causal=True, scale=scale)
    mine = sm90.backward(grad, *tensors, out, lse, None, causal=True, scale=scale, dlse=dlse)
    outs, grads = run(lambda *t: reference.attention(*t), [t.double() for t in tensors], [grad.double(), dlse.double()])
    assert error(lse, outs[1]) < 1e-4
    assert all(error(a, b) < 2e-2 for a, b in zip(mine, grads, strict=True))


def test_parts_of_one_projection_and_any_gradient(model, poisoned):  # noqa: F811
    q, k, v = draw(2, 130, 4 * 64, dtype=BF16).view(2, 130, 4, 64).split([2, 1, 1], dim=2)
    check([q, k, v], torch.ones((), device=DEVICE).expand(2, 130, 2, 64))
    check([q, k, v], layouts(draw(2, 130, 2, 64))["inside"])


@by_model
def test_order_in_time_changes_nothing_but_dq(monkeypatch):
    (q, k, v), grad = inputs(1, 300, 300, 2, 1, 64, BF16)
    results = []
    for seed in range(3):
        with monkeypatch.context() as context:
            gluon_model.install(context, MODULES, launch, 100 * seed)
            outs, grads = run(_sm90(None), [q, k, v], [grad])
        results.append((*outs, *grads[1:]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


nobody_waits = SimpleNamespace(**vars(gluon_model.mbarrier) | {"wait": lambda barrier, parity: None})
FAULTS = {
    "no fence": (sm90_backward, "fence_async_shared", lambda: None),
    "no fence before a store": (sm90_forward, "fence_async_shared", lambda: None),
    "no meeting": (sm90_backward, "_both_warpgroups", lambda: None),
    "a stage freed by one of two": (sm90_forward, "barriers", lambda n, _: sm90_tiles.barriers(n, 1)),
    "nobody waits": (sm90_forward, "mbarrier", nobody_waits),
}


@by_model
@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_finds_faults(fault, model, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    monkeypatch.setattr(gluon_model, "PATIENCE", 2)
    tensors, grad = inputs(1, 600, 600, 1, 1, 64, BF16)
    with pytest.raises((AssertionError, threading.BrokenBarrierError)):
        check(tensors, grad)


def test_every_tile_has_one_place_and_heavy_ones_come_first():
    place = sm90_tiles.place.fn
    for n_blocks, heads in itertools.product(range(1, 9), range(1, 13)):
        for group in (n for n in range(1, heads + 1) if heads % n == 0):
            for last_first in (True, False):
                tiles = [place(i, n_blocks, group, last_first) for i in range(n_blocks * heads)]
                assert len(set(tiles)) == n_blocks * heads
                assert set(tiles) == set(itertools.product(range(n_blocks), range(heads)))
                blocks = [block for block, _ in tiles[: n_blocks * group]]
                assert blocks == sorted(blocks, reverse=last_first)


def test_dq_returns_from_the_order_of_fragments():
    """A model of the accumulator of wgmma (PTX ISA, "Register fragments"): which thread holds which number."""
    for size in (64, 128):
        dq = draw(64, size).cpu()
        memory = torch.full((64 * size,), float("nan"))
        for half, warp, lane in itertools.product(range(2), range(4), range(32)):
            columns = range(size // 2)
            held = [  # (row, column) of the thread's registers in order: pairs of columns, two rows, eighths
                (16 * warp + 8 * eight + lane // 4, 8 * eighth + 2 * (lane % 4) + pair)
                for eighth in range(len(columns) // 8) for eight in range(2) for pair in range(2)
            ]  # fmt: skip
            for register, (row, column) in enumerate(held):
                four, within = divmod(register, 4)
                at = half * 32 * size + four * 512 + warp * 128 + lane * 4 + within
                memory[at] = dq[row, half * size // 2 + column]
        assert memory.isfinite().all()
        out = torch.empty(1, 64, 1, size, device=DEVICE)
        launch.run(sm90_backward.from_fragments, (1, 1), memory.to(DEVICE), out, 1, 64, 64, 1.0, D=size)
        assert torch.equal(out[0, :, 0].cpu(), dq)


def test_supports_says_what_these_kernels_take(model):
    (q, k, v), _ = inputs(2, 256, 256, 4, 2, 64, BF16)
    yes = (q, k, v, None, True, None, None)

    def changed(**parts):
        names = ("q", "k", "v", "spans", "causal", "window", "softcap")
        return sm90.supports(*(parts.get(n, x) for n, x in zip(names, yes, strict=True)))

    assert changed() and changed(spans=spans_of(2, 256))
    assert not any((changed(causal=False), changed(window=5), changed(softcap=2.0), changed(q=q[:, :200])))
    assert not sm90.supports(*(x[:, :100] for x in (q, k, v)), *yes[3:])
    assert not sm90.supports(*(x.float() for x in (q, k, v)), *yes[3:])
    assert not sm90.supports(*(x[..., :32] for x in (q, k, v)), *yes[3:])
    assert not changed(q=q.transpose(1, 2).contiguous().transpose(1, 2))  # heads are not side by side
    assert not changed(q=draw(2, 256, 4, 65, dtype=BF16)[..., 1:])  # rows do not begin at 16 bytes


def test_attention_comes_here_only_when_chosen(model, monkeypatch):
    tensors, grad = inputs(1, 128, 128, 1, 1, 64, BF16)
    assert HOPPER or not sm90.chosen(*tensors, None, True, None, None)
    calls = []
    for name in ("forward", "backward"):
        function = getattr(sm90, name)
        monkeypatch.setattr(sm90, name, lambda *a, f=function, n=name, **k: (calls.append(n), f(*a, **k))[1])
    monkeypatch.setattr(sm90, "chosen", sm90.supports)
    compare(attention.attention, lambda *t: reference.attention(*t)[0], tensors, [grad])
    assert calls == ["forward", "backward"]
    torch.use_deterministic_algorithms(True)
    try:
        run(attention.attention, tensors, [grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["forward", "backward", "forward"]


HEADS = [(1, 1, 64), (12, 12, 64), (8, 1, 64), (6, 6, 128), (8, 2, 128), (3, 1, 128)]
LENGTHS = [128, 131, 1000, 2048, 4096]  # both kinds of tiles of queries, whole and cut, few tiles and many
MORE_LENGTHS = [192, 1024, 4095, 5000]  # other cuts of the same kernels: one kind of heads for each head size
CASES = [*itertools.product(HEADS, LENGTHS), *itertools.product([(12, 12, 64), (8, 2, 128)], MORE_LENGTHS)]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "length"), CASES, ids=str)
def test_on_a_gpu_many_times(heads, length, packed, poisoned):  # noqa: F811
    """Right, and twenty times the same bit for bit, except for dq, which is added in any order."""
    tensors, grad = inputs(2, length, length, *heads, BF16)
    spans = spans_of(2, length) if packed else None
    check(tensors, grad, spans)
    options = dict(causal=True, scale=heads[2] ** -0.5)

    def once() -> tuple[torch.Tensor, ...]:
        out, lse = sm90.forward(*tensors, spans, **options)
        dq, dk, dv = sm90.backward(grad, *tensors, out, lse, spans, **options)
        return dq, out, lse, dk, dv

    first = once()
    for _ in range(20):
        again = once()
        assert error(again[0], first[0]) < 1e-3
        assert all(torch.equal(a, b) for a, b in zip(again[1:], first[1:], strict=True))


@pytest.mark.gpu
@hopper
def test_on_a_gpu_a_long_row_and_half_precision(poisoned):  # noqa: F811
    check(*inputs(1, 16384, 16384, 2, 1, 128, BF16))
    for size in (64, 128):
        check(*inputs(2, 1500, 1500, 4, 2, size, torch.float16))
