import json

import pytest
import torch

from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks
from minillm.training.config import TrainingConfig
from minillm.training.progress import StepProfiler, steps_to_record


def profiled(folder, asked, steps, end=None):
    """What is said in these steps of a run of 20, of which each has one op of its own; end: by a signal after it."""
    said = []
    profiler = StepProfiler(
        TrainingConfig(out=str(folder), steps=20, profile=asked), Ranks(0, 1, torch.device("cpu")), said.append
    )
    for step in steps:
        profiler.before(step)
        getattr(torch.zeros(3), ["exp", "sin", "cos", "tan", "sqrt"][step % 5])()
        profiler.after(step)
        if step == end:
            profiler.after(step, is_end=True)
    return said


def recorded(file):
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    return names & {"aten::exp", "aten::sin", "aten::cos", "aten::tan", "aten::sqrt"}


def test_the_steps_that_are_named_are_recorded_and_no_others(tmp_path):
    table, line = profiled(tmp_path, "6:7", range(4, 10))
    assert "aten::sin" in table and "aten::cos" in table and "aten::tan" not in table
    assert line.startswith(f"{tmp_path}/profile-6-7.json: steps 6 to 7")
    assert recorded(tmp_path / "profile-6-7.json") == {"aten::sin", "aten::cos"}


def test_a_run_that_begins_or_ends_between_records_what_it_does(tmp_path):
    profiled(tmp_path, "5:8", range(7, 12))  # resumed after step 6
    assert recorded(tmp_path / "profile-7-8.json") == {"aten::cos", "aten::tan"}
    profiled(tmp_path, "10:18", range(9, 12), end=11)  # stopped by a signal
    assert recorded(tmp_path / "profile-10-11.json") == {"aten::exp", "aten::sin"}


def test_steps_that_were_done_before_are_said_once_and_without_the_option_nothing_is(tmp_path):
    (line,) = profiled(tmp_path, "2:3", range(7, 12))
    assert "steps 2 to 3 were done before" in line
    assert profiled(tmp_path, None, range(1, 12)) == [] == list(tmp_path.iterdir())


def test_a_recording_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    table, line = profiled(tmp_path, "6:7", range(4, 10))
    assert "aten::sin" in table and "could not be written ([Errno 28] No space left on device)" in line


@pytest.mark.parametrize("asked", ["", "3", "3:", ":3", "0:3", "5:3", "a:b", "3:21", "-1:3", "3:4:5"])
def test_what_names_no_steps_of_the_run_is_refused(asked):
    with pytest.raises(UserError, match=f"--profile {asked}: expected FIRST:LAST, .* steps of the run's 20"):
        steps_to_record(asked, 20)
