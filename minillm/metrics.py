"""What a run displays: a progress line, the hardware's peak for its MFU, TensorBoard."""

import re
import sys
import time

import torch
from tqdm import tqdm

from minillm import UserError

# Dense peak of the tensor cores in TFLOP/s without sparsity, from NVIDIA's data sheets; first match wins.
# (part of its name, bf16/fp16 with fp32 accumulation, fp32 as TF32)
GPU_PEAKS = (
    ("B200", 2250, 1125),
    ("H200 NVL", 835, 417),
    ("H200", 989, 494),
    ("GH200", 989, 494),
    ("H100 PCIe", 756, 378),
    ("H100 NVL", 835, 417),
    ("H100", 989, 494),
    ("H800", 989, 494),
    ("H20", 148, 74),
    ("A100", 312, 156),
    ("A800", 312, 156),
    ("L40S", 362, 183),
    ("L40", 181, 90),
    ("L4", 121, 60),
    ("A10", 125, 62),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX 5090", 209, 105),
    ("RTX 4090", 165, 82.6),
    ("RTX 3090", 71, 35.6),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak floating-point operations a second of a device, or None where it is not known.

    A GPU's comes from the table above; a CPU's is measured: the best of a few 1024³ products in `dtype`.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, single in GPU_PEAKS:
            if re.search(rf"\b{part}\b(?! (D|Ti|SUPER|Laptop)\b)", name):  # RTX A1000 is no A100
                return (single if dtype == torch.float32 else half) * 1e12
        return None
    if device.type != "cpu":
        return None
    n, best = 1024, 0.0
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out = a @ b
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


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
