"""GGUF, the one-file format of llama.cpp and its relatives, through the gguf package: metadata, and tensors by name.

Install the package by `pip install -e ".[gguf]"`. It reads a header as it is; here a header that claims more than the
file has, or more than any model needs, is refused in one line.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.base.errors import UserError, naming
from minillm.base.json_door import file_size
from minillm.checkpoint import gguf_blocks, tensor_files

MAGIC = b"GGUF"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # GGML's name → dtype
# Of a header. A vocabulary of 262,144 pieces with 514,906 merges needs two million values and 50 MB.
MOST_VALUES = 3_000_000
MOST_BYTES = 1 << 28


def package(purpose: str) -> ModuleType:
    """The gguf package. Raises `UserError` naming the extra if it is not installed; purpose: what needs it."""
    try:
        import gguf
    except ImportError:
        raise UserError(f'{purpose}: GGUF needs the gguf package: pip install -e ".[gguf]"') from None
    return gguf


# ---- reading


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is stored. offset: bytes into the file; shape: outermost size first; kind: GGML's type."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are as stored; those of a quantized tensor count as float32."""
        return FLOATS.get(self.kind.name, torch.float32)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own, read piece by piece, so that there is never a second copy of it."""
        if self.kind.name in FLOATS:
            return tensor_files.Place(self.file, self.offset, self.shape, self.dtype).read(dtype)
        gguf = package(str(self.file))
        row_size = self.shape[-1]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        row_bytes = row_size // block_size * block_bytes
        out = torch.empty(self.shape, dtype=dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            for rows in out.view(-1, row_size).split(max(1, tensor_files.PIECE // row_size)):
                stored = stream.read(len(rows) * row_bytes)
                if len(stored) < len(rows) * row_bytes:
                    raise UserError(f"{self.file}: ends before its tensors do; get a whole copy")
                blocks = np.frombuffer(stored, np.uint8).reshape(len(rows), row_bytes)
                with np.errstate(all="ignore"):  # who reads a tensor checks that its values are finite
                    rows.copy_(torch.from_numpy(gguf.dequantize(blocks, self.kind)))
        return out


def read_header(path: Path) -> tuple[dict, dict[str, GGUFTensor]]:
    """Metadata, and where the tensors are, by name. Raises `UserError` for what is not possible or not supported."""
    gguf = package(str(path))
    if not file_size(path):
        raise UserError(f"{path}: no GGUF file: it is empty")
    try:
        reader = _open_bounded(gguf, path)
        metadata = {name: _value(gguf, field) for name, field in reader.fields.items()}
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as problem:  # of the package
        raise UserError(f"{path}: no GGUF file, or damaged: {problem}") from None
    if reader.byte_order != "I":
        raise UserError(f"{path}: written for big-endian machines, which is not supported; convert it to little-endian")
    tensors = {}
    for stored in reader.tensors:
        shape = tuple(reversed(stored.shape.tolist()))
        tensors[stored.name] = GGUFTensor(path, stored.data_offset, shape, stored.tensor_type)
    for kind in {tensor.kind for tensor in tensors.values()}:
        _check_kind(gguf, kind, path)
    for name, tensor in tensors.items():
        _check_size(gguf, name, tensor, path.stat().st_size)
    return metadata, tensors


def _open_bounded(gguf: ModuleType, path: Path):
    """The package's reader, kept within the file and within what a header needs.

    By itself it reads beyond the end of a file as if nothing were there, and then goes on for as many elements as an
    array claims to have.
    """

    class BoundedReader(gguf.GGUFReader):
        n_values = 0

        def _get(self, offset: int, dtype: type, count: int = 1, override_order: str | None = None) -> np.ndarray:
            dtype = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            end = int(offset) + int(count) * dtype.itemsize
            if end > len(self.data):
                raise UserError(f"{path}: truncated, or its header is wrong: it asks for more than the file has")
            in_header = not hasattr(self, "data_offset")  # which is known when all of the header is read
            self.n_values += 1
            if in_header and (end > MOST_BYTES or self.n_values > MOST_VALUES):
                raise UserError(
                    f"{path}: its header is wrong: above {MOST_BYTES >> 20} MiB or {MOST_VALUES:,} values, "
                    "more than any model needs"
                )
            return np.frombuffer(self.data, dtype, int(count), int(offset))  # without a copy

    with np.errstate(over="raise"):
        return BoundedReader(path)


def _value(gguf: ModuleType, field) -> Any:
    """A value of the metadata: bool, int, float, str, or a list of one of these."""
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # the shortest decimal: 1e-05 for 9.999999747378752e-06
    return value


def _check_kind(gguf: ModuleType, kind: Any, path: Path) -> None:
    """Raise `UserError` unless tensors of this type can be turned into numbers: a block of zeros is tried."""
    if kind.name in FLOATS:
        return
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise UserError(f"{path}: holds tensors of type {kind.name}, which is not supported") from None


def _check_size(gguf: ModuleType, name: str, tensor: GGUFTensor, file_size: int) -> None:
    """Raise `UserError` unless the tensor is within its file; in whole numbers, since the package's may overflow."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    n_bytes = math.prod(tensor.shape) // block_size * block_bytes
    if not tensor.shape or min(tensor.shape) < 1 or tensor.offset + n_bytes > file_size:
        raise UserError(f"{tensor.file}: its header is wrong: {name} {tensor.shape} ends beyond the file")


# ---- writing


def write(
    path: Path,
    metadata: dict,
    tensors: dict[str, tuple[Sequence[int], str]],
    read: Callable[[str], Tensor],
) -> None:
    """Write a GGUF file with only one tensor at a time in memory.

    metadata: "general.architecture" and others; bool, int (as uint32), float (as float32), str, and lists of int (as
    int32), float or str. tensors: name → shape, outermost size first, and GGML's type: one of `FLOATS`, or of
    `gguf_blocks.PACK` for rows of whole blocks. read(name): the tensor of that shape.
    """
    gguf = package(str(path))
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])  # which it writes itself
    for name, value in metadata.items():
        if name != "general.architecture":
            _add_value(writer, name, value)
    for name, (shape, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[number]
        n_bytes = math.prod(shape) // block_size * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind) in tensors.items():
            writer.write_tensor_data(_stored(name, read(name), kind).numpy())
    finally:
        writer.close()


def _stored(name: str, tensor: Tensor, kind: str) -> Tensor:
    """The bytes of a tensor in a type, uint8."""
    if kind in FLOATS:
        return tensor.to(FLOATS[kind]).contiguous().view(torch.uint8)
    with naming(name):
        return gguf_blocks.PACK[kind](tensor.contiguous())


def _add_value(writer, name: str, value: Any) -> None:
    """Add a value to the metadata to be written."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
