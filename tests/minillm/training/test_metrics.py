import json
import sys

import pytest

from minillm.base.errors import UserError
from minillm.training.metrics import MetricsLog, TensorBoard


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
