"""AdamW against its specification and torch's own: parameters, moments, copies, roundings, clipping, layouts."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.errors import TritonError

from kernels import reference
from kernels.optimizers import tensor_lists
from kernels.optimizers.adamw import _op, adamw
from tests.kernels.check import DEVICE, draw, error, layouts, poisoned, trying  # noqa: F401

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = [(64, 48), (1,), (3,), (1000,), (0,), (7, 11, 13), (2048,)]
BF16 = torch.bfloat16
SMALL = {"CHUNK": 512, "BLOCK": 128, "num_warps": 1}  # several chunks of several blocks


def parts(shapes=SHAPES, dtype=torch.float32, seed=0):
    """Parameters, gradients, and moments as they are before the first step."""
    params = [draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]
    grads = [draw(*shape, dtype=dtype, seed=seed + 50 + i) for i, shape in enumerate(shapes)]
    zeros = [[torch.zeros(shape, device=DEVICE) for shape in shapes] for _ in range(2)]
    return [params, grads, *zeros]


def expected(params, grads, firsts, seconds, **options):
    """The three new lists, in fp64."""
    lists = zip(params, grads, firsts, seconds, strict=True)
    return zip(*(reference.adamw(*(x.double() for x in one), **options) for one in lists), strict=True)


@pytest.mark.parametrize("chosen", [None, SMALL], ids=["default", "small"])
def test_ten_steps_agree_with_the_reference_and_with_torch(chosen, poisoned):  # noqa: F811
    with trying("adamw", chosen):
        params, _, firsts, seconds = parts()
        exact, torchs = [[p.double() for p in params]] + [parts()[i] for i in (2, 3)], [p.clone() for p in params]
        optimizer = torch.optim.AdamW(torchs, fused=False, foreach=False, **OPTIONS)
        for step in range(1, 11):
            grads = parts(seed=100 * step)[1]
            for p, g in zip(torchs, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            exact = list(expected(exact[0], grads, exact[1], exact[2], step=step, **OPTIONS))
            adamw(params, grads, firsts, seconds, step=step, **OPTIONS)
            assert all(torch.equal(g, h) for g, h in zip(grads, parts(seed=100 * step)[1], strict=True))
    for i, p in enumerate(params):
        assert error(p, torchs[i]) < 3e-7
        ours, theirs = error(p, exact[0][i]), error(torchs[i], exact[0][i])
        assert ours <= 2 * theirs + 1e-7
        assert error(firsts[i], exact[1][i]) < 3e-7 and error(seconds[i], exact[2][i]) < 3e-7


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_a_master_copy_takes_the_steps_and_the_parameter_is_its_rounding(dtype, poisoned):  # noqa: F811
    params, grads, firsts, seconds = parts(dtype=dtype)
    masters = [p.float() for p in params]
    exact = [p.double() for p in params], firsts, seconds
    for step in range(1, 6):
        exact = list(expected(exact[0], grads, exact[1], exact[2], step=step, **OPTIONS))
        adamw(params, grads, firsts, seconds, step=step, masters=masters, **OPTIONS)
    for p, w, e in zip(params, masters, exact[0], strict=True):
        assert error(w, e) < 3e-7 and torch.equal(p, w.to(dtype))


def random_steps(params, grads, firsts, seconds, steps, chosen=None, seed=7, numbers=None, **options):
    with trying("adamw", chosen):
        for step in steps:
            adamw(params, grads, firsts, seconds, step=step, seed=seed, numbers=numbers, **{**OPTIONS, **options})
    return params


def test_random_rounding_is_on_average_right_and_goes_to_a_neighbour():
    n = 1 << 16
    start = torch.full((n,), 1.0, dtype=BF16, device=DEVICE)
    lists = (
        [start.clone()],
        [torch.ones(n, dtype=BF16, device=DEVICE)],
        *([torch.zeros(n, device=DEVICE)] for _ in "mv"),
    )
    (p,) = random_steps(*lists, [1], lr=1e-3, weight_decay=0.0)  # the step is lr: 0.999, between 0.99609375 and 1
    assert set(p.unique().tolist()) == {0.99609375, 1.0}
    spread = 0.00390625 * 0.5 / n**0.5
    assert abs(p.double().mean().item() - 0.999) < 5 * spread
    down = (p < 1).float()
    for shift in (1, 2, 3, 4, 2048):  # no element's bits are another's
        together = (down * down.roll(shift)).mean() - down.mean() ** 2
        assert abs(together) < 5 / n**0.5 * 0.25


def test_random_bits_depend_on_seed_step_and_parameter_alone():
    def run(**changed):
        options = dict(steps=[3], chosen=None, seed=7, numbers=[4]) | changed
        return random_steps(*parts([(5000,)], dtype=BF16), **options, lr=1e-4)[0]

    first = run()
    assert torch.equal(first, run()) and torch.equal(first, run(chosen=SMALL))
    for changed in (dict(seed=8), dict(steps=[4]), dict(numbers=[5]), dict(seed=7 + (1 << 32))):
        assert not torch.equal(first, run(**changed))
    both = parts([(9,), (5000,)], dtype=BF16)
    for column, own in zip(both, parts([(5000,)], dtype=BF16), strict=True):
        column[1] = own[0]
    assert torch.equal(first, random_steps(*both, steps=[3], numbers=[0, 4], lr=1e-4)[1])


def test_random_rounding_makes_no_number_of_what_is_none():
    """NaN plus random bits may overflow into a number: no weight may recover silently."""
    for broken in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        p = torch.full((4096,), broken, dtype=BF16, device=DEVICE)
        random_steps([p], [torch.zeros_like(p)], *([torch.zeros(4096, device=DEVICE)] for _ in "mv"), [1])
        assert not p.isfinite().any()


def test_clipping_factor_is_read_from_the_device(poisoned):  # noqa: F811
    ours, theirs = parts(), parts()
    factor = torch.tensor(0.25, device=DEVICE)
    adamw(*ours, step=1, grad_scale=factor, **OPTIONS)
    adamw(theirs[0], [g * factor for g in theirs[1]], *theirs[2:], step=1, **OPTIONS)
    for a, b in zip(ours[0] + ours[2] + ours[3], theirs[0] + theirs[2] + theirs[3], strict=True):
        assert error(a, b) < 1e-7


@pytest.mark.parametrize("which", range(4), ids=["parameter", "gradient", "first", "second"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout(which, layout, poisoned):  # noqa: F811
    lists, same = parts([(6, 5, 24), (40,)]), parts([(6, 5, 24), (40,)])
    lists[which][0] = layouts(lists[which][0])[layout]
    adamw(*lists, step=1, **OPTIONS)
    adamw(*same, step=1, **OPTIONS)
    for a, b in zip(lists, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_transposed_parameter_is_updated_where_it_lies(monkeypatch):
    lists = [[draw(6, 8, seed=i).T] for i in range(3)] + [[draw(6, 8, seed=3).abs().T]]
    new = [list(one) for one in expected(*lists, step=2, **OPTIONS)]
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # nothing is copied
    adamw(*lists, step=2, **OPTIONS)
    for a, b in zip((lists[0], lists[2], lists[3]), new, strict=True):
        assert error(a[0], b[0]) < 3e-7


def test_tensors_that_begin_anywhere(poisoned):  # noqa: F811
    """As gradients do that are views into a bucket of DistributedDataParallel."""
    lists, same = parts([(700,), (20,)]), parts([(700,), (20,)])
    bucket = torch.full((800,), float("nan"), device=DEVICE)
    for i, begin in ((0, 1), (1, 750)):
        view = bucket[begin : begin + lists[1][i].numel()]
        lists[1][i] = view.copy_(lists[1][i])
    with trying("adamw", SMALL):
        adamw(*lists, step=1, **OPTIONS)
    adamw(*same, step=1, **OPTIONS)
    for a, b in zip(lists, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nothing_to_do():
    adamw([], [], [], [], step=1, **OPTIONS)
    adamw(*parts([(0,), (0, 4)]), step=1, **OPTIONS)


def test_what_does_not_go_together_is_refused():
    params, grads, firsts, seconds = parts([(8,)])
    half = [params[0].bfloat16()]
    for message, lists, options in (
        ("share dtype", [[*params, *half], [*grads, *half], firsts * 2, seconds * 2], {}),
        ("master copies", [half, half, firsts, seconds], {}),
        ("random rounding", [params, grads, firsts, seconds], dict(seed=1)),
        ("may be fp32", [[params[0].double()], grads, firsts, seconds], {}),
        ("fp32; convert", [params, grads, half, seconds], {}),
        ("parameter's shape", [params, [grads[0][:4]], firsts, seconds], {}),
        ("parameter's shape", [params, grads, firsts, [seconds[0][None]]], {}),
        ("parameter's shape", [half, half, firsts, seconds], dict(masters=[params[0][:4]])),
    ):
        with pytest.raises(ValueError, match=message):
            adamw(*lists, step=1, **options, **OPTIONS)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=9),
    kind=st.sampled_from(["fp32", "master", "random"]),
    step=st.integers(1, 10**6),
    seed=st.integers(0, 99),
)
def test_any_sizes(sizes, kind, step, seed):
    params, grads, firsts, seconds = parts([(n,) for n in sizes], torch.float32 if kind == "fp32" else BF16, seed)
    seconds = [x + 0.1 for x in seconds]
    exact = list(expected(params, grads, firsts, seconds, step=step, **OPTIONS))
    masters = [p.float() for p in params] if kind == "master" else None
    with trying("adamw", SMALL):
        adamw(
            params,
            grads,
            firsts,
            seconds,
            step=step,
            masters=masters,
            seed=seed if kind == "random" else None,
            **OPTIONS,
        )
    for i, p in enumerate(masters or params):
        assert error(p, exact[0][i]) < (2**-7 if kind == "random" else 3e-7)
        assert error(firsts[i], exact[1][i]) < 3e-7 and error(seconds[i], exact[2][i]) < 3e-7


def test_chunks_cover_every_element_once():
    found = tensor_lists.chunks((5, 0, 12, 4), 4, torch.device("cpu")).tolist()
    assert found == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2], [3, 0]]


def test_a_table_is_sent_once_and_again_when_a_gradient_moves():
    lists = parts([(64,), (8,)])
    tensor_lists._table.cache_clear()
    for _ in range(3):
        adamw(*lists, step=1, **OPTIONS)
    assert tensor_lists._table.cache_info().misses == 1
    moved = [[x.clone() for x in column] for column in lists]
    lists[1] = [g.clone().neg_() for g in lists[1]]
    moved[1] = [g.neg() for g in moved[1]]
    for column in (lists, moved):
        adamw(*column, step=2, **OPTIONS)
    assert tensor_lists._table.cache_info().misses == 3
    assert all(torch.equal(p, q) for p, q in zip(lists[0], moved[0], strict=True))


def arguments(lists):
    return (*lists, [], None, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, None, None)


def test_is_a_sound_torch_op():
    torch.library.opcheck(_op, arguments(parts([(8, 4), (5,)])))


def test_compiles_without_a_graph_break():
    def step(params, grads, firsts, seconds):
        adamw(params, grads, firsts, seconds, step=1, **OPTIONS)
        return [p * 2 for p in params]  # the new values, not those from before

    eager, compiled = parts(), parts()
    a = step(*eager)
    b = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(x, y) for x, y in zip(a + eager[0] + eager[3], b + compiled[0] + compiled[3], strict=True))


def test_autograd_knows_that_a_parameter_changed():
    p = draw(4).requires_grad_()
    loss = (p * p).sum()
    with torch.no_grad():
        adamw([p], [draw(4)], [torch.zeros(4, device=DEVICE)], [torch.zeros(4, device=DEVICE)], step=1, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_settings_that_would_write_beyond_a_chunk_are_refused():
    with trying("adamw", {"CHUNK": 64, "BLOCK": 128, "num_warps": 4}), pytest.raises(TritonError):
        adamw(*parts(), step=1, **OPTIONS)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    n = (1 << 31) + 4096 + 5
    p, g = (torch.ones(n, dtype=BF16, device="cuda") for _ in range(2))
    m, v = (torch.zeros(n, device="cuda") for _ in range(2))
    adamw([p], [g], [m], [v], step=1, seed=0, **(OPTIONS | dict(lr=0.5, weight_decay=0.0)))
    low, high = p.aminmax()  # a last bit of fp32 off is a step of bf16 in one of 65,536
    assert 0.498 < low <= 0.5 <= high < 0.504 and (m > 0.09).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_second_device():
    lists = [[x.to("cuda:1") for x in column] for column in parts()]
    same = parts()
    adamw(*lists, step=1, **OPTIONS)
    adamw(*same, step=1, **OPTIONS)
    assert all(torch.equal(a.to(b.device), b) for a, b in zip(lists[0], same[0], strict=True))


def test_each_stream_has_a_table_of_its_own(monkeypatch):
    """Asked of the key by which a table is found again, so that no GPU is needed."""
    streams, asked = [3, 3, 8], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=streams.pop(0)))
    monkeypatch.setattr(tensor_lists, "_table", lambda *key: asked.append(key))
    for _ in range(3):
        tensor_lists.table((1, 2), torch.device("cuda", 0))
    assert asked[0] == asked[1] != asked[2] and len(streams) == 0
