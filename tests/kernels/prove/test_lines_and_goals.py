"""The list as it is shipped: its commands are there, its time fits, its goals are about cases that are measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.bench import attention, rows, suite
from kernels.bench.case import Place
from kernels.prove import command, goals, machine
from kernels.prove.goals import Row
from kernels.prove.lines import LINES, pytest_workers, words
from kernels.prove.proof import RESERVE_S
from minillm.model import ops

ROOT = Path(__file__).parents[3]
COMMANDS = [words(text, Path("a folder"), "-n 4") for line in LINES for text in line.commands]


def test_every_file_of_a_command_is_there():
    files = [word for command_words in COMMANDS for word in command_words if word.startswith(("tests", "train_"))]
    assert len(files) > 5 and not [file for file in files if not (ROOT / file).exists()]


def test_options_of_the_benchmark_are_its_own():
    of_bench = [c[3:] for c in COMMANDS if c[1:3] == ["-m", "kernels.bench"]]
    assert len(of_bench) == 4
    measured = set()
    for options in map(suite.build_parser().parse_args, of_bench):
        assert options.out.parts[0] == "a folder"  # one word, blank and all
        measured |= set(suite.chosen_ops(options.ops)) if options.quick else set()
    assert measured == set(suite.OPS)


def test_results_are_read_where_they_are_written():
    for line in LINES:
        assert bool(line.results) == ("kernels.bench" in line.commands[0])
        assert not line.results or f"--out {{out}}/{line.results}" in line.commands[-1]


def test_what_a_failed_self_check_and_skipped_tests_say_is_what_is_looked_for():
    files = [*(ROOT / "minillm").rglob("*.py"), ROOT / "tests" / "kernels" / "attention" / "test_sm90.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    phrases = {phrase for line in LINES for phrase in line.fails_on}
    assert len(phrases) == 4 and all(phrase in sources for phrase in phrases)


def test_no_line_passes_that_trains_or_generates_with_torchs_ops(monkeypatch):
    monkeypatch.setattr(ops, "_triton", None)  # as where Triton or a compiler is missing
    monkeypatch.setattr(ops, "_selected", "auto")
    said = ops.describe(torch.device("cuda"))
    caught = {line.name for line in LINES if any(phrase in said for phrase in line.fails_on)}
    assert caught == {line.name for line in LINES if line.printed_as} | {"training"} and len(caught) == 4


def test_a_proof_of_twelve_minutes_has_time_for_all_lines_but_the_last():
    assert sum(line.usual_s for line in LINES[:-1]) <= 12 * 60 - RESERVE_S
    assert LINES[-1].name == "everything" and all(line.usual_s < line.limit_s for line in LINES)
    assert len({line.name for line in LINES}) == len(LINES)


def test_the_page_tells_of_every_line():
    page = (ROOT / "docs" / "en" / "kernels.md").read_text(encoding="utf-8")
    limits = re.findall(r"^\| `(\S+)` \|.*\| (\d+) (s|min) \|$", page, re.MULTILINE)
    seconds = {name: int(number) * {"s": 1, "min": 60}[unit] for name, number, unit in limits}
    assert seconds == {line.name: line.limit_s for line in LINES}


def test_pytest_runs_in_parallel_where_it_can():
    assert pytest_workers(16, True) == "-n 12" and pytest_workers(4, True) == "-n 4" and pytest_workers(16, False) == ""
    of_pytest = {line.name: line.commands[0] for line in LINES if "pytest" in line.commands[0]}
    parallel = {name for name, text in of_pytest.items() if "-n" in words(text, Path("out"), "-n 4")}
    assert parallel == of_pytest.keys() - {"shapes"}  # each of those takes most of the GPU's memory
    assert not any("-n" in words(text, Path("out"), "") for text in of_pytest.values())


def test_a_test_of_hopper_that_hangs_fails_by_name_and_alone(tmp_path):
    (line,) = (line for line in LINES if line.name == "hopper-tests")
    *options, _ = words(line.commands[0], tmp_path, "-n 2")[1:]
    hangs = "import time\n\ndef test_hangs():\n    time.sleep(600)\n\ndef test_other():\n    pass\n"
    (tmp_path / "test_both.py").write_text(hangs)
    options = [option.replace("timeout=60", "timeout=4") for option in options]
    command = [sys.executable, *options, "-p", "no:cacheprovider", str(tmp_path)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout
    assert "1 failed, 1 passed" in said and re.search(r"crashed while running .*test_hangs", said), said


@pytest.mark.parametrize("size", ["full", "quick"])
def test_every_case_with_a_goal_is_measured(size):
    place = Place(torch.device("meta"), torch.bfloat16, size)
    cpu = Place(torch.device("cpu"), torch.bfloat16, size)  # its targets are drawn, which the meta device cannot
    cases = [*attention.attention(place), *attention.decode(place), *rows.rms_norm(place), *rows.swiglu(place)]
    cases += [*rows.rope(place), *rows.loss(cpu)]
    found = {(case.op, case.name, part): case for case in cases for part in case.work}
    ours = [goal for goal in goals.goals() if goal.op in {case.op for case in cases}]
    if size == "full":
        missing = [g for g in ours if g.case and (g.op, g.case, g.part) not in found]
        assert not missing and len(ours) > 60
    for goal in ours:
        for (op, name, part), case in found.items():
            if (goal.op, goal.part) == (op, part) and goal.case in ("", name):
                assert goal.other in {*case.sides, goals.COPY}, goal
                assert set(goal.sides) & {*case.sides, "ours (sm_90)"}, goal


def row(side: str, rate: float, case: str = "16/16, D 128, T 4,096", part: str = "forward", **more) -> Row:
    return Row("line", "attention", case, part, side, rate, "TFLOP/s", **more)


def test_a_goal_is_a_multiple_of_what_another_reached_in_the_same_run():
    measured = [row("ours", 500.0), row("ours (plain Triton)", 403.2), row("ours (sm_90)", 500.0)]
    measured += [row("FlexAttention", 360.0), row("SDPA cuDNN", 500.0)]
    plain, hopper = goals.compare(measured, "NVIDIA H100 80GB HBM3")
    assert (plain.row.side, plain.against) == ("ours (plain Triton)", "1.12 × FlexAttention, this run")
    assert plain.goal == pytest.approx(403.2)
    assert plain.share == pytest.approx(1.0) and hopper.goal == 475.0 and hopper.share == pytest.approx(500 / 475)


def test_without_the_other_an_h100_has_the_numbers_of_an_h100_and_another_gpu_none():
    (plain,) = goals.compare([row("ours", 400.0)], "NVIDIA H100 80GB HBM3")
    assert plain.goal == pytest.approx(1.12 * 358) and plain.against == "1.12 × FlexAttention, 358 on an H100 SXM"
    assert goals.compare([row("ours", 400.0)], "NVIDIA A100") == []
    assert goals.compare([row("FlexAttention", 400.0)], "NVIDIA H100") == []


def test_memory_has_a_goal_too():
    case = "16,384 x 2,048, vocabulary 32,000"
    ours = Row("rows", "loss", case, "step", "ours", 550.0, "TFLOP/s", 700.0, 1004.0)
    speed, memory = goals.compare([ours], "NVIDIA H100")
    assert speed.goal == 543.0 and (memory.measured, memory.goal, memory.share) == (1004.0, 502.0, 0.5)


def test_what_minillm_prints_is_read():
    printed = [
        "124m: 109,529,856 parameters, torch.bfloat16, NVIDIA H100",
        "  plain PyTorch, compiled           505,700 tok/s   MFU  39.4%     15.7 GiB",
        "  transformers 5.0, compiled        435,900 tok/s",
        "  minillm                                   612.4 tok/s",
        "  minillm                                      1.95 x transformers",
    ]
    found = {r.side: r.rate for r in goals.printed_rows("step", "step 124m", printed)}
    assert found == {"plain PyTorch, compiled": 505_700, "transformers 5.0, compiled": 435_900, "minillm": 612.4}


def test_sides_that_have_goals_are_printed_under_these_names():
    source = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "minillm" / "commands" / "bench").glob("*.py")
    )
    for goal in goals.goals():
        if goal.sides == goals.MINILLM:
            assert all(f'"{side}"' in source for side in (*goal.sides, goal.other))
            assert goal.op in {line.printed_as for line in LINES}


def test_the_machine_is_asked_in_a_process_of_its_own(monkeypatch, tmp_path):
    known = machine.describe()
    assert {"gpu", "power limit", "clock now", "driver", "torch", "triton", "python", "CUDA", "CPU"} <= set(known)
    assert all(isinstance(value, str) for value in known.values()) and re.match(
        r"[0-9a-f]{40}|unknown", known["source"]
    )
    assert machine.installed(("pytest", "no-such-package"))[0].startswith("pytest ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prove", "--out", str(tmp_path / "new")])
    monkeypatch.setattr(command, "noting_signals", command.Stop)
    assert command.main() == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "needs a CUDA GPU" in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes", "1"], "from 2 to 1440"),
        (["--only", "tset"], "choose from"),
        (["--out", "."], "name a new folder"),
    ],
)
def test_wrong_options_are_refused_in_a_line(options, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prove", *options])
    with pytest.raises(SystemExit):
        command.main()
    assert says in capsys.readouterr().err


def test_the_list_needs_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prove", "--list", "--only", "rows", "shapes"])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("rows: ") and "shapes: " in said and "training" not in said and "about 90 s" in said
