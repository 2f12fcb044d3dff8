"""GGUF, the one-file format of llama.cpp and its relatives: metadata, and tensors by name.

    "GGUF", uint32 version 3, uint64 tensors, uint64 entries
    entries   name, uint32 type, value                         (strings: uint64 length, UTF-8)
    tensors   name, uint32 dimensions, uint64 sizes (innermost first), uint32 type, uint64 offset
    data      from the next multiple of the alignment on; each tensor begins at one

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised tensors are read through the gguf
package (`pip install -e ".[gguf]"`); float ones are read and written here.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minillm.base.errors import UserError, naming_damage
from minillm.checkpoint import tensor_files

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type → struct's letter
STRING, ARRAY = 8, 9
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; shape: outermost size first; kind: GGML's number of its type."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: int

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own, read piece by piece, so that there is never a second copy of it."""
        if self.kind in PLAIN:
            return tensor_files.Place(self.file, self.offset, self.shape, PLAIN[self.kind]).read(dtype)
        quants, (block, size) = _gguf(self.file), _block(self.file, self.kind)
        out, row_bytes = torch.empty(self.shape, dtype=dtype), self.shape[-1] // block * size
        with naming_damage(self.file), self.file.open("rb") as stream:
            stream.seek(self.offset)
            for rows in out.view(-1, self.shape[-1]).split(max(1, tensor_files.PIECE // self.shape[-1])):
                raw = np.frombuffer(stream.read(len(rows) * row_bytes), np.uint8).reshape(len(rows), row_bytes)
                rows.copy_(torch.from_numpy(quants.dequantize(raw, quants.GGMLQuantizationType(self.kind))))
        return out

    def n_bytes(self) -> int:
        block, size = _block(self.file, self.kind)
        if self.shape[-1] % block:
            raise UserError(f"{self.file}: a row of {self.shape[-1]} numbers is no multiple of its block of {block}")
        return math.prod(self.shape) // block * size


def _gguf(path: Path):
    try:
        from gguf import quants
    except ImportError:
        raise UserError(f'{path}: quantised weights need the gguf package: pip install -e ".[gguf]"') from None
    return quants


def _block(path: Path, kind: int) -> tuple[int, int]:
    """(numbers, bytes) of a block, in which numbers of this type are stored together."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    quants = _gguf(path)
    try:
        kind = quants.GGMLQuantizationType(kind)
        if kind not in quants._type_traits:
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: holds tensors of GGML's type {kind}, which the gguf package cannot convert") from None
    return quants.GGML_QUANT_SIZES[kind]


class _Header:
    """Reads what comes before the data, never beyond the end of the file, whatever length it claims."""

    def __init__(self, path: Path, stream):
        self.path, self.stream, self.left = path, stream, path.stat().st_size

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise UserError(f"{self.path}: truncated, or its header is wrong: it asks for more than the file has")
        self.left -= n
        return self.stream.read(n)

    def numbers(self, letter: str, n: int) -> tuple:
        numbers = struct.unpack(f"<{n}{letter}", self.take(n * struct.calcsize(letter)))
        # the shortest decimal: 1e-05, where the float32 is 9.999999747378752e-06
        return tuple(float(str(np.float32(x))) for x in numbers) if letter == "f" else numbers

    def number(self, letter: str):
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: damaged: a string in its header is not UTF-8") from None

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        inner, n = (self.number("I"), self.number("Q")) if kind == ARRAY else (None, 0)
        if inner == STRING:
            return [self.text() for _ in range(n)]
        if inner in SCALARS:
            return list(self.numbers(SCALARS[inner], n))
        raise UserError(f"{self.path}: damaged, or too new: a value of type {kind}, {inner} in its header")


def read_header(path: Path) -> tuple[dict, dict[str, Entry]]:
    """Metadata, and where the tensors are, by name. Raises `UserError` for numbers that are not possible."""
    with path.open("rb") as stream:
        header = _Header(path, stream)
        if header.take(4) != MAGIC or (version := header.number("I")) not in (2, VERSION):
            raise UserError(f"{path}: no GGUF file of version 2 or {VERSION}")
        n_tensors, n_entries = header.numbers("Q", 2)
        metadata, found = {"version": version}, {}
        for _ in range(n_entries):
            name = header.text()
            metadata[name] = header.value(header.number("I"))
        for _ in range(n_tensors):
            name = header.text()
            if name in found:
                raise UserError(f"{path}: damaged: holds {name} twice")
            shape = header.numbers("Q", header.number("I"))[::-1]
            found[name] = (shape, header.number("I"), header.number("Q"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        begin = stream.tell()
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{path}: damaged: its alignment is {alignment}")
    begin += -begin % alignment
    entries = {name: Entry(path, begin + offset, shape, kind) for name, (shape, kind, offset) in found.items()}
    size = path.stat().st_size
    for name, entry in entries.items():
        if not entry.shape or min(entry.shape) < 1 or entry.offset + entry.n_bytes() > size:
            raise UserError(f"{path}: truncated, or its header is wrong: {name} {entry.shape} ends beyond the file")
    return metadata, entries


def write(
    path: Path, metadata: dict, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """Write a GGUF file with only one tensor at a time in memory.

    metadata: bool, int (uint32), float, str, and lists of int (int32), float or str. tensors: name → shape, outermost
    size first, and dtype; read(name) gives the tensor of that shape.
    """
    kinds = {dtype: kind for kind, dtype in PLAIN.items()}
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    header += b"".join(_string(name) + _packed(value) for name, value in metadata.items())
    offset = 0
    for name, (shape, dtype) in tensors.items():
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kinds[dtype], offset)
        offset += math.prod(shape) * dtype.itemsize
        offset += -offset % ALIGNMENT
    with path.open("wb") as file:
        file.write(header)
        for name, (_, dtype) in tensors.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(read(name).to(dtype).contiguous().view(torch.uint8).numpy())
        file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(value) -> bytes:
    """A metadata value: its type, then the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    inner = {int: 5, float: 6, str: STRING}[type(value[0])]
    data = b"".join(map(_string, value)) if inner == STRING else struct.pack(f"<{len(value)}{SCALARS[inner]}", *value)
    return struct.pack("<IIQ", ARRAY, inner, len(value)) + data
