"""What all kernels share: starting on the right device, its architecture, their settings, and their ops.

A kernel's settings are the sizes of its blocks, its warps and its pipeline stages. Each kernel's file has a small
table of them, with reasons; `settings` prefers what `python -m kernels.tune` has measured on this GPU. Nothing is tuned
during a training run.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests
if INTERPRETED:
    from kernels.shared import interpreter

    interpreter.correct()

# Shared memory a block may use, in bytes, by compute capability (CUDA C programming guide, "Technical specifications").
SHARED_MEMORY = dict.fromkeys((80, 87), 163 << 10) | dict.fromkeys((86, 89, 120), 99 << 10)
SHARED_MEMORY |= dict.fromkeys((90, 100, 103), 227 << 10)  # 103: B300

PLAIN = {Tensor, nn.Parameter}  # types without a dispatch of their own

_choose: Callable[[str, tuple, dict], dict] | None = None  # see `choosing`


def run(kernel, grid: tuple[int, ...], *arguments, **settings) -> None:
    """Start a kernel on the device of its first argument, a tensor or a tensor descriptor.

    Triton itself launches on the current device, whatever its arguments live on.
    """
    device = getattr(arguments[0], "base", arguments[0]).device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*arguments, **settings)


def watched(tensors: list[Tensor]) -> bool:
    """Whether more than autograd has to see an op: torch.compile, a transform, a mode, subclasses, meta tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._are_functorch_transforms_active() or any(type(x) not in PLAIN or x.is_meta for x in tensors)


def op(
    library: torch.library.CustomOpDef,
    function: Callable,
    setup: Callable | None = None,
    gradient: Callable | None = None,
) -> Callable:
    """A function that calls a library op, past torch's dispatcher if only autograd has to see it: half the host time.

    Under torch.compile, transforms and modes the returned function calls `library`. Otherwise it calls `function`
    itself, inside a `torch.autograd.Function` where a gradient is wanted.

    function: what `library` computes. setup, gradient: `setup_context` and `backward` as `register_autograd` takes
    them; they are registered here, and also make a `torch.autograd.Function`. Without them a call that autograd has to
    record goes to `library`, whose backward raises an error. The returned function takes the op's positional arguments.
    """
    if gradient is not None:
        library.register_autograd(gradient, setup_context=setup)

    def forward(ctx, *inputs):
        output = function(*inputs)
        setup(ctx, inputs, output)
        return output

    def backward(ctx, *grads):
        # An argument that is a list has a list of gradients, all None: autograd wants one None.
        return tuple(x if isinstance(x, Tensor) else None for x in gradient(ctx, *grads))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = function.__module__.rpartition(".")[2]  # what a profiler shows
    eager = type(name, (torch.autograd.Function,), methods)

    def call(*inputs):
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if watched(tensors):
            return library(*inputs)
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if not recorded:
            return function(*inputs)
        if gradient is None:
            return library(*inputs)
        return eager.apply(*inputs)

    return call


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
    side_by_side = matrix.stride(-1) == 1 or matrix.shape[-1] == 1
    return matrix if side_by_side else matrix.contiguous()


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product rounds x to: autocast's dtype inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of x's shape, in x's dtype or another: a third of the host time of `torch.empty`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own function takes 1.5 µs, and a launch needs several; so does the next one.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def last_power_of_2(n: int) -> int:
    """The largest power of two that is at most n, for n from 1 on."""
    return 1 << (n.bit_length() - 1)


def tuned_file() -> Path:
    """Where `python -m kernels.tune` saves what it found."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minillm" / "kernels.json"


def machine(device: torch.device) -> str:
    """What a measured setting is valid for: the GPU's name and the version of Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


@functools.cache
def _tuned(device: torch.device) -> dict[str, dict]:
    try:
        tuned = json.loads(tuned_file().read_text(encoding="utf-8"))[machine(device)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # there is none, or it is damaged
        return {}
    return tuned if isinstance(tuned, dict) and all(isinstance(value, dict) for value in tuned.values()) else {}


def settings(op: str, key: tuple, device: torch.device, default: dict) -> dict:
    """The settings of a kernel: what tuning found for (op, key) on this GPU, else the file's own default.

    key: what the best settings depend on, such as head size, width or dtype, but never a number of tokens.
    """
    if _choose is not None:
        return _choose(op, key, default)
    tuned = _tuned(device)
    if not tuned:  # as nearly always: the name need not be made
        return default
    return tuned.get(settings_name(op, key)) or default


def settings_name(op: str, key: tuple) -> str:
    """The key of (op, key) in the tuned file."""
    return " ".join(map(str, (op, *key)))


@contextlib.contextmanager
def choosing(choose: Callable[[str, tuple, dict], dict]) -> Iterator[None]:
    """Context in which `settings` returns choose(op, key, default): how settings are compared."""
    global _choose
    before = _choose
    _choose = choose
    try:
        yield
    finally:
        _choose = before
