"""train_ppo.py as a process: what it learns, what it writes, how it goes on, and what it refuses."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch

from minillm.checkpoint import huggingface, run_folder
from minillm.tokenizer.tokenizer import Tokenizer
from tests import launch
from tests.minillm.evaluation.benchmark_rows import write_all
from tests.test_train_sft import write_instructions

OPTIONS = "--seq_len 64 --max_new_tokens 8 --batch_size 4 --group_size 4 --lr 1e-2 --warmup_steps 0 "
OPTIONS += "--reference_prompts 4 --reference_answers 8 --eval_prompt_rows 8 --device cpu --dtype float32"

# a reward that a nearly random model can find
REWARDS = """
def vowels(prompts, answers, rows):
    assert len(prompts) == len(answers) == len(rows) and rows[0]["family"]
    return [min(1.0, answer.count('e') / 8) for answer in answers]

def broken(prompts, answers, rows):
    return [float("nan")] * len(answers)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ppo"), launch.SMALL)


def write_folder(here: Path, shape: str) -> Path:
    """A folder with a model of a few steps in base/, a reward model in reward/, prompts and reward functions."""
    launch.write_corpus(here / "data")
    base = f"--data {here}/data --out {here}/base {shape} --micro_batch_size 8 --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, here / "log" / "base")
    for name, seed in (("train", 0), ("held_out", 1)):
        write_instructions(here / f"{name}_sft.jsonl", 40, seed)
        with (here / f"{name}.jsonl").open("w") as file:
            for line in (here / f"{name}_sft.jsonl").read_text().splitlines():
                row = json.loads(line)
                prompt = {"prompt": row["input"], "answer": row["output"], "family": row["family"]}
                file.write(json.dumps(prompt) + "\n")
    others = (here / "train_sft.jsonl").read_text().replace('"family": "', '"family": "another ')
    (here / "beside.jsonl").write_text(others)
    (here / "rewards.py").write_text(REWARDS)
    write_reward_model(here / "base", here / "reward")
    write_reward_model(here / "base", here / "flat", size=0.0)
    write_reward_model(here / "base", here / "huge", size=1e38)
    return here


def write_reward_model(base: Path, folder: Path, seed: int = 1, size: float = 1.0) -> None:
    """The base with a score head that likes some tokens more than others. size: standard deviation of its weights."""
    source = run_folder.resolve_checkpoint(base)
    model = huggingface.load_model(source)
    model.give_score_head(0)
    torch.nn.init.normal_(model.score.weight, std=size, generator=torch.Generator().manual_seed(seed))
    tokenizer = Tokenizer.load(source)
    folder.mkdir()
    huggingface.save_model(model, folder, special_ids=tokenizer.special_ids)
    tokenizer.save(folder)


def options(folder: Path, out: str, more: str = "") -> str:
    data = f"--data {folder}/train.jsonl --eval_prompts {folder}/held_out.jsonl --reward {folder}/rewards.py:vowels"
    learned = "" if "--reward_model" in more else f"--reward_model {folder}/reward"
    return f"{data} {learned} --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more.format(folder=folder)}"


def train(folder: Path, out: str, more: str = "", **how) -> str:
    return launch.finish("ppo", options(folder, out, more), folder / "log" / out, **how)


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in launch.rows(run) if row.get(name) is not None]


def test_rewards_rise_and_what_is_logged(folder):
    said = train(folder, "learns", "--reward_model none --steps 30 --beta 0.01 --batch_size 8 --group_size 8")
    run = folder / "learns"
    reward = column(run, "reward")
    assert len(reward) == 30 and sum(reward[-5:]) > 1.5 * sum(reward[:5])
    names = ("true_reward", "kl", "objective", "optimum", "entropy", "length", "clip_share", "cut_share", "beta")
    for name in (*names, "value_loss", "value_clip_share", "approx_kl", "explained_variance", "zero_std_share"):
        assert len([row for row in launch.rows(run) if "reward" in row and name in row]) == 30, name
    assert abs(column(run, "kl")[0]) < 1e-3  # before the first step the policy is the reference
    last = launch.rows(run)[-1]
    assert last["heldout_after"] > last["heldout_before"]
    value_loss = column(run, "value_loss")
    assert sum(value_loss[-10:]) < sum(value_loss[:10]) / 2  # what is explained of so small a spread is noise
    assert "held-out prompts" in said and "next: python -m" in said
    huggingface.load_model(
        run_folder.resolve_checkpoint(run)
    )  # eval and chat take it as it lies: the policy is what lies on top


