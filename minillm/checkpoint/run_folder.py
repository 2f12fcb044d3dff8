"""The folder of a run: which checkpoint to go on from, and which to delete.

out/<run>/step-00000060/   a checkpoint, whole or absent (see base/files.py)
out/<run>/metrics.jsonl    one row a logged step
out/<run>/lock             held while a run trains here
*.tmp-<pid>-…, *.old       what a killed process left in the middle of writing; never loaded
step-00000060.users        folders of adapters over this checkpoint, for whose sake it is not deleted
*.left-<time>              damaged checkpoints after the one that training went on from; yours to delete

There is no "latest" pointer: the newest folder whose manifest verifies is the latest.
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.printing import LONGEST_LINE, clipped
from minillm.distributed.hosts import differences, place_on_host
from minillm.distributed.ranks import Ranks

STEP = re.compile(r"step-(\d+)")  # the name of a checkpoint's folder


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: str | Path) -> int:
    """The step that a checkpoint's folder name says. Raises `UserError` if the name is not of that form."""
    match = STEP.fullmatch(Path(folder).name)
    if match is None:
        raise UserError(f"{folder}: no checkpoint of a run (step-00000060 or so); start from it by --init_from")
    return int(match[1])


def step_folders(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    folders = [path for path in Path(run).glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def newest_checkpoint(
    run: str | Path, log: Callable[[str], None] = print, ranks: Ranks | None = None, copies: bool = False
) -> Path | None:
    """The newest checkpoint of a run that verifies; None if the run has none.

    Logs what is wrong with each broken one it skips. ranks: those who call this together, and read a part each; all
    take the folders that rank 0 sees, and it logs. copies: each machine may have a copy of its own, so the ranks of
    each read all of it. Raises `UserError` if there are checkpoints but none is whole:
    whether to start over in their place is for a person to decide.
    """
    folders = step_folders(run)
    if ranks is not None:
        names = ranks.exchange([folder.name for folder in folders])[0]
        folders = [Path(run) / name for name in names]
    for folder in reversed(folders):
        problems = _problems_of(folder, ranks, copies)
        if not problems:
            return folder
        if ranks is None or ranks.main:
            log(f"{folder} is damaged and passed over: {clipped('; '.join(problems), LONGEST_LINE)}")
    if folders:
        raise UserError(
            f"{run}: none of its {len(folders)} checkpoints is whole; bring back a copy, or choose another --out"
        )
    return None


def _problems_of(folder: Path, ranks: Ranks | None, copies: bool) -> list[str]:
    """What is wrong with a checkpoint, of which each rank reads a part; the same lines on every rank.

    copies: as `newest_checkpoint` takes it; a line then names the machine.
    """
    if ranks is None or ranks.world == 1:
        return files.verify_folder(folder)
    files.wait_for(folder)
    if copies:
        problems = files.verify_folder(folder, *place_on_host())
        problems = [f"{problem} on {socket.gethostname()}" for problem in problems]
    else:
        problems = files.verify_folder(folder, ranks.rank, ranks.world)
    of_ranks = ranks.exchange(problems)
    return list(dict.fromkeys(problem for problems in of_ranks for problem in problems))


def _check_copies(folder: Path, ranks: Ranks | None) -> None:
    """Raise `UserError` on every rank unless all see a folder with the same manifest there, or all without one."""
    if ranks is None:
        return
    manifest = folder / files.MANIFEST
    if manifest.exists():
        seen = f"manifest {files.sha256(manifest)[:12]}"
    else:
        seen = "no manifest" if folder.is_dir() else "no folder"
    lines = differences(ranks, {str(folder): seen})
    if lines:
        raise UserError(f"the machines hold different copies ({'; '.join(lines)}): copy the same to all of them")


def earlier_start(run: str | Path) -> str:
    """Where a run that went wrong can begin once more, in words."""
    checkpoints = step_folders(run)
    if not checkpoints:
        return "begin again"
    return f"go on from a checkpoint before that: copy {checkpoints[0]} into another --out"


def resolve_checkpoint(path: str | Path, log: Callable[[str], None] = print, ranks: Ranks | None = None) -> Path:
    """The model folder that `path` means: itself, or a run's newest checkpoint.

    ranks: those who call this together; the ranks of a machine read a part each of what may be a copy of its own.
    Raises `UserError` if there is none, if it has a manifest and does not verify, or if it is not the same everywhere.
    """
    path = Path(path)
    _check_copies(path, ranks)
    if path.is_file():
        raise UserError(f"{path}: a file and no folder; python -m minillm import makes one of a .gguf or .bin")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run, a checkpoint or a Hugging Face model folder")
    if (path / files.MANIFEST).exists():
        problems = _problems_of(path, ranks, copies=True)
        if problems:
            raise UserError(f"{path}: damaged: {'; '.join(problems)}; give the checkpoint before it, or the run")
        return path
    if newest := newest_checkpoint(path, log, ranks, copies=True):
        _check_copies(newest, ranks)
        return newest
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{path}: holds no checkpoint and no config.json; give a run or a model folder")
    return path


def tokenizer_folder(path: str | Path) -> Path:
    """Where the tokenizer named by `path` is: in a run's newest checkpoint; anything else is the place itself."""
    path = Path(path)
    holds_one = any((path / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    if holds_one or not step_folders(path):
        return path
    return resolve_checkpoint(path)


def clean_stale(run: str | Path) -> None:
    """Tidy what a killed process left: call it while holding the run's lock.

    Only the holder of the lock writes checkpoints, so one that is half written is of an attempt that has ended, on
    whatever machine. Other files are written beside a run as well, such as its curve, by a process that may be alive.
    """
    for aside in Path(run).glob("step-*.old"):
        if not STEP.fullmatch(aside.stem):
            continue  # not ours
        if aside.with_suffix("").exists():
            files.discard(aside)
        else:
            aside.rename(aside.with_suffix(""))
    for scratch in Path(run).glob("*.tmp-*"):
        match = files.SCRATCH.fullmatch(scratch.name)
        if match and (STEP.fullmatch(match["name"]) or not _alive(int(match["pid"]))):
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
    """Rename a run's checkpoints after `step`, from which it now goes on: they are damaged.

    Otherwise each start would verify them again, and `prune` would delete the new ones as the oldest.
    """
    for folder in step_folders(run):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.left-{time.time_ns()}")
            folder.rename(aside)
            log(f"going on from step {step}: the later {folder} is kept as {aside.name}")


def prune(run: str | Path, keep_last: int, log: Callable[[str], None] = print, was_read_back: bool = False) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: keep all), if the newest verifies; and none in use.

    was_read_back: it was when it was written, so that its files and their sizes are enough to see.
    """
    folders = step_folders(run)
    if keep_last < 1 or len(folders) <= keep_last:
        return
    problems = files.verify_folder(folders[-1], parts=None if was_read_back else 1)
    if problems:
        log(f"{folders[-1]} is damaged ({'; '.join(problems)}): the older checkpoints are kept")
        return
    for folder in folders[:-keep_last]:
        if users_of(folder):
            continue
        try:
            doomed = folder.rename(files.scratch_name(folder))  # half deleted, it must not look like a checkpoint
            shutil.rmtree(doomed)
            _users_file(folder).unlink(missing_ok=True)
        except OSError as problem:  # a checkpoint too many is no reason to end a run
            log(f"{folder}: could not be deleted ({problem})")


# ---- checkpoints that others need


def note_user(checkpoint: Path, user: Path) -> bool:
    """Note that what is in the folder `user` cannot do without a run's checkpoint, so that `prune` leaves it.

    Returns False if it could not be noted: the run may be another's.
    """
    if STEP.fullmatch(checkpoint.name) is None or str(user.absolute()) in users_of(checkpoint):
        return True
    try:
        with _users_file(checkpoint).open("a", encoding="utf-8") as file:
            file.write(f"{user.absolute()}\n")
    except OSError:
        return False
    return True


def users_of(checkpoint: Path) -> list[str]:
    """The folders that need a checkpoint and still exist."""
    file = _users_file(checkpoint)
    if not file.is_file():
        return []
    return [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if Path(line).exists()]


def _users_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.users")
