"""train_reward.py as a process: resuming, micro-batches and ranks, adapters, what it prints, what it refuses."""

import json
import random
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import train_ppo
import train_reward
from minillm.alignment.pair_scores import noise_floor, score_pairs
from minillm.alignment.reward_model import load_reward_model, score_scale, text_lengths
from minillm.base.command_line import parse
from minillm.checkpoint import run_folder
from minillm.datasets.preferences import PreferenceRows
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning import folders
from tests import launch

OPTIONS = "--seq_len 64 --batch_size 8 --micro_batch_size 2 --warmup_steps 2 --device cpu --dtype float32"
KINDS = ("another word", "no word", "two words")


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """The right answer is one word, "yes"; the wrong ones are of three kinds."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = " ".join(draw.choices(launch.WORDS, k=draw.randrange(2, 12)))
            kind = KINDS[number % 3]
            rejected = {"another word": "river", "no word": ".", "two words": "yes yes"}[kind]
            row = {"prompt": f"{prompt} {number}", "chosen": "yes", "rejected": rejected, "kind": kind}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model of a few steps in base/, and preferences."""
    here = tmp_path_factory.mktemp("reward")
    launch.write_corpus(here / "data")
    base = f"--data {here}/data --out {here}/base {launch.SMALL} --micro_batch_size 8 --steps 4 --max_seq_len 128"
    launch.finish("pretrain", base, here / "log" / "base")
    write_pairs(here / "train.jsonl", 200)
    write_pairs(here / "held_out.jsonl", 30, seed=1)
    return here


def options(folder: Path, out: str, more: str = "") -> str:
    files = f"--data {folder}/train.jsonl --eval_data {folder}/held_out.jsonl"
    return f"{files} --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more}"


def train(folder: Path, out: str, more: str = "", **how) -> str:
    return launch.finish("reward", options(folder, out, more), folder / "log" / out, **how)


def test_held_out_pairs_are_learned_and_transformers_reads_the_scores(folder):
    printed = train(folder, "learned", "--lr 3e-3 --epochs 4")
    last = launch.rows(folder / "learned")[-1]
    assert last["heldout_accuracy"] > 0.9 and last["heldout_nll"] < 0.5 and 0 <= last["ece"] < 0.3
    assert last["heldout_after"] == last["heldout_accuracy"] > last["heldout_before"]
    assert last["longer_wins"] == 0.5  # longer than ".", as long as "river", shorter than "yes yes"
    for kind in (*KINDS, "all"):
        assert f"  {kind} " in printed
    assert "the longer one would win 50.0%" in printed and "next: python train_ppo.py --reward_model" in printed

    # transformers, from the texts' tokens, one by one
    step = run_folder.newest_checkpoint(folder / "learned")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(step).eval()
    rows = PreferenceRows(folder / "held_out.jsonl", Tokenizer.load(step), 63)
    by_length = np.argsort(rows.longest(np.arange(8)), kind="stable")  # the order in which they are scored
    answers = rows.batch(by_length)
    ours = score_pairs(load_reward_model(step), rows, np.arange(8)).scores
    for number, score in zip(answers.number.tolist(), ours, strict=True):
        ids = torch.from_numpy(rows.ids[rows.begin[number] : rows.begin[number + 1]]).long()[None]
        with torch.no_grad():
            assert theirs(ids).logits.item() == pytest.approx(score, abs=1e-5)

    # the scale that was recorded with it: chosen answers of the training data have mean 0 by it
    mean, std = score_scale(folder / "learned")
    pairs = score_pairs(load_reward_model(step), PreferenceRows(folder / "train.jsonl", Tokenizer.load(step), 63))
    assert pairs.chosen.mean() == pytest.approx(mean, abs=1e-5) and pairs.scores.std() == pytest.approx(std, abs=1e-5)


def test_the_command_to_try_next_trains_the_policy_and_prompts_of_this_run():
    assert train_reward.next_command(train_reward.Config()) == "python train_ppo.py"
    how = dict(template="simple", encoding="gb18030", allow_lossy=True, on_bad_line="skip")  # the data are to be read
    run = train_reward.Config(init_from="my sft", out="我的 奖励", data="a.jsonl,b.jsonl", **how)
    words = shlex.split(train_reward.next_command(run))
    ppo = parse(train_ppo.Config, None, words[2:])
    assert (ppo.init_from, ppo.reward_model, ppo.data) == (run.init_from, run.out, run.data)
    assert {name: getattr(ppo, name) for name in how} == how


def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder):
    more = "--steps 30 --dropout 0.1"
    train(folder, "straight", more)
    (process,) = launch.start("reward", options(folder, "broken", f"{more} --save_every 10"), folder / "log" / "broken")
    process.wait_for_checkpoint(folder / "broken", 10)
    process.kill(signal.SIGKILL)
    process.wait()
    train(folder, "broken", more)
    assert launch.tensors(folder / "broken", 30) == launch.tensors(folder / "straight", 30)
    assert launch.losses(folder / "broken") == launch.losses(folder / "straight")


def test_a_checkpoint_saved_by_a_signal_has_the_scale_of_its_scores(folder):
    (process,) = launch.start("reward", options(folder, "signal", "--steps 900 --save_every 0"), folder / "log" / "sig")
    process.wait_for("900 steps")
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert score_scale(folder / "signal")[1] > 0


