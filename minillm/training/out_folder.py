"""A run's folder and what lies in it besides checkpoints: the lock, options.toml, metrics.jsonl; of rank 0 alone.

Somebody may delete the folder, or move it, while the run trains. Its files are still open then, so the folder is made
again with all that was in it, except the checkpoints: the run saves the next one at once.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.json_door import read_object
from minillm.base.process import RunLock
from minillm.checkpoint import run_folder, train_state
from minillm.training.metrics import Log, MetricsLog, TensorBoard, WeightsAndBiases

CONCLUDED = "concluded.json"  # after which step all that follows the last one was done
WANDB = "wandb.json"  # the id of the run at Weights & Biases


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
        self.logs: list[Log] = []
        self.more_logs: list[Log] = []  # those that stay as they are when the folder is made again
        self.has_tensorboard = False

    def open_logs(self, step: int, tensorboard: bool) -> None:
        """Open the logs, which keep their rows up to `step`."""
        self.has_tensorboard = tensorboard
        self.metrics = MetricsLog(self.path / "metrics.jsonl", step)
        self.logs = [self.metrics]
        if tensorboard:
            self.logs.append(TensorBoard(self.path / "tensorboard", step))
        self.logs += self.more_logs

    def add_logs(self, training_config, logs: Sequence[Log], *, is_resumed: bool, log: Callable[[str], None]) -> None:
        """Give the rows from here on to Weights & Biases too, if --wandb asks for it, and to these logs.

        A new run becomes a new one there, and one that is resumed goes on with its own.
        """
        self.more_logs = list(logs)
        if training_config.wandb is not None:
            noted = self.path / WANDB
            run_id = read_object(noted).get("id", str) if is_resumed and noted.exists() else None
            options = dataclasses.asdict(training_config)
            wandb_log = WeightsAndBiases(training_config.wandb, self.path, options, run_id, log)
            if wandb_log.run is not None:
                self._write_json(WANDB, {"id": wandb_log.run.id})
            self.more_logs.append(wandb_log)
        self.logs += self.more_logs

    def finish_logs(self) -> None:
        """No row follows: call `finish` of each log that has it."""
        for log in self.logs:
            if hasattr(log, "finish"):
                log.finish()

    def was_concluded(self, step: int) -> bool:
        """Whether what follows the last step was done after this one, from which the run goes on."""
        try:
            return read_object(self.path / CONCLUDED).get("step", int) == step
        except UserError:  # not there, or damaged: then it is done again
            return False

    def conclude(self, step: int) -> None:
        """Note that all is done that follows the last step, and that no row follows."""
        self._write_json(CONCLUDED, {"step": step})
        self.finish_logs()

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file, now and whenever the folder is made again; write(scratch): writes it."""
        self.contents[name] = write
        files.write_file(self.path / name, write)

    def _write_json(self, name: str, value: dict) -> None:
        text = json.dumps(value) + "\n"
        self.write(name, lambda scratch: scratch.write_text(text, encoding="utf-8"))

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
