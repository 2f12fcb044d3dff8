"""Several machines, played by forked ranks that are given names: what each does once, and what must be the same."""

import os
import socket

import pytest
import torch

from minillm.base.errors import UserError
from minillm.distributed import ranks as distributed
from minillm.distributed.hosts import check_options, differences, differing, first_on_host, once_a_host
from minillm.distributed.ranks import Ranks
from minillm.training import kernel_check, run
from minillm.training.config import TrainingConfig
from tests.forked_ranks import on_ranks

CPU = torch.device("cpu")


def on_host(rank: int) -> str:
    """Make this process one of two machines with two ranks each, and return the machine's name."""
    os.environ["LOCAL_RANK"] = str(rank % 2)
    name = f"host{1 + rank // 2}"
    socket.gethostname = lambda: name
    return name


def _builds(rank: int, folder, shared: bool) -> None:
    """Each machine builds what it does not see; the disk is shared, or each has its own."""
    ranks = Ranks(rank, 4, CPU)
    name = on_host(ranks.rank)
    path = folder / ("disk" if shared else name)

    def build():
        if not path.exists():
            path.write_text(f"by rank {ranks.rank}")

    once_a_host(ranks, build)
    assert path.exists()  # for every rank, as soon as it goes on


@pytest.mark.parametrize("shared", [True, False])
def test_each_machine_builds_what_it_does_not_see(shared, tmp_path):
    on_ranks(4, tmp_path / "ranks", _builds, tmp_path, shared)
    written = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert written == ({"disk": "by rank 0"} if shared else {"host1": "by rank 0", "host2": "by rank 2"})


def test_alone_a_process_does_it_once(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    done = []
    once_a_host(Ranks(0, 1, CPU), lambda: done.append(1))
    assert first_on_host() and done == [1]


def test_facts_that_differ_are_told_with_their_machines():
    hosts = ["host1", "host1", "host2", "host2"]
    facts = [{"torch": "2.14.1", "data": "a"}] * 2 + [{"torch": "2.11.0", "data": "a"}] * 2
    assert differing(hosts, facts) == ["torch: 2.14.1 on host1, 2.11.0 on host2"]
    facts[3] = {"torch": "2.11.0"}
    assert differing(hosts, facts)[1] == "data: a on host1 and host2, none on host2"
    assert differing([f"host{i}" for i in range(9)], [{"gpu": "H100"}] * 8 + [{"gpu": "A100"}]) == [
        "gpu: H100 on 8 machines, A100 on host8"
    ]
    assert differing(hosts, [{"torch": "2.14.1"}] * 4) == []


def _with_other_data(rank: int, folder) -> None:
    ranks = Ranks(rank, 3, CPU)
    name = on_host(ranks.rank)
    data = "1f" if name == "host2" else "0a"
    assert differences(ranks, {"data": data, "model": "m"}) == ["data: 0a on host1, 1f on host2"]
    with pytest.raises(UserError, match=r"different data or models \(data: 0a on host1, 1f on host2\)"):
        run.Run(TrainingConfig(out=str(folder / "out"), steps=3), ranks, {"data": data, "model": "m"})


def test_machines_with_different_data_do_not_train(tmp_path):
    on_ranks(3, tmp_path / "ranks", _with_other_data, tmp_path)


def _with_other_options(rank: int, on_host2: dict) -> str:
    """What `run.begin` says on host2, started with other options than host1."""
    ranks = Ranks(rank, 3, CPU)
    options = {"device": "cpu", "batch_size": 12} | (on_host2 if on_host(rank) == "host2" else {})
    run.distributed.start = lambda device, timeout_s: ranks
    run.distributed.world_size = run.sharding.world_size = lambda: ranks.world
    try:
        run.begin(TrainingConfig(**options))
    except UserError as problem:
        return str(problem)
    return ""


@pytest.mark.parametrize(
    ("on_host2", "words"),
    [
        ({"lr": 0.1}, "different options (--lr: None on host1, 0.1 on host2): give the same command"),
        ({"max_bad_steps": 3, "save_every": 7}, "--save_every: 500 on host1, 7 on host2; --max_bad_steps: 20 on host1"),
        ({"dtype": "bfloat16"}, "--dtype: torch.float32 on host1, torch.bfloat16 on host2"),
        ({"dtype": "float32", "device": "auto"}, ""),  # as auto is on a CPU
    ],
)
def test_machines_with_different_options_do_not_train(on_host2, words, tmp_path):
    for said in on_ranks(3, tmp_path, _with_other_options, on_host2):
        assert words in said and bool(words) == bool(said)


def test_alone_a_process_may_have_any_options():
    check_options(Ranks(0, 1, CPU), {"lr": float("nan")})


def _without_kernels_on_host2(rank: int) -> None:
    """Rank 2 alone has no compiler; before, the others waited for it for ever."""
    ranks = Ranks(rank, 3, CPU)
    name, lines = on_host(ranks.rank), []
    check = kernel_check.KernelCheck(ranks, lines.append)
    check.is_automatic, check.are_there = True, name == "host1"  # as on GPUs
    check.settle()
    assert kernel_check.ops.selected() == "torch"
    says = "ops: the kernels on host2 cannot be used, so torch's are, on all machines"
    assert [line.partition(";")[0] for line in lines] == ([says] if ranks.main else [])


def test_where_one_machine_lacks_the_kernels_all_use_torchs(tmp_path):
    on_ranks(3, tmp_path, _without_kernels_on_host2)


def _without_kernels(rank: int) -> None:
    ranks = Ranks(rank, 2, CPU)
    check = kernel_check.KernelCheck(ranks, on_host)
    check.is_automatic = True
    check.settle()
    assert kernel_check.ops.selected() == "auto"  # which is torch's there, and `ops.describe` says why


def test_where_no_machine_has_the_kernels_nothing_is_said(tmp_path):
    on_ranks(2, tmp_path, _without_kernels)


def _wrong_on_host2(rank: int) -> None:
    ranks = Ranks(rank, 3, CPU)
    name, lines = on_host(ranks.rank), []
    check = kernel_check.KernelCheck(ranks, lines.append)
    check.is_automatic = check.are_there = True
    check.process = name == "host2"  # its first rank has compared
    check._problem = lambda: "are not right on this GPU (loss is off)"
    check.settle()
    assert kernel_check.ops.selected() == "torch"
    says = "ops: the kernels on host2 are not right on this GPU (loss is off); using torch's. Please report it."
    assert lines == ([says] if ranks.main else [])


def test_each_machine_checks_the_kernels_on_its_own_gpu(tmp_path):
    on_ranks(3, tmp_path, _wrong_on_host2)


class Store(dict):
    def set(self, key, value):
        self[key] = value.encode()

    get = dict.__getitem__


def test_ranks_with_devices_of_other_kinds_are_refused_by_name(monkeypatch):
    store = Store()
    monkeypatch.setattr(socket, "gethostname", lambda: "host1")
    distributed._check_kind(store, 0, "cuda")
    monkeypatch.setattr(socket, "gethostname", lambda: "host2")
    distributed._check_kind(store, 8, "cuda")
    with pytest.raises(UserError, match="rank 8 on host2 would take its cpu, but rank 0 on host1 has taken its cuda"):
        distributed._check_kind(store, 8, "cpu")


@pytest.mark.parametrize(
    ("machines", "restarts", "shared", "warns"),
    [("2", "3", "True", True), ("1", "3", "True", False), ("2", "0", "True", False), ("2", "3", "False", False)],
)
def test_a_store_that_lets_no_machine_come_back(machines, restarts, shared, warns, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    assert distributed._would_not_come_back() == warns
