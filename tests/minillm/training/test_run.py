import dataclasses
import datetime
import json
import math
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
import train_sft
from minillm.base.command_line import parse
from minillm.base.device import autocast, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import declared, value_type, write_toml
from minillm.base.process import RunLock, run_script
from minillm.checkpoint import train_state
from minillm.datasets.batch import Batch
from minillm.distributed.ranks import Ranks
from minillm.distributed.watchdog import LOADING
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.tokenizer import jinja_template
from minillm.training import out_folder, run
from minillm.training.config import TrainingConfig, listed_files
from minillm.training.step import TrainState

CPU = torch.device("cpu")
SCRIPTS = [train_pretrain, train_sft, train_reward, train_dpo, train_ppo, train_grpo]


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """Makes a run in tmp_path/out on one rank; its signal handlers and its lock are given back in the end."""
    made = []

    def make(logs=(), **options) -> run.Run:
        cfg = dataclasses.replace(TrainingConfig(out=str(tmp_path / "out"), steps=10), **options)
        made.append(run.Run(cfg, Ranks(0, 1, CPU), {"data": "d"}, logs=logs))
        return made[-1]

    yield make
    for one in made:
        one.close()
        one.signals.restore()
        one.out.lock.release()


def new_state(model: nn.Module, loss: float = 2.0, grad_norm: float = 1.0) -> TrainState:
    """The state after a step with this loss and gradient norm, of a model without optimizers."""
    state = TrainState(model, [], Ranks(0, 1, CPU), torch.float32)
    state.loss, state.grad_norm = loss, grad_norm
    state.applied = math.isfinite(loss) and math.isfinite(grad_norm)
    return state


@pytest.fixture
def state() -> TrainState:
    """Of a model of the smallest size."""
    return new_state(Transformer(ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, max_seq_len=8)))


def test_fingerprints_tell_apart_and_do_not_depend_on_the_order_of_keys():
    one = train_state.fingerprint({"a": 1, "b": [1.5, None]}, Path("x"))
    assert one == train_state.fingerprint({"b": [1.5, None], "a": 1}, Path("x")) and len(one) == 16
    assert (
        len({one, train_state.fingerprint({"a": 1}), train_state.fingerprint({"a": "1"}), train_state.fingerprint(1)})
        == 4
    )


def test_templates_tell_the_day_on_which_a_run_began(new_run, tmp_path, monkeypatch):
    """Whenever it goes on; else its texts, their lengths and so their places in rows would change."""
    monkeypatch.setattr(jinja_template, "STARTED", datetime.datetime(2026, 1, 31, 23, 59))
    day = new_run()._describe(2)["day"]
    for name, text in ("step-00000001", "{"), ("step-00000002", json.dumps({"format": 1, "step": 2, "day": day})):
        (tmp_path / "out" / name / "resume").mkdir(parents=True)
        (tmp_path / "out" / name / "resume" / "train_state.json").write_text(text)
    for out, told in ("new", datetime.date.today()), ("out", datetime.date(2026, 1, 31)):
        run.begin(TrainingConfig(out=str(tmp_path / out), device="cpu"))[2]()
        assert jinja_template.strftime_now("%Y-%m-%d") == told.isoformat()


def test_precision():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("float16", CPU) == torch.float16
    x = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


def test_what_is_reported_is_measured_with_patience(new_run):
    """A validation may take longer than a step, and must not be taken for a rank that hangs."""
    one, seen = new_run(), []

    def measure() -> dict[str, float]:
        seen.append(one.watchdog.patience)
        return {"val_loss": 1.0}

    assert one.report(3, measure, of="held-out answers") == {"val_loss": 1.0}
    assert seen == [LOADING] and one.watchdog.patience == 1
    assert '"val_loss": 1.0' in (one.folder / "metrics.jsonl").read_text()


def test_options_that_mean_nothing_are_listed_together():
    TrainingConfig()
    with pytest.raises(UserError) as refusal:
        TrainingConfig(lr=math.nan, seed=-1, timeout_s=0.5)
    assert [part.split(":")[0] for part in str(refusal.value).split("; ")] == [
        "--seed -1",
        "--lr nan",
        "--timeout_s 0.5",
    ]


NO_DECAY, OWN = "--schedule constant", "--data mine.jsonl"


