"""A run's folder: which checkpoint is the newest, one owner, signals, metrics."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from minillm.base import files, process
from minillm.base.errors import UserError
from minillm.base.process import RunLock, StopSignals, run_script
from minillm.checkpoint import run_folder
from tests.minillm.base.test_files import content, fill_with, in_child, refused


@pytest.fixture
def saved(tmp_path):
    for step in (10, 20, 30):
        files.write_folder(tmp_path / run_folder.step_name(step), fill_with(str(step)))
    return tmp_path


def script(text: str, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-u", "-c", textwrap.dedent(text), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(run_folder.__file__).parents[2], **pipes | options)


def damage(folder: Path, kind: str) -> str:
    """Damage a checkpoint; returns what must be said of it."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if kind == "flip":
        file.write_bytes(data[:777] + bytes([data[777] ^ 1]) + data[778:])
        return "model.safetensors differs from its checksum"
    if kind == "truncate":
        file.write_bytes(data[:-1])
        return "model.safetensors has 1,999 bytes instead of 2,000"
    if kind == "missing":
        (folder / "resume" / "state.json").unlink()
        return "resume/state.json is missing"
    if kind == "extra":
        (folder / "more.safetensors").write_bytes(b"")
        return "more.safetensors was added"
    text = {"no manifest": None, "torn manifest": '{"files": {', "other manifest": '{"files": {"a": 1}}'}[kind]
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    return "manifest.json cannot be read"


KINDS = ["flip", "truncate", "missing", "extra", "no manifest", "torn manifest", "other manifest"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, kind):
    said = damage(saved / "step-00000030", kind)
    lines = []
    assert run_folder.newest_checkpoint(saved, lines.append) == saved / "step-00000020"
    assert len(lines) == 1 and said in lines[0] and "step-00000030" in lines[0]
    with pytest.raises(UserError, match="damaged") if "no" not in kind else pytest.raises(UserError, match="holds no"):
        run_folder.resolve_checkpoint(saved / "step-00000030")


def test_no_whole_checkpoint_is_not_the_same_as_none(saved):
    for folder in run_folder.step_folders(saved):
        damage(folder, "flip")
    with pytest.raises(UserError, match="none of its 3 checkpoints is whole"):
        run_folder.newest_checkpoint(saved, lambda line: None)
    assert run_folder.newest_checkpoint(saved / "nowhere") is None


def test_resolve_takes_a_run_a_checkpoint_or_a_foreign_folder(saved, tmp_path_factory):
    foreign = tmp_path_factory.mktemp("foreign")
    with pytest.raises(UserError, match="holds no checkpoint"):
        run_folder.resolve_checkpoint(foreign)
    (foreign / "config.json").write_text("{}")
    assert run_folder.resolve_checkpoint(foreign) == foreign
    assert run_folder.resolve_checkpoint(saved) == saved / "step-00000030"
    assert run_folder.resolve_checkpoint(saved / "step-00000010") == saved / "step-00000010"
    with pytest.raises(UserError, match="--init_from"):
        run_folder.step_of(foreign)
    with pytest.raises(UserError, match="no such folder"):
        run_folder.resolve_checkpoint(saved / "typo")


def test_what_is_half_written_goes_but_not_of_the_living_or_of_others(saved):
    child = subprocess.Popen(["sleep", "0"])
    child.wait()
    living = saved / f"curve.png.tmp-{os.getppid()}-01234567"  # a plot is drawn without the run's lock
    foreign = saved / f"step-00000050.tmp-{os.getppid()}-01234567"  # of an attempt on another machine
    others = [saved / name for name in ("mine.tmp-backup", f"notes.tmp-{child.pid}", "step-mine.old")]
    for path in (saved / f"step-00000040.tmp-{child.pid}-01234567", foreign, living, *others):
        path.mkdir()
        (path / "file").write_text("x")
    assert run_folder.newest_checkpoint(saved) == saved / "step-00000030"
    run_folder.clean_stale(saved)
    left = {path for path in saved.iterdir() if not run_folder.STEP.fullmatch(path.name)}
    assert left == {living, *others}


def test_later_checkpoints_are_kept_out_of_the_way(saved):
    lines = []
    run_folder.set_aside_later(saved, 10, lines.append)
    assert run_folder.newest_checkpoint(saved) == saved / "step-00000010" and len(lines) == 2
    files.write_folder(saved / "step-00000015", fill_with("15"))
    run_folder.prune(saved, 1)
    assert [run_folder.step_of(f) for f in run_folder.step_folders(saved)] == [15]
    run_folder.clean_stale(saved)
    assert sorted(content(path) for path in saved.iterdir() if ".left-" in path.name) == ["20", "30"]


