"""Scripts under --shard, as processes: the losses of whole copies, questions asked on all ranks, and a checkpoint."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, test_train_grpo, test_train_ppo
from tests.test_train_dpo import OPTIONS, write_pairs

SHAPE = launch.SMALL.replace("--n_kv_heads 1", "--n_kv_heads 2")  # for two slices

LAYOUTS = {"shard": "--shard 2", "tensor": "--tensor_parallel 2", "context": "--context_parallel 2"}
DIVIDED = pytest.mark.parametrize(
    ("script", "more", "layouts"),
    [
        ("dpo", "--epochs 0.2 --optimizer adamw", "shard tensor context"),
        ("dpo", "--epochs 0.2 --tune lora --lora_rank 2", "shard tensor"),
        # in the last step rank 1 has nothing to compare
        ("dpo", "--epochs 0.2 --optimizer adamw --loss kto", "shard context"),
        ("dpo", "--epochs 0.2 --tune prefix --n_virtual 3", "shard context"),
        ("reward", "--steps 3 --optimizer adamw --save_every 2", "shard tensor context"),
        ("reward", "--steps 3 --tune prefix --n_virtual 3 --encoder mlp --lr 1e-2", "shard tensor"),
    ],
)


@pytest.mark.slow
@DIVIDED
def test_parts_learn_from_preferences_as_whole_copies_do(tmp_path, script, more, layouts):
    launch.write_corpus(tmp_path / "data")
    base = f"--data {tmp_path}/data --out {tmp_path}/base {SHAPE} --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, tmp_path / "log-base")
    train = write_pairs(tmp_path / "train.jsonl", 60)
    held_out = write_pairs(tmp_path / "held_out.jsonl", 11, seed=1)
    option = {"dpo": "--eval_pairs", "reward": "--eval_data"}[script]
    common = f"--data {train} {option} {held_out} --init_from {tmp_path}/base {OPTIONS} --eval_every 1 {more}"
    whole, *divided = (tmp_path / name for name in ("whole", *layouts.split()))
    for run in (whole, *divided):
        options = f"{common} {LAYOUTS.get(run.name, '--shard 1')} --out {run}"
        launch.finish(script, options, tmp_path / f"log-{run.name}", ranks=2)
    for run in divided:
        assert launch.losses(run) == pytest.approx(launch.losses(whole), abs=2e-6) != {}
        assert launch.norms(run) == pytest.approx(launch.norms(whole), rel=1e-5)
        watched = [[row for row in launch.rows(each) if "loss" not in row] for each in (whole, run)]
        assert len(watched[0]) > 1
        for one, other in zip(*watched, strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


# ---- answers that the model draws itself

# a reward that notes what it is asked, each rank in a file of its own
NOTED = """
import os

def noted(prompts, answers, rows):
    with open("{notes}." + os.environ.get("RANK", "0"), "a") as file:
        file.writelines(f"{prompt!r} {answer!r}\\n" for prompt, answer in zip(prompts, answers))
    return [min(1.0, answer.count('e') / 8) for answer in answers]
"""

ROLLED_OUT = pytest.mark.parametrize(
    ("script", "ranks", "layout", "more"),
    [
        ("ppo", 4, "--shard 2", "--micro_batch_size 1 --updates 2"),
        ("ppo", 2, "--shard 2", "--tune lora --replay_weight 1 --replay_rows 3 --replay_data {folder}/beside.jsonl"),
        ("ppo", 2, "--tensor_parallel 2", "--updates 2 --replay_rows 3 --replay_data {folder}/beside.jsonl"),
        ("grpo", 4, "--shard 2", "--micro_batch_size 1 --loss grpo --resample 2 --updates 2"),
        ("grpo", 2, "--shard 2", "--tune prefix --n_virtual 3 --encoder mlp"),
        ("grpo", 2, "--shard 2", "--tune lora --loss reinforce --reward {folder}/noted.py:noted,0.1*{folder}/reward"),
        ("grpo", 2, "--context_parallel 2", "--tune lora --loss reinforce --reward {folder}/noted.py:noted"),
        ("grpo", 4, "--context_parallel 2", "--micro_batch_size 1 --loss grpo --resample 2 --updates 2"),
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, prompts and reward functions as those of train_ppo.py's tests."""
    return test_train_ppo.write_folder(tmp_path_factory.mktemp("rolled"), SHAPE)


def write_reward(folder: Path, notes: Path) -> None:
    """A reward function that writes into <notes>.0 and so on."""
    (folder / "noted.py").write_text(NOTED.replace("{notes}", str(notes)))


def noted(notes: Path) -> set[str]:
    """Prompts and answers that any rank has judged."""
    return {line for path in notes.parent.glob(f"{notes.name}.*") for line in path.read_text().splitlines()}


@pytest.mark.slow
@ROLLED_OUT
def test_parts_learn_from_their_own_answers_as_one_process_does(folder, tmp_path, script, ranks, layout, more):
    """Over a kill in the middle; ranks draw answers of unequal lengths, and learn from unequal numbers of them."""
    module = {"ppo": test_train_ppo, "grpo": test_train_grpo}[script]
    name = f"{script}-{ranks}-{layout.split()[0]}-{more.split()[1]}"  # of its own, since all cases share the folder
    more = f"--steps 4 --batch_size 8 --max_new_tokens 16 --reward {folder}/noted.py:noted {more}"
    more = more.replace("{folder}", str(folder))
    whole, divided = folder / f"{name}-whole", folder / f"{name}-divided"

    write_reward(folder, tmp_path / "whole")
    launch.finish(script, module.options(folder, whole.name, more), tmp_path / "log-whole")
    write_reward(folder, tmp_path / "divided")
    options = module.options(folder, divided.name, f"{more} {layout} --save_every 2")
    processes = launch.start(script, options, tmp_path / "log-killed", ranks)
    processes[0].wait_for_checkpoint(divided, 2, seconds=300)
    processes[0].kill(signal.SIGKILL)  # the others end by themselves
    for process in processes:
        process.wait()
    launch.finish(script, options, tmp_path / "log-divided", ranks)

    # the same answers, rewards and losses; in place of prompts that it lacks a rank answers others for nothing
    assert noted(tmp_path / "whole") <= noted(tmp_path / "divided")
    assert "--resample" in more or noted(tmp_path / "whole") == noted(tmp_path / "divided")
    assert launch.losses(divided) == pytest.approx(launch.losses(whole), rel=1e-5, abs=2e-5)
    assert launch.norms(divided) == pytest.approx(launch.norms(whole), rel=1e-4)
    for name in ("reward", "length", "kl", "value_loss", "explained_variance", "zero_std_share"):
        one, other = (module.column(run, name) for run in (whole, divided))
        assert other == pytest.approx(one, rel=1e-4, abs=2e-5), name

    # and the same weights, but for what AdamW makes of a gradient near 0
    last = whole / "step-00000004"
    for path in (*last.glob("*.safetensors"), *last.glob("resume/value.safetensors")):
        found = load_file(divided / path.relative_to(whole))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
