"""A command ends at its limit, with everything it started, whatever it does."""

import os
import sys
import time
from pathlib import Path

import pytest

from kernels.prove import process
from kernels.prove.process import FAILED, INTERRUPTED, PASSED, TIMED_OUT, Stop

HANG = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(process, "TERMINATE_S", 0.5)
    monkeypatch.setattr(process, "KILL_S", 5.0)


def run(tmp_path: Path, source: str, *words: str, limit_s: float = 30.0, stop: Stop | None = None) -> process.Ending:
    command = [sys.executable, "-c", source, *words]
    return process.run(command, tmp_path / "log.txt", limit_s, stop or Stop(), dict(os.environ))


def has_ended(number: int) -> bool:
    """Whether a process is gone or a zombie; it may take a moment until the system says so."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def log(tmp_path: Path) -> str:
    return (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_command_passes_or_fails_and_its_output_is_kept(tmp_path):
    ending = run(tmp_path, "import sys; print('to out'); print('to err', file=sys.stderr)")
    assert (ending.verdict, ending.exit_code, ending.notes) == (PASSED, 0, ())
    ending = run(tmp_path, "raise SystemExit(3)")
    assert (ending.verdict, ending.exit_code) == (FAILED, 3)
    ending = run(tmp_path, "import os; os.kill(os.getpid(), 11)")
    assert (ending.verdict, ending.exit_code) == (FAILED, -11)
    assert set(log(tmp_path).split("\n")) >= {"to out", "to err"}


def test_a_command_that_is_not_there_fails(tmp_path):
    ending = process.run(["/no/such/program"], tmp_path / "log.txt", 5.0, Stop(), {})
    assert (ending.verdict, ending.exit_code) == (FAILED, None)
    assert "cannot start" in log(tmp_path)


def test_it_reads_nothing_and_knows_only_its_environment(tmp_path):
    source = "import os, sys; print(repr(sys.stdin.read()), sorted(os.environ.keys() & {'A', 'HOME'}))"
    process.run([sys.executable, "-c", source], tmp_path / "log.txt", 20.0, Stop(), {"A": "1"})
    assert log(tmp_path) == "'' ['A']\n"


@pytest.mark.parametrize("source", [HANG, DEAF], ids=["hangs", "ignores SIGTERM"])
def test_a_hang_ends_at_the_limit(tmp_path, source):
    began = time.monotonic()
    ending = run(tmp_path, source, limit_s=1.0)
    assert ending.verdict == TIMED_OUT and ending.exit_code in (-15, -9) and not ending.notes
    assert (ending.exit_code == -9) == (source is DEAF)
    assert 1.0 <= time.monotonic() - began < 5.0


def test_it_has_time_to_clean_up(tmp_path):
    source = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('clean')))"
    ending = run(tmp_path, f"{source}; time.sleep(600)", limit_s=1.0)
    assert ending.verdict == TIMED_OUT and log(tmp_path) == "clean\n"


GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=sys.argv[2] == "own session")
print(child.pid, flush=True)
if sys.argv[3] == "waits":
    child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("ends", ["waits", "ends"])
@pytest.mark.parametrize("session", ["same session", "own session"])
def test_what_it_started_ends_with_it(tmp_path, session, ends):
    ending = run(tmp_path, GRANDCHILD, DEAF, session, ends, limit_s=3.0)
    assert ending.verdict == (TIMED_OUT if ends == "waits" else PASSED)
    assert ending.notes == (() if ends == "waits" else ("left 1 process(es) behind, which were ended",))
    assert has_ended(int(log(tmp_path).split()[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_processes_of_others_are_left_alone(tmp_path):
    import subprocess

    with subprocess.Popen([sys.executable, "-c", HANG]) as bystander:
        run(tmp_path, HANG, limit_s=0.5)
        assert bystander.poll() is None
        bystander.kill()


def test_much_output_is_kept_in_a_file_and_endless_output_ended(tmp_path, monkeypatch):
    source = "for i in range(200_000): print('line', i)"
    assert run(tmp_path, source).verdict == PASSED
    assert log(tmp_path).endswith("line 199999\n")
    monkeypatch.setattr(process, "LOG_BYTES", 4 << 20)
    ending = run(tmp_path, "while True: print('more' * 1000)")
    assert ending.verdict == FAILED and ending.notes == ("ended because it printed more than 4 MiB",)


def test_a_signal_ends_it(tmp_path):
    stop = Stop()
    stop.note(2)
    ending = run(tmp_path, HANG, stop=stop)
    assert ending.verdict == INTERRUPTED and ending.seconds < 10 and stop.signal.name == "SIGINT"
