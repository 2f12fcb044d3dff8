"""A proof dry: stand-ins for its lines. Its time is kept and its report whole, whatever a line does."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernels.prove import command, machine, process, proof, report
from kernels.prove.lines import Line
from kernels.prove.process import Stop
from kernels.prove.proof import Proof

ROOT = Path(__file__).parents[3]
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "power limit": "700.00 W", "architecture": "sm_90", "memory": "79 GiB"}
PASSES = "python -c \"print('fine')\""
FAILS = "python -c \"print('computing'); raise ValueError('off by 0.5')\""
HANGS = "python -c \"import time; print('waiting for a barrier', flush=True); time.sleep(600)\""
DEAF = (
    'python -c "import os, signal, time; signal.signal(15, signal.SIG_IGN); '
    "print(os.getpid(), 'is deaf', flush=True); time.sleep(99)\""
)
PRINTS = "python -c \"print('many words ' * 500_000)\""
LEAVES = "python -c \"import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)\""


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(process, "TERMINATE_S", 0.5)
    monkeypatch.setattr(proof, "RESERVE_S", 2.0)


def line(name: str, *commands: str, usual_s: float = 1.0, limit_s: float = 20.0, **more) -> Line:
    return Line(name, f"that it {name}", commands, usual_s, limit_s, **more)


def prove(lines: list[Line], out: Path, seconds: float = 60.0, stop: Stop | None = None) -> tuple[int, Proof]:
    tried = Proof(lines, MACHINE, out, time.monotonic() + seconds, dict(os.environ))
    return tried.run(stop or Stop()), tried


def csv_rows(out: Path, kind: str) -> list[dict[str, str]]:
    with (out / "prove.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


def whole(out: Path) -> str:
    """The report's text, if both files are whole."""
    text = (out / "prove.md").read_text(encoding="utf-8")
    assert text.startswith("# minillm's kernels on NVIDIA H100") and "## Commands" in text and text.endswith("\n")
    assert csv_rows(out, "proof") and len(csv_rows(out, "machine")) == len(MACHINE)
    return text


def test_every_kind_of_line_has_its_verdict(tmp_path):
    lines = [
        line("passes", PASSES), line("fails", PASSES, FAILS, PASSES), line("hangs", HANGS, limit_s=1.0),
        line("deaf", DEAF, limit_s=1.0), line("prints", PRINTS), line("leaves", LEAVES), line("last", PASSES),
    ]  # fmt: skip
    exit_code, tried = prove(lines, tmp_path)
    assert exit_code == 1
    verdicts = {o.line.name: (o.verdict, o.exit_code) for o in tried.outcomes}
    assert verdicts == {
        "passes": ("passed", 0), "fails": ("failed", 1), "hangs": ("timed out", -15), "deaf": ("timed out", -9),
        "prints": ("passed", 0), "leaves": ("passed", 0), "last": ("passed", 0),
    }  # fmt: skip
    text = whole(tmp_path)
    assert "\n\nFinished after " in text and "Of 7 lines: 4 passed, 1 failed, 2 timed out." in text
    assert "## fails: failed" in text and "    ValueError: off by 0.5" in text and "    waiting for a barrier" in text
    assert "## passes" not in text and "left 1 process(es) behind" in text
    assert len(text) < 20_000  # of a line that prints much only the end
    assert (tmp_path / "fails.txt").read_text().count("fine") == 1  # its third command was not run
    by_name = {row["line"]: row for row in csv_rows(tmp_path, "line")}
    assert by_name["deaf"]["exit_code"] == "-9" and float(by_name["hangs"]["seconds"]) >= 1.0
    assert {row["name"]: row["value"] for row in csv_rows(tmp_path, "machine")} == MACHINE


def test_all_lines_that_pass_give_code_0_and_none_that_ran_code_1(tmp_path):
    assert prove([line("passes", PASSES), line("other", PASSES, architecture=80)], tmp_path)[0] == 0
    assert prove([line("passes", PASSES, usual_s=999)], tmp_path)[0] == 1


def test_the_time_is_kept_and_what_does_not_fit_is_not_begun(tmp_path):
    lines = [line("first", HANGS, limit_s=2.0), line("long", PASSES, usual_s=30.0), line("deaf", DEAF, limit_s=500.0)]
    lines += [line("late", PASSES)]
    began = time.monotonic()
    _, tried = prove(lines, tmp_path, seconds=9.0)
    assert time.monotonic() - began < 9.0
    assert [o.verdict for o in tried.outcomes] == ["timed out", "not run", "timed out", "not run"]
    assert "no time left: it takes about 30 s" in whole(tmp_path)


def test_commands_of_a_line_share_its_limit(tmp_path):
    waits = 'python -c "import time; time.sleep(2)"'
    _, tried = prove([line("waits", waits, waits, waits, limit_s=3.0)], tmp_path)
    assert tried.outcomes[0].verdict == "timed out" and tried.outcomes[0].seconds < 5.0


def test_a_run_that_falls_back_to_torch_has_failed(tmp_path):
    says = "python -c \"print('the kernels are not right; using torch')\""
    exit_code, tried = prove([line("says", says, fails_on=("not said", "using torch"))], tmp_path)
    assert exit_code == 1 and tried.outcomes[0].verdict == "failed" and 'but said "using torch"' in whole(tmp_path)


