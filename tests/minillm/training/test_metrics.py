import json
import math
import sys
from types import SimpleNamespace

import pytest

from minillm.base.errors import UserError
from minillm.training.metrics import MetricsLog, TensorBoard, WeightsAndBiases


def test_metrics_rows_beyond_the_resumed_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
        log.write({"step": step, "val_loss": float("nan")})
    assert len(path.read_text().splitlines()) == 10  # on the disk without closing
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(path, 3)
    log.write({"step": 4, "loss": 0.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4]
    assert rows[1]["val_loss"] is None and rows[4]["loss"] == 1 / 3
    MetricsLog(path, 0)
    assert path.read_text() == "" and len(list(tmp_path.iterdir())) == 1


def test_tensorboard_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -e .*\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_steps_that_a_killed_run_repeats_are_on_the_board_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, last in ((0, 5), (2, 6)):  # killed after step 5, its newest checkpoint that of step 2
        board = TensorBoard(tmp_path, done)
        for step in range(done + 1, last + 1):
            board.write({"step": step, "loss": 10 * done + step, "mfu": None})
        board.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25), (6, 26)]


class FakeRun:
    """What is called of a run of Weights & Biases."""

    def __init__(self, given: dict, starting_step: int):
        self.given = given
        self.id = given["id"] or f"new-{starting_step}"
        self.starting_step = starting_step
        self.sent, self.options, self.is_finished = [], {}, False
        self.config = SimpleNamespace(update=self.update)

    def update(self, options: dict, allow_val_change: bool) -> None:
        assert allow_val_change  # else a resumed run with another value is refused
        self.options = options

    def log(self, values: dict, step: int) -> None:
        assert not self.sent or step >= self.sent[-1][0]
        self.sent.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A package `wandb` that keeps its runs in a list."""
    fake = SimpleNamespace(runs=[], starting_step=0, Settings=lambda **how: how)

    def init(**given) -> FakeRun:
        fake.runs.append(FakeRun(given, fake.starting_step))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_is_an_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e .*\[wandb\]"):
        WeightsAndBiases("mine", tmp_path, {}, None, print)


def test_weights_and_biases_gets_each_value_at_its_step_once(wandb, tmp_path):
    log = WeightsAndBiases("mine", tmp_path, {"lr": 0.1}, None, print)
    log.write({"step": 1, "loss": 2.0, "mfu": None})
    log.write({"step": 1, "val_loss": math.nan})
    log.finish()
    (run,) = wandb.runs
    assert run.given["project"] == "mine" and run.given["name"] == tmp_path.name and run.given["resume"] == "allow"
    assert run.given["settings"]["finish_timeout"] == run.given["settings"]["init_timeout"] > 0
    assert (run.given["dir"] / "wandb").is_dir() and run.options == {"lr": 0.1} and run.is_finished
    assert run.sent[0] == (1, {"loss": 2.0}) and math.isnan(run.sent[1][1]["val_loss"]) and run.sent[1][0] == 1

    wandb.starting_step = 6  # killed after step 5, and goes on from the checkpoint of step 3
    log = WeightsAndBiases("mine", tmp_path, {}, "an-id", print)
    for step in range(4, 8):
        log.write({"step": step, "loss": 1.0})
    assert wandb.runs[1].given["id"] == "an-id" and [step for step, _ in wandb.runs[1].sent] == [6, 7]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_fails_there_is_said_once_and_ends_nothing(wandb, tmp_path, monkeypatch, where):
    def fail(*given, **named):
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb if where == "init" else FakeRun, where, fail)
    said = []
    log = WeightsAndBiases("mine", tmp_path, {}, None, said.append)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0})
    log.finish()
    log.finish()
    assert said == ["--wandb: no network; the run goes on and logs to metrics.jsonl alone"] and log.run is None
