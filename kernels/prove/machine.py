"""What a proof runs on: GPU, driver, power limit, clocks, versions, CPU, source.

torch is asked in a process of its own (`python -m kernels.prove.machine` prints the answer as JSON): a driver that
hangs then hangs that process only, and the proving process never holds memory of the GPU.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.prove import process
from kernels.prove.process import ROOT, Stop

ANSWER_S = 90.0  # importing torch from a cold disk takes half a minute
BESIDE = ("transformers", "liger-kernel", "flash-attn", "flash-attn-4", "quack-kernels", "bitsandbytes",
          "pytest", "pytest-xdist")  # fmt: skip


def ask(stop: Stop, environment: dict[str, str]) -> tuple[dict[str, str], str]:
    """The machine, and why it cannot prove anything: "" if it has a CUDA GPU that answers."""
    command = [sys.executable, "-m", "kernels.prove.machine"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "machine.txt"
        ending = process.run(command, log, ANSWER_S, stop, environment)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    if ending.verdict == process.TIMED_OUT:
        return {}, f"torch and the driver did not answer within {ANSWER_S:.0f} s"
    if ending.verdict != process.PASSED:
        return {}, f"{ending.verdict}: {lines[-1]}"
    machine = json.loads(lines[-1])
    return machine, "" if machine["gpu"] != "none" else f"torch {machine['torch']} finds none"


def describe() -> dict[str, str]:
    """The machine of this process, by name."""
    import torch

    from kernels.bench import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = measure.machine(device)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine["architecture"] = f"sm_{gpu.major}{gpu.minor}"
        machine["memory"] = f"{gpu.total_memory / 2**30:.0f} GiB"
        machine["multiprocessors"] = str(gpu.multi_processor_count)
    machine["CUDA"] = str(torch.version.cuda)
    machine["CPU"] = f"{cpu_name()}, {n_cores()} cores"
    machine["system"] = platform.platform()
    machine["source"] = source()
    machine["beside"] = ", ".join(installed(BESIDE)) or "nothing else installed"
    return machine


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def n_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(packages: tuple[str, ...]) -> list[str]:
    """Those packages that are installed, with their versions."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> str:
    """The commit that is proved, and whether files differ from it."""
    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}, {len(changed.splitlines())} file(s) changed" if changed else commit


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


if __name__ == "__main__":
    print(json.dumps(describe()))