@pytest.mark.parametrize(
    ("script", "given", "said"),
    [
        *((script, f"{NO_DECAY} --min_lr_ratio 0.5", "--min_lr_ratio 0.5: means nothing with") for script in SCRIPTS),
        *((script, f"{NO_DECAY} --decay_share 0.5", "--decay_share 0.5: means nothing with") for script in SCRIPTS),
        (train_sft, "--diloco_lr 0.1", "--diloco_lr 0.1: means nothing with --diloco_steps 0"),
        (train_pretrain, "--diloco_momentum 0", "--diloco_momentum 0.0: means nothing with --diloco_steps 0"),
        *(
            (script, f"{OWN} --eval_rows 7", "--eval_rows 7: means nothing without --eval_data")
            for script in SCRIPTS[1:]
        ),
        *((script, f"{OWN} --eval_tokens 7", "--eval_tokens 7: means nothing without") for script in SCRIPTS[1:]),
        *((script, f"{OWN} --eval_every 7", "--eval_every 7: means nothing without --eval_") for script in SCRIPTS[1:]),
        *(
            (script, f"{OWN} --eval_prompt_rows 7", "--eval_prompt_rows 7: means nothing without")
            for script in SCRIPTS[4:]
        ),
        (train_ppo, "--beta 0 --target_kl 3", "--target_kl 3.0: means nothing with --beta 0.0"),
        (train_ppo, "--kl_horizon 3", "--kl_horizon 3: means nothing with --target_kl none"),
        (train_ppo, "--reward_model none --normalize_reward false", "--normalize_reward false: means nothing with"),
        (train_ppo, f"{OWN} --reward_time_s 3", "--reward_time_s 3.0: means nothing without"),
        (train_ppo, "--stop_at_kl 3", "--stop_at_kl 3.0: means nothing without several --updates"),
        (train_grpo, "--optimum_prompts 0 --optimum_answers 3", "--optimum_answers 3: means nothing with"),
    ],
)
def test_options_that_nothing_reads_are_refused(script, given, said):
    with pytest.raises(UserError) as refusal:
        parse(script.Config, "", given.split())
    assert said in str(refusal.value) and "leave it out" in str(refusal.value)


@pytest.mark.parametrize(
    ("script", "given"),
    [
        *((script, words) for script in SCRIPTS for words in ("", NO_DECAY, "--schedule wsd --decay_share 0.5")),
        *((script, f"{OWN} --eval_every 0") for script in SCRIPTS),
        (train_sft, f"{OWN} --eval_tasks arc_easy --eval_every 7"),
        (train_sft, f"{OWN} --eval_data h.jsonl --eval_every 7 --eval_rows 7 --eval_tokens 7"),
        (train_dpo, f"{OWN} --eval_pairs h.jsonl --eval_every 7"),
        (train_ppo, f"{OWN} --reward number --eval_prompts h.jsonl --eval_every 7 --eval_prompt_rows 7"),
        (train_ppo, "--target_kl 3 --kl_horizon 3"),
        (train_sft, "--diloco_steps 3 --diloco_lr 0.1 --diloco_momentum 0"),
    ],
)
def test_what_a_run_writes_down_is_read_back_whatever_has_a_meaning(script, given, tmp_path):
    if script is train_ppo and OWN in given and "--reward " not in given:
        given += " --reward number"  # or nothing would say what an answer is worth in truth
    config = parse(script.Config, "", given.split())
    write_toml(config, tmp_path / "options.toml")
    assert parse(script.Config, "", ["--config", str(tmp_path / "options.toml")]) == config


def test_every_number_has_a_range_or_choices():
    for script in SCRIPTS:
        hints = typing.get_type_hints(script.Config)
        for name, its in declared(script.Config).items():
            if value_type(hints[name])[0] in (int, float):
                assert its.limits() or its.choices, name


