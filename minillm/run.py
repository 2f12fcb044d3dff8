"""The folder of a run: every checkpoint whole or absent, one owner, and signals that never tear a save.

out/<run>/step-00000060/   a checkpoint; manifest.json in it holds size and SHA-256 of each file
out/<run>/metrics.jsonl    one row a logged step
out/<run>/lock             held while a run trains here
*.tmp-<pid>, *.old         what a killed process left in the middle of writing; never loaded
*.left-<time>              later checkpoints than the one that training went on from; yours to delete

A folder appears under its name by one rename, after its bytes have reached the disk. So a kill or a
power cut leaves the checkpoint before, or this one, and nothing between. There is no "latest" pointer:
the newest folder whose manifest verifies is the latest.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minillm import UserError

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

MANIFEST = "manifest.json"


# ---- whole files and folders


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Gives the place where this process may write what shall appear at `path`; whatever goes wrong, it is
    empty again in the end, and what the disk refuses becomes a `UserError`."""
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
    except OSError as problem:
        files = _files(scratch).values() if scratch.is_dir() else ()
        written = sum(file.stat().st_size for file in files)
        home = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise UserError(
            f"{path}: writing failed after {written:,} bytes: {problem.strerror or problem} "
            f"({shutil.disk_usage(home).free:,} bytes free there); free space, mend the folder or choose another "
            "--out; earlier checkpoints are untouched"
        ) from None
    finally:
        _discard(scratch)


def _discard(path: Path) -> None:
    """Delete a file or folder, if it is there and can be deleted."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows cannot, and keeps names in order by itself
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    """Every file under `folder` by its relative name, sorted; the manifest itself left out."""
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def _describe(file: Path) -> dict:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_json_atomically(path: str | Path, value) -> None:
    """Write `value` as JSON: a reader sees the old file or the new one, whole. Raises `UserError` naming the path."""
    with _writing(path := Path(path)) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(scratch)
        scratch.replace(path)
        _sync(path.parent)


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` appear whole, with a manifest, or not at all.

    fill(folder): writes the files into the folder it is given. A folder that is there already is replaced,
    and stays on the disk until the new one is whole. Raises `UserError` with path and bytes when the disk is
    full, read-only or the like; whatever goes wrong, nothing but the old content is left.
    """
    with _writing(path := Path(path)) as scratch:
        _discard(scratch)
        scratch.mkdir()
        fill(scratch)
        files = _files(scratch)
        (scratch / MANIFEST).touch()
        for file in files.values():  # safetensors makes files that only their owner may read
            file.chmod((scratch / MANIFEST).stat().st_mode)
        with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock: one core per file
            list(pool.map(_sync, files.values()))
            manifest = {"format": 1, "files": dict(zip(files, pool.map(_describe, files.values()), strict=True))}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(scratch / MANIFEST)
        for folder in (*(f for f in scratch.rglob("*") if f.is_dir()), scratch):
            _sync(folder)
        _put_in_place(scratch, path)


