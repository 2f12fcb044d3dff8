"""The folder of a run: which checkpoint to resume from, a lock for its one owner, and signals that never cut a save.

out/<run>/step-00000060/   a checkpoint, whole or absent (see files.py)
out/<run>/metrics.jsonl    one row a logged step
out/<run>/lock             held while a run trains here
*.tmp-<pid>, *.old         what a killed process left in the middle of writing; never loaded
*.left-<time>              later checkpoints than the one that training went on from; yours to delete

There is no "latest" pointer: the newest folder whose manifest verifies is the latest.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minillm import UserError, files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: str | Path) -> int:
    """The step that a checkpoint's folder name says. Raises `UserError` if the name is not of that form."""
    found = re.fullmatch(r"step-(\d+)", Path(folder).name)
    if not found:
        raise UserError(f"{folder}: no checkpoint of a run (step-00000060 or so); start from it by --init_from")
    return int(found[1])


def step_folders(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    found = [path for path in Path(run).glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_checkpoint(run: str | Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that verifies; None if the run has none.

    Logs what is wrong with each broken one it skips. Raises `UserError` if there are checkpoints but none is
    whole: whether to start over in their place is for a person to decide.
    """
    folders = step_folders(run)
    for folder in reversed(folders):
        problems = files.verify_folder(folder)
        if not problems:
            return folder
        log(f"{folder} is damaged and passed over: {'; '.join(problems)}")
    if folders:
        raise UserError(
            f"{run}: none of its {len(folders)} checkpoints is whole; bring back a copy, or choose another --out"
        )
    return None


def resolve_checkpoint(path: str | Path, log: Callable[[str], None] = print) -> Path:
    """The model folder that `path` means: itself, or a run's newest checkpoint.

    Raises `UserError` if there is none, or if it has a manifest and does not verify.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path}: a file and no folder; python -m minillm import makes one of a .gguf or .bin")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run, a checkpoint or a Hugging Face model folder")
    if (path / files.MANIFEST).exists():
        problems = files.verify_folder(path)
        if problems:
            raise UserError(f"{path}: damaged: {'; '.join(problems)}; give the checkpoint before it, or the run")
        return path
    newest = newest_checkpoint(path, log)
    if newest is None and not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{path}: holds no checkpoint and no config.json; give a run or a model folder")
    return newest or path


def resume_from(run: str | Path, resume: str) -> Path:
    """Where to look for the checkpoint that --resume means: in the run, or at a PATH until the run has its own.

    A PATH inside the run is used every time: the user wants to go back to it.
    """
    named, run = Path(resume), Path(run)
    if resume == "auto" or (step_folders(run) and run.resolve() not in (named.resolve(), named.resolve().parent)):
        return run
    return named


def clean_stale(run: str | Path) -> None:
    """Tidy what a killed process left: call it while holding the run's lock."""
    for aside in Path(run).glob("step-*.old"):
        if aside.with_suffix("").exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(aside.with_suffix(""))
    for scratch in Path(run).glob("*.tmp-*"):
        pid = scratch.name.rpartition(".tmp-")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            files.discard(scratch)


def _alive(pid: int) -> bool:
    """Whether another process has this number. (In a container each run may be process 1; that is not another one.)"""
    if os.name == "nt" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def set_aside_later(run: str | Path, step: int, log: Callable[[str], None] = print) -> None:
    """Rename a run's checkpoints after `step`, from which it now goes on: they are damaged or no longer wanted.

    Otherwise the next start would take them for the newest, and `prune` would delete the new ones as the oldest.
    """
    for folder in step_folders(run):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.left-{time.time_ns()}")
            folder.rename(aside)
            log(f"going on from step {step}: the later {folder} is kept as {aside.name}")


def prune(run: str | Path, keep_last: int, log: Callable[[str], None] = print) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: keep all), if the newest verifies."""
    folders = step_folders(run)
    if keep_last < 1 or len(folders) <= keep_last:
        return
    problems = files.verify_folder(folders[-1])
    if problems:
        log(f"{folders[-1]} is damaged ({'; '.join(problems)}): the older checkpoints are kept")
        return
    for folder in folders[:-keep_last]:
        try:
            doomed = folder.rename(f"{folder}.tmp-{os.getpid()}")  # half deleted, it must not look like a checkpoint
            shutil.rmtree(doomed)
        except OSError as problem:  # a checkpoint too many is no reason to end a run
            log(f"{folder}: could not be deleted ({problem})")


# ---- one owner, orderly ends


class RunLock:
    """Locks a run's folder for this process; the system unlocks it when the process ends, however it ends."""

    def __init__(self, run: str | Path):
        """Raises `UserError` naming the holder if another process trains in `run`."""
        path = Path(run) / "lock"
        with files.writing(path):
            self.file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            print(f"{run}: cannot be locked on this system; start no second run with the same --out")
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(f"--out {run}: in use by {holder}; end that run or choose another --out") from None
        except OSError as problem:  # some network disks
            print(f"{run}: cannot be locked ({problem.strerror}); start no second run with the same --out")
            return
        os.register_at_fork(after_in_child=self.file.close)  # a child that outlives us must not keep the lock
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Let go before the process ends."""
        self.file.close()


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours between two steps.

    The loop sees `requested` (signal number, 0 for none), saves one checkpoint and exits with 128 + that number: 130
    after Ctrl-C, 143 after SIGTERM. A second signal changes nothing; a third Ctrl-C ends the process at once. torchrun
    passes SIGTERM on to every rank and kills them after 30 s; a save cut short by that leaves the checkpoint before.
    """

    def __init__(self):
        self.requested, self.interrupts = 0, 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(os, "register_at_fork"):  # a worker process must end when told to
            os.register_at_fork(after_in_child=self.restore)

    def _note(self, number: int, frame) -> None:
        nth = self.interrupts = self.interrupts + (number == signal.SIGINT)  # the next may come meanwhile
        if nth == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next is the system's, even inside a long call
        if os.environ.get("RANK", "0") == "0":
            ends = "once more ends at once, unsaved" if nth == 2 else "finishing this step, then saving"
            os.write(2, f"\n{signal.Signals(number).name}: {ends}\n".encode())  # print is not safe in here
        self.requested = self.requested or int(number)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit status.

    130 after Ctrl-C; 141 if whoever reads the output has stopped reading; 2 and one line on stderr for a `UserError`, a
    file without permission, or when memory runs out.
    """
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error: rank {rank}"
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it does not have
    try:
        status = main() or 0
        print(end="", flush=True)  # what is buffered, while a closed pipe can still be told
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it was stdout's: `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
            return 128 + 13  # as if SIGPIPE had ended it
        raise
    except UserError as problem:
        line = str(problem)
    except PermissionError as problem:
        line = f"{problem.filename}: {problem.strerror or problem}; fix its permissions (chmod)"
    except (MemoryError, RuntimeError) as problem:
        text = str(problem)  # the first is torch's wording on a GPU, the second on a CPU
        if not isinstance(problem, MemoryError) and not re.search("out of memory|can't allocate memory", text):
            raise
        asked = re.search(r"allocate [\d.,]+ \w+", text)
        line = f"out of memory (could not {asked[0]})" if asked else "out of memory"
        line += ": to train, halve --micro_batch_size, set --checkpoint_activations true, or choose a smaller --preset"
    print(f"{who}: {line}", file=sys.stderr, flush=True)
    return 2


class MetricsLog:
    """metrics.jsonl: one JSON object per line, unbuffered."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Keep the rows up to `resume_step` (None or 0: a new run, no rows); drop later ones and a torn last line."""
        self.path = Path(path)
        with files.writing(self.path) as scratch:
            if self.path.exists():
                with self.path.open("rb") as old, scratch.open("wb") as kept:
                    kept.writelines(line for line in old if resume_step and _step_in(line) <= resume_step)
                files.sync(scratch)
                scratch.replace(self.path)
            self.file = self.path.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        """Append a row; values that are not finite become null, since JSON has no NaN."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with files.writing(self.path):
            if self.file.write(line) < len(line):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _step_in(line: bytes) -> float:
    """The step of a row; infinity for a line that is not a whole row."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
