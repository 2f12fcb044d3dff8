"""A run's folder and what lies in it besides checkpoints: the lock, options.toml, metrics.jsonl; of rank 0 alone.

Somebody may delete the folder, or move it, while the run trains. Its files are still open then, so the folder is made
again with all that was in it, except the checkpoints: the run saves the next one at once.
"""

import os
from collections.abc import Callable
from pathlib import Path

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.process import RunLock
from minillm.checkpoint import run_folder, train_state
from minillm.training.metrics import MetricsLog, TensorBoard


def check_out(folder: Path) -> None:
    """Raise `UserError` for an --out in which no run can be, before anything is read that takes long."""
    if (folder / train_state.STATE).exists():
        raise UserError(
            f"--out {folder}: is a checkpoint itself; give the folder of a run, which holds checkpoints by names like "
            "step-00000060"
        )
    if (folder / "meta.json").exists():
        raise UserError(f"--out {folder}: holds token bins (meta.json); choose another folder for the run")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: {nearest} is a file; give a folder, which is made if it is missing")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--out {folder}: nothing may be written into {nearest}; choose another, or chmod u+w it")


class OutFolder:
    """The folder `path`, locked for this process."""

    def __init__(self, path: Path):
        """Raises `UserError` if another process trains there."""
        self.path = path
        self.lock = RunLock(path)
        self.contents: dict[str, Callable[[Path], None]] = {}  # name → what writes the file
        self.logs: list[MetricsLog | TensorBoard] = []
        self.has_tensorboard = False

    def open_logs(self, step: int, tensorboard: bool) -> None:
        """Open the logs, which keep their rows up to `step`."""
        self.has_tensorboard = tensorboard
        self.metrics = MetricsLog(self.path / "metrics.jsonl", step)
        self.logs = [self.metrics]
        if tensorboard:
            self.logs.append(TensorBoard(self.path / "tensorboard", step))

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file, now and whenever the folder is made again; write(scratch): writes it."""
        self.contents[name] = write
        files.write_file(self.path / name, write)

    def make_again_if_lost(self, step: int) -> bool:
        """Whether the folder, or a file that is open in it, was gone and has been made again. step: the last one.

        Raises `UserError` if another run has the place by now.
        """
        lock_is_lost = files.is_lost(self.lock.path, self.lock.file)
        metrics_are_lost = files.is_lost(self.metrics.path, self.metrics.file)
        if lock_is_lost:
            self.lock.release()
            self.lock = RunLock(self.path)
        if lock_is_lost and metrics_are_lost and run_folder.step_folders(self.path):
            raise UserError(f"--out {self.path}: was deleted or moved, and another run lies there now; this one ends")
        if metrics_are_lost:
            rows = self.metrics.rows()
            files.write_file(self.metrics.path, lambda scratch: scratch.write_bytes(rows))
            self.open_logs(step, self.has_tensorboard)
            for name, write in self.contents.items():
                files.write_file(self.path / name, write)
        return lock_is_lost or metrics_are_lost