def test_when_something_is_due(new_run):
    one = new_run()
    assert [step for step in range(1, 11) if one.due(step, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if one.due(step, 0)] == [10]


def test_bad_steps_are_counted_in_a_row(new_run, state, capsys):
    one = new_run(max_bad_steps=3)

    def step(number: int, loss: float, grad_norm: float) -> int:
        one.step = number
        one.log_step(new_state(state.model, loss, grad_norm), n_tokens=1)
        if one.bad_steps.problem:
            one.bad_steps.end_run(one.folder)
        return one.bad_steps.in_a_row

    assert step(1, 2.0, 1.0) == 0
    assert step(2, math.nan, 1.0) == 1 and step(3, 2.0, math.inf) == 2
    assert step(4, 2.0, 1.0) == 0
    assert step(5, -math.inf, 1.0) == 1 and step(6, math.nan, 1.0) == 2
    with pytest.raises(UserError, match="step 7: 3 steps in a row were not finite; lower --lr"):
        step(7, math.nan, math.nan)
    assert "step 3: loss 2.0, gradient norm inf: not applied (2 in a row)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "remedy"), [([], "begin again"), ([2, 4], "copy .*step-00000002 into another --out")]
)
def test_a_run_that_diverged_names_a_checkpoint_if_it_has_one(new_run, state, steps, remedy):
    one = new_run(max_bad_steps=1)
    for step in steps:
        (one.folder / f"step-{step:08d}").mkdir()
    one.step = 5
    one.log_step(new_state(state.model, math.nan, math.nan), n_tokens=1)
    with pytest.raises(UserError, match=remedy):
        one.bad_steps.end_run(one.folder)


def test_rows_of_metrics(new_run, state, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    one = new_run(lr=0.1)
    one.flops, one.peak = 1000, 1e6
    for _ in one.steps(state):
        now[0] += 2.0
        state.grad_norm = math.inf
        one.log_step(state, n_tokens=200)
        break
    (row,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert row["mfu"] == pytest.approx(0.1) and row["grad_norm"] is None and row["tokens_per_s"] == 100.0
    assert row["step"] == 1 and row["loss"] == 2.0 and row["lr"] == 0.1
    assert 0 <= row["time_s"] < 60


def test_one_short_step_changes_the_mfu_of_no_other(new_run, state, tmp_path, monkeypatch):
    """Not even one that reaches more than the peak."""
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    one = new_run(lr=0.1)
    one.flops, one.peak = 1000, 75e3
    for step, took in ((1, 2.0), (2, 1.0), (3, 4.0)):
        one.step, one.step_begun = step, now[0]
        now[0] += took
        one.log_step(state, n_tokens=100)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mfu"] for row in rows] == pytest.approx([50 / 75, 100 / 75, 25 / 75])


def test_attention_is_counted_inside_documents(new_run, state, tmp_path):
    one = new_run()
    one.flops, one.peak = run.starting_model.flops_per_token(state.model, 8), 1e9
    documents = torch.tensor([[1, 1, 1, 2, 3, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5]], dtype=torch.int32)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    of_rows = Batch(tokens, tokens)
    for step, batches in enumerate(([of_rows], [of_rows._replace(documents=documents)]), 1):
        one.step = step
        one.log_step(state, 100, batches)
    whole, inside = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    a_token = 12 * 8  # 12 L H D
    span = (9 + 1 + 16 + 64) / 16
    flops = [row["mfu"] * 1e9 / row["tokens_per_s"] for row in (whole, inside)]
    assert flops[0] - flops[1] == pytest.approx(a_token * (8 - span))


@pytest.fixture
def seven_threads():
    """torch computes on seven threads; in the end on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("recorded", "changes", "environment", "taken", "words"),
    [
        (3, {}, {}, 3, "threads: 3 of 7, as in the checkpoint; OMP_NUM_THREADS=7 would take all"),
        (7, {}, {}, 7, ""),
        (9, {}, {}, 7, "threads: 9 in the checkpoint, 7 now; results agree to rounding, not bit for bit"),
        (3, {}, {"OMP_NUM_THREADS": "7"}, 7, "threads: 3 in the checkpoint, 7 now; results agree"),
        (3, {"world": 2}, {}, 7, "threads: 3 in the checkpoint, 7 now; results agree"),
        (-1, {}, {}, 7, "threads: -1 in the checkpoint, 7 now"),
    ],
)
def test_a_run_goes_on_with_the_threads_it_began_with(
    new_run, state, seven_threads, monkeypatch, capsys, recorded, changes, environment, taken, words
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    one = new_run()
    one.step = 5
    save_state(one, state, threads=recorded, **changes)
    capsys.readouterr()
    one.out.lock.release()
    new_run()
    assert torch.get_num_threads() == taken
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("threads")]
    assert words in "\n".join(told) and bool(told) == bool(words)


def save_state(one: run.Run, state: TrainState, **changes) -> None:
    """A checkpoint of the run's step, its state changed in these values."""
    describe = one._describe
    one._describe = lambda step: describe(step) | changes
    one.save(state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, "device: cuda in the checkpoint, cpu now; results agree to rounding"),
        ({"precision": "bfloat16"}, "matrix products: bfloat16 in the checkpoint, float32 now; results agree"),
    ],
)
def test_what_auto_stands_for_is_compared_and_not_the_word(new_run, state, capsys, changes, words):
    one = new_run()
    one.step = 5
    save_state(one, state, **changes)
    one.out.lock.release()
    new_run()
    assert words in capsys.readouterr().out


