"""What every kernel shares when it is started: its device, that device's architecture, its settings.

A kernel's settings are the sizes of its blocks, its warps and its pipeline stages. Each kernel's file has a small
table of them, with reasons; `settings` gives what was measured on this very GPU before it, if `python -m kernels.tune`
was run. Nothing is tuned during a training run.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests
if INTERPRETED:
    from kernels import interpreter

    interpreter.correct()

# Shared memory a block may use, in bytes, by compute capability (CUDA C programming guide, "Technical specifications").
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_trying: dict[str, dict] = {}


def run(kernel, grid: tuple[int, ...], *arguments, **settings) -> None:
    """Start a kernel on the device of its first argument, a tensor or a tensor descriptor.

    Triton itself launches on the current device, whatever its arguments live on.
    """
    device = getattr(arguments[0], "base", arguments[0]).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **settings)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number: 90 for an H100. The interpreter takes an H100's settings."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has; under the interpreter few, since each program costs time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one block may use; an unknown GPU is taken to have as little as any."""
    return SHARED_MEMORY.get(architecture(device), 99 << 10)


def rows(x: Tensor) -> Tensor:
    """x (..., C) as a matrix (N, C) whose columns lie side by side: a view where there is one, else a copy."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def tuned_file() -> Path:
    """Where `python -m kernels.tune` keeps what it found."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minillm" / "kernels.json"


def machine(device: torch.device) -> str:
    """What a measured setting holds for: the GPU's name and the version of Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


@functools.cache
def _tuned(device: torch.device) -> dict[str, dict]:
    try:
        return json.loads(tuned_file().read_text(encoding="utf-8")).get(machine(device), {})
    except (OSError, ValueError):
        return {}


def settings(op: str, key: tuple, device: torch.device, default: dict) -> dict:
    """The settings of a kernel: what tuning found for (op, key) on this GPU, else the file's own default.

    key: whatever the best settings depend on, head size or width or dtype, but no number of tokens.
    """
    return _trying.get(op) or _tuned(device).get(settings_name(op, key)) or default


def settings_name(op: str, key: tuple) -> str:
    """What settings for (op, key) are called in the tuned file."""
    return " ".join(map(str, (op, *key)))


@contextlib.contextmanager
def trying(op: str, candidate: dict) -> Iterator[None]:
    """Inside, `settings` gives this candidate for the op: how settings are compared."""
    _trying[op] = candidate
    try:
        yield
    finally:
        del _trying[op]
