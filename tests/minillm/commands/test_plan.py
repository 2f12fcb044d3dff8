"""The table of layouts: what is in it, in which order, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

import train_pretrain
from minillm.base import command_line
from minillm.checkpoint import run_folder
from minillm.commands import plan
from minillm.commands.bench import train
from minillm.distributed import layout as parts
from minillm.model.config import ModelConfig, preset
from minillm.model.layouts import Layout
from minillm.training import sharding
from train_pretrain import Config as Pretrain

LLAMA = ("--preset", "8b", "--vocab_size", "128256")


def table(printed: str) -> list[list[str]]:
    """The words of each line of the table."""
    lines = printed.partition("tok/s/GPU")[2].splitlines()[1:]
    return [line.split() for line in lines if line.count("×") == 3]


def layouts(printed: str) -> list[tuple[int, ...]]:
    """replicate, shard, context and tensor parallel of each line."""
    return [tuple(int(word) for word in words[:7:2]) for words in table(printed)]


def test_the_best_layouts_come_first(call):
    status, out, _ = call("plan", *LLAMA, "--gpus", "64", "--top", "0")
    assert status == 0 and "8,030,261,248 parameters, 57.9 GFLOP a token" in out
    assert "512 × 8,192 = 4,194,304 tokens a step" in out
    found = layouts(out)
    assert found[0] == (4, 16, 1, 1)  # 8 × 8 takes 75.9 of 72 GB, larger shards send more
    assert len(found) == len(set(found)) and (64, 1, 1, 1) not in found
    for layout in found:
        replicate, shard, cp, tp = layout
        assert replicate * shard * cp * tp == 64 and tp <= 8
    steps = [float(words[-4]) for words in table(out)]
    assert steps == sorted(steps)
    assert table(out)[0][-4:-1] == ["8.53", "45.0%", "7,685"]


def test_days_and_dollars_follow_from_the_tokens(call):
    _, out, _ = call("plan", *LLAMA, "--gpus", "8", "--tokens", "15e12", "--price", "2", "--top", "1", "--usable", "1")
    (words,) = table(out)
    assert layouts(out) == [(1, 8, 1, 1)]
    days, dollars = (float(word.replace(",", "")) for word in words[-2:])
    assert days == pytest.approx(15e12 / 7685 / 8 / 86400, rel=1e-3) and days == pytest.approx(2800, rel=0.01)
    assert dollars == pytest.approx(days * 24 * 8 * 2, rel=1e-3)
    assert "seconds of the first: compute 68.23" in out


def test_what_does_not_fit_is_refused_with_what_would(call):
    status, _, err = call("plan", *LLAMA, "--gpus", "1", "--gpu", "4090")
    assert status and "--gpus 1: no layout fits 21.6 GB of each 4090; the least takes" in err and "take 16" in err
    status, _, err = call("plan", *LLAMA, "--gpus", "64", "--batch_size", "3", "--seq_len", "50")
    assert status and "--gpus 64: 3 sequences of 50 tokens cannot be shared out" in err
    status, _, err = call("plan", *LLAMA, "--gpus", "12")
    assert status and "--gpus 12: is no multiple of --gpus_per_host 8" in err
    status, _, err = call("plan", "--gpus", "8")
    assert status and "give either --preset NAME or --model DIR" in err


@pytest.mark.parametrize("per_host", ["8", "5"])
@pytest.mark.parametrize("gpus", ["1", "3", "5"])
def test_the_number_of_gpus_it_tells_to_take_is_enough(call, gpus, per_host):
    small = ("--preset", "3b", "--memory", "10", "--batch_size", "240", "--gpus_per_host", per_host)
    status, _, err = call("plan", *small, "--gpus", gpus)
    more = re.search(r"take (\d+), or shorter", err)
    assert status and more, err
    status, out, err = call("plan", *small, "--gpus", more[1])
    assert status == 0 and layouts(out), err


def test_copies_that_train_alone_are_to_be_left_out_where_they_do_not_fit(call):
    """Neither more GPUs nor a larger batch makes a whole copy smaller."""
    status, _, err = call("plan", "--preset", "3b", "--gpus", "4", "--memory", "40", "--diloco_steps", "50")
    assert status and "with --diloco_steps each GPU holds a whole copy; leave it out" in err and "batch" not in err
    assert call("plan", "--preset", "3b", "--gpus", "4", "--memory", "40")[0] == 0


@pytest.mark.parametrize("tokens", ["3e5", "3.1e5", "9e5"])
def test_a_small_run_has_its_numbers_too(call, tokens):
    """What is not zero is not told as 0.0, and the steps are those of the command."""
    rows = ("--gpus", "2", "--batch_size", "64", "--seq_len", "512", "--memory", "0.05", "--tokens", tokens)
    status, out, err = call("plan", "--preset", "tiny", *rows)
    assert status == 0, err
    assert not re.search(r"\b0\.0\b", out)
    (steps,) = re.findall(r"tokens are (\d+) steps", out)
    assert int(steps) == math.ceil(float(tokens) / (64 * 512)) and f"--steps {steps} " in out


def test_a_model_of_a_folder_is_planned_too(call):
    status, out, _ = call("plan", "--model", "out/sft", "--gpus", "2", "--batch_size", "4")
    assert status == 0 and set(layouts(out)) == {(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)}
    assert "--max_seq_len" not in out


def test_the_command_trains_the_shape_that_was_planned(call):
    shape = ["--n_layers", "3", "--qkv_bias", "true", "--tie_embeddings", "false", "--max_seq_len", "256"]
    _, out, _ = call("plan", "--preset", "tiny", "--gpus", "1", *shape)
    command = out.partition("the first begins by: ")[2]
    asked = command_line.parse(Pretrain, "", command.partition("train_pretrain.py ")[2].split())
    given = (asked.preset, asked.n_layers, asked.qkv_bias, asked.tie_embeddings, asked.max_seq_len, asked.seq_len)
    assert given == ("tiny", 3, True, False, 256, 256) and asked.checkpoint_activations is False


@pytest.mark.parametrize("seq_len", ["64", "66", "80"])
def test_every_layout_of_a_model_trains_rows_of_that_length(call, home, monkeypatch, seq_len):
    """In rows that are longer than the model's context, or that ranks divide: what training checks before it begins."""
    chosen = ("--model", "out/sft", "--gpus", "4", "--batch_size", "8", "--seq_len", seq_len)
    status, out, err = call("plan", *chosen, "--top", "0")
    assert status == 0, err
    command = out.partition("the first begins by: ")[2]
    asked = command_line.parse(Pretrain, "", command.partition("train_pretrain.py ")[2].split())
    monkeypatch.setattr(train_pretrain.starting_model, "check_tokenizer", lambda *_: None)
    model_config = train_pretrain.shape(asked, 400, run_folder.resolve_checkpoint("out/sft"), 0)
    assert model_config.max_seq_len == max(64, int(seq_len)) == (asked.max_seq_len or 64)
    for replicate, shard, cp, tp in layouts(out):
        assert replicate * shard * cp * tp == 4
        sharding._check_rows_fit(asked, model_config, parts.Layout(shard, cp, tp))