def test_a_lengthened_run_says_what_its_rate_will_do(new_run, state, capsys):
    one = new_run(lr=0.1)
    one.step = 10
    one.save(state)
    one.out.lock.release()
    new_run(lr=0.1).out.lock.release()
    assert "learning rate" not in capsys.readouterr().out
    one = new_run(lr=0.1, steps=20)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learning rate")]
    assert line.startswith("learning rate: 1.27e-02 in step 10, now 6.28e-02 in step 11, then 1.07e-02 in step 20: 4")
    # that is what it does
    (first, *_, last) = [one.lr for _ in one.steps(state)]
    assert f"{first:.2e}" == "6.28e-02" and f"{last:.2e}" == "1.07e-02"


def test_the_time_left_is_that_of_steps_after_the_first(new_run, state, monkeypatch):
    now, shown = [100.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "peak_flops", lambda device, dtype: None)
    one = new_run(steps=10)
    monkeypatch.setattr(one.progress, "show", lambda step, row, left_s: shown.append(left_s))
    now[0] += 50.0  # loading
    one.start(state)
    for step, took in ((1, 7.0), (2, 1.0), (3, 2.0)):
        one.step, one.step_begun = step, now[0]
        now[0] += took
        one.log_step(state, n_tokens=100)
    assert shown == [None, 1.0 * 8, 1.5 * 7]
    one.close()
    now[0] += 90.0  # questions, drawing
    assert one.took == 10.0


def test_a_disk_too_small_is_said_with_what_will_be_needed(new_run, state, monkeypatch):
    from minillm.base import files

    asked = []
    monkeypatch.setattr(
        files, "check_writable", lambda folder, needed, largest_file: asked.append((needed, largest_file))
    )
    new_run(keep_last=2).start(state)
    size = 4 * n_parameters(state.model.config)
    assert asked == [(3 * 3 * size, 2 * size)]


def test_steps_are_awaited_from_the_start_to_closing(new_run, state):
    one = new_run()
    assert one.watchdog.since == math.inf  # loading
    one.start(state)
    assert one.watchdog.since < math.inf
    one.close()
    assert one.watchdog.since == math.inf  # drawing, answering questions


def test_a_measurement_is_taken_once_and_read_by_a_run_that_goes_on(new_run):
    one = new_run()
    (one.folder / "before.json").write_text("17")  # left by an earlier start that saved nothing
    assert one.baseline("before.json", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    one.source = one.folder / "step-00000001"
    assert one.baseline("before.json", lambda: 1 / 0) == {"a": [1, 2]}
    assert one.baseline("never.json", lambda: 1 / 0) == {}


def test_what_was_measured_on_other_questions_is_left_out_and_said(new_run, capsys):
    one = new_run()
    found = {"exact": {"all": [1, 2]}, "reward": 0.5, "spread": 3}
    assert one.baseline("before.json", lambda: found, {"exact": "a", "reward": "b"}) == found
    one.source = one.folder / "step-00000001"
    assert one.baseline("before.json", lambda: 1 / 0, {"exact": "a", "reward": "b"}) == found
    capsys.readouterr()
    assert one.baseline("before.json", lambda: 1 / 0, {"exact": "c"}) == {"spread": 3}
    assert "before.json: of other questions than now, and so not compared: exact, reward" in capsys.readouterr().out


def test_a_failing_curve_is_no_failing_run(new_run, monkeypatch):
    monkeypatch.setattr(run.plot, "draw", lambda *_: 1 / 0)
    assert new_run().draw() == "no curve: ZeroDivisionError: division by zero"


def test_an_out_in_which_no_run_can_be_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("a text")
    for out in (file, file / "run", file / "run" / "deeper"):
        with pytest.raises(UserError, match=f"--out {out}: {file} is a file; give a folder"):
            run.begin(TrainingConfig(out=str(out), device="cpu"))
    out_folder.check_out(tmp_path / "not" / "there")
    out_folder.check_out(tmp_path)
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"bins: holds token bins \(meta\.json\); choose another folder"):
        out_folder.check_out(tmp_path / "bins")
    monkeypatch.setattr(out_folder.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"nothing may be written into {tmp_path}; choose another"):
        out_folder.check_out(tmp_path / "not" / "there")


