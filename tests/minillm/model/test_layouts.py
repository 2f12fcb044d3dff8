"""Memory and time of layouts beside numbers worked out by hand and published runs (sources in docs/en/plan.md)."""

import dataclasses

import pytest

from minillm.model import memory
from minillm.model.config import preset
from minillm.model.layouts import Gpu, Layout, Work, step_seconds
from minillm.model.memory import gpu_memory
from minillm.model.size import flops_per_token, n_parameters

H100 = Gpu(peak=989e12, memory=80e9, link=450e9, network=50e9)
SHAPES = {name: preset(name, vocab_size=128_256) for name in ("8b", "70b", "405b")}
LENGTH = 8192  # tokens of a sequence

# preset, replicate × shard × context × tensor, Mi tokens of a step, recomputed
# → GB of state, gathered, gradients
# → micro-batches; seconds of compute, tensor parallel, gather, reduce (once), hops, replicas, step
# → MFU in percent, tokens a second and GPU
TABLE = [
    ("8b", (1, 8, 1, 1), 4, 0, "16.1 3.0 3.4", 64, "68.23 0 5.00 .08 .29 0 68.23", 45.0, 7685),
    ("8b", (1, 8, 1, 1), 4, 1, "16.1 3.0 3.4", 64, "90.97 0 5.00 .08 .29 0 90.97", 33.8, 5763),
    ("8b", (8, 8, 1, 1), 4, 0, "16.1 3.0 3.4", 8, "8.53 0 .62 .08 .04 .18 8.53", 45.0, 7685),
    ("8b", (1, 1024, 1, 1), 8, 0, ".1 3.0 3.4", 1, "1.07 0 .10 .10 .98 0 1.18", 40.6, 6935),
    ("8b", (16, 64, 1, 1), 8, 0, "2.0 3.0 3.4", 1, "1.07 0 .09 .09 .06 .02 1.07", 45.0, 7685),
    ("8b", (256, 8, 1, 8), 16, 0, "2.0 2.2 2.3", 1, ".13 .04 .09 .09 .01 .02 .25", 24.1, 4110),
    ("70b", (1, 64, 1, 1), 8, 1, "17.6 7.6 9.3", 16, "189.05 0 12.35 .77 1.66 0 189.05", 33.8, 693),
    ("70b", (16, 8, 1, 8), 8, 0, "17.6 4.6 4.8", 8, "8.86 1.67 6.17 .77 .10 .21 10.53", 37.9, 778),
    ("405b", (4, 32, 1, 8), 16, 1, "25.4 10.0 10.8", 16, "128.87 15.78 78.63 4.91 1.29 .24 144.65", 30.1, 113),
    ("405b", (64, 32, 1, 8), 16, 1, "25.4 10.0 10.8", 1, "8.05 .99 4.91 4.91 .12 .31 11.25", 24.2, 91),
]


def work_of(layout: tuple, mi_tokens: float, recompute: bool, rows: int = 1, **more) -> Work:
    return Work(Layout(*layout), rows, LENGTH, int(mi_tokens * (1 << 20)), recompute=bool(recompute), **more)


def speed(shape, work: Work, seconds: dict[str, float]) -> float:
    """Tokens a second and GPU."""
    return work.n_tokens / seconds["step"] / work.layout.n_gpus


def test_sizes_and_operations_are_those_of_the_published_shapes():
    assert [n_parameters(shape) for shape in SHAPES.values()] == [8_030_261_248, 70_553_706_496, 405_853_388_800]
    flops = [flops_per_token(shape, LENGTH) for shape in SHAPES.values()]
    assert flops == [57_914_449_920, 481_442_709_504, 2_625_449_459_712]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]} {row[3]}")
def test_a_table_worked_out_by_hand(row):
    name, layout, mi_tokens, recompute, sizes, n_micro_batches, times, mfu, tokens_per_s = row
    shape = SHAPES[name]
    work = work_of(layout, mi_tokens, recompute, reduce_once=True)
    found = gpu_memory(shape, work)
    for item, gigabytes in zip(("state", "gathered", "gradients"), sizes.split(), strict=True):
        assert found[item] / 1e9 == pytest.approx(float(gigabytes), abs=0.051), item

    assert work.n_micro_batches == n_micro_batches
    seconds = step_seconds(shape, work, H100)
    names = ("compute", "tensor parallel", "gather", "reduce", "hops", "replicas", "step")
    for item, expected in zip(names, times.split(), strict=True):
        assert seconds[item] == pytest.approx(float(expected), abs=0.0051), item
    found_speed = speed(shape, work, seconds)
    assert found_speed == pytest.approx(tokens_per_s, abs=0.51)
    assert found_speed * flops_per_token(shape, LENGTH) / H100.peak * 100 == pytest.approx(mfu, abs=0.051)


