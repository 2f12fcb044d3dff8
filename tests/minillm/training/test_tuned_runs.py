import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.__main__ import main
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.datasets import questions
from minillm.evaluation import answers
from minillm.model.size import flops_per_token
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.tuning import folders
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests import launch
from tests.minillm.tuning import tiny
from tests.test_train_sft import OPTIONS, write_instructions
from train_sft import Config as Sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model of a few steps in base/, its corpus in data/, and instructions."""
    here = tmp_path_factory.mktemp("tuning")
    launch.write_corpus(here / "data")
    more = f"--data {here}/data --out {here}/base {launch.SMALL} --micro_batch_size 8 --max_seq_len 128"
    launch.finish("pretrain", f"{more} --steps 4 --save_every 2", here / "log" / "base")
    write_instructions(here / "train.jsonl", 200)
    write_instructions(here / "held_out.jsonl", 8, seed=1)
    return here


def sft(folder: Path, out: str, more: str, **how) -> str:
    options = f"--data {folder}/train.jsonl --init_from {folder}/base --out {folder}/{out} {OPTIONS} {more}"
    return launch.finish("sft", options, folder / "log" / out, **how)


def pretrain(folder: Path, out: str, more: str, **how) -> str:
    options = (
        f"--data {folder}/data --out {folder}/{out} --seq_len 32 --batch_size 8 --warmup_steps 2 --eval_tokens 512"
    )
    options += f" --device cpu --dtype float32 --eval_every 0 {more}"
    return launch.finish("pretrain", options, folder / "log" / out, **how)


def tensors(run: Path, step: int) -> list[bytes]:
    folder = run / f"step-{step:08d}"
    return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "resume/optimizer.safetensors")]


FULL = "--tune lora --lora_dropout 0.1 --modules_to_save embed_tokens,lm_head"


STOPPED = {
    "lora": f"{FULL} --base_bits 4",
    "lora16": f"{FULL} --base_bits 16",
    "freeze": "--tune freeze --train_layers last:1,norms",
    "ptuning": "--tune ptuning --n_virtual 4 --encoder lstm",
}


@pytest.mark.parametrize("out", STOPPED)
def test_resumed_is_bit_for_bit_the_run_never_stopped_and_steps_hold_no_base(folder, out):
    """Muon for the layers that are trained in full, AdamW for the adapter."""
    more, kind = STOPPED[out], "muon" if out == "freeze" else "adamw"
    text = sft(folder, f"{out}-straight", f"{more} --steps 6")
    assert f"optimizer = {kind}" in " ".join(text.split()) and "parameters trained, " in text and "weights from" in text
    sft(folder, f"{out}-broken", f"{more} --steps 6 --save_every 3")
    broken = folder / f"{out}-broken"
    shutil.rmtree(broken / "step-00000006")
    sft(folder, broken.name, f"{more} --steps 6")
    assert tensors(broken, 6) == tensors(folder / f"{out}-straight", 6)
    assert launch.losses(broken) == launch.losses(folder / f"{out}-straight")
    step = broken / "step-00000006"
    assert {path.name for path in step.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "minillm_base.json",
        "resume",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert "has finished its 6 steps" in sft(folder, broken.name, f"{more} --steps 6")


def test_a_base_is_kept_though_its_run_goes_on(folder, command):
    """An adapter's run and the adapter keep the checkpoint that it began with, which its run would have deleted."""
    base = folder / "moving"
    shutil.copytree(folder / "base", base, ignore=shutil.ignore_patterns("*.users"))
    lora = f"--init_from {base} --tune lora"
    sft(folder, "over-moving", f"{lora} --steps 2")

    longer = f"--data {folder}/data --out {base} {launch.SMALL} --micro_batch_size 8 --max_seq_len 128 --save_every 1"
    launch.finish("pretrain", f"{longer} --steps 7 --keep_last 2", folder / "log" / "moving")
    assert launch.steps(base) == [4, 6, 7]
    sft(folder, "over-moving", f"{lora} --steps 3")
    assert list(launch.losses(folder / "over-moving")) == [1, 2, 3]
    assert command(f"generate --model {folder}/over-moving --prompt a --max_new_tokens 2 --device cpu")

    # gone all the same: said by its name
    shutil.move(base / "step-00000004", folder / "elsewhere")
    said = sft(folder, "over-moving", f"{lora} --steps 4", status=2)
    assert f"over-moving/step-00000003 is an adapter over {base}/step-00000004, which is not there any more" in said
    shutil.move(folder / "elsewhere", base / "step-00000004")

    # without the adapter nobody needs it
    shutil.rmtree(folder / "over-moving")
    launch.finish("pretrain", f"{longer} --steps 8 --keep_last 2", folder / "log" / "moving")
    assert launch.steps(base) == [7, 8] and not list(base.glob("*.users"))


SHARED = [FULL.replace("--lora_dropout 0.1 ", ""), "--tune adapter", "--tune freeze --train_layers 0"]
SHARED += ["--tune prefix --n_virtual 4", "--tune dora --base_bits 8"]


