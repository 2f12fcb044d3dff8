"""How often a step waits for the GPU, which then has nothing to do until the host has queued something new."""

import json
from pathlib import Path

import pytest

from tests import host_waits, launch, test_train_dpo, test_train_grpo, test_train_ppo, test_train_reward, test_train_sft

STEP = {"step.update", "ranks: run._meet"}  # are loss and gradient finite; is the run to end, or to be saved
SAMPLING = {"completion.prefill", "kv_cache.copy_rows", "rollouts.grow", "rollouts.roll_out"}
JUDGING = {"rewards.__call__", "judging.sums", "judging.step_sums"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    here = test_train_ppo.write_folder(tmp_path_factory.mktemp("waits"), launch.SMALL)
    test_train_dpo.write_pairs(here / "pairs.jsonl", 60)
    return here


def waits(folder: Path, script: str, options: str) -> dict[str, int]:
    """The waits of the second of three steps, by place."""
    arguments = f"{options} --out {folder}/{script} --steps 3 --save_every 0".format(folder=folder)
    process = launch.server().Process(target=host_waits.run, args=(script, arguments, f"{folder}/{script}.json"))
    process.start()
    process.join(300)
    (_, _, second, _) = json.loads((folder / f"{script}.json").read_text())
    return second


@pytest.mark.parametrize(
    ("script", "options", "wanted"),
    [
        (
            "pretrain",
            f"--data {{folder}}/data {launch.SMALL} --micro_batch_size 2 --pack best_fit",
            {"ranks: train_pretrain.train": 1},  # how many targets all ranks have
        ),
        (
            "sft",
            f"--data {{folder}}/train_sft.jsonl --init_from {{folder}}/base {test_train_sft.OPTIONS}",
            {"ranks: train_sft.train": 1},
        ),
        (
            "reward",
            f"--data {{folder}}/pairs.jsonl --init_from {{folder}}/base {test_train_reward.OPTIONS}",
            {"train_reward.train": 2, "ranks: train_reward.train": 2},  # what is logged, too
        ),
        (
            "dpo",
            f"--data {{folder}}/pairs.jsonl --init_from {{folder}}/base {test_train_dpo.OPTIONS} "
            "--replay_data {folder}/train_sft.jsonl",
            {"ranks: train_dpo.train": 1, "ranks: replay.learn": 1, "step.means": 1, "ranks: step.means": 1},
        ),
    ],
)
def test_no_micro_batch_waits_and_a_step_only_at_its_end(folder, script, options, wanted):
    """There are four micro-batches. A wait for other ranks counts on one rank, too."""
    assert waits(folder, script, options) == dict.fromkeys(STEP, 1) | wanted


def test_a_pass_over_answers_that_were_sampled_waits_for_nothing(folder):
    options = "--updates 2 --replay_data {folder}/beside.jsonl --micro_batch_size 1"
    found = waits(folder, "grpo", test_train_grpo.options(folder, "grpo", options))
    before = {"judging.answers", "batch.with_places", "policy_loss.<genexpr>", "policy_loss.<listcomp>"}
    script = {"train_grpo.experience", "train_grpo.log_rollout"}
    script |= {"ranks: train_grpo.train", "ranks: train_grpo.log_rollout"}
    assert found.keys() == STEP | SAMPLING | JUDGING | before | script | {"ranks: replay.learn"}
    assert found["step.update"] == found["ranks: replay.learn"] == 2  # the updates


def test_the_passes_of_ppo_wait_for_nothing(folder):
    found = waits(folder, "ppo", test_train_ppo.options(folder, "ppo", "--micro_batch_size 1"))
    passes = {"log_probs._answer_states", "policy_loss.clip_counts", "updates.note", "value.value_loss"}
    assert not found.keys() & passes
    assert found["step.update"] == 2 * found["train_ppo.improve"] == 4  # of policy and value model, in two updates