@pytest.mark.parametrize("name", ["eval_data", "eval_pairs", "replay_data"])
def test_files_to_look_at_that_are_not_there_are_refused_before_anything_is_read(name, tmp_path):
    here = tmp_path / "here.jsonl"
    here.write_text("{}")
    options = {name: f"{here},{tmp_path}/gone.jsonl", "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(UserError, match=f"--{name} {tmp_path}/gone.jsonl: no such file"):
        run.begin(train_dpo.Config(**options))


def test_files_of_the_bundled_corpus_need_not_be_there_if_it_will_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = "./data/bundled/sft_heldout.jsonl"
    run.check_files(train_sft.Config(eval_data=file))
    with pytest.raises(UserError, match=f"--eval_data {file}: is not written yet; run python data/bundled.py"):
        run.check_files(train_sft.Config(data="mine.jsonl", eval_data=file))


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_goes_with_the_bundled_data_does_so_however_their_path_is_written(script):
    usual, other = script.Config(), script.Config(data=f"./{script.Config.data}")
    for name in ("held_out", "held_out_pairs", "held_out_prompts", "true_reward", "replayed_data"):
        assert getattr(other, name, None) == getattr(usual, name, None), name


def test_files_are_listed_by_commas_unless_one_has_a_comma_in_its_name(tmp_path):
    both = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    assert listed_files(both) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    one = tmp_path / "a, b.jsonl"
    one.write_text("{}")
    assert listed_files(str(one)) == [str(one)]
    run.check_files(train_dpo.Config(eval_data=str(one), eval_pairs=str(one), replay_data=str(one)))
    with pytest.raises(UserError, match="--eval_data ,: names no file"):
        listed_files(",", "eval_data")


def test_the_place_of_a_lost_folder_may_be_taken(tmp_path):
    folder = out_folder.OutFolder(tmp_path / "out")
    folder.open_logs(0, tensorboard=False)
    folder.metrics.write({"step": 1, "loss": 2.0})
    assert not folder.make_again_if_lost(1)
    shutil.rmtree(tmp_path / "out")
    another = RunLock(tmp_path / "out")
    with pytest.raises(UserError, match="in use by process"):
        folder.make_again_if_lost(1)
    another.release()

    folder = out_folder.OutFolder(tmp_path / "out")
    folder.open_logs(0, tensorboard=False)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out" / "step-00000007").mkdir(parents=True)  # of a run that has ended meanwhile
    with pytest.raises(UserError, match="another run lies there now"):
        folder.make_again_if_lost(1)


class Rows(list):
    """A log of a script's own."""

    write = list.append
    is_finished = False

    def finish(self) -> None:
        self.is_finished = True


def test_a_log_of_ones_own_gets_each_row_also_when_the_folder_is_made_again(new_run, tmp_path):
    rows = Rows()
    one = new_run(logs=[rows])
    one.record(1, loss=2.0)
    shutil.rmtree(tmp_path / "out")
    assert one.out.make_again_if_lost(1)
    one.record(2, val_loss=3.0)
    one.took = 1.0
    one.print_result()
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 3.0}] and rows.is_finished
    assert [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()] == rows