@pytest.mark.parametrize("more", SHARED, ids=["lora", "adapter", "freeze", "prefix", "dora on int8"])
def test_two_ranks_take_the_same_steps_as_one(folder, more):
    out = more.split()[1]
    for ranks in (1, 2):
        sft(folder, f"{out}-{ranks}", f"{more} --steps 3 --grad_clip 0", ranks=ranks)
    for read in (launch.losses, launch.norms):
        one, two = (read(folder / f"{out}-{ranks}") for ranks in (1, 2))
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (load_file(folder / f"{out}-{n}" / "step-00000003" / "adapter_model.safetensors") for n in (1, 2))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `python -m minillm` with these arguments; returns what it printed."""

    def run(text: str) -> str:
        monkeypatch.setattr("sys.argv", ["minillm", *text.split()])
        assert main() == 0
        return capsys.readouterr().out

    return run


def test_two_stages_of_pretraining_and_a_plain_model_in_the_end(folder, command):
    """New embeddings first, then low-rank matrices with embeddings in full, each merged into the base."""
    pretrain(folder, "prompted", f"--init_from {folder}/base --tune prompt --n_virtual 4 --steps 2")
    val_loss = next(row["val_loss"] for row in launch.rows(folder / "prompted") if "val_loss" in row)
    said = command(f"eval --model {folder}/prompted --data {folder}/data --max_tokens 512 --seq_len 32 --device cpu")
    assert float(said.split("loss")[1].split()[0]) == pytest.approx(val_loss, abs=2e-3)

    stages = ["--tune freeze --train_layers embed,head", "--tune lora --modules_to_save embed_tokens,lm_head"]
    base = folder / "base"
    for stage, more in enumerate(stages, 1):
        run = folder / f"stage-{stage}"
        more += " --document_attention true"  # as a merged folder, which does not say how it was trained, is scored
        text = pretrain(folder, run.name, f"--init_from {base} {more} --steps 8 --lr 1e-2 --compile false")
        assert "a sample:" in text
        losses = launch.losses(run)
        assert losses[8] < losses[1]
        said = command(f"merge --model {base} --adapter {run} --out {folder}/merged-{stage}")
        assert f"merged-{stage}: {run}/step-00000008 merged into" in said
        val_loss = next(row["val_loss"] for row in launch.rows(run) if "val_loss" in row)
        for model in (f"--model {folder}/merged-{stage}", f"--model {run}"):
            said = command(f"eval {model} --data {folder}/data --max_tokens 512 --seq_len 32 --device cpu")
            assert float(said.split("loss")[1].split()[0]) == pytest.approx(val_loss, abs=2e-3)
        base = folder / f"merged-{stage}"
    assert huggingface.load_config(base).tie_embeddings
    assert Tokenizer.load(base).sha256 == Tokenizer.load(folder / "data").sha256


def test_merging_what_cannot_be_merged_is_refused(folder, command):
    sft(folder, "once", "--tune lora --steps 2")
    sft(folder, "never", "--tune adapter --steps 2")
    base, once = folder / "base", f"--adapter {folder}/once"
    command(f"merge --model {base} {once} --out {folder}/with-once")
    for more, words in {
        f"merge --model {folder}/with-once {once} --out {folder}/twice": "has this adapter merged in already",
        f"merge --model {base}/step-00000002 {once} --out {folder}/twice": "made for another base",
        f"merge --model {base} {once} --out {folder}/with-once": "is there already",
        f"merge --model {base} --adapter {base} --out {folder}/twice": "so it is no adapter",
        f"merge --model {base} --adapter {folder}/never --out {folder}/twice": "--tune adapter adds what no plain",
        f"eval --model {base} --base {base} --data {folder}/data": "is a model of its own and no adapter",
        f"eval --model {folder}/once --base {folder}/with-once --data {folder}/data": "made for another base",
        f"info --model {folder}/once": "an adapter, and no model; merge it into its base first",
    }.items():
        with pytest.raises(UserError, match=words):
            command(more)
    assert not (folder / "twice").exists() and not list(folder.glob("*.tmp-*"))


@pytest.mark.parametrize("tune", ["dora", "prefix --n_virtual 4", "lora --base_bits 4"])
def test_answers_are_scored_before_and_after(folder, tune):
    run = folder / f"scored-{tune[:3]}"
    more = f"--tune {tune} --steps 4 --lr 1e-2 --eval_data {folder}/held_out.jsonl --template simple"
    text = sft(folder, run.name, more)
    assert "exact answers to 8 held-out questions, before → after:" in text
    model, base = folders.load_adapted(run / "step-00000004")
    tokenizer = folders.tokenizer_of(run / "step-00000004", base)
    scores = answers.exact_match(
        model.eval(), tokenizer, questions.read_questions(folder / "held_out.jsonl", None), template="simple"
    )
    right, asked = map(sum, zip(*scores.values(), strict=True))
    assert launch.rows(run)[-1]["exact_match"] == right / asked


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--tune lora --lora_rank 0", ["--lora_rank 0: must be at least 1"]),
        ("--tune lora --lora_dropout 1", ["--lora_dropout 1.0"]),
        ("--tune lora --lora_alpha -1", ["--lora_alpha -1.0"]),
        ("--tune lora --lora_rank 33", ["--lora_rank 33: at most 32, the smaller side of layers.0.self_attn.q_proj"]),
        (
            "--tune ia3 --lora_rank 4 --train_layers 1",
            [
                "--lora_rank 4: means nothing with --tune ia3; leave it out, or choose lora or dora",
                "--train_layers 1: ",
            ],
        ),
        ("--tune freeze", ["by --train_layers"]),
        ("--tune adapter --base_bits 4", ["--base_bits 4: means nothing", "or choose lora or dora"]),
        ("--tune lora --base_bits 5", ["--base_bits 5: choose one of 16, 8, 4"]),
        ("--tune lora --target_modules q_prj", ["did you mean q_proj?"]),
        ("--tune lora --target_modules lm_head --lora_dropout 0.1", ["lm_head", "--lora_dropout 0"]),
        ("--tune LoRA", ["choose one of full, freeze, lora"]),
        ("--tune lora --init_from {folder}/refusing", ["an adapter", "merge it into its base first"]),
        (
            "--tune lora --lora_rank 4 --out {folder}/refusing",
            [
                "refusing/step-00000002 was made with another tuning (--lora_rank: 8 in the checkpoint, 4 now)",
                "another --out",
            ],
        ),
        ("--tune lora --init_from {folder}/base/step-00000002 --out {folder}/refusing", ["another base model"]),
        ("--out {folder}/refusing", ["another base model and another tuning"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, more, words):
    if not (folder / "refusing").exists():
        sft(folder, "refusing", "--tune lora --steps 2")
    text = sft(folder, "refused", "--steps 2 " + more.format(folder=folder), status=2)
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert text.endswith(line + "\n") and "Traceback" not in text
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--tune lora", ["--tune lora", "give it by --init_from"]),
        (
            "--tune prompt --init_from {folder}/base --document_attention true",
            ["--document_attention true: the virtual tokens of --tune prompt stand before one text a row"],
        ),
        ("--tune prefix --n_virtual 100 --init_from {folder}/base", ["--seq_len 32 and --n_virtual 100", "128"]),
        (
            "--tune lora --init_from {folder}/base --max_seq_len 256 --rope_scaling linear:2",
            ["--max_seq_len, --rope_scaling"],
        ),
    ],
)
def test_pretraining_a_part_needs_a_base_and_keeps_its_shape(folder, more, words):
    text = pretrain(folder, "unshaped", "--steps 2 " + more.format(folder=folder), status=2)
    assert all(word in text.splitlines()[-1] for word in words), text


def test_optimizer_and_learning_rate_where_they_are_left_open():
    def chosen(**options):
        cfg = starting_model.choose_optimizer(Sft(**options), 128, lr_scale=0.25)
        return cfg.optimizer, cfg.lr

    assert chosen() == chosen(tune="freeze", train_layers="last:1") == ("muon", pytest.approx(0.09 / 128**0.5 / 4))
    assert chosen(optimizer="adamw")[1] == pytest.approx(0.045 / 128**0.5 / 4)
    assert chosen(tune="lora")[0] == "adamw" and chosen(tune="lora", optimizer="muon")[0] == "muon"
    assert chosen(tune="lora", lr=0.5)[1] == 0.5
    decays = [
        starting_model.choose_optimizer(Sft(tune=tune), 128).weight_decay for tune in ("full", "lora", "ia3", "prompt")
    ]
    assert decays == [0.1, 0.1, 0, 0]


def test_floating_point_operations():
    """Of the base's weights no gradient is taken: two thirds; few new ones weigh little."""
    model = tiny.base()
    full = starting_model.flops_per_token(model, 0)
    assert full == flops_per_token(model.config, 0)
    attach(model, TuningConfig("lora", lora_rank=1))
    assert starting_model.flops_per_token(model, 0) == full * 2 // 3 + 6 * starting_model.n_trained(model)
    assert starting_model.describe_parameters(model).startswith(
        f"{starting_model.n_trained(model):,} parameters trained, "
    )
    whole = tiny.base()
    layers = TuningConfig("freeze", train_layers="first:2,head,norms")
    attach(whole, layers)
    assert (
        abs(starting_model.flops_per_token(whole, 0) - full) <= 2 * 16 * 5
    )  # but for the norms, which multiply nothing
    assert json.loads(json.dumps(folders.fingerprints(TuningConfig(), None))) == {}


def test_an_adapters_answers_end_where_its_bases_do(tmp_path):
    from tests.minillm.tokenizer.test_other_folders import json_folder

    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
        json_folder(tmp_path / name, None)
    (tmp_path / "adapter" / "config.json").unlink()
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert folders.tokenizer_of(tmp_path / "adapter", tmp_path / "base").end_ids == [1, 7]
