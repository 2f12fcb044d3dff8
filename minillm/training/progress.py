"""What a run displays while it trains: a progress bar, or now and then a line."""

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm


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
        """row: a row of metrics.jsonl, in which parts of the loss are called …_loss; left_s: estimated seconds to the
        end, None if not known yet.
        """
        if not self.enabled:
            return
        mfu = "" if row.get("mfu") is None else f" mfu {100 * row['mfu']:.1f}%"
        parts = [f"{name.removesuffix('_loss')} {row[name]:.4f}" for name in row if name.endswith("_loss")]
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

    def say(self, text: str) -> None:
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
