import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

import train_dpo
from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import load_config
from tests import launch
from tests.minillm.evaluation.benchmark_rows import write_all

OPTIONS = "--seq_len 64 --batch_size 8 --micro_batch_size 2 --warmup_steps 2 --device cpu --dtype float32 --lr 1e-3"


def write_pairs(path: Path, count: int, seed: int = 0, labels: bool = False) -> Path:
    """Questions about the last of some words, answered by it or by another word."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices(launch.WORDS, k=draw.randrange(2, 8))
            wrong = draw.choice([word for word in launch.WORDS if word != words[-1]])
            row = {"prompt": "say the last: " + " ".join(words)}
            if labels:
                good = draw.random() < 0.5
                row |= {"completion": words[-1] if good else wrong, "label": good}
            else:
                row |= {"chosen": words[-1], "rejected": f"{wrong} {words[0]}" if draw.random() < 0.5 else wrong}
                row["kind"] = draw.choice(["value", "other"])
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model of a few steps in base/, preferences and labels."""
    here = tmp_path_factory.mktemp("dpo")
    launch.write_corpus(here / "data")
    base = f"--data {here}/data --out {here}/base {launch.SMALL} --micro_batch_size 8 --steps 20 --max_seq_len 128"
    launch.finish("pretrain", base, here / "log" / "base")
    write_pairs(here / "train.jsonl", 120)
    write_pairs(here / "few.jsonl", 32, seed=3)
    write_pairs(here / "held_out.jsonl", 20, seed=1)
    write_pairs(here / "labels.jsonl", 60, seed=2, labels=True)
    questions = [{"instruction": f"what sees the {word}?", "output": f"the {word} {word}"} for word in launch.WORDS]
    (here / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return here


def options(folder: Path, out: str, more: str = "", data: str = "train") -> str:
    return f"--data {folder}/{data}.jsonl --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more}"


def train(folder: Path, out: str, more: str = "", data: str = "train", **how) -> str:
    return launch.finish("dpo", options(folder, out, more, data), folder / "log" / out, **how)


def assert_same_steps(one: Path, other: Path) -> None:
    """Losses and gradient norms agree to rounding."""
    for of in (launch.losses, launch.norms):
        wanted = of(other)
        assert of(one) == pytest.approx(wanted, rel=2e-5, abs=2e-6)
        assert len(wanted) > 1


def test_a_run_from_start_to_end(folder):
    more = f"--epochs 1 --eval_pairs {folder}/held_out.jsonl --eval_every 5 --save_every 5"
    text = train(folder, "whole", more)
    rows = launch.rows(folder / "whole")
    first = rows[0]
    assert first["rewards_chosen"] == first["margins"] == first["accuracy"] == 0  # policy and reference agree
    assert first["length_chosen"] >= 2 and first["logps_chosen"] < 0
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss"] == pytest.approx(first["preference_loss"] + first["sft_loss"], rel=1e-5)
    assert f"loss {first['loss']:.4f} (preference 0.6931, sft {first['sft_loss']:.4f}) lr" in text
    assert {"val_accuracy", "val_plain_accuracy", "val_u_chosen", "val_u_rejected"} <= rows[5].keys()
    assert "held-out pairs whose chosen answer is likelier, before → after" in text
    assert "chat --model" in text
    assert load_config(folder / "whole" / "step-00000015").vocab_size == 400


@pytest.mark.parametrize("tune", ["full", "lora", "prefix"])
def test_the_loss_begins_at_log_2(folder, tune):
    train(folder, f"log2-{tune}", f"--sft_weight 0 --steps 2 --tune {tune}")
    first = launch.losses(folder / f"log2-{tune}")[1]
    if tune != "prefix":  # virtual tokens change the model from their start
        assert first == pytest.approx(math.log(2), abs=1e-6)
    assert launch.losses(folder / f"log2-{tune}")[2] != first


def test_thirty_two_pairs_are_learned(folder):
    train(
        folder,
        "few",
        "--steps 40 --batch_size 32 --micro_batch_size 32 --sft_weight 0 --lr 1e-2 --beta 0.3",
        data="few",
    )
    last = [row for row in launch.rows(folder / "few") if "loss" in row][-1]
    assert last["accuracy"] == 1.0
    assert last["loss"] < 0.5


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "kto", "orpo", "sigmoid --replay_data {}"])
def test_the_cut_into_micro_batches_and_ranks_changes_nothing(folder, loss):
    data = "labels" if loss == "kto" else "train"
    more = f"--loss {loss} --steps 3".format(folder / "instructions.jsonl")
    name = f"cut-{loss.split()[0]}-{'replay' in loss}"
    train(folder, f"{name}-2", more, data)
    train(folder, f"{name}-8", f"{more} --micro_batch_size 8", data)
    train(folder, f"{name}-ranks", more, data, ranks=2)
    assert_same_steps(folder / f"{name}-8", folder / f"{name}-2")
    assert_same_steps(folder / f"{name}-ranks", folder / f"{name}-2")


