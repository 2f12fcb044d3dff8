"""What a run displays and logs: a progress line, metrics.jsonl, TensorBoard."""

import errno
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from minillm.base import files
from minillm.base.errors import UserError


class Progress:
    """A progress bar with the numbers of the last step; on a pipe or in a file, one plain line now and then."""

    def __init__(self, steps: int, done: int, enabled: bool, every_s: float = 10.0):
        """steps: of the whole run; done: finished before; enabled: False on all ranks but one."""
        self.enabled, self.steps, self.every_s = enabled, steps, every_s
        self.last = 0.0
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, row: dict, left_s: float | None) -> None:
        """row: a row of metrics.jsonl; left_s: estimated seconds to the end, None if not known yet."""
        if not self.enabled:
            return
        mfu = "" if row.get("mfu") is None else f" mfu {100 * row['mfu']:.1f}%"
        numbers = f"loss {row['loss']:.4f} lr {row['lr']:.2e} grad {row['grad_norm']:.2f}"
        numbers += f" {row['tokens_per_s']:,.0f} tok/s{mfu}"
        if self.bar is not None:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step in (1, self.steps) or time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            left = "" if left_s is None else f" left {duration(left_s)}"
            print(f"step {step}/{self.steps} {numbers}{left}", flush=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def tensorboard_writer(folder, done: int = 0):
    """A TensorBoard writer for a folder (extra `tensorboard`); it hides earlier events of steps after `done`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard needs its package: pip install -e ".[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=done + 1)


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