def test_tensor_parallelism_divides_heads_and_stays_inside_a_host():
    step = plan.Step(ModelConfig(vocab_size=64, dim=48, n_heads=12, n_kv_heads=6, ffn_dim=96), 144, 24, muon=False)
    found = list(step.layouts(24, per_host=4))
    assert {layout.tp for layout in found} == {1, 2, 3}  # 4 does not divide 6 heads, 6 is more than a host
    assert {layout.cp for layout in found if layout.tp == 1} == {1, 2, 3, 4, 6, 8, 12, 24}
    odd = plan.Step(step.shape, 50, 24, muon=False)
    assert {layout.cp for layout in odd.layouts(24, per_host=4)} == {1}  # 50 tokens are not 4 equal chunks
    even = plan.Step(step.shape, 52, 24, muon=False)
    assert {layout.cp for layout in even.layouts(24, per_host=4)} == {1, 2}
    learned = plan.Step(dataclasses.replace(step.shape, positions="learned"), 144, 24, muon=False)
    assert {(layout.cp, layout.tp) for layout in learned.layouts(24, per_host=4)} == {(1, 1)}
    assert Layout(24, 1, 1, 1) in found and all(layout.n_gpus == 24 for layout in found)


def test_slow_links_are_used_every_so_many_steps(call):
    two_machines = ("--preset", "124m", "--gpus", "2", "--gpu", "4090", "--gpus_per_host", "1", "--network", "0.125")
    more = ("--seq_len", "1024", "--batch_size", "64", "--tokens", "1e9")
    days = {}
    for steps in ("0", "100"):
        status, out, _ = call("plan", *two_machines, *more, "--diloco_steps", steps)
        assert status == 0
        days[steps] = float(table(out)[0][-1])
    assert layouts(out) == [(2, 1, 1, 1)]  # each trains a whole model alone
    assert days["100"] < days["0"] / 5


