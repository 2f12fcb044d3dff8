"""Runs whose checkpoints several ranks write, or a thread: the same files, and the same run goes on."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from minillm.base import files
from tests import launch

SHAPE = launch.SMALL.replace("--n_kv_heads 1", "--n_kv_heads 2")  # for two slices
OPTIONS = f"{SHAPE} --micro_batch_size 2 --steps 6 --save_every 3 --keep_last 9"
LAYOUTS = {  # name: ranks, options
    "one rank": (1, ""),
    "copies": (2, ""),
    "shards": (2, "--shard 2"),
    "slices": (2, "--tensor_parallel 2"),
}
ANOTHER = [("one rank", "shards"), ("shards", "one rank"), ("copies", "one rank"), ("shards", "slices")]
ANOTHER += [("slices", "one rank")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the corpus in data/, in which runs of 6 steps are made when they are asked for."""
    here = tmp_path_factory.mktemp("sharded")
    launch.write_corpus(here / "data")
    return here


def straight(folder: Path, layout: str) -> dict[str, bytes]:
    """What a run that was never stopped ends with."""
    if not (folder / layout).exists():
        train(folder, layout, layout)
    return launch.tensors(folder / layout, 6)


def train(folder: Path, layout: str, out: str, more: str = "") -> str:
    ranks, options = LAYOUTS[layout]
    arguments = [*f"--data {folder}/data {OPTIONS} {options} {more}".split(), "--out", str(folder / out)]
    return launch.finish("pretrain", arguments, folder / "log" / out, ranks)


def from_step_3(folder: Path, of: str, out: str) -> None:
    """A run that has got as far as step 3 of another."""
    (folder / out).mkdir()
    shutil.copytree(folder / of / "step-00000003", folder / out / "step-00000003")


def furthest_apart(one: dict[str, bytes], other: dict[str, bytes]) -> float:
    differences = [0.0]
    for name in one:
        ours, theirs = load(one[name]), load(other[name])
        assert ours.keys() == theirs.keys()
        differences += [float((ours[key] - theirs[key]).abs().max()) for key in ours]
    return max(differences)


@pytest.mark.parametrize(("before", "after"), [*zip(LAYOUTS, LAYOUTS, strict=True), *ANOTHER])
def test_a_run_goes_on_under_any_layout_bit_for_bit_under_its_own(folder, before, after):
    never_stopped, out = straight(folder, before), f"{before}, then {after}"
    from_step_3(folder, before, out)
    assert "weights from" in train(folder, after, out)
    went_on = launch.tensors(folder / out, 6)
    if before == after:
        assert went_on == never_stopped
    assert furthest_apart(went_on, never_stopped) <= 1e-6
    losses = launch.losses(folder / before)
    assert launch.losses(folder / out) == pytest.approx({step: losses[step] for step in (4, 5, 6)}, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_in_the_background_is_the_same(folder, layout):
    straight(folder, layout)
    out = f"{layout}, later"
    train(folder, layout, out, "--save_in_background true")
    for step in (3, 6):
        assert launch.tensors(folder / out, step) == launch.tensors(folder / layout, step)
        assert files.verify_folder(folder / out / f"step-{step:08d}") == []
    assert not list((folder / out).glob("*.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one rank", "shards"])
def test_killed_while_saving_in_the_background_ends_as_if_never_killed(folder, layout):
    """Every kill leaves a whole checkpoint, from which the same command goes on."""
    out, more = f"{layout}, killed", "--save_in_background true --steps 20 --save_every 1"
    train(folder, layout, f"{layout}, alive", more)
    ranks, options = LAYOUTS[layout]
    arguments = [*f"--data {folder}/data {OPTIONS} {options} {more}".split(), "--out", str(folder / out)]
    draw, left_halves = random.Random(1), 0
    for kill in range(6):
        processes = launch.start("pretrain", arguments, folder / "log" / f"{out}-{kill}", ranks)
        done = max(launch.steps(folder / out), default=0)
        processes[0].wait_for_checkpoint(folder / out, done + 1)
        time.sleep(draw.random() * 0.1)
        for process in processes:
            process.kill(signal.SIGKILL)
        for process in processes:
            process.wait()
        left_halves += len(list((folder / out).glob("step-*.tmp-*")))
        newest = max(launch.steps(folder / out))
        assert files.verify_folder(folder / out / f"step-{newest:08d}") == []
    train(folder, layout, out, more)
    assert launch.tensors(folder / out, 20) == launch.tensors(folder / f"{layout}, alive", 20)
    assert launch.losses(folder / out) == launch.losses(folder / f"{layout}, alive")
    assert not list((folder / out).glob("*.tmp-*")) and left_halves > 0


def test_numbers_that_are_compared_may_differ():
    from safetensors.torch import save

    one, other = ({"x": save({"a": torch.tensor([1.0, 2.0 + change])})} for change in (0, 0.25))
    assert furthest_apart(one, other) == 0.25
