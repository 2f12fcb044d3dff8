"""The benchmark without a GPU: what they check, how they take turns, what they write."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.bench import attention, measure, report, suite
from kernels.bench.case import Function, Place, Side, compiled, distance, values
from kernels.prove import goals
from kernels.quant_matmul import FUSED_ROWS
from kernels.shared import launch
from tests.kernels.check import DEVICE, draw

ROOT = Path(__file__).parents[3]
SMALL = Place(torch.device(DEVICE), torch.float32, "small")
MACHINE = {
    "gpu": "NVIDIA H100", "power limit": "700.00 W", "clock now": "1980 MHz", "highest clock": "1980 MHz",
    "driver": "570.1", "torch": "2.14", "triton": "3.8", "python": "3.12", "date": "2026-01-01 12:00",
}  # fmt: skip
BROKEN_ON_CPU = {"SDPA efficient", "SDPA cuDNN", "torch varlen_attn"}
# tests neither need nor install these
PACKAGES = {"flash-attn 2", "flash-attn 4", "Liger", "QuACK", "CCE", "bitsandbytes"}


class Clock:
    """A GPU whose time passes only in runs."""

    def __init__(self, monkeypatch):
        self.now, self.order, self.synchronized = 0.0, [], True
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at, clock.synchronized = clock.now, False

            def elapsed_time(self, end):
                assert clock.synchronized
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: setattr(clock, "synchronized", True))

    def side(self, name, milliseconds):
        def run():
            self.order.append(name)
            self.now += milliseconds

        return run


def test_sides_take_turns_and_each_runs_as_long_as_it_must(monkeypatch):
    clock, cold = Clock(monkeypatch), torch.empty(4)

    def broken():
        raise RuntimeError("no kernel for this")

    sides = {"quick": clock.side("quick", 2.0), "broken": broken, "slow": clock.side("slow", 30.0)}
    timer = lambda run, times: measure.timed(run, times, cold)  # noqa: E731
    taken, failed = measure.in_turns(sides, 3, 10.0, timer)
    assert list(failed) == ["broken"] and str(failed["broken"]) == "no kernel for this"
    assert taken == {"quick": [2.0] * 15, "slow": [30.0] * 3}  # 5 runs of 2 ms or one of 30 ms a round
    warm_up = 2 * 4
    assert clock.order[warm_up:] == ["quick"] * 5 + ["slow", "slow"] + ["quick"] * 10 + ["slow"]


def test_a_side_that_fails_later_leaves_the_others_alone(monkeypatch):
    clock, left = Clock(monkeypatch), [6]

    def tiring():
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("tried to allocate")
        clock.now += 30.0

    timer = lambda run, times: measure.timed(run, times, torch.empty(4))  # noqa: E731
    taken, failed = measure.in_turns({"tiring": tiring, "slow": clock.side("slow", 30.0)}, 4, 10.0, timer)
    assert list(failed) == ["tiring"] and taken == {"slow": [30.0] * 4}


def test_the_cache_is_emptied_before_each_run(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    cold = torch.ones(4)

    def run():
        seen.append(cold.sum().item())
        cold.fill_(1.0)

    measure.timed(run, 3, cold)
    assert seen == [0.0] * 3 and clock.synchronized


def test_rates():
    assert measure.rate(3e9, "GB/s", 1.0) == 3000
    assert measure.rate(2 * 8192**3, "TFLOP/s", 2.0) == pytest.approx(549.76, rel=1e-4)


def test_distance_never_lets_nan_pass():
    x = draw(5)
    assert distance(x, x) == 0 and distance(2 * x, x) == pytest.approx(1)
    bad = Side(lambda: lambda x: x * torch.tensor([1.0, float("nan")], device=DEVICE))
    assert "WRONG" in suite.checked(doubling({"ours": bad}), "ours", bad)[2]


def doubling(sides: dict[str, Side]) -> Function:
    """A case of an op that doubles two numbers."""
    work = {"forward": 1e6, "backward": 2e6}
    make = lambda: ([draw(2, seed=1)], [draw(2, seed=2)])  # noqa: E731
    return Function("double", "two numbers", "GB/s", work, make, lambda x: 2 * x, sides)


def raising(kind, *words):
    def load():
        raise kind(*words)

    return Side(load)


SIDES = {
    "ours": Side(lambda: lambda x: x + x),
    "fast": Side(lambda: lambda x: 2 * x),
    "in place": Side(lambda: lambda x: (2 * x, x.detach().zero_())[0], writes=True),
    "wrong": Side(lambda: lambda x: 2.1 * x),
    "wrong gradient": Side(lambda: lambda x: 2 * x.detach() + 0 * x),
    "missing": raising(ModuleNotFoundError, "No module named 'other'"),
    "too large": raising(torch.OutOfMemoryError, "tried to allocate"),
    "picky": raising(RuntimeError, "no kernel\nfor that"),
}


@pytest.fixture
def fake_gpu(monkeypatch):
    """The benchmark's own course, with made-up memory and ceilings; whatever runs takes 2 ms."""
    monkeypatch.setattr(measure, "cold_buffer", lambda device: None)
    monkeypatch.setattr(measure, "timed", lambda run, n, cold: [(run(), 2.0)[1]] * n)
    monkeypatch.setattr(measure, "peak_memory", lambda run, device: 3 << 20)
    monkeypatch.setattr(measure, "ceilings", lambda *_: {"GB/s": 3000.0, "TFLOP/s": 700.0})
    monkeypatch.setattr(measure, "machine", lambda device: MACHINE)


