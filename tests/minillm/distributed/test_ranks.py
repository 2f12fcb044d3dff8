import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.base import device
from minillm.base.errors import UserError
from minillm.distributed import ranks
from minillm.distributed.layout import Layout, RowPart
from minillm.distributed.ranks import Ranks, micro_batch, start
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")


@given(step=st.integers(0, 10**12), micro=st.integers(1, 5), per_rank=st.integers(1, 4), world=st.integers(1, 8))
def test_micro_batches_of_all_ranks_are_the_global_batch_in_order(step, micro, per_rank, world):
    batch = micro * per_rank * world
    taken = [Ranks(rank, world, CPU).micro_batches(step, batch, micro) for rank in range(world)]
    assert np.concatenate([m for mine in taken for m in mine]).tolist() == list(range(step * batch, (step + 1) * batch))
    assert {len(m) for mine in taken for m in mine} == {micro}
    assert {len(mine) for mine in taken} == {per_rank}


def test_micro_batches_by_hand():
    first, second = Ranks(0, 2, CPU), Ranks(1, 2, CPU)
    assert [m.tolist() for m in first.micro_batches(3, 8, 2)] == [[24, 25], [26, 27]]
    assert [m.tolist() for m in second.micro_batches(3, 8, 2)] == [[28, 29], [30, 31]]
    assert first.micro_batches(0, 8, 2)[0].dtype == np.int64


