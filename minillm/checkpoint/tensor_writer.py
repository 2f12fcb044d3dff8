"""Writing safetensors files: which tensors go into which, their headers, and their bytes, one tensor at a time.

How tensors are divided into files depends on their shapes alone. So does every byte that is no weight: a model saved by
one process or by hundreds makes the same files.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillm.base import files
from minillm.checkpoint.tensor_files import DTYPES, INDEX, WEIGHTS

MOST_BYTES = 5_000_000_000  # of tensors in one file of a checkpoint
# safetensors' own writer puts large numbers first, so that each tensor is aligned
LIBRARY_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")

Kind = tuple[Sequence[int], torch.dtype]  # shape and dtype of a tensor


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that is to be written."""

    name: str  # relative to the folder
    header: bytes  # with its length in front
    keys: tuple[str, ...]  # of its tensors, in the order of their bytes
    n_bytes: int  # of all tensors


def plan_weights(shapes: dict[str, Sequence[int]], dtype: torch.dtype, limit: int | None) -> list[TensorFile]:
    """The files of a model's weights: one, or several of at most `limit` bytes of tensors (None: one file).

    A tensor that is larger than that has a file of its own. Several need an index beside them (`write_index`).
    """
    tensors = {key: (shape, dtype) for key, shape in shapes.items()}
    return _plan(WEIGHTS, tensors, limit, lambda entries: json.dumps({"__metadata__": {"format": "pt"}} | entries))


def plan_tensors(
    stem: str, tensors: dict[str, Kind], limit: int | None = None, metadata: dict[str, str] | None = None
) -> list[TensorFile]:
    """The files of any other tensors, each as safetensors' own `save_file` writes it: "<stem>.safetensors" or several.

    limit: as `plan_weights` takes it. metadata: what a file's header says of it.
    """

    def place(key: str) -> tuple[int, bytes]:
        return LIBRARY_ORDER.index(name_of(tensors[key][1])), key.encode()

    def describe(entries: dict[str, dict]) -> str:
        about = {"__metadata__": metadata} if metadata else {}
        return json.dumps(about | entries, separators=(",", ":"), ensure_ascii=False)

    in_order = {key: tensors[key] for key in sorted(tensors, key=place)}
    return _plan(stem, in_order, limit, describe)


def _plan(
    stem: str, tensors: dict[str, Kind], limit: int | None, describe: Callable[[dict[str, dict]], str]
) -> list[TensorFile]:
    """The files of these tensors, in their order; describe(entries): a file's header as JSON."""
    groups = _divide(tensors, limit)
    planned = []
    for number, group in enumerate(groups, 1):
        entries, end = {}, 0
        for key, (shape, dtype) in group.items():
            begin, end = end, end + n_bytes_of(shape, dtype)
            entries[key] = {"dtype": name_of(dtype), "shape": list(shape), "data_offsets": [begin, end]}
        text = describe(entries).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        place = "" if len(groups) == 1 else f"-{number:05}-of-{len(groups):05}"
        header = len(text).to_bytes(8, "little") + text
        planned.append(TensorFile(f"{stem}{place}.safetensors", header, tuple(group), end))
    return planned


def _divide(tensors: dict[str, Kind], limit: int | None) -> list[dict[str, Kind]]:
    """The tensors of each file, in their order: a new file begins where the next tensor has no room."""
    groups: list[dict[str, Kind]] = [{}]
    room = limit
    for key, (shape, dtype) in tensors.items():
        n_bytes = n_bytes_of(shape, dtype)
        if limit is not None and groups[-1] and n_bytes > room:
            groups.append({})
            room = limit
        groups[-1][key] = shape, dtype
        room = None if limit is None else room - n_bytes
    return groups


def name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def n_bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * dtype.itemsize


def write_index(folder: Path, planned: list[TensorFile]) -> None:
    """Write model.safetensors.index.json, by which others find weights, of one dtype, in several files; not for one."""
    if len(planned) == 1:
        return
    total_size = sum(file.n_bytes for file in planned)
    first = json.loads(planned[0].header[8:])[planned[0].keys[0]]
    metadata = {"total_parameters": total_size // DTYPES[first["dtype"]].itemsize, "total_size": total_size}
    weight_map = {key: file.name for file in planned for key in file.keys}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


class TensorWriter:
    """A safetensors file under way: give it the tensors in the order of the plan, then `finish` it."""

    def __init__(self, folder: Path, planned: TensorFile):
        """Raises OSError if the file cannot be made."""
        self.path = folder / planned.name
        self.dtypes = [DTYPES[entry["dtype"]] for entry in _entries(planned)]
        self.n_added = 0
        self.digest = hashlib.sha256()
        self.file = files.create(self.path)
        self._write(planned.header)

    def add(self, tensor: Tensor) -> None:
        """Append the next tensor, from any device and in any dtype."""
        dtype = self.dtypes[self.n_added]
        tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1)
        self._write(tensor.view(torch.uint8).numpy())
        self.n_added += 1

    def _write(self, data) -> None:
        self.file.write(data)
        self.digest.update(data)

    def finish(self) -> dict:
        """Close the file and return its entry in a manifest: size and SHA-256 of what was to be written."""
        size = self.file.tell()
        self.file.close()
        return {"size": size, "sha256": self.digest.hexdigest()}


def _entries(planned: TensorFile) -> list[dict]:
    """What a file's header says of each tensor, in their order."""
    header = json.loads(planned.header[8:])
    return [header[key] for key in planned.keys]


def write_file(folder: Path, planned: TensorFile, tensors: Iterable[Tensor]) -> dict:
    """Write a whole file; tensors: in the order of the plan. Returns its entry in a manifest."""
    writer = TensorWriter(folder, planned)
    for tensor in tensors:
        writer.add(tensor)
    return writer.finish()


def write_weights(
    folder: Path,
    shapes: dict[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    limit: int | None = None,
) -> None:
    """Write the weights of a model folder: one file, or indexed ones of at most `limit` bytes of tensors.

    Only one tensor at a time is in memory: read(key) gives that of this shape.
    """
    planned = plan_weights(shapes, dtype, limit)
    for file in planned:
        write_file(folder, file, map(read, file.keys))
    write_index(folder, planned)


def check_written(path: Path, entry: dict) -> None:
    """Wait until a file is on the disk, and read it back. Raises OSError if it is not what was written."""
    files.sync(path)
    if path.stat().st_size != entry["size"] or files.sha256(path) != entry["sha256"]:
        raise OSError(None, f"{path.name} reads otherwise than it was written; check the disk")
