"""Which device computes, in which dtype, and how fast it could be."""

import contextlib
import ctypes
import os
import re
import time

import torch

from minillm.base.errors import UserError

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
    n = 1024
    a = torch.randn(n, n).to(dtype)
    b = torch.randn(n, n).to(dtype)
    out = a @ b
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds = time.perf_counter() - begin
        best = max(best, 2 * n**3 / seconds)
    return best


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype):
    """A context with matrix products in `dtype` and sensitive ops in fp32; for float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 on CUDA, else float32."""
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def pick_device(name: str) -> torch.device:
    """A torch device from a name; "auto" means CUDA if available, else the CPU. A GPU given by number becomes the
    current device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("neither cpu, cuda nor mps")
        if device.type == "cuda":  # ask the driver: a test tensor would take memory
            n_gpus = torch.cuda.device_count()
            if (device.index or 0) >= n_gpus:
                raise RuntimeError(f"{n_gpus} GPU(s) found")
            if device.index is not None:
                torch.cuda.set_device(device)  # streams, events and CUDA graphs are the current one's
        else:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try auto or cpu") from None
    return device


def busy_cores() -> str:
    """Advice if other programs keep this machine's cores busy, since torch's threads wait for one another. Else "".

    The load is that of the last minute, in which a run before this one may have kept as many cores busy as this will.
    """
    n_cores = os.cpu_count() or 1
    n_threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if n_threads == 1 or load < n_cores + n_threads:
        return ""
    return (
        f"the cores were busy in the last minute (load {load:.1f} on {n_cores}): if steps are slow, set "
        "OMP_NUM_THREADS to the number of cores that other programs leave free"
    )


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: on a CPU, new pages for each step cost a tenth of its time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of free heap
