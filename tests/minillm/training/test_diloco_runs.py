"""Runs whose ranks train alone between exchanges: beside the same in one process, stopped and resumed, and refused."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.checkpoint import huggingface
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows
from minillm.distributed.ranks import Ranks
from minillm.model.transformer import Transformer
from minillm.training.optim import build_optimizers
from minillm.training.schedule import Schedule, lr_at, set_lr
from minillm.training.step import TrainState
from tests import launch
from tests.test_train_sft import OPTIONS as SFT_OPTIONS
from tests.test_train_sft import write_instructions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus in data/."""
    here = tmp_path_factory.mktemp("diloco")
    launch.write_corpus(here / "data")
    return here


def options(folder: Path, out: str, more: str) -> str:
    return f"--data {folder}/data --out {folder}/{out} {launch.SMALL} --micro_batch_size 4 {more}"


def train(folder: Path, out: str, more: str, ranks: int = 2, **how) -> str:
    return launch.finish("pretrain", options(folder, out, more), folder / "log" / out, ranks, **how)


def test_the_weights_are_the_mean_of_workers_that_trained_alone(folder):
    """One exchange, at an outer rate of 1 without momentum, beside two models trained in this process."""
    more = "--steps 3 --diloco_steps 3 --diloco_lr 1 --diloco_momentum 0 --optimizer adamw"
    train(folder, "mean", more)
    checkpoint = folder / "mean" / "step-00000003"
    shape = huggingface.load_config(checkpoint)
    windows = TokenWindows([(TokenBins(folder / "data", "train"), 1.0)], 32, seed=0, documents=False)
    schedule = Schedule(lr=2e-3, steps=3, warmup=4, shape="cosine", min_ratio=0.1, decay=0.2)

    weights = []
    for worker in range(2):
        model = Transformer(shape)
        model.init_weights(0)
        optimizers = build_optimizers(model, "adamw", lr=2e-3, weight_decay=0.1)
        state = TrainState(model, optimizers, Ranks(0, 1, CPU), torch.float32)
        for step in range(3):
            set_lr(optimizers, lr_at(step, schedule))
            (positions,) = Ranks(worker, 2, CPU).micro_batches(step, 8, 4)
            batch = windows.batch(positions)
            loss = model(batch.x, batch.y, mask=batch.mask)
            state.backward(loss, batch.n_targets())
            state.update(1.0)
        weights.append(dict(model.named_parameters()))

    trained = dict(huggingface.load_model(checkpoint).named_parameters())
    for name, weight in trained.items():
        expected = (weights[0][name] + weights[1][name]) / 2
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weight, weights[0][name], rtol=1e-4, atol=1e-6)  # one worker is not the mean


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopped_and_resumed_is_bit_for_bit_the_run_never_stopped(folder, optimizer):
    """A signal in the middle of a round waits for its end; each worker goes on with moments of its own."""
    more = f"--steps 24 --diloco_steps 4 --optimizer {optimizer} --dropout 0.1"
    straight, broken = folder / f"straight-{optimizer}", folder / f"broken-{optimizer}"
    train(folder, straight.name, more)

    processes = launch.start("pretrain", options(folder, broken.name, more), folder / "log" / broken.name, 2)
    processes[0].wait_for("step 1/")
    processes[1].kill(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    (step,) = launch.steps(broken)
    assert step % 4 == 0 and step < 24
    train(folder, broken.name, more)

    files = ("model", "resume/outer", "resume/workers")
    for name in files:
        ends = [(run / "step-00000024" / f"{name}.safetensors").read_bytes() for run in (straight, broken)]
        assert ends[0] == ends[1], name
    assert launch.losses(broken) == launch.losses(straight)
    moments = load_file(straight / "step-00000024" / "resume" / "workers.safetensors")
    assert all(len(tensor) == 2 for tensor in moments.values())
    momentum = next(tensor for name, tensor in moments.items() if name.endswith(("exp_avg", "momentum_buffer")))
    assert not torch.equal(momentum[0], momentum[1])


def test_saving_and_validation_wait_for_an_exchange(folder):
    """In the background, too: then a checkpoint is given its name at a later exchange, or at the end."""
    more = "--steps 14 --diloco_steps 5 --save_every 3 --eval_every 7 --keep_last 0 --save_in_background true"
    train(folder, "due", more)
    assert launch.steps(folder / "due") == [5, 10, 14]
    scored = [row["step"] for row in launch.rows(folder / "due") if "val_loss" in row]
    assert scored == [10, 14]
    for step in (5, 10):
        outer = load_file(folder / "due" / f"step-{step:08d}" / "resume" / "outer.safetensors")
        assert all(tensor.any() for tensor in outer.values())


def test_what_does_not_fit_is_refused(folder):
    more = "--steps 4 --diloco_steps 2"
    assert "float16" in train(folder, "refused", f"{more} --dtype float16", status=2)
    train(folder, "two", more)
    said = train(folder, "two", "--steps 8 --diloco_steps 2", ranks=1, status=2)
    assert "1 rank(s): the checkpoint holds an optimizer for each of 2 workers" in said
    said = train(folder, "two", "--steps 8", status=2)
    assert "--diloco_steps 0: the checkpoint was made with 2" in said


def test_instructions_are_learned_by_adapters_of_workers(folder):
    """LoRA; 2 epochs of 58 rows are 14 batches of 8 and one of 4, of which rank 1 has none."""
    train(folder, "base", "--steps 2 --max_seq_len 128", ranks=1)
    write_instructions(folder / "train.jsonl", 58)
    more = f"--data {folder}/train.jsonl --init_from {folder}/base --out {folder}/sft {SFT_OPTIONS}"
    more += " --tune lora --packing false --epochs 2 --diloco_steps 3 --weight_decay 0.1"
    launch.finish("sft", more, folder / "log" / "sft", 2)
    (row,) = [row for row in launch.rows(folder / "sft") if row["step"] == 15 and "loss" in row]
    assert row["loss"] > 0
    checkpoint = folder / "sft" / "step-00000015"
    trained = load_file(checkpoint / "adapter_model.safetensors")
    outer = load_file(checkpoint / "resume" / "outer.safetensors")
    assert trained and len(outer) == len(trained) and all(torch.isfinite(t).all() for t in trained.values())