@pytest.mark.parametrize(
    ("more", "launcher"),
    [
        (("--gpus", "64"), "torchrun --nproc_per_node 8 --nnodes 8"),
        (("--gpus", "4", "--gpu", "b200", "--batch_size", "1"), "torchrun --nproc_per_node 4 train"),
        (("--gpus", "1", "--gpu", "b200", "--memory", "400"), "python train"),
        (("--gpus", "4", "--gpus_per_host", "2", "--memory", "400", "--diloco_steps", "50"), "--nnodes 2"),
    ],
)
def test_the_command_it_tells_trains_in_the_first_layout(call, more, launcher):
    status, out, err = call("plan", *LLAMA, *more)
    assert status == 0, err
    command = out.partition("the first begins by: ")[2].strip()
    assert launcher in command
    asked = command_line.parse(Pretrain, "", command.partition("train_pretrain.py ")[2].split())
    replicate, shard, cp, tp = layouts(out)[0]
    assert (int(asked.shard), asked.context_parallel, asked.tensor_parallel) == (shard, cp, tp)
    assert asked.batch_size % (asked.micro_batch_size * replicate * shard) == 0
    words = table(out)[0]
    assert (str(asked.micro_batch_size), "yes" if asked.checkpoint_activations else "no") == (words[7], words[8])
    assert asked.steps == math.ceil(20 * 8_030_261_248 / (asked.batch_size * 8192))
    assert f"G tokens are {asked.steps:,} steps\n" in out
    assert asked.diloco_steps == (50 if "--diloco_steps" in more else 0)


def test_a_measured_speed_takes_the_place_of_the_assumed(call, home):
    flops = 57_914_449_920
    measured = {"device": "NVIDIA H100 80GB HBM3, power limit 700.00 W, torch 2.14.1", "dtype": "bfloat16"}
    measured |= {"flops_per_token": flops}
    measured["tokens_per_s"] = {"plain PyTorch": 9999.0, "minillm": 5000.0, "minillm, compiled": 6000.0}

    def planned(**changes):
        (home.path / "speed.json").write_text(json.dumps(measured | changes))
        return call("plan", *LLAMA, "--gpus", "64", "--measured", "speed.json")

    _, out, _ = planned()
    assert f"of which {6000 * flops / 989e12:.1%} are reached (measured)" in out and "6,000" in out
    for changes, said in (
        (dict(device="NVIDIA H200, torch 2.14.1"), "tells nothing of --gpu h100"),
        (dict(dtype="float32"), "tells nothing of --gpu h100 in bfloat16"),
        (dict(tokens_per_s={"plain PyTorch": 1.0}), "holds no speed of minillm"),
        (dict(tokens_per_s={"minillm": 1e9}), "times the peak of --gpu h100"),
        (dict(tokens_per_s={"minillm": "fast"}), "minillm is 'fast', not"),
    ):
        status, _, err = planned(**changes)
        assert status and said in err, err
    status, _, err = call("plan", *LLAMA, "--measured", "speed.json", "--efficiency", "0.5")
    assert status and "--measured gives it already" in err


def test_bench_train_writes_what_is_read(tmp_path, monkeypatch, capsys):
    small = preset("tiny", vocab_size=40, dim=16, n_layers=1, ffn_dim=32, n_heads=2, n_kv_heads=1)
    monkeypatch.setattr(train.shapes, "preset", lambda name, **changes: small)
    monkeypatch.setattr(train.Sides, "_on_cpu", lambda self: {})
    train.run(train.Config(device="cpu", rows=2, seq_len=8, vocab_size=40, json=str(tmp_path / "speed.json")))
    written = json.loads((tmp_path / "speed.json").read_text())
    shown = capsys.readouterr().out
    assert f"{written['tokens_per_s']['minillm']:,.0f} tok/s" in shown and written["dtype"] == "float32"
    for name in ("device", "flops_per_token", "tokens_per_s"):
        assert name in written


def test_the_page_lists_the_gpus_as_they_are():
    page = (Path(__file__).parents[3] / "docs" / "en" / "plan.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == plan.GPUS.keys()
    for name in plan.GPUS:
        gpu = plan.gpu_of(plan.Config(preset="8b", gpu=name))
        numbers = [float(cell.replace(",", "")) for cell in rows[name].split("|")]
        assert numbers == [gpu.peak / 1e12, gpu.memory / 1e9, gpu.link / 1e9, gpu.network / 1e9]