@pytest.mark.parametrize(
    ("name", "layout", "recompute", "gigabytes"),
    [
        ("8b", (1, 8, 1, 1), 0, 53.4),
        ("8b", (1, 8, 1, 1), 1, 8.7),
        ("8b", (256, 8, 1, 8), 0, 7.7),
        ("70b", (16, 8, 1, 8), 0, 33.8),
        ("405b", (4, 32, 1, 8), 1, 17.2),
    ],
)
def test_activations_are_those_of_one_device_divided_by_the_parts_of_a_row(name, layout, recompute, gigabytes):
    """By hand, for T tokens of a GPU: see the formulas in docs/en/plan.md."""
    shape = SHAPES[name]
    tokens = LENGTH // (layout[2] * layout[3])
    dim, ffn = shape.dim, shape.ffn_dim
    heads = (shape.n_heads + shape.n_kv_heads) * 128  # numbers of a query and a key
    head = 2 * shape.vocab_size * dim
    loss = 2 * min(tokens * shape.vocab_size, max((shape.vocab_size + tokens) * dim, 1 << 25)) + head + 2 * tokens * dim
    if recompute:
        layer = tokens * (8 * dim + 2 * (2 * dim + 2 * heads + 6 * ffn))
        expected = tokens * shape.n_layers * 6 * dim + max(layer, loss)
    else:
        a_layer = 4 * 2 * dim + 2 * (2 * dim + 3 * heads + 4 * ffn)
        expected = tokens * (shape.n_layers * a_layer + 6 * dim) + loss
    found = gpu_memory(shape, work_of(layout, 16, recompute))["activations"]
    assert found == expected and found / 1e9 == pytest.approx(gigabytes, abs=0.051)


def test_a_part_of_a_row_keeps_the_keys_and_values_of_all_of_it():
    """Half the tokens as in tensor parallelism by two, and 32 layers of 8,192 × 1,024 keys and values in bfloat16."""
    shape = SHAPES["8b"]
    context, tensor = (
        gpu_memory(shape, work_of(layout, 4, 0))["activations"] for layout in ((1, 4, 2, 1), (1, 4, 1, 2))
    )
    assert context - tensor == 32 * 2 * 2 * 8192 * 1024
    context, tensor = (
        gpu_memory(shape, work_of(layout, 4, 1))["activations"] for layout in ((1, 4, 2, 1), (1, 4, 1, 2))
    )
    assert context - tensor == 2 * 2 * 8192 * 1024


def test_one_gpu_takes_what_info_counts():
    shape = preset("124m", vocab_size=50_257)
    one = gpu_memory(shape, Work(Layout(), rows=8, seq_len=1024, n_tokens=8 * 1024))
    state = {**memory.weights(shape), **memory.optimizer_state(n_parameters(shape))}
    activations = memory.activations(shape, 8, 1024, 2)
    assert sum(one.values()) == sum(state.values()) + sum(activations.values())


@pytest.mark.parametrize(("seq_len", "n_positions"), [(1024, 8192), (16384, 16384)])
def test_rotary_tables_are_whole_on_each_gpu(seq_len, n_positions):
    shape = SHAPES["8b"]
    work = Work(Layout(shard=8), rows=1, seq_len=seq_len, n_tokens=8 * seq_len)
    assert gpu_memory(shape, work)["state"] == 16 * n_parameters(shape) // 8 + 4 * 128 * n_positions


def test_muon_keeps_one_moment_for_the_matrices_of_the_layers():
    shape = SHAPES["8b"]
    work = work_of((1, 8, 1, 1), 4, 0)
    n_matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    saved = gpu_memory(shape, work)["state"] - gpu_memory(shape, dataclasses.replace(work, muon=True))["state"]
    assert saved == 4 * n_matrices // 8


def test_gradients_are_reduced_in_every_micro_batch():
    """405B on 1,024 GPUs: then the network, not arithmetic, sets the time."""
    seconds = step_seconds(SHAPES["405b"], work_of((4, 32, 1, 8), 16, 1), H100)
    assert seconds["reduce"] == pytest.approx(16 * 4.9145, rel=1e-3)  # 4 bytes × N × (1 − 8/256) / 320 GB/s each
    assert seconds["hops"] == pytest.approx((2 * 16 + 16) * 126 * 31 * 1e-5)
    assert seconds["step"] == pytest.approx(2 * 78.63 + 1.875 + 0.24 + 15.78, abs=0.02)


def test_context_parallelism_gathers_keys_and_values():
    """8 key/value heads of 128, 4,096 tokens a rank, 32 layers: keys and values forward, gradients backward."""
    shape = SHAPES["8b"]
    within = step_seconds(shape, work_of((1, 4, 2, 1), 4, 0), H100)["context parallel"]
    assert within == pytest.approx(128 * 4 * 32 * 4096 * 2 * 1024 / 360e9)
    across = step_seconds(shape, work_of((1, 4, 16, 1), 4, 0), H100)["context parallel"]
    assert across == pytest.approx(128 * 4 * 32 * 512 * 2 * 1024 * 15 / 40e9)
    again = step_seconds(shape, work_of((1, 4, 2, 1), 4, 1), H100)["context parallel"]
    assert again == pytest.approx(1.5 * within)