def test_prune_keeps_the_newest_and_only_if_it_is_whole(saved):
    lines = []
    run_folder.prune(saved, 0)
    damage(saved / "step-00000030", "flip")
    run_folder.prune(saved, 1, lines.append)
    assert len(run_folder.step_folders(saved)) == 3 and "kept" in lines[0]
    files.write_folder(saved / "step-00000030", fill_with("30"))
    run_folder.prune(saved, 2)
    assert [run_folder.step_of(f) for f in run_folder.step_folders(saved)] == [20, 30]


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    holder = script(
        """
        import os, sys, time
        from minillm.base.process import RunLock
        lock = RunLock(sys.argv[1])
        if os.fork() == 0:  # a worker that outlives the run must not hold its folder
            print("held", flush=True)
        time.sleep(60)
        """,
        tmp_path,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        text = refused(lambda: RunLock(tmp_path))
        assert f"process {holder.pid} on " in text and "--out" in text
        holder.kill()
        holder.wait()
        lock = RunLock(tmp_path)
        assert f"process {os.getpid()} on " in refused(lambda: RunLock(tmp_path))
        lock.release()
        RunLock(tmp_path).release()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_the_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    """A network disk frees the lock of a machine that is gone after a while; one that is alive keeps it."""
    monkeypatch.setattr(process, "LEASE_S", 1)
    holder = RunLock(tmp_path)
    (tmp_path / "lock").write_text("process 7 on another\n")
    threading.Timer(0.3, holder.release).start()
    lock = RunLock(tmp_path)
    assert "locked by process 7 on another; waiting up to 1 s, in case another is gone" in capsys.readouterr().out
    (tmp_path / "lock").write_text("process 7 on another\n")
    assert "in use by process 7 on another; end that run" in refused(lambda: RunLock(tmp_path))
    lock.release()


LOOP = """
import sys, time
from pathlib import Path
from minillm.base import files, process
from minillm.base.process import StopSignals, run_script
from minillm.checkpoint import run_folder
home, slow = Path(sys.argv[1]), float(sys.argv[2])
def main():
    signals = StopSignals()
    def fill(folder):
        (folder / "first").write_text("a")
        print("saving", flush=True)
        end = time.monotonic() + slow
        while time.monotonic() < end:
            time.sleep(0.01)
        (folder / "second").write_text("b")
    for step in range(1, 1000):
        print("step", flush=True)
        time.sleep(0.02)
        if step == 3 or signals.requested:
            files.write_folder(home / run_folder.step_name(step), fill)
        if signals.requested:
            return 128 + signals.requested
sys.exit(run_script(main))
"""


def stop(tmp_path, moment: str, numbers: list[int], slow: float = 0.3) -> tuple[int, str]:
    """Send signals to a loop once it has printed `moment`; its exit status and what it wrote to stderr."""
    process = script(LOOP, tmp_path, slow)
    while process.stdout.readline().strip() != moment:
        pass
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("moment", ["step", "saving"])
@pytest.mark.parametrize(
    ("numbers", "status"),
    [([signal.SIGTERM], 143), ([signal.SIGINT], 130), ([signal.SIGTERM] * 2, 143), ([signal.SIGINT] * 2, 130)],
)
def test_signals_end_with_one_whole_checkpoint_more(tmp_path, moment, numbers, status):
    returned, errors = stop(tmp_path, moment, numbers)
    assert returned == status and "Traceback" not in errors and "finishing this step" in errors
    folders = run_folder.step_folders(tmp_path)
    assert folders and all(files.verify_folder(folder) == [] for folder in folders)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}


def test_a_third_ctrl_c_ends_at_once(tmp_path):
    files.write_folder(tmp_path / run_folder.step_name(1), fill_with("1"))
    returned, errors = stop(tmp_path, "saving", [signal.SIGINT] * 3, slow=1000.0)
    assert returned == -signal.SIGINT and "ends at once" in errors
    assert run_folder.newest_checkpoint(tmp_path) == tmp_path / run_folder.step_name(1)
    run_folder.clean_stale(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_child_process_can_still_be_ended(tmp_path):
    runs = [StopSignals(), StopSignals()]  # a notebook may begin a second run before it ends the first
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
    for signals in reversed(runs):
        signals.restore()


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    assert signals.requested == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested == signal.SIGTERM
    signals.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_user_error_is_one_line_and_status_two(capsys):
    def fail():
        raise UserError("--steps 0: must be at least 1")

    def interrupt():
        raise KeyboardInterrupt

    for work, status in ((fail, 2), (interrupt, 130), (lambda: None, 0), (lambda: 143, 143)):
        assert run_script(work) == status
    assert capsys.readouterr().err == "error: --steps 0: must be at least 1\n"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB"),
        (None, "18014398509481984 bytes"),
        (MemoryError(), "out of memory: close other programs"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_a_remedy(capsys, problem, words):
    def fail():
        if problem:
            raise problem
        torch.empty(1 << 52)  # no CPU has so much

    assert run_script(fail) == 2
    line = capsys.readouterr().err
    assert words in line and "smaller model or input" in line and line.count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("another")))


PRINTER = """
import sys
from minillm.base.process import run_script
def main():
    for _ in range(int(sys.argv[1])):
        print("12 → 13 三 \U0001f600")
sys.exit(run_script(main))
"""


def test_a_terminal_of_any_encoding_shows_what_it_can():
    done = subprocess.run(
        [sys.executable, "-c", PRINTER, "1"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "gbk"}
    )
    assert (done.returncode, done.stdout.decode("gbk").strip(), done.stderr) == (0, "12 → 13 三 ?", b"")


def test_a_script_without_output_or_with_an_encoding_of_choice_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_script(lambda: 0) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace"))
    assert run_script(lambda: print("三")) == 0 and sys.stdout.buffer.getvalue() == b"\\u4e09\n"


def test_output_that_is_no_longer_read_ends_a_script_quietly():
    script = subprocess.Popen([sys.executable, "-c", PRINTER, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    script.stdout.readline()
    script.stdout.close()
    assert script.stderr.read() == b"" and script.wait() == 141


def test_a_broken_pipe_elsewhere_is_still_an_error():
    def fail():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_script(fail)
