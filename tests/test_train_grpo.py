"""train_grpo.py as a process: what it learns, what it writes, how it goes on, and what it refuses."""

import json
import random
import signal
from pathlib import Path

import pytest

from minillm.checkpoint.huggingface import load_model
from tests import launch
from tests.minillm.evaluation.benchmark_rows import write_all
from tests.test_train_sft import write_instructions

OPTIONS = "--seq_len 64 --max_new_tokens 8 --batch_size 4 --group_size 4 --lr 1e-2 --warmup_steps 0 --optimizer adamw "
OPTIONS += "--optimum_prompts 3 --optimum_answers 8 --eval_prompt_rows 8 --device cpu --dtype float32"

# a reward that a nearly random model can find
REWARDS = """
def vowels(prompts, answers, rows):
    assert len(prompts) == len(answers) == len(rows) and rows[0]["family"]
    return [min(1.0, answer.count('e') / 8) for answer in answers]

def some(prompts, answers, rows):
    rewards = vowels(prompts, answers, rows)
    return [0.5 if len(prompt) % 2 else reward for prompt, reward in zip(prompts, rewards)]

def equal(prompts, answers, rows):
    return [0.5] * len(answers)

def broken(prompts, answers, rows):
    return [float("nan")] * len(answers)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model of a few steps in base/, prompts, held-out prompts and reward functions."""
    here = tmp_path_factory.mktemp("grpo")
    launch.write_corpus(here / "data")
    base = f"--data {here}/data --out {here}/base {launch.SMALL} --micro_batch_size 8 --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, here / "log" / "base")
    for name, seed in (("train", 0), ("held_out", 1)):
        write_instructions(here / f"{name}_sft.jsonl", 40, seed)
        with (here / f"{name}.jsonl").open("w") as file:
            for line in (here / f"{name}_sft.jsonl").read_text().splitlines():
                row = json.loads(line)
                file.write(
                    json.dumps({"prompt": row["input"], "answer": row["output"], "family": row["family"]}) + "\n"
                )
    others = (here / "train_sft.jsonl").read_text().replace('"family": "', '"family": "another ')
    (here / "beside.jsonl").write_text(others)
    (here / "rewards.py").write_text(REWARDS)
    return here


def options(folder: Path, out: str, more: str = "") -> str:
    data = f"--data {folder}/train.jsonl --eval_prompts {folder}/held_out.jsonl --reward {folder}/rewards.py:vowels"
    return f"{data} --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more.format(folder=folder)}"


def train(folder: Path, out: str, more: str = "", **how) -> str:
    return launch.finish("grpo", options(folder, out, more), folder / "log" / out, **how)


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in launch.rows(run) if row.get(name) is not None]


def test_rewards_rise_and_what_is_logged(folder):
    said = train(folder, "learns", "--steps 40 --beta 0.01 --batch_size 8 --group_size 8")
    run = folder / "learns"
    reward = column(run, "reward")
    assert len(reward) == 40 and sum(reward[-5:]) > 1.5 * sum(reward[:5])
    for name in ("kl", "objective", "optimum", "entropy", "length", "clip_share", "zero_std_share", "cut_share"):
        assert len([row for row in launch.rows(run) if "reward" in row and name in row]) == 40, name
    assert abs(column(run, "kl")[0]) < 1e-3  # before the first step the policy is the reference
    last = launch.rows(run)[-1]
    assert last["heldout_after"] > last["heldout_before"]
    assert last["objective_before"] < last["objective"] <= last["optimum"]
    assert (
        "held-out prompts" in said
        and "the most that any policy has" in said
        and "% of it)" in said
        and "next: python -m" in said
    )
    assert load_model(run / "step-00000040").config.vocab_size == 400


BESIDE = "--replay_weight 1 --replay_rows 3 --replay_data {folder}/beside.jsonl"


@pytest.mark.parametrize(
    "more", ["", "--tune lora --loss dapo --beta 0", "--updates 2 --loss grpo --kl k3", f"--tune lora {BESIDE}"]
)
def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder, more):
    more += " --steps 8"
    straight, broken = folder / f"straight-{len(more)}", folder / f"broken-{len(more)}"
    train(folder, straight.name, more)
    (process,) = launch.start("grpo", options(folder, broken.name, f"{more} --save_every 4"), folder / "broken")
    process.wait_for_checkpoint(broken, 4)
    process.kill(signal.SIGKILL)
    process.wait()
    train(folder, broken.name, more)
    step = "step-00000008"
    files = sorted(path.relative_to(straight / step) for path in (straight / step).rglob("*.safetensors"))
    assert len(files) >= 2
    for name in files:
        assert (broken / step / name).read_bytes() == (straight / step / name).read_bytes(), name
    assert launch.losses(broken) == launch.losses(straight) and column(broken, "reward") == column(straight, "reward")