@given(n=st.integers(0, 40), world=st.integers(1, 8))
def test_a_share_is_as_long_on_each_rank_and_each_number_is_once_its_own(n, world):
    shares = [Ranks(rank, world, CPU).share(n) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(number for share in shares for number, is_own in share if is_own) == list(range(n))


def test_ranks_that_share_rows_have_the_same_data_positions():
    ranks = [Ranks(rank, 4, CPU, Layout(tensor=2)) for rank in range(4)]
    assert [one.micro_batches(0, 4, 2)[0].tolist() for one in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [one.row_part for one in ranks] == 2 * [RowPart(0, tensor=2), RowPart(1, tensor=2)]


def test_one_rank_needs_no_group():
    alone = Ranks(0, 1, CPU)
    assert alone.main and alone.sum(1.5, 2) == [1.5, 2] and alone.max(15) == 15 and alone.max(0) == 0
    assert alone.maxima(3, -1) == [3, -1] and alone.exchange({"a": [1]}) == [{"a": [1]}]
    alone.barrier()


def _tell_one_another(rank: int) -> None:
    ranks = Ranks(rank, 3, CPU)
    told = ranks.exchange({"rank": ranks.rank, "three": "三" * ranks.rank})  # of different lengths
    assert told == [{"rank": rank, "three": "三" * rank} for rank in range(3)]
    assert ranks.maxima(ranks.rank, -ranks.rank, 2**60 + ranks.rank) == [2, 0, 2**60 + 2]
    assert ranks.max(ranks.rank) == 2


def test_ranks_tell_one_another_values_and_the_largest_numbers(tmp_path):
    on_ranks(3, tmp_path, _tell_one_another)


@pytest.mark.parametrize(("batch", "most", "world"), [(8, 2, 3), (0, 1, 1), (1, 4, 2)])
def test_a_batch_that_does_not_divide_by_the_ranks_is_refused_with_one_that_does(batch, most, world):
    with pytest.raises(UserError, match=f"--batch_size {batch} ") as refusal:
        micro_batch(batch, most, world)
    proposed = int(str(refusal.value).rpartition(" ")[2])
    assert micro_batch(3 * proposed, most, world) <= most


@pytest.mark.parametrize(
    ("batch", "most", "world", "micro"),
    [(16, 4, 8, 2), (16, 2, 16, 1), (16, 4, 2, 4), (5, 2, 1, 2), (6, 4, 1, 3), (1, 2, 1, 1), (128, 64, 1, 64)],
)
def test_a_micro_batch_is_what_was_asked_for_at_most(batch, most, world, micro):
    assert micro_batch(batch, most, world) == micro
    assert micro_batch(batch, micro, world) == micro  # as a run writes it down


@pytest.mark.parametrize(
    ("batch", "world", "micro"),
    [
        (16, 1, 16),
        (16, 2, 8),
        (128, 1, 32),
        (80, 2, 20),
        (31, 1, 31),
        (37, 1, 19),
        (33, 1, 17),
        (65, 1, 22),
        (74, 2, 19),
    ],
)
def test_a_micro_batch_not_asked_for_is_a_rank_s_share_up_to_32(batch, world, micro):
    assert micro_batch(batch, None, world) == micro
    assert micro_batch(batch, micro, world) == micro  # as a run writes it down


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("share", [1, 2, 31, 32, 33, 37, 64, 65, 97, 127, 1021])
def test_micro_batches_are_few_alike_and_hold_each_sample_once(share, world):
    batch = share * world
    micro = micro_batch(batch, None, world)
    parts = [Ranks(rank, world, CPU).micro_batches(3, batch, micro) for rank in range(world)]
    sizes = [[len(part) for part in of_rank] for of_rank in parts]
    assert sizes[0] == sizes[-1]  # so ranks make the same passes, which shards need
    assert len(sizes[0]) == math.ceil(share / 32) and set(sizes[0][:-1]) <= {micro} and sizes[0][-1] <= micro <= 32
    assert np.concatenate([np.concatenate(of_rank) for of_rank in parts]).tolist() == list(range(3 * batch, 4 * batch))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "meta:x", "meta"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}: (choose auto, cpu, cuda|.*try auto or cpu)") as refused:
        device.pick_device(name)
    assert len(str(refused.value)) < 100  # torch's own list of all that it knows helps nobody


@pytest.mark.parametrize(
    ("group", "limits", "cores"),
    [
        ("0::/\n", {"": "200000 100000"}, 2.0),  # in a container
        ("0::/\n", {"": "max 100000"}, math.inf),
        ("0::/\n", {}, math.inf),  # the root of a machine has no such file
        ("0::/a/b\n", {"a": "150000 100000", "a/b": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a": "800000 100000", "a/b": "50000 100000"}, 0.5),
        ("12:cpu:/a\n", {"a": "50000 100000"}, math.inf),  # version 1
        (None, {"": "50000 100000"}, math.inf),  # no Linux
        ("0::/\n", {"": "many"}, math.inf),
    ],
)
def test_the_quota_of_a_container(tmp_path, group, limits, cores):
    (tmp_path / "proc/self").mkdir(parents=True)
    if group is not None:
        (tmp_path / "proc/self/cgroup").write_text(group)
    for name, limit in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{limit}\n")
    assert device.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(
    ("quota", "environment", "taken"),
    [
        (math.inf, {}, []),
        (8.0, {}, []),
        (2.0, {}, [2]),
        (1.5, {}, [2]),
        (0.2, {}, [1]),
        (2.0, {"OMP_NUM_THREADS": "8"}, []),
    ],
)
def test_a_container_gets_as_many_threads_as_its_quota_has_cores(monkeypatch, quota, environment, taken):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_to = []
    monkeypatch.setattr(device, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    device.keep_to_quota()
    assert set_to == taken


def test_devices():
    assert device.pick_device("cpu") == CPU
    assert device.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("name", "current"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_given_by_number_becomes_the_current_one(name, current, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)  # below torch's own checks
    assert device.pick_device(name) == torch.device(name) and taken == current


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_one_process_takes_its_gpu_by_number(name, number, monkeypatch):
    taken = []
    monkeypatch.setattr(ranks, "pick_device", torch.device)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)  # below torch's own checks
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert start(name) == Ranks(0, 1, torch.device("cuda", number)) and taken == [number]


def test_ranks_that_hold_different_things_are_found(monkeypatch):
    one = Ranks(0, 1, torch.device("cpu"))
    assert one.agree({"data": "d"})
    monkeypatch.setattr(Ranks, "max", lambda self, number: max(number, 0))  # the other rank has another number
    assert not one.agree({"data": "d"})
