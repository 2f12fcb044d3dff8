"""Attention over a cache against its specification: every row's part of the cache, heads, sizes, windows, layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.attention import decode
from kernels.attention.decode import _op, block_settings, decode_attention, split_count
from kernels.shared import launch
from tests.kernels.check import DEVICE, DTYPES, FORWARD, draw, error, layouts, poisoned, trying  # noqa: F401


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def spec(q, k, v, begin=None, end=None, **options):
    """Each row alone, its part of the cache cut out; what the queries before the cache's first slot see is nothing."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        first, last = 0 if begin is None else int(begin[b]), k.shape[1] if end is None else int(end[b])
        queries = min(q.shape[1], max(0, last - first))
        if queries:
            part = [x[b : b + 1, first:last] for x in (k, v)]
            out[b, q.shape[1] - queries :] = reference.attention(q[b : b + 1, -queries:], *part, **options)[0][0]
    return out


def compare(q, k, v, begin=None, end=None, *, ulps=1, **options):
    mine = decode_attention(q, k, v, begin=begin, end=end, **options)
    assert mine.shape == q.shape and mine.dtype == q.dtype and mine.is_contiguous()
    exact = spec(q.double(), k.double(), v.double(), begin, end, **options)
    same = error(spec(q, k, v, begin, end, **options), exact)
    allowed = max(min(FORWARD[q.dtype], 2 * same + ulps * torch.finfo(q.dtype).eps), 4 * torch.finfo(torch.float32).eps)
    assert error(mine, exact) <= allowed, (error(mine, exact), same)


def inputs(batch, queries, keys, heads, kv_heads, size, dtype=torch.float32, seed=0):
    q = draw(batch, queries, heads, size, dtype=dtype, seed=seed)
    return q, *(draw(batch, keys, kv_heads, size, dtype=dtype, seed=seed + i) for i in (1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("queries", [1, 3])
def test_heads_and_dtypes(queries, heads, kv_heads, dtype, poisoned):  # noqa: F811
    q, k, v = inputs(2, queries, 700, heads, kv_heads, 64, dtype)
    compare(q, k, v, ints(0, 17), ints(700, 333))


@pytest.mark.parametrize("size", [1, 16, 40, 80, 96, 112, 128, 256])
def test_head_sizes(size, poisoned):  # noqa: F811
    compare(*inputs(1, 2, 300, 4, 2, size), end=ints(260))


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 203, 239, 799, 1023, 1024])
def test_lengths_of_what_is_filled(length, poisoned):  # noqa: F811
    q, k, v = inputs(1, 1, 1024, 2, 1, 32)
    k[:, length:], v[:, length:] = float("nan"), float("nan")  # nothing there yet
    compare(q, k, v, end=ints(length))
    begin = length // 3
    k[:, :begin], v[:, :begin] = float("nan"), float("nan")
    compare(q, k, v, ints(begin), ints(length))


def test_without_bounds_the_whole_cache_is_seen(poisoned):  # noqa: F811
    compare(*inputs(2, 1, 333, 4, 2, 32))
    compare(*inputs(2, 5, 333, 4, 2, 32), begin=ints(0, 330))


@pytest.mark.parametrize("window", [1, 5, 64, 150, 5000])
def test_windows(window, poisoned):  # noqa: F811
    compare(*inputs(2, 4, 500, 4, 2, 32), ints(0, 200), ints(500, 333), window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_and_scale(softcap, poisoned):  # noqa: F811
    q, k, v = inputs(2, 2, 300, 4, 2, 32)
    compare(10 * q, k, v, ints(5, 0), ints(300, 100), softcap=softcap)
    compare(q, k, v, ints(5, 0), ints(300, 100), softcap=softcap, scale=0.3)
    compare(q, k, v, scale=1.0)


@pytest.mark.parametrize("queries, heads, kv_heads", [(16, 8, 1), (7, 12, 2), (16, 1, 1)])
def test_many_rows_in_one_tile_or_several(queries, heads, kv_heads, poisoned):  # noqa: F811
    for dtype in (torch.float32, torch.bfloat16):
        compare(*inputs(2, queries, 200, heads, kv_heads, 32, dtype), ints(0, 9), ints(200, 150), window=40)


def test_queries_that_see_nothing_give_zeros(poisoned):  # noqa: F811
    q, k, v = inputs(4, 3, 200, 4, 2, 32)
    begin, end = ints(0, 50, 7, 150), ints(0, 50, 5, 152)
    compare(q, k, v, begin, end)
    out = decode_attention(q, k, v, begin=begin, end=end)
    assert not out[:3].any() and not out[3, 0].any() and out[3, 1:].all()
    assert not decode_attention(q, k[:, :0], v[:, :0]).any()
    assert decode_attention(q[:0], k[:0], v[:0]).shape == (0, 3, 4, 32)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_any_number_of_splits(splits, monkeypatch, poisoned):  # noqa: F811
    monkeypatch.setattr(decode, "split_count", lambda *_: splits)
    q, k, v = inputs(3, 2, 900, 2, 1, 32)
    for length in (1, 100, 130, 900):
        compare(q, k, v, ints(0, length // 2, length), ints(length, length, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_the_settings_of_a_gpu(size, dtype, monkeypatch, poisoned):  # noqa: F811
    monkeypatch.setattr(launch, "INTERPRETED", False)
    chosen = block_settings(16, size, dtype, torch.device("cpu"))
    with trying("decode_attention", chosen):
        compare(*inputs(1, 1, 400, 8, 2, size, dtype), ints(3), ints(390))


@pytest.mark.parametrize("name", ["contiguous", "transposed", "rows apart", "inside"])
def test_any_layout(name, poisoned):  # noqa: F811
    q, k, v = inputs(2, 2, 200, 4, 2, 24)
    other = [layouts(x)[name] for x in (q, k, v)]
    assert all(torch.equal(a, b) for a, b in zip(other, (q, k, v), strict=True))
    compare(*other, ints(0, 10), ints(200, 90))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    compare(*heads_first, ints(0, 10), ints(200, 90))
    bounds = torch.stack((ints(0, 10), ints(200, 90)), 1)
    compare(q, k, v, bounds[:, 0], bounds[:, 1].long())


def test_one_cache_for_all_rows(poisoned):  # noqa: F811
    q, k, v = inputs(3, 1, 100, 4, 2, 32)
    compare(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1), ints(0, 10, 20), ints(100, 90, 80))


def test_large_scores_do_not_overflow(poisoned):  # noqa: F811
    q, k, v = inputs(1, 1, 300, 2, 1, 32)
    compare(1000 * q, k, v)
    compare(100 * q, k, v, softcap=50.0)


def test_inputs_stay_as_they_were_and_runs_are_equal():
    q, k, v = inputs(2, 1, 800, 4, 2, 64)
    begin, end = ints(0, 100), ints(800, 700)
    copies = [x.clone() for x in (q, k, v, begin, end)]
    first = decode_attention(q, k, v, begin=begin, end=end)
    assert torch.equal(first, decode_attention(q, k, v, begin=begin, end=end))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, begin, end), copies, strict=True))


