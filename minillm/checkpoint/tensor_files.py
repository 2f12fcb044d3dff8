"""Reading tensors from safetensors files: one file, or indexed shards.

There is no pickle anywhere: reading a file cannot run code. Reading is strict: everything that is missing,
unexpected, of another shape or broken is listed, and nothing is loaded in part.
"""

import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.base.contents import Contents
from minillm.base.errors import MissingError, UserError, naming
from minillm.base.json_door import file_size, parse_json, path_inside, read_json

WEIGHTS = "model"  # how the names of a model's files begin
SINGLE = f"{WEIGHTS}.safetensors"
INDEX = f"{SINGLE}.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
MOST_PROBLEMS = 50  # after which no other shard is looked for


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: `offset` bytes into a file, contiguous, little-endian."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dtype: torch.dtype | None = None, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor in memory of its own, converted piece by piece, so that there is never a second copy of it.

        part: a slice with begin and end for each dimension, to read that part alone and no other byte of the file.

        The file is not memory-mapped: its pages would count as memory, and a tensor would not be aligned like torch's,
        so that vectorized code may round differently and a resumed run diverge.
        """
        part = part or tuple(slice(0, size) for size in self.shape)
        out = torch.empty([each.stop - each.start for each in part], dtype=dtype or self.dtype)
        if out.numel() == 0:
            return out
        firsts, length = _stretches(self.shape, part)
        with self.file.open("rb", buffering=0) as stream:  # a buffer would read ahead
            for first, numbers in zip(firsts, out.view(-1).split(length), strict=True):
                stream.seek(self.offset + first * self.dtype.itemsize)
                self._read_into(numbers, stream)
        return out

    def _read_into(self, numbers: Tensor, stream: FileIO) -> None:
        """Fill a flat tensor from where the stream stands."""
        needs_conversion = numbers.dtype != self.dtype
        for piece in numbers.split(PIECE):
            stored = torch.empty(piece.shape, dtype=self.dtype) if needs_conversion else piece
            missing = memoryview(stored.view(torch.uint8).numpy())
            while len(missing):
                n_read = stream.readinto(missing)
                if not n_read:
                    raise UserError(f"{self.file}: ends before its tensors do; get a whole copy")
                missing = missing[n_read:]
            if needs_conversion:
                piece.copy_(stored)


def _stretches(shape: tuple[int, ...], part: tuple[slice, ...]) -> tuple[Iterator[int], int]:
    """Where in a flat tensor of this shape the numbers of a part lie that follow one another, and how many each time.

    Of some rows with all columns that is one stretch, of some columns one for each row.
    """
    whole = [each == slice(0, size) for size, each in zip(shape, part, strict=True)]
    cut = max((dim for dim, is_whole in enumerate(whole) if not is_whole), default=0)  # the last that is not whole
    if not shape:
        return iter([0]), 1
    inner = math.prod(shape[cut + 1 :])
    outer = itertools.product(*(range(each.start, each.stop) for each in part[:cut]))
    strides = [math.prod(shape[dim + 1 :]) for dim in range(cut)]
    offset = part[cut].start * inner
    firsts = (offset + sum(map(operator.mul, index, strides)) for index in outer)
    return firsts, (part[cut].stop - part[cut].start) * inner


def are_equal(one: Place, other: Place) -> bool:
    """Whether two stored tensors hold the same numbers."""
    if one.shape != other.shape:
        return False
    dtype = one.dtype if one.dtype == other.dtype else torch.float32
    return torch.equal(one.read(dtype), other.read(dtype))


def has_own_head(folder: str | Path) -> bool:
    """Whether a folder's weights hold a head that is not the embedding; a line says so, once in a process."""
    if not any((Path(folder) / name).exists() for name in (SINGLE, INDEX)):
        return False
    places = find_weights(folder)
    head, embedding = places.get(HEAD), places.get(EMBEDDING)
    if head is None or embedding is None or are_equal(head, embedding):
        return False
    _print_untied(str(folder))
    return True


@cache
def _print_untied(folder: str) -> None:
    print(f"{folder}: tied in its config.json, but its head is not its embedding: loaded untied", file=sys.stderr)


def refuse_pickle(path: Path, start: bytes) -> None:
    """Raise `UserError` if a file that begins with `start` is a pickle, or a zip of pickles.

    A safetensors file begins with a number, which may have the same first bytes, but has a 0 as its fourth.
    """
    if start[:2] in PICKLES and start[3:4] != b"\0":
        raise UserError(f"{path}: a pickle, which could run code; refused unread: convert it to safetensors")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU. Raises `UserError` if it is anything else or broken."""
    return {name: place.read() for name, place in _read_header(Path(path)).items()}


def shapes_in(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of one safetensors file. Raises `UserError` as `load_tensors` does."""
    return {name: place.shape for name, place in _read_header(Path(path)).items()}


