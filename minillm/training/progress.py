"""What a run displays while it trains: a progress bar, or now and then a line; with --profile, where time goes."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from minillm.base.errors import UserError
from minillm.distributed.ranks import Ranks

PARTS = {"preference_loss": "preference", "sft_loss": "sft"}  # column with a part of the loss → how it is shown
SHOWN = 12  # ops in the table that the profiler prints


class Progress:
    """A progress bar with the numbers of the last step; on a pipe or in a file, one plain line now and then."""

    def __init__(self, steps: int, done: int, enabled: bool, every_s: float = 10.0):
        """steps: of the whole run; done: finished before; enabled: False on all ranks but one."""
        self.enabled, self.steps, self.every_s = enabled, steps, every_s
        self.last = 0.0
        self.bar = None
        if enabled and _has_room(sys.stderr):
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, row: dict, left_s: float | None) -> None:
        """row: a row of metrics.jsonl; left_s: estimated seconds to the end, None if not known yet."""
        if not self.enabled:
            return
        mfu = "" if row.get("mfu") is None else f" mfu {100 * row['mfu']:.1f}%"
        parts = [f"{words} {row[name]:.4f}" for name, words in PARTS.items() if name in row]
        of_parts = f" ({', '.join(parts)})" if parts else ""
        numbers = f"loss {row['loss']:.4f}{of_parts} lr {row['lr']:.2e} grad {row['grad_norm']:.2f}"
        numbers += f" {row['tokens_per_s']:,.0f} tok/s{mfu}"
        if self.bar is not None:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step in (1, self.steps) or time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            left = "" if left_s is None else f" left {duration(left_s)}"
            print(f"step {step}/{self.steps} {numbers}{left}", flush=True)

    def print(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _has_room(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a bar can be seen: one of 0 columns shows none."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # its size is not known
        return True


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---- `--profile FIRST:LAST`: in which ops some steps spend their time, by torch's profiler


def steps_to_record(text: str, n_steps: int) -> tuple[int, int]:
    """`10:13` → (10, 13), the first and the last step. n_steps: of the run. Raises `UserError` for anything else."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= n_steps):
        raise UserError(f"--profile {text}: expected FIRST:LAST, such as 10:13, steps of the run's {n_steps:,}")
    return int(first), int(last)


class StepProfiler:
    """Records the steps that `--profile` names; without it, and on all ranks but the first, does nothing.

    Recording slows these steps down, so their tokens/s and MFU say little.
    """

    def __init__(self, training_config, ranks: Ranks, log: Callable[[str], None]):
        """Raises `UserError`, on all ranks, for steps that the run does not have."""
        asked = training_config.profile
        self.first, self.last = steps_to_record(asked, training_config.steps) if asked else (0, 0)
        self.records = ranks.main and asked is not None
        self.folder = Path(training_config.out)
        self.is_cuda = ranks.device.type == "cuda"
        self.log = log
        self.profiler: profile | None = None

    def before(self, step: int) -> None:
        """Begin to record with the first step named, or with a later one, where a resumed run begins with that."""
        if self.records and step > self.last:
            self.log(f"--profile: steps {self.first} to {self.last} were done before, so nothing is recorded")
            self.records = False
        if self.records and self.first <= step <= self.last and self.profiler is None:
            activities = [ProfilerActivity.CPU]
            if self.is_cuda:
                activities.append(ProfilerActivity.CUDA)
            self.begun = step
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def after(self, step: int, *, is_end: bool = False) -> None:
        """Write what was recorded, if this step is the last one named, or the run ends with it."""
        if self.profiler is None or (step < self.last and not is_end):
            return
        if self.is_cuda:
            torch.cuda.synchronize()  # kernels of the step may still run
        self.profiler.stop()
        file = self.folder / f"profile-{self.begun}-{step}.json"
        where = f"{file}: steps {self.begun} to {step}, to be opened in https://ui.perfetto.dev"
        try:
            self.profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as problem:  # such as a full disk; the run is worth more than its recording
            where = f"{file}: could not be written ({problem})"
        column = "self_device_time_total" if self.is_cuda else "self_cpu_time_total"
        self.log(self.profiler.key_averages().table(sort_by=column, row_limit=SHOWN, max_name_column_width=40))
        self.log(where)
        self.profiler = None
        self.records = False
