"""Tensors in safetensors files: one file, or indexed shards.

There is no pickle anywhere: reading a file cannot run code. Reading is strict: everything that is missing,
unexpected, of another shape or broken is listed, and nothing is loaded in part.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.base.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {  # safetensors' name → torch's
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # their first bytes
PIECE = 1 << 18  # numbers read at once


# ---- reading tensors


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: `offset` bytes into a file, contiguous, little-endian."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, converted piece by piece, so that there is never a second copy of it.

        The file is not memory-mapped: its pages would count as memory, and a tensor would not be aligned like torch's,
        so that vectorized code may round differently and a resumed run diverge.
        """
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            for piece in out.view(-1).split(PIECE):
                stored = piece if piece.dtype == self.dtype else torch.empty(piece.shape, dtype=self.dtype)
                if stream.readinto(stored.view(torch.uint8).numpy()) < stored.nbytes:
                    raise UserError(f"{self.file}: ends before its tensors do; get a whole copy")
                if stored is not piece:
                    piece.copy_(stored)
        return out


def refuse_pickle(path: Path, start: bytes) -> None:
    """Raise `UserError` if a file that begins with `start` is a pickle, or a zip of pickles.

    A safetensors file begins with a number, which may have the same first bytes, but has a 0 as its fourth.
    """
    if start[:2] in PICKLES and start[3:4] != b"\0":
        raise UserError(f"{path}: a pickle, which could run code; refused unread: convert it to safetensors")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU. Raises `UserError` if it is anything else or broken."""
    return {name: place.read() for name, place in _read_header(Path(path)).items()}


def find_weights(folder: str | Path) -> dict[str, Place]:
    """Where each tensor of a model folder is stored, in one file or in indexed shards; all headers are checked.

    Raises `UserError` with the complete list of what is wrong: shards missing or outside the folder, tensors missing,
    unlisted or held twice, files that are not safetensors.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists() or not (folder / INDEX).exists():
        names = {"model.safetensors": None}
    else:
        names = _read_index(folder)
    places, problems, seen = {}, [], {}
    for file, listed in names.items():
        try:
            found = _read_header(folder / file)
        except UserError as problem:
            problems.append(str(problem))
            continue
        held = set(found)
        problems += [f"{name} is missing from {file}" for name in sorted((listed or held) - held)]
        problems += [f"{name} in {file} is not in the index" for name in sorted(held - (listed or held))]
        problems += [f"{name} is in {seen[name]} and in {file}" for name in sorted(held & set(seen))]
        seen |= dict.fromkeys(held, file)
        places |= found
    if problems:
        raise UserError(f"{folder}: its weights cannot be used: {'; '.join(problems)}")
    return places


def _read_index(folder: Path) -> dict[str, set[str]]:
    """The tensors that the index promises, by shard."""
    path = folder / INDEX
    try:
        places = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        names = {str(file) for file in places.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path}: not an index of weights ({type(problem).__name__}: {problem})") from None
    outside = sorted(name for name in names if not re.fullmatch(r"[^/\\:]+\.safetensors", name))
    if outside:
        raise UserError(f"{path}: {', '.join(map(repr, outside))}: not a safetensors file of this folder; refused")
    return {file: {name for name, place in places.items() if place == file} for file in sorted(names)}


def _no_duplicates(pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"holds twice: {', '.join(twice)}")
    return dict(pairs)


def _read_header(path: Path) -> dict[str, Place]:
    """Where each tensor of a file is stored, after safetensors has checked that header and file size agree."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            refuse_pickle(path, start)
            with safe_open(path, framework="pt"):
                pass
            header = json.loads(stream.read(int.from_bytes(start, "little")), object_pairs_hook=_no_duplicates)
            begin = stream.tell()
    except FileNotFoundError:
        others = sorted(file.name for file in path.parent.glob("*.bin")) if path.parent.is_dir() else []
        hint = f" (there is {others[0]}, a pickle: convert it to safetensors)" if others else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as problem:
        raise UserError(f"{path}: truncated or no safetensors file ({problem}); get a whole copy") from None
    header.pop("__metadata__", None)
    strange = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if strange:
        raise UserError(f"{path}: holds tensors of type {', '.join(strange)}, which is not supported")
    return {
        name: Place(path, begin + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }


def write_tensors(
    path: Path, shapes: dict[str, Sequence[int]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file with only one tensor at a time in memory: read(name) gives a tensor of that shape."""
    word = next(name for name, known in DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = read(name).to(device="cpu", dtype=dtype).contiguous().view(-1)
            file.write(tensor.view(torch.uint8).numpy())


def check_finite(name: str, tensor: Tensor, source: str | Path) -> None:
    """Raise `UserError` naming the tensor if it holds NaN or infinity."""
    if tensor.is_floating_point():
        parts = tensor.reshape(-1).split(PIECE)  # no second tensor of this size
        wide = (part.float() if part.element_size() == 1 else part for part in parts)
        bad = tensor.numel() - sum(int(torch.isfinite(part).sum()) for part in wide)
        if bad:
            raise UserError(
                f"{source}: {name} holds {bad:,} of {tensor.numel():,} values that are not finite; "
                "take an earlier checkpoint"
            )


def match_tensors(expected: dict, got: dict, source: str | Path) -> None:
    """Raise one `UserError` listing all tensors missing, unexpected or of another shape. Both: {name: shape}."""
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not expected" for name in got if name not in expected]
    problems += [
        f"{name} is {tuple(got[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in got and tuple(got[name]) != tuple(shape)
    ]
    if problems:
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems)}")
