"""Which device computes, in which dtype, and how fast it could be."""

import contextlib
import ctypes
import math
import os
import re
import time
from pathlib import Path

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

    A GPU's comes from the table above. A CPU's is measured on one thread and multiplied by the cores that torch's
    threads have. Only the time in which the thread ran counts, not that of other programs. They still disturb its
    caches and slow its clock, so the true peak may be higher than what is found.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, single in GPU_PEAKS:
            if re.search(rf"\b{part}\b(?! (D|Ti|SUPER|Laptop)\b)", name):  # RTX A1000 is no A100
                return (single if dtype == torch.float32 else half) * 1e12
        return None
    if device.type != "cpu":
        return None
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = _speed_of_a_core(dtype)
    finally:
        torch.set_num_threads(n_threads)
    return best * min(n_threads, n_cores())


def _speed_of_a_core(dtype: torch.dtype, at_least_s: float = 0.02, rounds: int = 8) -> float:
    """The most floating-point operations a second of one thread, in square products of three sizes.

    The best of some rounds counts, since all that disturbs makes a round slower. at_least_s: seconds of the thread's
    own time for each. Where one product fills a round, as in a dtype that the core does not know, that is enough.
    """
    best = 0.0
    for n in (256, 512, 1024):
        a = torch.randn(n, n).to(dtype)
        b = torch.randn(n, n).to(dtype)
        out = a @ b
        for _ in range(rounds):
            n_products, begin = 0, time.process_time()
            while time.process_time() - begin < at_least_s:
                torch.mm(a, b, out=out)
                n_products += 1
            took = time.process_time() - begin
            best = max(best, n_products * 2 * n**3 / took)
            if took > 5 * at_least_s:
                return best
    return best


def n_cores() -> int:
    """The cores that this process may use; two hardware threads that share one are one core."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    shared = Path("/sys/devices/system/cpu")
    try:
        return len({(shared / f"cpu{number}/topology/thread_siblings_list").read_text() for number in usable})
    except OSError:
        return len(usable)


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
    except RuntimeError:  # no name of torch's
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: choose auto, cpu, cuda, cuda:N or mps")
    try:
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


def keep_to_quota() -> None:
    """Let torch compute on no more threads than the container may use cores, unless OMP_NUM_THREADS says how many.

    torch starts a thread for each core of the machine. Once they have used up a container's quota, all of them stand
    still for the rest of that tenth of a second.
    """
    quota = cpu_quota()
    if "OMP_NUM_THREADS" not in os.environ and quota < torch.get_num_threads():
        torch.set_num_threads(max(1, math.ceil(quota)))


def cpu_quota(system: Path = Path("/")) -> float:
    """How many cores this process may use at once on average, by its control groups (Linux, version 2), or infinity."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    groups = system / "sys/fs/cgroup"
    quota = math.inf
    for group in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for folder in (groups / group, *(groups / group).parents):  # a group is within the limits of those above it
            with contextlib.suppress(OSError, ValueError):  # no limit: "max 100000"
                used, period = map(int, (folder / "cpu.max").read_text().split())  # microseconds
                quota = min(quota, used / period)
    return quota


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: on a CPU, new pages for each step cost a tenth of its time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of free heap