def test_a_policy_that_does_not_change_has_the_same_reward_after_as_before(folder):
    """Both on the scale of the reference's answers, which is measured in between."""
    train(folder, "still", "--steps 1 --lr 0")
    last = launch.rows(folder / "still")[-1]
    for name in ("heldout", "heldout_learned"):
        assert last[f"{name}_after"] == pytest.approx(last[f"{name}_before"], abs=1e-5), name


def test_the_value_model_can_learn_alone(folder):
    """Before the policy does: without a rate of its own the policy stays, and the value model follows --value_lr."""
    losses = {}
    for rate in ("0", "1e-3"):
        train(folder, f"values-{rate}", f"--steps 3 --lr 0 --value_lr {rate}")
        losses[rate] = column(folder / f"values-{rate}", "value_loss")
    assert losses["1e-3"][2] < 0.95 * losses["0"][2]


def test_a_learned_reward_rises_and_the_true_one_is_recorded_beside_it(folder):
    more = "--steps 20 --beta 0.01 --batch_size 8 --group_size 8 --value_start zero"
    said = train(folder, "learned", more)
    reward, true = column(folder / "learned", "reward"), column(folder / "learned", "true_reward")
    assert "scaled to mean 0 and spread 1" in said and "policy, value, reward, reference" in said
    assert abs(reward[0]) < 0.7 and sum(reward[-5:]) > sum(reward[:5]) + 2
    assert len(true) == 20 and all(0 <= value <= 1 for value in true)


def test_values_that_begin_as_scores_leave_the_rewards_zero_where_it_was(folder):
    more = "--steps 2 --lr 0 --batch_size 8 --group_size 8"
    said = train(folder, "scores", more)
    train(folder, "zeros", f"{more} --value_start zero")
    assert "; scaled to spread 1" in said
    scores, zeros = (column(folder / name, "reward") for name in ("scores", "zeros"))
    shift = scores[0] - zeros[0]  # the mean of the reference's scores, in their spread
    assert scores[1] - zeros[1] == pytest.approx(shift, abs=1e-4) and abs(shift) > 0.1
    losses = [column(folder / name, "value_loss")[0] for name in ("scores", "zeros")]
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


def test_learned_rewards_before_and_after_have_one_scale(folder):
    train(folder, "unchanged", "--steps 1 --lr 0")
    last = launch.rows(folder / "unchanged")[-1]
    assert last["heldout_learned_after"] == last["heldout_learned_before"] != 0


def test_other_prompts_than_those_of_the_start_are_not_compared_with_them(folder):
    train(folder, "others", "--steps 1")
    said = train(folder, "others", f"--steps 2 --eval_prompt_rows 5 --eval_data {folder}/held_out_sft.jsonl")
    assert (
        "of other questions than now, and so not compared: exact, heldout" in said
        and "  last             not asked" in said
    )
    last = launch.rows(folder / "others")[-1]
    assert "heldout_after" in last and "heldout_before" not in last


def test_a_run_whose_scale_of_rewards_is_gone_is_refused(folder):
    train(folder, "no-scale", "--steps 1")
    (folder / "no-scale" / "before.json").unlink()
    assert "before.json: is gone" in train(folder, "no-scale", "--steps 2", status=2)


def test_every_rank_has_all_minibatches(folder):
    more = "--steps 1 --batch_size 6 --minibatches 2"
    train(folder, "six", more)
    assert "no multiple of it times 2 ranks" in train(folder, "six-on-two", more, ranks=2, status=2)


BESIDE = "--replay_weight 1 --replay_rows 3 --replay_data {folder}/beside.jsonl"


@pytest.mark.parametrize(
    "more", ["", "--tune lora --target_kl 0.5", "--reward_model none --updates 3 --tune ia3", f"--tune lora {BESIDE}"]
)
def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder, more):
    more += " --steps 6"
    straight, broken = folder / f"straight-{len(more)}", folder / f"broken-{len(more)}"
    train(folder, straight.name, more)
    (process,) = launch.start("ppo", options(folder, broken.name, f"{more} --save_every 3"), folder / "broken")
    process.wait_for_checkpoint(broken, 3)
    process.kill(signal.SIGKILL)
    process.wait()
    train(folder, broken.name, more)
    step = "step-00000006"
    files = sorted(path.relative_to(straight / step) for path in (straight / step).rglob("*.safetensors"))
    assert Path("resume/value.safetensors") in files and len(files) == 3
    for name in files:
        assert (broken / step / name).read_bytes() == (straight / step / name).read_bytes(), name
    for name in ("loss", "reward", "beta", "value_loss"):
        assert column(broken, name) == column(straight, name)