def _put_in_place(scratch: Path, path: Path) -> None:
    # A rename cannot replace a full folder, so the old one steps aside under a name that clean_stale
    # gives back, should we be killed between the two renames.
    aside = path.with_name(path.name + ".old")
    if path.exists() and verify_folder(path):
        shutil.rmtree(path)  # damaged: worth less than what may still lie aside
    elif path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    scratch.rename(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def verify_folder(path: str | Path) -> list[str]:
    """What is wrong with a folder that `write_folder` wrote; empty when every file is as it was written.

    Files added later are no fault, weights (*.safetensors and their index) excepted: a loader might read them.
    """
    path = Path(path)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return [f"{MANIFEST} cannot be read ({type(problem).__name__}: {problem})"]
    present = _files(path)
    problems = [f"{name} is missing" for name in expected if name not in present]
    problems += [
        f"{name} was added"
        for name in present
        if name not in expected and name.endswith((".safetensors", ".safetensors.index.json"))
    ]

    def compare(name: str) -> str | None:
        try:
            size = present[name].stat().st_size
            if size != expected[name][0]:
                return f"{name} has {size:,} bytes instead of {expected[name][0]:,}"
            return (
                None if _describe(present[name])["sha256"] == expected[name][1] else f"{name} differs from its checksum"
            )
        except OSError as problem:  # a bad sector, or another person's file
            return f"{name} cannot be read ({problem.strerror})"

    with ThreadPoolExecutor() as pool:
        found = pool.map(compare, (name for name in expected if name in present))
        return problems + [problem for problem in found if problem]


def check_writable(path: str | Path, bytes_needed: int, largest_file: int = 0) -> None:
    """Refuse, before the first step, a run's folder that could not take its checkpoints.

    bytes_needed: for all checkpoints that will lie there at once, beyond those there now; largest_file: bytes.
    Raises `UserError` if the folder cannot be written, has too little space or allows no file so large.
    """
    with _writing(Path(path) / "probe") as probe:
        probe.write_bytes(b"x")
        free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise UserError(
            f"{path}: {free:,} bytes free, but the checkpoints will need {bytes_needed:,}; "
            "free space, lower --keep_last or choose another --out"
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
    if 0 <= limit < largest_file:
        raise UserError(
            f"{path}: a checkpoint has a file of {largest_file:,} bytes, but the limit on a file is {limit:,}; "
            "raise it (ulimit -f unlimited)"
        )


# ---- checkpoints of a run


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

    Says of each broken one it passes over what is wrong with it. Raises `UserError` if there are checkpoints
    but not one is whole: to begin anew in their place is for a person to decide.
    """
    folders = step_folders(run)
    for folder in reversed(folders):
        problems = verify_folder(folder)
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
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run, a checkpoint or a Hugging Face model folder")
    if (path / MANIFEST).exists():
        problems = verify_folder(path)
        if problems:
            raise UserError(f"{path}: damaged: {'; '.join(problems)}; give the checkpoint before it, or the run")
        return path
    newest = newest_checkpoint(path, log)
    if newest is None and not (path / "config.json").exists():
        raise UserError(f"{path}: holds no checkpoint and no config.json; give a run or a model folder")
    return newest or path


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
            _discard(scratch)


def _alive(pid: int) -> bool:
    """Whether another process of that number exists. (In a container every run may be process 1: not another.)"""
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
    """Rename a run's checkpoints after `step`, from which it now goes on: they are damaged or of a track left behind.

    Else the next start would take them for the newest, and `prune` the new ones for the oldest.
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
    problems = verify_folder(folders[-1])
    if problems:
        log(f"{folders[-1]} is damaged ({'; '.join(problems)}): the older checkpoints are kept")
        return
    for folder in folders[:-keep_last]:
        try:
            doomed = folder.rename(f"{folder}.tmp-{os.getpid()}")  # half deleted, it must not bear a step's name
            shutil.rmtree(doomed)
        except OSError as problem:  # a checkpoint too many is no reason to end a run
            log(f"{folder}: could not be deleted ({problem})")


# ---- one owner, orderly ends


class RunLock:
    """Holds a run's folder for this process; the system lets go when the process ends, however it ends."""

    def __init__(self, run: str | Path):
        """Raises `UserError` naming the holder if another process trains in `run`."""
        path = Path(run) / "lock"
        with _writing(path):
            self.file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return print(f"{run}: cannot be locked on this system; start no second run with the same --out")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(f"--out {run}: in use by {holder}; end that run or choose another --out") from None
        except OSError as problem:  # some network disks
            return print(f"{run}: cannot be locked ({problem.strerror}); start no second run with the same --out")
        os.register_at_fork(after_in_child=self.file.close)  # a child that outlives us must not hold it
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Let go before the process ends."""
        self.file.close()


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a wish that the loop grants between two steps.

    The loop sees `requested` (signal number, 0 for none), saves one checkpoint and exits with `exit_code`: 130 after
    Ctrl-C, 143 after SIGTERM. A second one changes nothing; a third Ctrl-C ends the process at once. torchrun
    passes SIGTERM on to every rank, gives them 30 s, then kills; a save cut short by that leaves the one before.
    """

    def __init__(self):
        self.requested, self.interrupts = 0, 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(os, "register_at_fork"):  # a worker process shall end when it is told to
            os.register_at_fork(after_in_child=self.restore)

    def _note(self, number: int, frame) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next is the system's, even inside a long call
        if os.environ.get("RANK", "0") == "0":
            ends = "once more ends at once, unsaved" if self.interrupts == 2 else "finishing this step, then saving"
            os.write(2, f"\n{signal.Signals(number).name}: {ends}\n".encode())  # print is not safe in here
        self.requested = self.requested or int(number)

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as a shell would report it."""
        return 128 + self.requested if self.requested else 0

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit status; 2 and one line on stderr for a `UserError`, 130 for Ctrl-C."""
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error: rank {rank}"
    try:
        return main() or 0
    except UserError as problem:
        print(f"{who}: {problem}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as problem:
        if type(problem).__name__ != "OutOfMemoryError":  # torch's; its module is not known here
            raise
        remedy = "halve --micro_batch_size, or set --checkpoint_activations true, or choose a shorter --seq_len"
        print(f"{who}: {str(problem).split('. ')[0]}: {remedy}", file=sys.stderr, flush=True)
        return 2


class MetricsLog:
    """metrics.jsonl: one JSON object a line, on its way to the disk as soon as it is written."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Keep the rows up to `resume_step` (None or 0: a new run, none), cut later ones and a torn last line."""
        self.path = Path(path)
        with _writing(self.path) as scratch:
            if self.path.exists():
                with self.path.open("rb") as old, scratch.open("wb") as kept:
                    kept.writelines(line for line in old if resume_step and _step_in(line) <= resume_step)
                _sync(scratch)
                scratch.replace(self.path)
            self.file = self.path.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        """Append a row; what is not finite is written as null, since JSON has no NaN."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with _writing(self.path):
            if self.file.write(line) < len(line):  # how a disk fills up
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _step_in(line: bytes) -> float:
    """The step of a row; infinite for a line that is no whole row."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
