import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from minillm.base.device import autocast, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import declared, value_type
from minillm.checkpoint import train_state
from minillm.distributed.ranks import Ranks
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.training import run
from minillm.training.config import TrainingConfig, schedule
from minillm.training.step import clip, seed_step
from train_pretrain import Config as Pretrain

CPU = torch.device("cpu")


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """Makes a run in tmp_path/out on one rank; its signal handlers and its lock are given back in the end."""
    made = []

    def make(**options) -> run.Run:
        cfg = dataclasses.replace(TrainingConfig(out=str(tmp_path / "out"), steps=10), **options)
        made.append(run.Run(cfg, Ranks(0, 1, CPU), {"data": "d"}))
        return made[-1]

    yield make
    for this in made:
        this.close()
        this.signals.restore()
        this.lock.release()


def test_a_step_s_dropout_depends_on_seed_step_and_rank_alone():
    def draw(*key):
        seed_step(*key)
        return torch.rand(4).tolist()

    keys = [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1), (0, 1, 2), (2**40, 2**40, 7)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)


def test_schedule_has_all_that_the_learning_rate_needs():
    from minillm.training.schedule import lr_at

    cfg = TrainingConfig(lr=0.5, steps=100, warmup_steps=10, min_lr_ratio=0.1)
    given = schedule(cfg)
    assert lr_at(0, **given) == pytest.approx(0.05) and lr_at(9, **given) == 0.5
    assert lr_at(100, **given) == pytest.approx(0.05)
    usual = [schedule(TrainingConfig(lr=0.5, steps=steps))["warmup"] for steps in (5, 20, 200, 2000)]
    assert usual == [0, 2, 20, 20]


def test_fingerprints_tell_apart_and_do_not_depend_on_the_order_of_keys():
    one = train_state.fingerprint({"a": 1, "b": [1.5, None]}, Path("x"))
    assert one == train_state.fingerprint({"b": [1.5, None], "a": 1}, Path("x")) and len(one) == 16
    assert (
        len({one, train_state.fingerprint({"a": 1}), train_state.fingerprint({"a": "1"}), train_state.fingerprint(1)})
        == 4
    )


def test_precision():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("float16", CPU) == torch.float16
    x = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (0.0, 5.0), (10.0, 5.0)])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_undoes_the_scale_and_returns_the_norm_of_before(limit, after, scaled):
    model = nn.Linear(2, 1, bias=False)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler.scale((model.weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert clip(model, [optimizer], scaler, limit) == pytest.approx(5.0)
    assert float(model.weight.grad.norm()) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("limit", [0.5, 4.9, 5.0, 5.0 + 1e-7, 5.1])
def test_clipping_is_torchs_bit_for_bit(limit):
    grads = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]])
    models = [nn.Linear(2, 1, bias=False) for _ in grads]
    for model, grad in zip(models, grads, strict=True):
        model.weight.grad = grad
    clip(models[0], [], torch.amp.GradScaler("cpu", enabled=False), limit)
    nn.utils.clip_grad_norm_(models[1].parameters(), limit)
    assert torch.equal(*grads)


def test_options_that_mean_nothing_are_listed_together():
    TrainingConfig()
    with pytest.raises(UserError) as refusal:
        TrainingConfig(lr=math.nan, seed=-1, timeout_s=0.5)
    assert [part.split(":")[0] for part in str(refusal.value).split("; ")] == [
        "--seed -1",
        "--lr nan",
        "--timeout_s 0.5",
    ]


def test_every_number_has_a_range_or_choices():
    from train_sft import Config as Sft

    for script in (Pretrain, Sft):
        hints = typing.get_type_hints(script)
        for name, its in declared(script).items():
            if value_type(hints[name])[0] in (int, float):
                assert its.limits() or its.choices, name


def test_when_something_is_due(new_run):
    this = new_run()
    assert [step for step in range(1, 11) if this.due(step, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if this.due(step, 0)] == [10]


def test_bad_steps_are_counted_in_a_row(new_run, capsys):
    this = new_run(max_bad_steps=3)
    assert this.check_finite(1, 2.0, 1.0)
    assert not this.check_finite(2, math.nan, 1.0) and not this.check_finite(3, 2.0, math.inf)
    assert this.check_finite(4, 2.0, 1.0)
    assert not this.check_finite(5, -math.inf, 1.0) and not this.check_finite(6, math.nan, 1.0)
    with pytest.raises(UserError, match="step 7: 3 steps in a row were not finite; lower --lr"):
        this.check_finite(7, math.nan, math.nan)
    assert "step 3: loss 2.0, gradient norm inf: not applied (2 in a row)" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "remedy"), [([], "begin again"), ([2, 4], "--resume .*step-00000002")])
def test_a_run_that_diverged_names_a_checkpoint_if_it_has_one(new_run, steps, remedy):
    this = new_run(max_bad_steps=1)
    for step in steps:
        (this.folder / f"step-{step:08d}").mkdir()
    with pytest.raises(UserError, match=remedy):
        this.check_finite(5, math.nan, math.nan)


def test_rows_of_metrics(new_run, tmp_path):
    this = new_run()
    this.finish_step({"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": math.inf}, speed=100.0, peak=1e6, flops=1000)
    (row,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert row["mfu"] == pytest.approx(0.1) and row["grad_norm"] is None and row["tokens_per_s"] == 100.0
    assert 0 <= row["time_s"] < 60


def test_the_time_left_is_that_of_steps_after_the_first(new_run, monkeypatch):
    now, shown = [100.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    this = new_run(steps=10)
    monkeypatch.setattr(this.progress, "show", lambda step, row, left_s: shown.append(left_s))
    now[0] += 50.0  # loading
    this.restore(nn.Linear(1, 1), [], torch.amp.GradScaler("cpu", enabled=False))
    for step, took in ((1, 7.0), (2, 1.0), (3, 2.0)):
        now[0] += took
        this.finish_step({"step": step, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}, 100.0, None, 1000)
    assert shown == [None, 1.0 * 8, 1.5 * 7]
    this.close()
    now[0] += 90.0  # questions, drawing
    assert this.took == 10.0


def test_a_disk_too_small_is_said_with_what_will_be_needed(new_run, monkeypatch):
    from minillm.base import files
    from minillm.model.transformer import Transformer

    model = Transformer(ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, max_seq_len=8))
    asked = []
    monkeypatch.setattr(
        files, "check_writable", lambda folder, needed, largest_file: asked.append((needed, largest_file))
    )
    new_run(keep_last=2).check_disk(model)
    size = 4 * n_parameters(model.config)
    assert asked == [(3 * 3 * size, 2 * size)]


def test_steps_are_awaited_from_restoring_to_closing(new_run):
    this = new_run()
    assert this.watchdog.since == math.inf  # loading
    this.restore(nn.Linear(1, 1), [], torch.amp.GradScaler("cpu", enabled=False))
    assert this.watchdog.since < math.inf
    this.close()
    assert this.watchdog.since == math.inf  # drawing, answering questions


def test_a_measurement_is_taken_once_and_read_by_a_run_that_goes_on(new_run):
    this = new_run()
    (this.folder / "before.json").write_text("17")  # left by an earlier start that saved nothing
    assert this.once("before.json", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    this.source = this.folder / "step-00000001"
    assert this.once("before.json", lambda: 1 / 0) == {"a": [1, 2]}
    assert this.once("never.json", lambda: 1 / 0) is None
