"""A run on two machines: it trains as on one, a machine dies and comes back, a link is cut, a save takes long."""

import contextlib
import os
import re
import sys
import time

import pytest
import torch.multiprocessing as mp

from minillm.checkpoint import train_state
from tests import launch, machines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return launch.write_corpus(tmp_path_factory.mktemp("machines") / "corpus")


def words(corpus, out, more: str) -> str:
    """Arguments of torchrun that train a small model."""
    return f"{launch.ROOT}/train_pretrain.py {launch.SMALL} --data {corpus} --out {out} {more}"


def test_two_machines_on_a_slow_link_train_as_one_process_does(corpus, tmp_path):
    out = tmp_path / "out"
    with machines.started() as both:
        for machine in both:
            machine.slow_down(50)
            machine.torchrun("--max_restarts 1 " + words(corpus, out, "--steps 20"), tmp_path / machine.name)
        assert [machine.wait() for machine in both] == [0, 0], both[0].text
    # torchrun shares its store over restarts by default, and then a machine cannot come back
    assert "a machine that is started again cannot join this run" in both[0].text + both[1].text
    alone = tmp_path / "alone"
    launch.finish("pretrain", words(corpus, alone, "--steps 20").split()[1:], tmp_path / "log")
    assert launch.losses(out) == pytest.approx(launch.losses(alone), abs=1e-5)
    assert len(launch.losses(out)) == 20


def test_a_machine_that_dies_and_comes_back_goes_on_with_the_other(corpus, tmp_path):
    out, more = tmp_path / "out", "--steps 600 --save_every 100 --timeout_s 30"
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with machines.started() as (first, second):
        for machine in (first, second):
            machine.torchrun("--max_restarts 3 " + words(corpus, out, more), tmp_path / machine.name, **env)
        first.wait_for_checkpoint(out)
        second.die()
        assert second.wait() != 0
        first.wait_for("has failed or ended after step")
        time.sleep(3)  # as long as a machine takes at least to start again
        second.torchrun("--max_restarts 3 " + words(corpus, out, more), tmp_path / second.name, **env)
        assert [machine.wait(240) for machine in (first, second)] == [0, 0], first.text + second.text
    assert "weights from" in first.text + second.text
    assert list(launch.losses(out)) == list(range(1, 601))  # each step once, also those that were done again


def test_one_machine_goes_on_alone_until_the_other_is_back(corpus, tmp_path):
    """torchrun told that one machine is enough: the run saves, and goes on with both, when the second joins."""
    out, env = tmp_path / "out", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    more = "--steps 100000 --save_every 100 --schedule constant --timeout_s 30"
    command = "--max_restarts 5 --rdzv_conf last_call_timeout=5 " + words(corpus, out, more)
    with machines.started() as (first, second):
        for machine in (first, second):
            machine.torchrun(command, tmp_path / machine.name, machines="1:2", **env)
        first.wait_for_checkpoint(out)
        second.die()
        first.wait_for("ranks: 2 in the checkpoint, 1 now")
        second.torchrun(command, tmp_path / second.name, machines="1:2", **env)
        first.wait_for("stopped by signal 15 after step")
        first.wait_for("ranks: 1 in the checkpoint, 2 now")
        n_rows = len(launch.losses(out))
        until = time.monotonic() + 60
        while len(launch.losses(out)) < n_rows + 5:
            assert time.monotonic() < until, first.text
            time.sleep(0.1)
    losses = launch.losses(out)  # in which no step stands twice
    assert list(losses) == list(range(1, len(losses) + 1))


def test_a_link_that_is_cut_ends_both_sides_and_the_lost_one_is_named(corpus, tmp_path):
    out = tmp_path / "out"
    with machines.started() as (first, second):
        for machine in (first, second):
            machine.torchrun(
                words(corpus, out, "--steps 100000 --save_every 50 --timeout_s 6"), tmp_path / machine.name
            )
        first.wait_for_checkpoint(out)
        second.cut()
        assert first.wait(120) != 0
        second.wait_for("no step finished for 6 s")
        assert "no step finished for 6 s after step" in first.text
        assert "on host2 gives no sign (last finished step" in first.text
    assert not list(out.glob("*.tmp-*")) and launch.steps(out)


def _saves_slowly(rank: int, arguments: list[str], port: int, output: str) -> None:
    """A rank of a training script in which every save takes longer than --timeout_s."""
    sys.path.insert(0, str(launch.ROOT))
    import train_pretrain

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    sys.argv = ["train_pretrain.py", *arguments]
    save = train_state.save

    def slow_save(*given, **options):
        time.sleep(14 if rank == 0 else 0)
        return save(*given, **options)

    train_state.save = slow_save
    with open(f"{output}-{rank}", "w") as stream, contextlib.redirect_stdout(stream):  # noqa: PTH123
        assert train_pretrain.main() == 0


def test_a_save_longer_than_the_limit_on_a_step_ends_no_run(corpus, tmp_path):
    arguments = words(corpus, tmp_path / "out", "--steps 4 --timeout_s 10").split()[1:]
    launch.server()
    given = (arguments, launch.free_port(), str(tmp_path / "log"))
    mp.start_processes(_saves_slowly, args=given, nprocs=2, start_method="forkserver")
    assert launch.steps(tmp_path / "out") == [4] and len(launch.losses(tmp_path / "out")) == 4


def test_the_benchmark_sees_that_a_slow_link_is_most_of_a_step(tmp_path):
    """A step sends 8 N (R−1)/R bytes: 2.5 MB of the 627,840 parameters here, 0.4 s at 50 Mbit/s."""
    with machines.started() as both:
        for machine in both:
            machine.slow_down(50)
            words = "-m minillm bench train --device cpu --vocab_size 400 --rows 1 --seq_len 64 --shard 1"
            machine.torchrun(words, tmp_path / machine.name)
        assert [machine.wait() for machine in both] == [0, 0], both[0].text
    text = both[0].text + both[1].text
    n_parameters = int(re.search(r"tiny: ([\d,]+) parameters", text)[1].replace(",", ""))
    speed = int(re.search(r"([\d,]+) tok/s a rank", text)[1].replace(",", ""))
    assert 64 / speed > 0.9 * 4 * n_parameters / 6.25e6
    shares = re.findall(r"GiB +([\d.]+)% +([\d.]+)%", text)
    assert len(shares) == 2 and all(float(talking) > 60 and float(exposed) > 50 for talking, exposed in shares)