def find_tensors(path: Path) -> dict[str, Place]:
    """Where each tensor of "x.safetensors" is stored, or of the files "x-00001-of-00003.safetensors" … in its place.

    Raises `UserError` as `load_tensors` does, and if one of several files is missing.
    """
    several = sorted(path.parent.glob(f"{path.stem}-[0-9]*-of-[0-9]*.safetensors"))
    if path.exists() or not several:
        return _read_header(path)
    n_files = several[0].stem.rpartition("-")[2]
    places: dict[str, Place] = {}
    for number in range(1, int(n_files) + 1):
        places |= _read_header(path.with_name(f"{path.stem}-{number:05}-of-{n_files}.safetensors"))
    return places


def find_weights(folder: str | Path) -> dict[str, Place]:
    """Where each tensor of a model folder is stored, in one file or in indexed shards; all headers are checked.

    Raises `UserError` with the complete list of what is wrong: shards missing or outside the folder, tensors missing,
    unlisted or held twice, files that are not safetensors.
    """
    folder = Path(folder)
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return _read_single(folder)
    places: dict[str, Place] = {}
    problems = []
    for shard, promised in _read_index(folder).items():
        if len(problems) > MOST_PROBLEMS:
            problems.append("…")
            break
        try:
            in_shard = _read_header(folder / shard)
        except UserError as problem:
            problems.append(str(problem))
            continue
        names = set(in_shard)
        problems += [f"{name} is missing from {shard}" for name in sorted(promised - names)]
        problems += [f"{name} in {shard} is not in the index" for name in sorted(names - promised)]
        problems += [
            f"{name} is in {places[name].file.name} and in {shard}" for name in sorted(names) if name in places
        ]
        places |= in_shard
    if problems:
        raise UserError(f"{folder}: its weights cannot be used: {'; '.join(problems)}")
    return places


def _read_single(folder: Path) -> dict[str, Place]:
    """Where the tensors of a folder with a single file of weights are."""
    with naming(f"{folder}: its weights cannot be used"):
        return _read_header(folder / SINGLE)


def _read_index(folder: Path) -> dict[str, set[str]]:
    """The tensors that the index promises, by shard."""
    path = folder / INDEX
    index = Contents(read_json(path), f"{path}: not an index of weights")
    weight_map = index.need("weight_map", dict[str, str])
    shards: dict[str, set[str]] = {shard: set() for shard in sorted(set(weight_map.values()))}
    for shard in shards:
        if path_inside(folder, shard, path).suffix != ".safetensors":
            raise UserError(f"{path}: {shard:.80}: not a safetensors file of this folder; refused")
    for name, shard in weight_map.items():
        shards[shard].add(name)
    return shards


def _read_header(path: Path) -> dict[str, Place]:
    """Where each tensor of a file is stored, after safetensors has checked that header and file size agree."""
    try:
        file_size(path)  # is it a file at all
        with path.open("rb") as stream:
            start = stream.read(8)
            refuse_pickle(path, start)
            with safe_open(path, framework="pt"):
                pass
            written = stream.read(int.from_bytes(start, "little"))
            begin = stream.tell()
    except MissingError:
        pickles = sorted(file.name for file in path.parent.glob("*.bin")) if path.parent.is_dir() else []
        hint = f" (there is {pickles[0]}, a pickle: convert it to safetensors)" if pickles else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as problem:
        raise UserError(f"{path}: truncated or no safetensors file ({problem!s:.300}); get a whole copy") from None
    header = parse_json(written, f"{path}: its header")
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise UserError(f"{path}: holds tensors of type {', '.join(unknown)}, which is not supported")
    places = {}
    for name, entry in header.items():
        offset, _ = entry["data_offsets"]
        places[name] = Place(path, begin + offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return places


# ---- checks


def check_finite(
    name: str, tensor: Tensor, source: str | Path, read: Callable[[torch.dtype], Tensor] | None = None
) -> None:
    """Raise `UserError` naming the tensor if it holds NaN or infinity, or whole numbers.

    read: gives its values in another dtype, which tells whether the stored ones are finite and float16 is too narrow.
    """
    if not tensor.is_floating_point():
        raise UserError(
            f"{source}: {name} holds whole numbers ({tensor.dtype}), not those of a model; get a whole copy"
        )
    n_finite = 0
    for piece in tensor.reshape(-1).split(PIECE):  # no second tensor of this size
        if piece.element_size() == 1:  # torch has no isfinite for float8
            piece = piece.float()
        n_finite += int(torch.isfinite(piece).sum())
    n_bad = tensor.numel() - n_finite
    if n_bad and tensor.dtype == torch.float16 and read and read(torch.float32).isfinite().all():
        raise UserError(
            f"{source}: {name} holds {n_bad:,} of {tensor.numel():,} values beyond float16's 65,504; choose --dtype "
            "bfloat16 or float32"
        )
    if n_bad:
        raise UserError(
            f"{source}: {name} holds {n_bad:,} of {tensor.numel():,} values that are not finite; "
            "take an earlier checkpoint"
        )


def match_tensors(expected: dict, stored: dict, source: str | Path) -> None:
    """Raise one `UserError` listing all tensors missing, unexpected or of another shape. Both: {name: shape}."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in expected]
    for name, shape in expected.items():
        if name in stored and tuple(stored[name]) != tuple(shape):
            problems.append(f"{name} is {tuple(stored[name])}, expected {tuple(shape)}")
    if problems:
        raise UserError(f"{source}: does not fit the model: {'; '.join(problems)}")
