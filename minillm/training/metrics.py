"""What a run logs: metrics.jsonl, one row a line, and the same numbers for TensorBoard and Weights & Biases."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from minillm.base import files
from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.base.json_door import file_size, parse_json

WAIT_S = 30.0  # for Weights & Biases, at the start and at the end of a run


class Log(Protocol):
    """Where rows go. One that has a method `finish` as well is told the end of the run."""

    def write(self, row: dict) -> None:
        """row: "step", and a number (or None) for each other name."""


class MetricsLog:
    """metrics.jsonl: one JSON object per line, unbuffered."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Keep the rows up to `resume_step` (None or 0: a new run, no rows); drop later ones and a torn last line."""
        self.path = Path(path)
        files.refuse_link(self.path)
        if self.path.exists() and file_size(self.path):
            files.write_file(self.path, lambda scratch: self._copy_rows(scratch, resume_step or 0))
        self.file = files.open_own(self.path)

    def _copy_rows(self, target: Path, last_step: int) -> None:
        with self.path.open("rb") as rows, target.open("wb") as kept:
            kept.writelines(line for line in rows if last_step and _step_in(line) <= last_step)

    def write(self, row: dict) -> None:
        """Append a row; values that are not finite become null, since JSON has no NaN."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        line = json.dumps(finite, ensure_ascii=False).encode() + b"\n"
        with files.writing(self.path):
            if self.file.write(line) < len(line):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rows(self) -> bytes:
        """All rows, also of a file that has been deleted meanwhile."""
        self.file.seek(0)
        return self.file.read()


def _step_in(line: bytes) -> float:
    """The step of a row; infinity for a line that is not a whole row."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return Contents(parse_json(line, "row"), "row").need("step", float)
    except UserError:
        return math.inf


class TensorBoard:
    """The rows of metrics.jsonl as TensorBoard events (extra `tensorboard`)."""

    def __init__(self, folder: str | Path, resume_step: int = 0):
        """Hides earlier events of steps after `resume_step`. Raises `UserError` without the package."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('--tensorboard needs its package: pip install -e ".[tensorboard]"') from None
        self.writer = SummaryWriter(str(files.own_folder(Path(folder))), purge_step=resume_step + 1)

    def write(self, row: dict) -> None:
        """Each value of a row except its step as a scalar at that step."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])


class WeightsAndBiases:
    """The rows of metrics.jsonl as a run of Weights & Biases (extra `wandb`), whose troubles end no training."""

    def __init__(self, project: str, folder: Path, options: dict, run_id: str | None, log: Callable[[str], None]):
        """folder: of the run; its files lie in wandb/ there. run_id: of a run to go on with, None for a new one.

        Raises `UserError` without the package.
        """
        try:
            import wandb
        except ImportError:
            raise UserError('--wandb needs its package: pip install -e ".[wandb]"') from None
        files.own_folder(folder / "wandb")
        self.log = log
        self.run = None
        with self._going_on():
            # its package would else take the output in hand, and wait for the network without end
            how = wandb.Settings(console="off", init_timeout=WAIT_S, finish_timeout=WAIT_S)
            name = folder.absolute().name
            run = wandb.init(project=project, name=name, dir=folder, id=run_id, resume="allow", settings=how)
            run.config.update(options, allow_val_change=True)
            self.run = run

    def write(self, row: dict) -> None:
        """Each value of a row at its step, unless the run has sent that step before it was killed."""
        if self.run is None or row["step"] < self.run.starting_step:
            return
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        with self._going_on():
            self.run.log(values, step=row["step"])

    def finish(self) -> None:
        """Send what is left, as far as the network takes it in time; the files keep it for `wandb sync`."""
        if self.run is not None:
            with self._going_on():
                self.run.finish()
                self.run = None

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """A context in which an error is printed, and ends the sending of rows, but not the run."""
        try:
            yield
        except Exception as problem:
            self.run = None
            self.log(f"--wandb: {problem or type(problem).__name__}; the run goes on and logs to metrics.jsonl alone")
