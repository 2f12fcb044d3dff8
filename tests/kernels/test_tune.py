"""The tuner without a GPU: what it tries, what it keeps, and that kernels take it."""

import json
import sys

import pytest
import torch

from kernels import tune
from kernels.attention import backward
from kernels.bench import measure, suite
from kernels.bench.case import Side
from kernels.shared import launch
from tests.kernels.bench.test_bench import SMALL, Clock, doubling


class Tuned:
    """An op whose time is known for each of its settings: best at BLOCK 256, 2 warps."""

    def __init__(self, monkeypatch, best: tuple[int, int] = (256, 2)):
        self.clock, self.seen, self.best = Clock(monkeypatch), [], best

    def load(self):
        def run(x):
            shipped = {"BLOCK": 64, "num_warps": 4, "EVEN": True}
            chosen = launch.settings("double", (2, torch.float32), x.device, shipped)
            self.seen.append(chosen)
            if chosen["BLOCK"] > 256:
                raise ValueError("too much shared memory\nby far")
            far = abs(chosen["BLOCK"].bit_length() - self.best[0].bit_length())
            self.clock.now += 1.0 + far + abs(chosen["num_warps"].bit_length() - self.best[1].bit_length())
            return x * (3 if chosen["num_warps"] == 1 else 2)  # one warp is wrong

        return run


def timer(run, times):
    return measure.timed(run, times, torch.empty(1))


def test_tuning_finds_the_fastest_right_settings(monkeypatch, capsys):
    case = doubling({"ours": Side(Tuned(monkeypatch).load)})
    found = tune.tune(case, timer, rounds=2, least_ms=1.0)
    assert found == {"double 2 torch.float32": {"BLOCK": 256, "num_warps": 2, "EVEN": True}}
    said = capsys.readouterr().out
    assert "left out, too much shared memory\n" in said and "left out, wrong: output 0 is off by 5.0e-01" in said
    assert launch.settings("double", (2,), SMALL.device, {"BLOCK": 1}) == {"BLOCK": 1}  # all is as before


def test_tuning_keeps_shipped_settings_that_are_best(monkeypatch):
    case = doubling({"ours": Side(Tuned(monkeypatch, best=(64, 4)).load)})
    assert tune.tune(case, timer, rounds=2, least_ms=1.0) == {"double 2 torch.float32": None}


def test_tuning_gives_up_after_some_candidates():
    seen = []

    def better_and_better(candidate):
        seen.append(candidate)
        return 1 / (1 + len(seen))

    tune.search({"A": 1 << 9, "B": 1 << 9, "num_stages": 3}, better_and_better, most=10)
    assert len(seen) == 10 and seen[0] == {"A": 256, "B": 512, "num_stages": 3}


def test_neighbours_stay_within_what_the_hardware_has():
    found = list(tune.neighbours({"num_warps": 32, "num_stages": 1, "ROWS": 1, "ODD": 3, "FLAG": True}))
    changed = [{k: v for k, v in n.items() if v != {"num_warps": 32, "num_stages": 1, "ROWS": 1, "ODD": 3}.get(k)}
               for n in found]  # fmt: skip
    assert [c | {"FLAG": None} for c in changed] == [
        {"num_warps": 16, "FLAG": None}, {"num_stages": 2, "FLAG": None}, {"ROWS": 2, "FLAG": None},
        {"ODD": 6, "FLAG": None},
    ]  # fmt: skip


def test_a_block_of_queries_is_never_larger_than_what_is_padded_for_it():
    """At 384 rows of padding, a block of 256 would read the second half of its log-sum-exps beyond the end."""
    found = [n["BLOCK_M"] for n in tune.neighbours({"BLOCK_M": backward.LARGEST_BLOCK})]
    assert found == [backward.LARGEST_BLOCK // 2]


def test_what_was_tuned_is_merged_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, machine = launch.tuned_file(), launch.machine(SMALL.device)
    tune.keep(path, "another GPU", {"a 1": {"BLOCK": 8}})
    tune.keep(path, machine, {"a 64": {"BLOCK": 16}, "b": {"BLOCK": 2}})
    tune.keep(path, machine, {"a 128": {"BLOCK": 32}, "b": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "another GPU": {"a 1": {"BLOCK": 8}}, machine: {"a 64": {"BLOCK": 16}, "a 128": {"BLOCK": 32}},
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]
    launch._tuned.cache_clear()
    try:
        assert launch.settings("a", (64,), SMALL.device, {"BLOCK": 1}) == {"BLOCK": 16}
        assert launch.settings("b", (), SMALL.device, {"BLOCK": 1}) == {"BLOCK": 1}
    finally:
        launch._tuned.cache_clear()


def test_a_damaged_file_does_not_stop_tuning(tmp_path):
    (tmp_path / "kernels.json").write_text("{", encoding="utf-8")
    tune.keep(tmp_path / "kernels.json", "GPU", {"a": {"BLOCK": 8}})
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8")) == {"GPU": {"a": {"BLOCK": 8}}}


def test_every_op_can_be_tuned_and_its_options_are_its_own(capsys):
    assert set(tune.OPS) == set(suite.OPS)
    options = vars(tune.build_parser().parse_args(["rms_norm", "--width", "4096", "--dtype", "float16"]))
    assert options == {"op": "rms_norm", "width": 4096, "dtype": "float16"}
    with pytest.raises(SystemExit):
        tune.build_parser().parse_args(["adamw", "--width", "4096"])


def test_without_a_gpu_tuning_is_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(sys, "argv", ["tune", "attention", "--head_dim", "64"])
    assert tune.main() == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "needs a CUDA GPU" in said