def test_a_resumed_run_goes_on_with_its_run_at_weights_and_biases(new_run, tmp_path, monkeypatch):
    given = []

    class Log(Rows):
        def __init__(self, project, folder, options, run_id, say):
            given.append((project, options["lr"], run_id))
            self.run = SimpleNamespace(id=run_id or f"id-{len(given)}")

    monkeypatch.setattr(out_folder, "WeightsAndBiases", Log)
    one = new_run(wandb="mine", lr=0.5)
    one.record(1, loss=2.0)
    assert one.out.logs[-1] == [{"step": 1, "loss": 2.0}]
    for is_resumed in (True, False):  # a new run in the same folder, which had no checkpoint yet, is a new one there
        one.out.add_logs(one.training_config, (), is_resumed=is_resumed, log=print)
    assert given == [("mine", 0.5, None), ("mine", 0.5, "id-1"), ("mine", 0.5, None)]
    assert json.loads((tmp_path / "out" / "wandb.json").read_text()) == {"id": "id-3"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch_size": 8}, "to train, halve --micro_batch_size (8), set --checkpoint_activations true, lower"),
        ({"micro_batch_size": 1, "checkpoint_activations": True}, "to train, lower --seq_len, or choose a smaller"),
    ],
)
def test_a_lack_of_memory_names_what_helps(new_run, state, capsys, monkeypatch, options, words):
    def fail():
        raise MemoryError

    one = new_run(**options)
    monkeypatch.setattr(run.starting_model, "flops_per_token", lambda *_: 0)
    one.start(state)
    assert run_script(fail) == 2 and f"error: out of memory: {words}" in capsys.readouterr().err
    one.close()
    assert run_script(fail) == 2 and "micro_batch_size" not in capsys.readouterr().err


def trained_pair(seed: int) -> TrainState:
    """The state of a layer with another layer trained beside it, both with optimizers."""
    torch.manual_seed(seed)
    states = []
    for _ in range(2):
        layer = Transformer(ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, max_seq_len=8))
        layer.init_weights(seed)
        optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-2)]
        states.append(TrainState(layer, optimizers, Ranks(0, 1, CPU), torch.float32))
    states[0].beside["value"] = states[1]
    return states[0]


def one_step(state: TrainState, step: int) -> None:
    tokens = torch.arange(step, step + 8).view(1, 8)
    for each in (state, state.beside["value"]):
        each.backward(each.model(tokens, tokens + 1), 8)
        each.update(1.0)


def test_a_model_trained_beside_another_is_kept_with_its_optimizer(new_run, tmp_path):
    straight = trained_pair(0)
    with_run = trained_pair(0)
    first = new_run()
    first.start(with_run)
    for step in (1, 2):
        one_step(with_run, step)
        one_step(straight, step)
    first.step = 2
    first.save(with_run)
    first.close()
    first.out.lock.release()

    # another process goes on
    second = new_run()
    resumed = trained_pair(1)
    assert second.start_step == 2
    weights = tmp_path / "out/step-00000002/model.safetensors"
    resumed.model.load_state_dict(with_run.model.state_dict())  # as `make_model` does
    assert weights.exists()
    second.start(resumed)
    one_step(straight, 3)
    one_step(resumed, 3)
    for name, parameter in straight.all_parameters().items():
        assert torch.equal(parameter, resumed.all_parameters()[name]), name


def test_a_model_beside_another_that_is_damaged_is_refused(new_run, tmp_path):
    state = trained_pair(0)
    first = new_run()
    first.start(state)
    one_step(state, 1)
    first.step = 1
    first.save(state)
    state.beside["value"].model = nn.Linear(2, 2)
    first.source = tmp_path / "out/step-00000001"
    with pytest.raises(UserError, match=r"value\.safetensors"):
        first.start(state)
    state.beside["value"].model.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        first.save(state)


def test_a_step_counts_as_bad_if_a_model_beside_took_none(new_run):
    state = trained_pair(0)
    bad = new_run(max_bad_steps=1, lr=0.1)
    bad.start(state)
    with pytest.raises(UserError, match="1 steps in a row"):
        for step in bad.steps(state):
            one_step(state, step)
            state.beside["value"].applied = False
            bad.log_step(state, 8)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_a_step_counts_as_bad_if_any_of_its_updates_was_not_applied(new_run, capsys, name):
    state = trained_pair(0)
    bad = new_run(max_bad_steps=2)
    bad.start(state)
    bad.step = 1
    one_step(state, 1)
    sick = {"policy": state, **state.beside}[name]
    sick.backward(sum(p.sum() for p in sick.model.parameters()) * math.nan, 1)
    sick.update(1.0)
    one_step(state, 2)  # a later update that is finite does not hide it
    bad.log_step(state, 8)
    of = "" if name == "policy" else "value model: "
    assert (
        bad.bad_steps.in_a_row == 1
        and f"step 1: {of}loss nan, gradient norm nan: not applied" in capsys.readouterr().out
    )
    one_step(state, 3)
    bad.log_step(state, 8)
    assert bad.bad_steps.in_a_row == 0