@pytest.mark.parametrize("more", ["--minibatches 2", "--micro_batch_size 1 --tune lora", BESIDE])
def test_two_ranks_take_the_same_steps_as_one(folder, more):
    runs = [folder / f"ranks-{len(more)}-{ranks}" for ranks in (1, 2)]
    for ranks, run in enumerate(runs, start=1):
        train(folder, run.name, f"--steps 3 {more}", ranks=ranks)
    for name in ("reward", "kl", "length", "grad_norm", "loss", "value_loss"):
        one, two = (column(run, name) for run in runs)
        assert two == pytest.approx(one, abs=2e-5, rel=2e-3), name


def test_micro_batches_do_not_change_a_step(folder):
    for size in (1, 2, 4):
        train(folder, f"micro-{size}", f"--steps 2 --micro_batch_size {size} --minibatches 1")
    for name in ("grad_norm", "value_loss"):
        one, *others = (column(folder / f"micro-{size}", name) for size in (1, 2, 4))
        for other in others:
            assert other == pytest.approx(one, rel=1e-4), name


def test_what_goes_astray_is_said(folder):
    said = train(folder, "astray", "--reward_model none --beta 0 --lr 0.1 --steps 12 --kl_warning 1 --max_new_tokens 4")
    assert "of the answers did not end within --max_new_tokens 4" in said
    assert "the policy has left its reference; raise --beta" in said


@pytest.mark.parametrize(
    "more, message",
    [
        ("--reward_model {folder}/base", "is a language model"),
        ("--value_start reward --tune lora", "--value_start reward: needs a --reward_model, and --tune full"),
        ("--init_from {folder}/reward", "is a reward model"),
        ("--reward_model none --reward {folder}/rewards.py:broken", "nan"),
        ("--reward {folder}/rewards.py:absent", "no such function"),
        ("--reward_model {folder}/nowhere", "nowhere"),
        (
            "--reward_model {folder}/flat",
            "gives all 32 answers of the reference the same score, 0, so there is nothing",
        ),
        ("--reward_model {folder}/huge", "huge: this reward model gives an answer the score"),
        ("--minibatches 3", "--batch_size 4 is no multiple"),
        ("--dropout 0.1", "--dropout: must be 0"),
        ("--max_new_tokens 64", "leaves no room for a prompt"),
        ("--temperature 0", "above 0"),
        ("--clip 1.5", "below 1"),
    ],
)
def test_what_cannot_be_is_refused(folder, more, message):
    said = train(folder, f"refused-{random.random()}", f"--steps 2 {more.format(folder=folder)}", status=2)
    assert message in said and "Traceback" not in said


def test_a_run_goes_on_with_its_own_reward_alone(folder, tmp_path):
    train(folder, "own-reward", "--steps 1")
    write_reward_model(folder / "base", tmp_path / "reward", seed=2)
    said = train(folder, "own-reward", f"--steps 2 --reward_model {tmp_path}/reward", status=2)
    assert "was made with another reward" in said and "--reward_model" in said


def test_a_reward_model_with_another_tokenizer_is_refused(folder, tmp_path):
    launch.write_corpus(tmp_path / "data", seed=5)
    other = f"--data {tmp_path}/data --out {tmp_path}/base {launch.SMALL} --steps 1 --max_seq_len 128"
    launch.finish("pretrain", other, tmp_path / "log")
    write_reward_model(tmp_path / "base", tmp_path / "reward")
    said = train(folder, "foreign", f"--steps 2 --reward_model {tmp_path}/reward", status=2)
    assert "has another tokenizer" in said


def test_a_reward_model_that_cannot_read_the_longest_answers_is_refused(folder, tmp_path):
    write_reward_model(folder / "base", tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config))
    said = train(folder, "short-context", f"--steps 2 --reward_model {tmp_path}/reward", status=2)
    assert "reward: the reward model reads at most 40 tokens, and a prompt with its answer may have 64" in said


def test_benchmarks_are_asked_meanwhile_and_training_stays_the_same(folder, tmp_path):
    asking = f"--eval_tasks {write_all(tmp_path / 'eval')}/arc_easy --eval_limit 5"
    train(folder, "not-asked", "--steps 3 --tune lora")
    train(folder, "asked", f"--steps 3 --eval_every 2 --tune lora {asking}")
    rows = [row for row in launch.rows(folder / "asked") if "acc/arc_easy" in row]
    assert [row["step"] for row in rows] == [2, 3] and "acc_stderr/arc_easy" in rows[0]
    assert launch.losses(folder / "asked") == launch.losses(folder / "not-asked")
    assert "no file of the split test" in train(folder, "asked-nowhere", "--eval_tasks nowhere/arc_easy", status=2)