def test_copies_on_one_host_share_its_network():
    shape = SHAPES["8b"]
    n = n_parameters(shape)
    one_host = step_seconds(shape, work_of((8, 1, 1, 1), 4, 0), H100)["replicas"]
    assert one_host == pytest.approx(8 * n * (7 / 8) / 360e9)
    two_hosts = step_seconds(shape, work_of((16, 1, 1, 1), 4, 0), H100)["replicas"]
    assert two_hosts == pytest.approx(8 * n / 8 * (1 / 2) / 40e9)
    alone = dataclasses.replace(H100, per_host=1)  # a GPU a machine: 2 N numbers, in float32, over R machines
    assert step_seconds(shape, work_of((2, 1, 1, 1), 4, 0), alone)["replicas"] == pytest.approx(8 * n / 2 / 40e9)


def test_muon_s_products_are_shared_out_among_owners():
    """8B: 6.7e14 operations a step: 1.7 s at 400 TFLOP/s, if each GPU does all of them."""
    shape = SHAPES["8b"]
    gpu = dataclasses.replace(H100, peak=400e12)
    seconds = {
        n: step_seconds(shape, work_of((1, n, 1, 1), 8, 0, muon=True), gpu, efficiency=1.0)["muon"] for n in (1, 8, 64)
    }
    n_matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    sent = 2 * 2 * n_matrices / 64 * 63 / 64
    assert sent == pytest.approx(0.43e9, rel=0.01)
    assert seconds[1] == pytest.approx(1.7, abs=0.05)
    assert seconds[8] == pytest.approx(0.21, abs=0.02)
    assert seconds[64] - sent / 40e9 == pytest.approx(0.026, abs=0.001)


def test_gpus_of_a_host_with_a_copy_each_share_muon_s_products():
    """The results of all matrices travel in bfloat16; another host, or workers that train alone, change nothing."""
    shape = SHAPES["8b"]
    n_matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)

    def seconds(n_copies: int, **more) -> float:
        return step_seconds(shape, work_of((n_copies, 1, 1, 1), 8, 0, muon=True, **more), H100)["muon"]

    assert seconds(8) == pytest.approx(seconds(1) / 8 + 2 * n_matrices * (7 / 8) / 360e9)
    assert seconds(16) == seconds(8)
    assert seconds(8, diloco_steps=100) == seconds(1)


def test_diloco_exchanges_every_so_many_steps_and_keeps_two_copies_more():
    shape = SHAPES["8b"]
    alone = dataclasses.replace(H100, per_host=1)
    work = work_of((2, 1, 1, 1), 4, 0)
    with_diloco = dataclasses.replace(work, diloco_steps=100)
    seconds, each_step = step_seconds(shape, with_diloco, alone), step_seconds(shape, work, alone)
    assert seconds["diloco"] == each_step["replicas"] / 100 and seconds["replicas"] == each_step["diloco"] == 0
    assert seconds["step"] == seconds["compute"] + seconds["diloco"]
    more = gpu_memory(shape, with_diloco)["state"] - gpu_memory(shape, work)["state"]
    assert more == 8 * n_parameters(shape)


@pytest.mark.parametrize(
    ("name", "layout", "rows", "recompute", "work", "published"),
    [
        # torchtitan, compiled; layers partly recomputed, for about 15 % more arithmetic
        ("8b", (1, 8, 1, 1), 2, 0, 1.15, 6667),
        ("8b", (1, 128, 1, 1), 2, 0, 1.15, 6514),
        ("8b", (1, 8, 1, 8), 12, 0, 1.15, 4378),
        ("70b", (1, 32, 1, 8), 16, 1, 1.0, 597.3),
    ],
)
def test_published_runs_are_within_a_fifth(name, layout, rows, recompute, work, published):
    shape = SHAPES[name]
    mi_tokens = rows * layout[0] * layout[1] * LENGTH / (1 << 20)  # one micro-batch
    planned = work_of(layout, mi_tokens, recompute, rows)
    seconds = step_seconds(shape, planned, H100, efficiency=0.45 / work)
    assert speed(shape, planned, seconds) == pytest.approx(published, rel=0.2)


def test_published_memory_falls_with_the_ranks_that_hold_a_copy():
    """torchtitan's 8B: 77.0 GiB on 8 GPUs, 62.0 on 128, at the same rows."""
    few, many = (gpu_memory(SHAPES["8b"], work_of((1, n, 1, 1), n / 64, 0, rows=2)) for n in (8, 128))
    assert (sum(few.values()) - sum(many.values())) / 2**30 == pytest.approx(77.0 - 62.0, rel=0.2)