@pytest.mark.parametrize(
    "more", ["", "--loss grpo --resample 2", "--loss reinforce --micro_batch_size 1 --tune lora", BESIDE]
)
def test_two_ranks_take_the_same_steps_as_one(folder, more):
    runs = [folder / f"ranks-{len(more)}-{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(runs, start=1):
        train(folder, run.name, f"--steps 4 {more}", ranks=ranks)
    for name in ("reward", "kl", "length", "zero_std_share", "grad_norm", "loss"):
        one, two = (column(run, name) for run in runs)
        assert two == pytest.approx(one, abs=2e-5, rel=1e-3), name


def test_instructions_that_are_named_are_learned_beside(folder):
    train(folder, "nothing-beside", "--steps 2")
    train(folder, "others-beside", f"--steps 2 --replay_data {folder}/beside.jsonl")
    assert column(folder / "others-beside", "loss")[0] != column(folder / "nothing-beside", "loss")[0]


def test_a_run_goes_on_with_its_own_reward_alone(folder):
    train(folder, "own-reward", "--steps 1")
    said = train(folder, "own-reward", f"--steps 2 --reward {folder}/rewards.py:equal", status=2)
    assert "was made with another reward" in said


def test_without_a_reference_no_distance_is_claimed(folder):
    train(folder, "no-reference", "--steps 1 --beta 0")
    assert not column(folder / "no-reference", "kl") and column(folder / "no-reference", "reward")


def test_prompts_in_place_of_others_do_not_depend_on_how_long_the_run_is(folder):
    """A run that was made longer takes the steps of one that was so long from the start."""
    more = f"--loss grpo --resample 2 --schedule constant --reward {folder}/rewards.py:some"
    train(folder, "long", f"{more} --steps 4")
    for steps in (2, 4):
        train(folder, "made-longer", f"{more} --steps {steps}")
    assert max(column(folder / "long", "zero_std_share")) > 0
    for name in ("loss", "grad_norm", "reward"):
        assert column(folder / "made-longer", name) == column(folder / "long", name), name


def test_micro_batches_do_not_change_a_step(folder):
    for size in (1, 2, 4):
        train(folder, f"micro-{size}", f"--steps 3 --micro_batch_size {size} --loss grpo")
    norms = [column(folder / f"micro-{size}", "grad_norm") for size in (1, 2, 4)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_later_passes_over_a_rollout_have_a_ratio_that_is_clipped(folder):
    train(folder, "passes", "--steps 3 --updates 4 --lr 1e-2 --clip_low 0.01 --clip_high 0.01")
    assert max(column(folder / "passes", "clip_share")) > 0.1
    train(folder, "one-pass", "--steps 3 --lr 1e-2 --clip_low 0.01 --clip_high 0.01")
    assert column(folder / "one-pass", "clip_share") == [0, 0, 0]


@pytest.mark.parametrize("more", ["--beta 0", "", "--loss reinforce_baseline"])
def test_groups_without_spread_are_dropped_and_end_the_run_with_advice(folder, more):
    run = folder / f"equal-{len(more)}"
    more += f" --reward {folder}/rewards.py:equal --no_spread_steps 3 --steps 9"
    said = train(folder, run.name, more, status=2)
    assert "step 1: the answers to each prompt all have the same reward: nothing to learn" in said
    assert "step 3: 3 rollouts in a row" in said and "--group_size" in said
    assert column(run, "zero_std_share") == [1, 1, 1]
    assert ("--beta 0" in more) == (column(run, "grad_norm") == [0, 0, 0])  # the price of the distance stays


def test_a_reward_that_is_always_the_same_has_no_share_of_an_optimum(folder):
    said = train(folder, "same", f"--reward {folder}/rewards.py:equal --no_spread_steps 9 --steps 2")
    assert "  0.500 → 0." in said and "(no share of it: it is hardly above what the reference has" in said
    assert "% of it" not in said


@pytest.mark.parametrize(
    "more, message",
    [
        ("--reward {folder}/rewards.py:broken", "nan"),
        ("--reward {folder}/rewards.py:absent", "no such function"),
        ("--max_new_tokens 64", "leaves no room for a prompt"),
        ("--group_size 1", "at least 2"),
        ("--temperature 0", "above 0"),
        ("--overlong penalty --overlong_cushion 9", "overlong_cushion 9"),
        ("--overlong_cushion 9", "overlong"),
        ("--kl k4", "k3_ratio"),
        ("--dropout 0.1", "--dropout: must be 0"),
        ("--tune lora --lora_dropout 0.1", "--lora_dropout: must be 0"),
        ("--loss reinforce --resample 1", "--resample 1"),
        ("--loss cispo --two_sided 3", "--loss cispo has no such bound"),
        ("--two_sided 1.1", "must be above 1 + ε, which is 1.2"),
        ("--replay_weight 1", "give the instructions by --replay_data"),
        ("--replay_data {folder}/train_sft.jsonl", "dropped (of a family that is left out)"),
        ("--replay_weight 0 --replay_data {folder}/train_sft.jsonl", "is not learned with --replay_weight 0"),
        ("--replay_rows 3", "--replay_rows 3: give the instructions by --replay_data"),
    ],
)
def test_what_cannot_be_is_refused(folder, more, message):
    said = train(folder, f"refused-{random.random()}", f"--steps 2 {more.format(folder=folder)}", status=2)
    assert message in said and "Traceback" not in said


def test_all_answers_cut_and_masked_teach_nothing(folder):
    said = train(folder, "cut", "--steps 3 --max_new_tokens 2 --overlong mask --no_spread_steps 9 --loss dapo --beta 0")
    assert "step-00000003" in said
    # none has ended: that is said, and not that their rewards are equal
    assert "all answers were cut at --max_new_tokens" in said and "have the same reward" not in said


def test_a_policy_that_leaves_its_reference_is_told_so_once_until_it_is_twice_as_far(folder):
    said = train(folder, "leaves", "--steps 12 --lr 0.3 --beta 0.0001 --max_new_tokens 32")
    far = [kl for kl in column(folder / "leaves", "kl") if kl > 50]
    n_told, limit = 0, 50
    for kl in far:
        if kl > limit:
            n_told, limit = n_told + 1, 2 * kl
    assert len(far) > n_told and said.count("the policy has left its reference") == n_told > 0


def test_a_resumed_run_counts_on_the_rollouts_with_nothing_to_learn(folder):
    more = f"--reward {folder}/rewards.py:equal --no_spread_steps 3"
    train(folder, "counts-on", f"{more} --steps 2")
    said = train(folder, "counts-on", f"{more} --steps 9", status=2)
    assert "step 3: 3 rollouts in a row" in said and "step 3: the answers" not in said


@pytest.mark.parametrize("more", ["", "--tune lora"])
def test_in_half_precision_the_policy_begins_at_its_reference(folder, more):
    """Both round alike, though the sampler does not round."""
    train(folder, f"bf16{len(more)}", f"--dtype bfloat16 --steps 2 --lr 0 {more}")
    assert column(folder / f"bf16{len(more)}", "kl") == pytest.approx([0, 0], abs=1e-6)


def test_a_run_ends_well_whose_first_measurement_is_lost(folder):
    train(folder, "lost", "--steps 1")
    (folder / "lost" / "before.json").unlink()
    said = train(folder, "lost", "--steps 2")
    assert "reward           not measured → " in said and "  not measured → " in said and "next: " in said
    last = launch.rows(folder / "lost")[-1]
    assert "heldout_after" in last and "heldout_before" not in last and last["objective"] <= last["optimum"]


def test_other_prompts_than_those_of_the_start_are_not_compared_with_them(folder):
    train(folder, "others", "--steps 1")
    said = train(folder, "others", "--steps 2 --eval_prompt_rows 5 --optimum_prompts 2")
    assert "of other questions than now, and so not compared: heldout, heldout_best, objective, optimum" in said
    assert "reward           not measured → " in said and "heldout_before" not in launch.rows(folder / "others")[-1]


def test_answers_drawn_otherwise_than_those_of_the_start_are_not_compared_with_them(folder):
    train(folder, "warm", "--steps 1")
    said = train(folder, "warm", "--steps 2 --temperature 0.5")
    assert "of other questions than now, and so not compared: heldout, heldout_best, objective, optimum" in said


def test_benchmarks_are_asked_meanwhile_and_training_stays_the_same(folder, tmp_path):
    asking = f"--eval_tasks {write_all(tmp_path / 'eval')}/arc_easy --eval_limit 5"
    train(folder, "not-asked", "--steps 3")
    train(folder, "asked", f"--steps 3 --eval_every 2 {asking}")
    rows = [row for row in launch.rows(folder / "asked") if "acc/arc_easy" in row]
    assert [row["step"] for row in rows] == [2, 3] and "acc_stderr/arc_easy" in rows[0]
    assert launch.losses(folder / "asked") == launch.losses(folder / "not-asked")
    assert "no file of the split test" in train(folder, "asked-nowhere", "--eval_tasks nowhere/arc_easy", status=2)