def test_one_batch_in_any_micro_batches_and_ranks_has_one_gradient(folder):
    ways = {"one": "--micro_batch_size 8", "two": "--micro_batch_size 4", "four": "--micro_batch_size 2"}
    for name, more in ways.items():
        train(folder, name, f"{more} --steps 4 --optimizer adamw")
    train(folder, "ranks", "--micro_batch_size 2 --steps 4 --optimizer adamw", ranks=2)
    for name in ("two", "four", "ranks"):
        assert launch.losses(folder / name) == pytest.approx(launch.losses(folder / "one"), abs=1e-6)
        assert launch.norms(folder / name) == pytest.approx(launch.norms(folder / "one"), abs=1e-5)
    columns = [launch.rows(folder / name)[0] for name in ("one", "ranks")]
    assert columns[0]["accuracy"] == columns[1]["accuracy"]


@pytest.mark.parametrize("tune", ["lora", "freeze --train_layers last:1", "prefix --n_virtual 4"])
def test_few_parameters_and_the_head_come_back_as_a_reward_model(tune, folder):
    out = tune.split()[0]
    train(folder, out, f"--tune {tune} --steps 20 --lr 1e-2")
    step = run_folder.newest_checkpoint(folder / out)
    rows = PreferenceRows(folder / "held_out.jsonl", Tokenizer.load(folder / "data"), 59)
    accuracy = launch.rows(folder / out)[-1]["heldout_accuracy"]
    pairs = score_pairs(load_reward_model(step), rows)
    assert (pairs.chosen > pairs.rejected).mean() == pytest.approx(accuracy, abs=1e-9)
    if out == "lora":
        folders.merge_folder(folder / "base", step, folder / "merged")
        merged = score_pairs(load_reward_model(folder / "merged"), rows)
        assert merged.scores == pytest.approx(pairs.scores, abs=1e-5)
    again = train(folder, out, f"--tune {tune} --steps 22 --lr 1e-2")  # goes on from there
    assert "22 steps" in again and len(launch.losses(folder / out)) == 22


def test_other_pairs_than_those_of_the_start_are_not_compared_with_them(folder):
    train(folder, "others", "--steps 1")
    assert "heldout_before" in launch.rows(folder / "others")[-1]
    said = train(folder, "others", "--steps 2 --eval_rows 5")
    assert "of other questions than now, and so not compared: heldout_accuracy, heldout_nll" in said
    assert launch.rows(folder / "others")[-1].keys() & {"heldout_before", "heldout_after"} == {"heldout_after"}


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [6, 5, 5]])  # the latter as 16 prompts in parts of at most 6
def test_prompts_of_like_length_share_a_micro_batch(folder, sizes):
    rows = PreferenceRows(folder / "train.jsonl", Tokenizer.load(folder / "data"), 63)
    positions = np.arange(40, 56)
    parts = train_reward.by_length(np.array_split(positions, len(sizes)), rows)
    assert sorted(np.concatenate(parts)) == positions.tolist() and [len(part) for part in parts] == sizes
    longest = [rows.longest(part) for part in parts]
    assert (np.diff(np.concatenate(longest)) >= 0).all()
    for part, length in zip(parts, longest, strict=True):
        answers = rows.batch(part)
        assert text_lengths(answers.batch).max() == length.max()


def test_a_reward_model_is_trained_further_with_the_head_that_it_has(folder):
    train(folder, "first", "--steps 10")
    files = f"--data {folder}/train.jsonl {OPTIONS}"
    printed = launch.finish(
        "reward", f"{files} --init_from {folder}/first --out {folder}/further --steps 1 --lr 0", folder / "log" / "f"
    )
    assert "held out: nothing" in printed
    before, after = (load_reward_model(folder / name) for name in ("first", "further"))
    assert torch.equal(before.score.weight, after.score.weight)


def test_noise_turns_held_out_labels_around_as_well_and_its_floor_is_told(folder):
    printed = train(folder, "noise", "--label_noise 0.3 --steps 4 --eval_every 2")
    assert f"floor {noise_floor(0.3):.4f} at --label_noise 0.3" in printed
    rows = [row for row in launch.rows(folder / "noise") if "floor_nll" in row]
    assert [row["step"] for row in rows] == [2, 4] and rows[0]["floor_nll"] == pytest.approx(noise_floor(0.3))
    clean, noisy = (
        PreferenceRows(folder / "held_out.jsonl", Tokenizer.load(folder / "data"), 63, label_noise=noise)
        for noise in (0.0, 0.3)
    )
    assert 0.1 < (clean.better != noisy.better).mean() < 0.5


def test_what_cannot_be_compared_is_refused(folder):
    labels = folder / "labels.jsonl"
    labels.write_text(
        "\n".join(json.dumps({"prompt": f"a {i}", "completion": "yes", "label": i % 2 == 0}) for i in range(8))
    )
    printed = launch.finish(
        "reward",
        f"--data {labels} --init_from {folder}/base --out {folder}/l {OPTIONS}",
        folder / "log" / "l",
        status=2,
    )
    assert "holds single answers with labels" in printed and "Traceback" not in printed


def test_a_reward_model_is_refused_where_a_language_model_is_trained(folder):
    train(folder, "judge", "--steps 1")
    words = "judge/step-00000001: is a reward model (LlamaForSequenceClassification), which gives a score and no text"
    printed = launch.finish(
        "sft",
        f"--data {folder}/train.jsonl --init_from {folder}/judge --out {folder}/no {OPTIONS}",
        folder / "log" / "no",
        status=2,
    )
    assert words in printed and "Traceback" not in printed
    bins = f"--data {folder}/data --init_from {folder}/judge --out {folder}/no --seq_len 32 --batch_size 8 --device cpu"
    assert words in launch.finish("pretrain", bins, folder / "log" / "no", status=2)


def test_the_bundled_data_is_what_it_takes_by_default():
    config = train_reward.Config()
    assert config.data.endswith("preferences_train.jsonl") and config.held_out.endswith("preferences_heldout.jsonl")
    assert train_reward.Config(data="mine.jsonl").held_out is None
