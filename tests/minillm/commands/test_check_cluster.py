"""`check_cluster` alone, and on forked ranks that are given the names of two machines."""

import contextlib
import io
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from minillm.base.errors import UserError
from minillm.commands import check_cluster
from minillm.commands.check_cluster import Config
from minillm.distributed.ranks import Ranks
from tests import launch, machines
from tests.forked_ranks import on_ranks


def on_host(ranks: Ranks, folder) -> str:
    """Make this one of two ranks a machine of its own, with a folder of its own, and return the machine's name."""
    name = f"host{1 + ranks.rank}"
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: name
    check_cluster.distributed.start = lambda *_: ranks
    check_cluster.distributed.stop = lambda: None
    check_cluster.MEASURED_S, check_cluster.SEEN_S, check_cluster.LARGEST = 0.01, 0.5, {"cpu": 2**20}
    os.chdir(folder / name)
    return name


def checked(**options) -> tuple[int, str, str]:
    """(status, what is printed, the error) of the command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            return check_cluster.run(Config(device="cpu", **options)), out.getvalue(), ""
        except UserError as problem:
            return 2, out.getvalue(), str(problem)


def _equal(rank: int, folder) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    on_host(ranks, folder)
    status, out, error = checked(data="data", out=str(folder / "shared"))
    assert (status, error) == (0, "") and bool(out) == ranks.main
    if ranks.main:
        assert "2 rank(s) on 2 machine(s)\n  host1   rank 0       1 × CPU with 1 thread(s)\n  host2   rank 1" in out
        assert f"  torch     {torch.__version__}\n" in out and "  data      data: 200,004 bytes, " in out
        (line,) = [line for line in out.splitlines() if line.startswith("  all 2 ranks")]
        latency, _, bandwidth, *_ = line.split()[3:]
        assert float(latency) > 0 and float(bandwidth) > 0
        assert "the same on all ranks; checked in" in out
    assert not list((folder / "shared").iterdir())


def _different(rank: int, folder) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    name = on_host(ranks, folder)
    if name == "host2":
        check_cluster.platform.python_version = lambda: "3.10.1"
        check_cluster.loss_of_small_model = lambda device: 7.0
    status, out, error = checked(data="data", out="own")
    assert status == 2 and bool(error) == ranks.main
    if ranks.main:
        python, data, loss, shared = error.split("; ", 3)
        assert python == f"python: {sys.version.split()[0]} on host1, 3.10.1 on host2"
        assert data.startswith("data: data: 200,004 bytes, ") and data.count("200,004 bytes") == 2
        assert loss.startswith("rank 1 on host2: the loss of a small model is 7.0000, elsewhere 6.")
        assert shared.startswith("--out own: what rank 0 writes there is not seen on host2 within 0 s; give a folder")
        assert "python" not in out and "  torch     " in out  # what is the same is listed all the same


def _same_names(rank: int, folder) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    on_host(ranks, folder)
    socket.gethostname = lambda: "node"
    status, out, _ = checked()
    assert status == 0 and ("2 machines have 1 name(s): no message can tell them apart" in out) == ranks.main


def _wrong_sums(rank: int) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    right = dist.all_reduce

    def wrong(tensor, *given, **options):
        right(tensor, *given, **options)
        if tensor.numel() > 1000:
            tensor[5] += ranks.rank  # on one rank alone

    assert check_cluster.check_sum(ranks) == []
    check_cluster.dist.all_reduce = wrong
    assert check_cluster.check_sum(ranks) == [
        "sums over all ranks are wrong in 1 of 1,048,576 places; try NCCL_P2P_DISABLE=1"
    ]


@pytest.fixture
def two_folders(tmp_path):
    for name in ("host1", "host2"):
        data = tmp_path / name / "data"
        data.mkdir(parents=True)
        (data / "train-00000.bin").write_bytes(bytes(200_000))
        (data / "meta.json").write_text("{  }")
    return tmp_path


def test_equal_machines_get_a_table(two_folders):
    on_ranks(2, two_folders / "ranks", _equal, two_folders)


def test_machines_that_differ_are_told_apart_in_one_line(two_folders):
    file = two_folders / "host2" / "data" / "train-00000.bin"
    file.write_bytes(bytes(199_999) + b"x")  # as large as the other
    on_ranks(2, two_folders / "ranks", _different, two_folders)


def test_machines_of_one_name_are_told_so(two_folders):
    on_ranks(2, two_folders / "ranks", _same_names, two_folders)


def test_sums_that_are_wrong_on_one_rank_are_found(tmp_path):
    on_ranks(2, tmp_path, _wrong_sums)


def test_alone_it_says_what_is_here(call):
    status, out, error = call("check_cluster", "--device", "cpu", "--data", "bins", "--out", "out/new")
    assert status == 0 and "1 rank(s) on 1 machine(s)" in out and "one process alone: start it by torchrun" in out
    assert "GB/s" not in out and not error
    status, _, error = call("check_cluster", "--device", "cpu", "--data", "no-such-folder")
    assert status == 2 and error == "error: --data no-such-folder: is not there, on no machine\n"


def test_a_changed_piece_changes_the_hash_of_a_file(tmp_path):
    file = tmp_path / "train.bin"
    file.write_bytes(bytes(3_000_000))
    before = check_cluster.contents(str(file))
    assert before == check_cluster.contents(str(file)) and "3,000,000 bytes" in before
    for place in (0, 2_999_999):
        changed = bytearray(3_000_000)
        changed[place] = 1
        file.write_bytes(changed)
        assert check_cluster.contents(str(file)) != before


@pytest.mark.slow
def test_on_two_machines_of_two_ranks(tmp_path):
    """Over a real network, whose speed between machines is known: 50 Mbit/s are 0.006 GB/s, which two ranks share."""
    with machines.started() as both:
        for machine in both:
            machine.slow_down(50)
            words = f"-m minillm check_cluster --device cpu --data {launch.ROOT}/docs --out {tmp_path}/out"
            machine.torchrun(words, tmp_path / machine.name, per_machine=2)
        assert [machine.wait() for machine in both] == [0, 0], both[0].text
    lines = both[0].text.splitlines() + both[1].text.splitlines()  # either may have rank 0
    assert "4 rank(s) on 2 machine(s)" in lines
    speeds = {line[:20].strip(): float(line.split()[-4]) for line in lines if " ms " in line}
    assert 0.002 < speeds["between machines"] < 0.004 < speeds["all 4 ranks"] < 0.008 < speeds["within a machine"]


@pytest.mark.slow
def test_the_command_ends_with_its_status_under_torchrun(tmp_path):
    words = ["-m", "minillm", "check_cluster", "--device", "cpu", "--data", str(tmp_path / "nothing")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", *words],
        cwd=launch.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and f"error: --data {tmp_path}/nothing: is not there" in done.stderr