def run_bench(tmp_path, monkeypatch, sides, *more: str) -> int:
    monkeypatch.setitem(suite.OPS, "double", lambda place: iter([doubling(sides)]))
    options = suite.build_parser().parse_args(["double", "--out", str(tmp_path), *more])
    return suite.measure(SMALL, ["double"], options)


def test_right_sides_are_timed_and_all_others_are_a_line(tmp_path, monkeypatch, fake_gpu, capsys):
    assert run_bench(tmp_path, monkeypatch, SIDES) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H100, power limit 700.00 W" in said and "driver 570.1, torch 2.14" in said
    assert "missing: not installed" in said and "too large: does not fit in memory" in said
    assert "picky: cannot: RuntimeError: no kernel\n" in said
    assert "wrong: WRONG, so not timed: output 0 is off by 5.0e-02" in said
    assert "wrong gradient: WRONG, so not timed: gradient 0 is off by 1.0e+00" in said
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open(encoding="utf-8")))
    assert [(row["part"], row["side"]) for row in rows if row["side"] == "ours"] == [
        ("forward", "ours"), ("backward", "ours"),
    ]  # fmt: skip
    assert {row["side"] for row in rows} == {"ours", "fast", "in place"} and rows[0]["gpu"] == "NVIDIA H100"
    for row in rows:
        rate = (1e6 if row["part"] == "forward" else 2e6) / float(row["milliseconds"]) / 1e6
        assert float(row["rate"]) == pytest.approx(rate) and float(row["share"]) == pytest.approx(rate / 3000, abs=1e-4)
    assert (tmp_path / "double.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_kept_when_the_next_case_is_ended(tmp_path, monkeypatch, fake_gpu):
    def two(place):
        yield doubling(SIDES)
        raise KeyboardInterrupt

    monkeypatch.setitem(suite.OPS, "double", two)
    options = suite.build_parser().parse_args(["double", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        suite.measure(SMALL, ["double"], options)
    with (tmp_path / "kernels.csv").open(encoding="utf-8") as file:
        assert {row["side"] for row in csv.DictReader(file)} == {"ours", "fast", "in place"}


def test_a_side_that_fails_while_its_memory_is_read_keeps_its_times(tmp_path, monkeypatch, fake_gpu, capsys):
    def peak_memory(run, device):
        if run() is None:
            raise torch.OutOfMemoryError("tried to allocate")
        return 3 << 20

    fails = Side(lambda: lambda x: 2 * x)
    monkeypatch.setattr(measure, "peak_memory", peak_memory)
    runs = lambda case, function, side: {"forward": lambda: None if side is fails else 1}  # noqa: E731
    monkeypatch.setattr(Function, "runs", runs)
    assert run_bench(tmp_path, monkeypatch, {"ours": SIDES["ours"], "fails": fails}) == 0
    assert "fails: memory not measured: does not fit in memory" in capsys.readouterr().out
    rows = {row.side: row for row in goals.read_rows("rows", tmp_path / "kernels.csv")}
    assert (rows["ours"].extra_mib, rows["fails"].extra_mib) == (3.0, None) and rows["fails"].rate > 0


def test_ours_is_not_timed_where_it_is_wrong(tmp_path, monkeypatch, fake_gpu, capsys):
    assert run_bench(tmp_path, monkeypatch, {"ours": SIDES["wrong"], "fast": SIDES["fast"]}) == 1
    said = capsys.readouterr()
    assert "WRONG, so not timed" in said.out and "double two numbers, ours" in said.err
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open(encoding="utf-8")))
    assert {row["side"] for row in rows} == {"fast"} and {row["beside_best"] for row in rows} == {"1.0"}


def test_quick_compiles_no_more_when_its_time_is_used_up(tmp_path, monkeypatch, fake_gpu, capsys):
    monkeypatch.setattr(suite, "QUICK_SECONDS", -1)
    sides = {"ours": SIDES["ours"], "compiled": compiled(lambda: SIDES["fast"].load())}
    monkeypatch.setattr(sys.modules[__name__], "SMALL", Place(SMALL.device, SMALL.dtype, "quick"))
    assert run_bench(tmp_path, monkeypatch, sides, "--quick") == 0
    assert "compiled: left out" in capsys.readouterr().out


def measurement(case: str, part: str, side: str, ms: float, op: str = "attention") -> report.Measurement:
    rate = measure.rate(1.1e12, "TFLOP/s", ms)
    return report.Measurement(
        op, case, part, side, ms, 0.98 * ms, 1.03 * ms, 40, rate, "TFLOP/s", 700.0, None, 150 << 20, 3e-3
    )


def made_up() -> list[report.Measurement]:
    sides = {"ours": 2.2, "ours (sm_90)": 1.9, "SDPA flash": 3.4, "SDPA cuDNN": 2.0, "FlexAttention": 2.6}
    found = []
    for i, case in enumerate(("32/32, D 64, T 4,096", "16/16, D 128, T 4,096", "32/8, D 128, T 16,384")):
        for part, slower in (("forward", 1.0), ("backward", 2.9)):
            group = [measurement(case, part, side, ms * slower * (1 - 0.1 * i)) for side, ms in sides.items()]
            found += report.beside_best(group)
    return found


def test_the_table_puts_ours_first_and_names_the_best_other():
    lines = report.table(made_up()[:5]).splitlines()
    assert lines[0] == "attention 32/32, D 64, T 4,096, forward"
    assert lines[1].split() == ["ms", "TFLOP/s", "of", "ceiling", "beside", "best", "other", "extra", "memory"]
    assert [line.split("  ")[1] for line in lines[2:]] == [
        "ours (sm_90)", "ours", "SDPA cuDNN", "FlexAttention", "SDPA flash",
    ]  # fmt: skip
    assert lines[3].split() == ["ours", "2.200", "500", "71%", "0.91", "x", "150", "MiB"]
    assert lines[4].split()[-4:] == ["1.00", "x", "150", "MiB"]
    assert len({len(line) for line in lines[1:]}) == 1
    alone = report.beside_best([measurement("x", "step", "ours", 1.0)])
    assert alone[0].beside_best is None and " x" not in report.table(alone).splitlines()[-1]


def test_sizes():
    assert report.size(690 << 20) == "690 MiB" and report.size(int(4.6 * 2**30)) == "4.6 GiB"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "attention.png", made_up(), MACHINE)
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, fake_gpu, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_bench(tmp_path, monkeypatch, SIDES) == 0
    assert 'pip install -e ".[plot]"' in capsys.readouterr().out and (tmp_path / "kernels.csv").exists()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "INTERPRETED", False)