def test_instructions_are_learned_beside_by_their_weight(folder):
    at_0 = {"loss": "sft", "sft_weight": 1e-9}  # of which next to nothing is learned
    more = " ".join(f"--{name} {value}" for name, value in at_0.items()) + " --steps 1 --grad_clip 1e9"
    for weight in (1, 3):
        replay = f"--replay_data {folder}/instructions.jsonl --replay_weight {weight} --replay_rows 4"
        train(folder, f"beside-{weight}", f"{more} {replay}")
    one, three = (launch.norms(folder / f"beside-{weight}")[1] for weight in (1, 3))
    assert one > 0.01 and three == pytest.approx(3 * one, rel=1e-3)


def test_instructions_of_the_kind_that_is_compared_are_not_learned_beside(folder):
    for name, keys in (("of-a-kind", {"family": "last"}), ("instructions-of-it", {"family": "last"})):
        source = "train" if name == "of-a-kind" else "instructions"
        rows = [json.loads(line) | keys for line in (folder / f"{source}.jsonl").read_text().splitlines()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = f"--steps 1 --replay_data {folder}/instructions-of-it.jsonl"
    assert "of a family that is left out" in train(folder, "refused", replay, "of-a-kind", status=2)
    train(folder, "taken", replay)


def test_the_last_batch_may_be_short_on_two_ranks(folder):
    for ranks in (1, 2):
        train(folder, f"short-{ranks}", "--epochs 0.2 --micro_batch_size 4", data="few", ranks=ranks)  # 7 = 8 - 1 pairs
    one, two = (launch.losses(folder / f"short-{ranks}") for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("more", ["", "--tune lora", "--loss kto", "--replay_data {}"])
def test_a_resumed_run_ends_bit_equal(folder, more):
    name = "resume" + re.sub(r"\W", "", more)
    more = more.format(folder / "instructions.jsonl")
    whole, halves = folder / f"{name}-whole", folder / f"{name}-halves"
    train(folder, whole.name, f"{more} --steps 6 --save_every 3 --keep_last 0")
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "step-00000006")
    text = train(folder, halves.name, f"{more} --steps 6 --save_every 3 --keep_last 0")
    assert "step-00000003" in text
    assert "by the reference policy" not in text or "kto" in more  # its numbers were kept
    weights = "adapter_model.safetensors" if "lora" in more else "model.safetensors"
    for name in (weights, "resume/optimizer.safetensors"):
        one, other = (run / "step-00000006" / name for run in (whole, halves))
        assert one.read_bytes() == other.read_bytes()
    assert launch.losses(whole) == launch.losses(halves)


def test_a_damaged_file_of_the_reference_is_made_again(folder):
    train(folder, "damaged", "--steps 2 --save_every 1 --keep_last 0")
    (file,) = (folder / "damaged").glob("reference-*.npy")
    right = file.read_bytes()
    file.write_bytes(right[:100])
    shutil.rmtree(folder / "damaged" / "step-00000002")
    train(folder, "damaged", "--steps 2")
    assert file.read_bytes() == right


def test_a_run_goes_on_by_the_numbers_of_its_reference_when_that_is_gone(folder):
    base = shutil.copytree(folder / "base", folder / "passing")
    more = f"--init_from {base} --steps 4 --save_every 1 --keep_last 0"
    train(folder, "orphan", more)
    whole = launch.losses(folder / "orphan")
    shutil.rmtree(base)
    for step in (2, 3):  # step 3 is written without it, and notes it all the same
        for later in range(step + 1, 5):
            shutil.rmtree(folder / "orphan" / f"step-{later:08d}")
        assert "by the reference policy" not in train(folder, "orphan", more)
        assert launch.losses(folder / "orphan") == whole
    for file in (folder / "orphan").glob("reference-*.npy"):
        file.unlink()
    shutil.rmtree(folder / "orphan" / "step-00000004")
    assert "is gone, and it is the reference" in train(folder, "orphan", more, status=2)


def test_a_resumed_run_may_look_at_other_pairs_or_have_lost_what_it_began_with(folder):
    train(folder, "other-pairs", f"--steps 2 --eval_pairs {folder}/held_out.jsonl --eval_every 1")
    more = f"--eval_pairs {folder}/few.jsonl --eval_every 1 --steps"
    said = train(folder, "other-pairs", f"{more} 3")
    assert "--eval_pairs: these were not looked at when the run began" in said and "not asked → " in said
    assert launch.rows(folder / "other-pairs")[-1].keys() >= {"val_plain_accuracy"}
    assert "of other questions" not in said
    asked = f"{more} 4 --eval_data {folder}/instructions.jsonl"
    assert "of other questions than now, and so not compared: exact" in train(folder, "other-pairs", asked)
    (folder / "other-pairs" / "before.json").unlink()
    assert "not asked → " in train(folder, "other-pairs", f"{more} 5")


def test_another_reference_or_loss_is_refused_on_resuming(folder):
    train(folder, "refuse", "--steps 2 --save_every 1 --keep_last 0")
    shutil.rmtree(folder / "refuse" / "step-00000002")
    text = train(folder, "refuse", "--steps 2 --beta 0.2", status=2)
    assert "another loss" in text and "--beta" in text


def test_a_fall_of_the_chosen_answers_is_said(folder):
    text = train(folder, "fall", "--loss apo_down --beta 1 --sft_weight 0 --lr 2e-2 --steps 30")
    assert "the chosen answers have become less likely" in text
    assert text.count("the chosen answers have become less likely") == 1


@pytest.mark.parametrize(
    ("more", "data", "message"),
    [
        ("--loss simpo --label_smoothing 0.1", "train", "--label_smoothing 0.1: means nothing with --loss simpo"),
        ("--dropout 0.1", "train", "--dropout: must be 0 with --loss sigmoid"),
        ("--tune lora --lora_dropout 0.1 --loss kto", "labels", "--lora_dropout: must be 0 with --loss kto"),
        ("--gamma 1", "train", "--gamma 1.0: means nothing with --loss sigmoid"),
        ("--loss sft --beta 0.1", "train", "--beta 0.1: means nothing with --loss sft"),
        ("--loss exo_pair --label_smoothing 0", "train", "give a number above 0"),
        ("--loss aot", "train", "give --micro_batch_size 8"),
        ("--loss dpo", "train", "choose one of sigmoid"),
        ("--loss kto --batch_size 1 --micro_batch_size 1", "labels", "give at least 2"),
        ("", "labels", "choose --loss kto"),
        ("--beta 0", "train", "must be above 0"),
        ("--replay_weight 1", "train", "--replay_weight 1.0: give the instructions by --replay_data"),
        ("--replay_rows 8", "train", "--replay_rows 8: give the instructions by --replay_data"),
        ("--seq_len 4", "train", "nothing left to compare"),
    ],
)
def test_bad_options_are_refused_by_name(folder, more, data, message):
    assert message in train(folder, "bad", more, data, status=2)


def test_a_reward_model_is_no_policy(folder):
    reward = shutil.copytree(folder / "base" / "step-00000020", folder / "reward")
    shutil.rmtree(reward / "resume")
    (reward / "manifest.json").unlink()
    config = json.loads((reward / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (reward / "config.json").write_text(json.dumps(config))
    text = train(folder, "from-reward", f"--init_from {reward}", status=2)
    assert "is a reward model" in text


def test_an_adapter_alone_is_no_policy(folder):
    train(folder, "adapter", "--tune lora --steps 1")
    text = train(folder, "from-adapter", f"--init_from {folder}/adapter", status=2)
    assert "merge it into its base first" in text


def test_recomputed_layers_give_the_same_steps(folder):
    train(folder, "plain", "--steps 2")
    train(folder, "recomputed", "--steps 2 --checkpoint_activations true")
    assert_same_steps(folder / "recomputed", folder / "plain")


def test_one_kind_of_label_alone_is_refused(folder):
    rows = [{"prompt": f"say {word}", "completion": word, "label": True} for word in launch.WORDS]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "needs both kinds" in train(folder, "one-kind", "--loss kto", "good", status=2)


def test_own_pairs_are_all_read_and_of_the_bundled_ones_a_quarter():
    assert train_dpo.Config().passes == 0.25
    assert train_dpo.Config(data="pairs.jsonl").passes == 1
    assert train_dpo.Config(data="pairs.jsonl", epochs=0.5).passes == 0.5


def test_every_loss_has_its_numbers():
    for loss in train_dpo.LOSSES:
        config = train_dpo.Config(loss=loss)
        assert config.objective.options.beta > 0
    assert train_dpo.Config(loss="simpo").objective.options.beta == 2
    assert train_dpo.Config(loss="simpo", beta=3.0).objective.options.beta == 3
    assert train_dpo.Config(loss="cdpo").objective.options.label_smoothing == 0.1
    assert train_dpo.Config(sft_weight=0.5).objective.sft_weight == 0.5
    with pytest.raises(UserError, match="means nothing with --loss cdpo"):
        train_dpo.Config(loss="cdpo", gamma=1.0)


def test_benchmarks_are_asked_meanwhile_and_training_stays_the_same(folder, tmp_path):
    asking = f"--eval_tasks {write_all(tmp_path / 'eval')}/arc_easy --eval_limit 5"
    train(folder, "not-asked", "--steps 3")
    train(folder, "asked", f"--steps 3 --eval_every 2 {asking}")
    rows = [row for row in launch.rows(folder / "asked") if "acc/arc_easy" in row]
    assert [row["step"] for row in rows] == [2, 3] and "acc_stderr/arc_easy" in rows[0]
    assert launch.losses(folder / "asked") == launch.losses(folder / "not-asked")
    assert "no file of the split test" in train(folder, "asked-nowhere", "--eval_tasks nowhere/arc_easy", status=2)
