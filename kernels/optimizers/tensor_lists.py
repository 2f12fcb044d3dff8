"""Many tensors in one launch: a table of their addresses on the device, and a list of the chunks they make.

A kernel takes a fixed number of arguments, but a model has hundreds of parameters, most of them small. So the
kernel gets a table of addresses as 64-bit integers, turns them back into pointers, and each of its programs works on
one chunk of one tensor. Tables are kept by what they hold: as long as no tensor moves nothing is sent, and a table
can never be out of date.
"""

import functools
import itertools
import operator
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
VECTOR = 16  # bytes that a thread can load or store at once, if the address is a multiple of it


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on the device, sent without waiting for it; the same for the same, on one stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _table(numbers, device, stream)  # another stream would not wait until this one has it


@functools.lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """(number of chunks, 2) int32: which tensor a chunk is of, and which of the tensor's chunks it is.

    sizes: how many elements each tensor has; chunk: elements a chunk has, fewer at a tensor's end.
    """
    counts = torch.tensor([-(-size // chunk) for size in sizes], dtype=torch.int64)  # chunks of each tensor
    first = counts.cumsum(0) - counts  # number of each tensor's first chunk
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    within = torch.arange(len(tensor)) - first[tensor]
    return torch.stack((tensor, within), dim=1).int().to(device)


def aligned(addresses: Iterable[int]) -> bool:
    """Whether every address is a multiple of 16 bytes; views into a larger buffer may not be."""
    bits_set_anywhere = functools.reduce(operator.or_, addresses, 0)
    return bits_set_anywhere % VECTOR == 0


def contiguous(columns: list[list[Tensor]]) -> bool:
    """Whether all tensors are contiguous: a quick test before `stored_alike` for each."""
    return all(map(Tensor.is_contiguous, itertools.chain(*columns)))


def dense(x: Tensor) -> bool:
    """Whether the elements of x fill one stretch of memory, in any order."""
    if x.is_contiguous():
        return True
    widest_stride_first = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(widest_stride_first).is_contiguous()


def stored_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether corresponding elements of all these tensors have the same offset in memory, without gaps."""
    if first.is_contiguous():
        return all(x.is_contiguous() for x in others)
    return dense(first) and all(x.stride() == first.stride() for x in others)


@triton.jit
def pointer(Entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in an entry of a table. Its alignment is declared after the cast, since Triton drops what it knows of
    an integer when it becomes a pointer."""
    start = tl.load(Entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start