def test_without_a_gpu_the_benchmark_says_what_it_can_do(no_gpu, monkeypatch, capsys):
    for words in ([], ["--check"], ["attention", "--quick"]):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        assert suite.main() == 1
        said = capsys.readouterr().out
        assert (
            said.count("\n") == 1
            and "CUDA GPU" in said
            and "TRITON_INTERPRET=1 python -m kernels.bench --check" in said
        )


def test_check_compares_every_op_on_the_cpu():
    words = [sys.executable, "-m", "kernels.bench", "--check"]
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(suite.OPS), done.stderr
    assert done.returncode == 0 and all(", ours" in line and ": right, error at most" in line for line in lines), lines


def test_check_tells_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setitem(suite.OPS, "double", lambda place: iter([doubling({"ours": SIDES["wrong"]})]))
    assert suite.check(SMALL, ["double"], "") == 1
    assert capsys.readouterr().out.startswith("double two numbers, ours: WRONG")


def test_ops_by_name():
    assert suite.chosen_ops([]) == suite.chosen_ops(["muon", "all"]) == list(suite.OPS)
    assert suite.chosen_ops(["rmsnorm", "RMS_Norm", "loss"]) == ["rms_norm", "loss"]
    with pytest.raises(ValueError, match="unknown op norm; there are attention"):
        suite.chosen_ops(["norm"])