def test_one_launch_serves_every_length():
    """The arguments of a launch depend on shapes alone: what a CUDA graph needs."""
    launches, run = [], launch.run

    def remember(kernel, grid, *arguments, **options):
        plain = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]
        launches.append((kernel, grid, plain, options))
        run(kernel, grid, *arguments, **options)

    launch.run = remember
    try:
        for length in (1, 100, 600):
            decode_attention(*inputs(1, 1, 600, 2, 1, 32), end=ints(length))
    finally:
        launch.run = run
    assert len(launches) == 6 and launches[:2] == launches[2:4] == launches[4:]


@pytest.mark.parametrize("groups", [1, 4, 8, 16, 24, 40, 128, 300, 512, 5000])
def test_splits_fill_the_multiprocessors(groups):
    splits = split_count(groups, 264, 512)
    rounds = -(-groups * splits // 264)
    assert groups * splits / (rounds * 264) > 0.85
    assert split_count(groups, 264, 1) == 1


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 16),
    keys=st.integers(1, 300),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    size=st.integers(1, 70),
    window=st.none() | st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape(batch, queries, keys, kv_heads, group, size, window, dtype, data):
    bound = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
    begin, end = data.draw(bound), data.draw(bound)
    q, k, v = inputs(batch, queries, keys, kv_heads * group, kv_heads, size, dtype)
    compare(q, k, v, ints(*begin), ints(*end), window=window)


def test_is_a_sound_torch_op():
    q, k, v = inputs(2, 1, 100, 4, 2, 32)
    torch.library.opcheck(_op, (q, k, v, ints(0, 3), ints(100, 50), 20, None, 0.1))
    torch.library.opcheck(_op, (q, k, v, None, None, None, 30.0, 0.1))


def test_compiles_without_a_graph_break():
    q, k, v = inputs(2, 1, 100, 4, 2, 32)

    def call(q, k, v, end):
        return decode_attention(q, k, v, end=end, window=50)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, ints(90, 5)), call(q, k, v, ints(90, 5)))


def test_a_gradient_is_refused_at_once():
    q, k, v = inputs(1, 1, 10, 2, 1, 16)
    q.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        decode_attention(q, k, v)
    with torch.no_grad():
        decode_attention(q, k, v)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(1, 17, 4, 16)), "17 queries: 1 to 16"),
        (dict(q=(1, 1, 3, 16)), "3 query heads are no multiple of 2"),
        (dict(q=(2, 1, 4, 16)), "does not fit"),
        (dict(v=(1, 9, 2, 16)), "does not fit"),
        (dict(q=(1, 1, 4, 300), k=(1, 10, 2, 300), v=(1, 10, 2, 300)), "head size 300: 1 to 256"),
        (dict(end=torch.zeros(2, dtype=torch.int32)), "must be"),
        (dict(begin=torch.zeros(1)), "must be"),
        (dict(window=0), "window 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    given = dict(q=(1, 1, 4, 16), k=(1, 10, 2, 16), v=(1, 10, 2, 16)) | change
    q, k, v = (torch.zeros(given.pop(name), device=DEVICE) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, **given)


def test_dtypes_that_differ_are_refused():
    q, k, v = inputs(1, 1, 10, 2, 1, 16)
    with pytest.raises(ValueError, match="dtypes"):
        decode_attention(q.half(), k, v)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_31_elements():
    q = draw(1, 1, 8, 128, dtype=torch.bfloat16)
    k, v = (torch.zeros(1, 9_000_000, 2, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    k[:, -300:], v[:, -300:] = draw(2, 1, 300, 2, 128, dtype=torch.bfloat16, seed=1)
    begin = ints(k.shape[1] - 300)
    mine = decode_attention(q, k, v, begin=begin)
    assert error(mine, spec(q.double(), k[:, -300:].double(), v[:, -300:].double())) < 1e-2


@pytest.mark.gpu
def test_one_graph_serves_every_length():
    q, k, v = inputs(2, 1, 4096, 8, 2, 128, torch.bfloat16)
    begin, end = ints(0, 30), ints(1, 31)
    decode_attention(q, k, v, begin=begin, end=end)  # compiled before it is recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, begin=begin, end=end)
    for length in (31, 100, 1000, 4096):
        end.fill_(length)
        graph.replay()
        assert error(out, spec(q.double(), k.double(), v.double(), begin, end)) < 1e-2
