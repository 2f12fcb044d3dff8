"""What a run logs: metrics.jsonl, one row a line, and the same numbers for TensorBoard."""

import errno
import json
import math
import os
from pathlib import Path

from minillm.base import files
from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.base.json_door import file_size, parse_json


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