def test_lines_for_other_gpus_are_not_run(tmp_path):
    _, tried = prove([line("small", PASSES, architecture=86), line("large", PASSES, memory_gib=100)], tmp_path)
    assert [o.note for o in tried.outcomes] == ["only for sm_86", "needs a GPU with 100 GiB"]
    assert {o.verdict for o in tried.outcomes} == {"not run"}


def test_the_report_is_whole_at_every_moment(tmp_path):
    """Read again and again while lines run; and it names the line that is running, should the machine go down."""
    lines = [line(f"number-{i}", PRINTS) for i in range(4)] + [line("waits", 'python -c "import time; time.sleep(1)"')]
    seen: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            if (tmp_path / "prove.csv").exists():
                seen.append(whole(tmp_path))

    reader = threading.Thread(target=read)
    reader.start()
    prove(lines, tmp_path)
    over.set()
    reader.join()
    assert len(seen) > 10 and any("| waits | running |" in text for text in seen)


BENCH = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "kernels.csv").write_text('''op,case,part,side,rate,unit,ceiling,extra_bytes
swiglu,"16,384 x 8,192",forward,ours,2910,GB/s,3000,1048576
swiglu,"16,384 x 8,192",backward,ours,2800,GB/s,3000,1048576
swiglu,"16,384 x 8,192",back''')
import time
time.sleep(600)
"""


def test_a_benchmark_that_hangs_keeps_what_it_measured(tmp_path):
    (tmp_path / "bench.py").write_text(BENCH)
    command = f"python {tmp_path / 'bench.py'} {{out}}/results"
    prints = "python -c \"print('  minillm, compiled        612,000 tok/s   1.2 x plain')\""
    lines = [line("bench", command, limit_s=1.5, results="results"), line("step", prints, printed_as="step 124m")]
    prove(lines, tmp_path)
    rows = csv_rows(tmp_path, "goal")
    assert [(row["part"], row["value"], row["goal"], row["verdict"]) for row in rows] == [
        ("forward", "2910", "2910", "reached"), ("backward", "2800", "2910", "short"),
        ("step", "612000", "556000", "reached"),
    ]  # fmt: skip
    text = whole(tmp_path)
    assert "96%, short" in text and "0.97 × a copy, this run" in text and "505,700 on an H100 SXM" in text


INTERRUPTED = """
import os, sys, time
from pathlib import Path
from kernels.prove.command import noting_signals
from kernels.prove.proof import Proof
from tests.kernels.prove.test_proof import DEAF, MACHINE, PASSES, line

stop = noting_signals()
lines = [line("passes", PASSES), line("deaf", DEAF, limit_s=100.0), line("late", PASSES)]
Proof(lines, MACHINE, Path(sys.argv[1]), time.monotonic() + 120, dict(os.environ)).run(stop)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_proof_leaves_a_report_and_no_process(tmp_path, number):
    command = [sys.executable, "-c", INTERRUPTED, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as running:
        log = tmp_path / "deaf.txt"
        while not (log.exists() and "deaf" in log.read_text()):
            assert running.poll() is None
            time.sleep(0.02)
        deaf = int(log.read_text().split()[0])
        running.send_signal(number)
        time.sleep(0.2)
        running.send_signal(number)  # an impatient second one changes nothing
        assert running.wait(30) == 0
    text = whole(tmp_path)
    assert f"\n\nInterrupted by {number.name} after " in text
    assert "Of 3 lines: 1 passed, 1 interrupted, 1 not run." in text
    assert not Path(f"/proc/{deaf}").exists()


@pytest.mark.parametrize(("lines", "exit_code"), [([PASSES], 0), ([PASSES, FAILS], 1)], ids=["passes", "fails"])
def test_the_command_from_end_to_end(lines, exit_code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "LINES", [line(f"number-{i}", text) for i, text in enumerate(lines)])
    monkeypatch.setattr(machine, "ask", lambda stop, environment: (MACHINE, ""))
    monkeypatch.setattr(command, "noting_signals", Stop)
    monkeypatch.setattr(sys, "argv", ["prove", "--out", str(tmp_path / "a folder")])
    assert command.main() == exit_code
    assert f"{MACHINE['gpu']}, 12 minutes for number-0" in capsys.readouterr().out
    assert "number-0 | passed |" in whole(tmp_path / "a folder")
    with pytest.raises(SystemExit):  # the folder holds a report now
        command.main()


def test_the_last_lines_are_those_a_terminal_would_show(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"old\n" * 9000 + b"\x1b[31mred\x1b[0m\r\n" + b"step 1\rstep 2\rstep 3\n" + b"\xff\x00end\n")
    lines = report.tail(path).splitlines()
    assert len(lines) == report.TAIL_LINES - 1 and lines[-4:] == ["old", "red", "step 3", "� end"]
    assert report.tail(tmp_path / "none.txt") == ""


def test_a_table_holds_any_words():
    assert report.markdown_table(("a", "b"), [("x|y", " z ")]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| x\\|y | z |",
    ]


def test_a_reader_that_has_gone_ends_the_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has read enough
    command = [sys.executable, "-m", "kernels.prove", "--list"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
