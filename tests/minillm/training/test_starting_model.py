"""The model a run starts from: the turns it knows, and machines with copies of it that differ."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.distributed.ranks import Ranks
from minillm.training.starting_model import Start, find_init
from tests.forked_ranks import on_ranks
from tests.minillm.distributed.test_hosts import on_host
from tests.minillm.tuning import tiny
from train_pretrain import Config as Pretrain


@pytest.mark.parametrize(
    ("recorded", "of_prompts", "turns"),
    [
        ({"turns": 2}, 1, {"turns": 2}),  # it learns from single questions, and can still follow up
        ({"turns": 1}, 3, {"turns": 3}),
        ({}, 1, {"turns": 1}),  # of pretraining, which shows no conversations
        (None, 1, {}),  # a model of others may know any number
    ],
)
def test_turns_that_a_model_was_taught_before_count_too(tmp_path, recorded, of_prompts, turns):
    if recorded is not None:
        (tmp_path / "resume").mkdir()
        (tmp_path / "resume" / "train_state.json").write_text(json.dumps({"format": 1, "step": 1, **recorded}))
    assert Start(tmp_path, None, None).turns(of_prompts) == turns


def _finds(rank: int, home: str) -> tuple[str, list[str]]:
    """What `find_init` finds or says on two machines with two ranks and a disk each, and the files that it hashes."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.chdir(Path(home) / on_host(rank))
    hashed, sha256 = [], files.sha256
    files.sha256 = lambda file: hashed.append(file.name) or sha256(file)
    try:
        found = find_init(Pretrain(init_from="base", out=f"{home}/out"), Ranks(rank, 4, torch.device("cpu")))
    except UserError as problem:
        return str(problem), []
    return str(found), [name for name in hashed if name != files.MANIFEST]


@pytest.fixture
def disks(tmp_path) -> Path:
    """A folder with the disks of two machines, host1 and host2, each with the same base/, which has a manifest."""
    model = tiny.base()
    files.write_folder(tmp_path / "host1" / "base", lambda folder: huggingface.save_model(model, folder))
    shutil.copytree(tmp_path / "host1", tmp_path / "host2")
    return tmp_path


def test_each_machine_verifies_its_copy_its_ranks_a_part_each(disks):
    found = on_ranks(4, disks / "told", _finds, str(disks))
    of_base = sorted(path.name for path in (disks / "host1" / "base").iterdir() if path.name != files.MANIFEST)
    assert all(init == "base" for init, _ in found)
    for first, second in ((0, 1), (2, 3)):
        assert sorted(found[first][1] + found[second][1]) == of_base and found[first][1] and found[second][1]


@pytest.mark.parametrize("host", ["host1", "host2"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_copy_that_is_damaged_on_one_machine_is_refused_by_all(disks, host, name):
    path = disks / host / "base" / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    for said, _ in on_ranks(4, disks / "told", _finds, str(disks)):
        assert f"base: damaged: {name} differs from its checksum on {host}; give" in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gone", "different copies (base: manifest "),
        ("of another run", "different copies (base: manifest "),
        ("without a manifest", "no manifest on host2): copy the same"),
        ("of others", "--init_from base: the machines hold different models (weights: "),
    ],
)
def test_machines_that_hold_different_models_do_not_train(disks, kind, words):
    """All weights are trained; before, ranks that share a model made a mixture of both."""
    there = disks / "host2" / "base"
    if kind == "without a manifest":
        (there / files.MANIFEST).unlink()
    else:
        shutil.rmtree(there)
    if kind == "of another run":
        files.write_folder(there, lambda folder: huggingface.save_model(tiny.base(seed=2), folder))
    if kind == "of others":
        (disks / "host1" / "base" / files.MANIFEST).unlink()
        tiny.write(tiny.base(seed=2), there)
    for said, _ in on_ranks(4, disks / "told", _finds, str(disks)):
        assert words in said and "on host1" in said and "on host2" in said