@pytest.mark.skipif(DEVICE == "cuda", reason="there the benchmark itself runs them all")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("op", suite.OPS)
def test_every_side_that_runs_here_computes_the_op(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for case in suite.cases(SMALL, [op], ""):
        for name, side in case.sides.items():
            if name in PACKAGES | BROKEN_ON_CPU or (name == "FlexAttention" and "backward" in case.work):
                continue
            function, _, problem = suite.checked(case, name, side)
            assert not problem, f"{case.name}, {name}: {problem}"
            runs = case.runs(function, side)
            assert set(runs) == set(case.work)
            for _ in range(2):  # timed again and again
                for run in runs.values():
                    run()


@pytest.mark.parametrize("size", ["full", "quick"])
def test_the_cases_of_a_gpu_are_those_of_the_issue(size):
    place = Place(torch.device("meta"), torch.bfloat16, size)
    found = {
        op: [(case.name, case.work) for case in suite.OPS[op](place)]
        for op in ("attention", "rms_norm", "swiglu", "quant_matmul")
    }
    work = dict(found["attention"])
    if size == "full":
        assert len(found["attention"]) == 15 and len(found["rms_norm"]) == 5
    assert work["32/8, D 128, T 4,096"]["forward"] == 4 * 4 * 32 * 4096**2 * 128 / 2
    assert work["32/8, D 128, T 4,096"]["backward"] == 2.5 * work["32/8, D 128, T 4,096"]["forward"]
    assert work["32/8, D 128, 16 documents"]["forward"] == pytest.approx(
        0.10757 * 4 * 32 * 16384**2 * 128 / 2, rel=1e-3
    )
    assert dict(found["swiglu"])["16,384 x 8,192"] == {"forward": 3 * 2**28, "backward": 5 * 2**28}
    work = dict(found["quant_matmul"])
    if size == "full":
        rows = ("1", "64", "256", "512", "2,048")
        assert list(work) == [f"{bits} bits, {n} x 11,008 x 4,096" for bits in (8, 4) for n in rows]
        assert work["8 bits, 1 x 11,008 x 4,096"] == {"forward": 4096 * (11008 + 4)}  # codes, and a scale a row
    assert work["4 bits, 1 x 11,008 x 4,096"] == {"forward": 4096 * (5504 + 172)}  # and one for 64 columns
    assert work["4 bits, 2,048 x 11,008 x 4,096"]["backward"] == 2 * 2048 * 11008 * 4096
    assert {f"4 bits, {n} x 11,008 x 4,096" for n in (FUSED_ROWS, 2 * FUSED_ROWS)} <= work.keys()  # where they meet


def test_the_reference_in_chunks_is_the_reference():
    q, k, v, g = draw(2, 50, 4, 8), draw(2, 50, 2, 8, seed=1), draw(2, 50, 2, 8, seed=2), draw(2, 50, 4, 8, seed=3)
    spans = reference.document_spans(torch.tensor([[0] * 20 + [1] * 30, [0] * 3 + [1] + [2] * 46], device=DEVICE))

    def chunks(q, k, v):
        return attention.expected(q, k, v, spans, chunk=16)

    def whole(q, k, v):
        return reference.attention(q, k, v, spans=spans)[0]

    for ours, theirs in zip(*(values(f, [q, k, v], [g]) for f in (chunks, whole)), strict=True):
        assert all(distance(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_the_two_paths_of_attention_can_be_measured_apart():
    case = attention.causal(SMALL, 4, 2, 16, 1, 40)
    spans = reference.document_spans(torch.zeros(1, 40, dtype=torch.int64, device=DEVICE))
    for given in (None, spans):
        side = Side(lambda given=given: attention._plain_triton(given))
        function, error, problem = suite.checked(case, "ours", side)
        assert not problem and error > 0
        runs = case.runs(function, side)
        assert torch.equal(runs["backward"]()[0], runs["backward"]()[0])


def test_the_machine_is_named_without_a_gpu():
    known = measure.machine(torch.device("cpu"))
    assert set(known) == set(MACHINE) and known["torch"] == torch.__version__ and known["gpu"] == "none"
