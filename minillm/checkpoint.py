"""Checkpoints: weights, optimizer and progress as safetensors and JSON in a Hugging Face model folder.

step-00000060/
    config.json model.safetensors      the model, as transformers, vLLM and others read it
    tokenizer.model …                  its tokenizer
    resume/optimizer.safetensors       what only resuming needs; in a folder of its own, since some loaders
    resume/train_state.json            read every *.safetensors beside the model
    manifest.json                      size and SHA-256 of each file (see files.py)

There is no pickle anywhere: reading a file cannot run code. Reading is strict: everything that is missing,
unexpected, of another shape or broken is listed, and nothing is loaded in part.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm import UserError, config, files, run

INDEX = "model.safetensors.index.json"
STATE = "resume/train_state.json"
OPTIMIZER = "resume/optimizer.safetensors"
FIXED = {"tokenizer", "architecture", "base model", "tuning"}  # fingerprints that no run may change
BOUND = {"data", "init_from", "batch_size", "seq_len", "seed"}  # options that go into a fingerprint
FREE = {f.name for f in dataclasses.fields(config.TrainingConfig)} - BOUND | {"epochs", "eval_data", "eval_rows"}
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


# ---- writing


def save(
    folder: str | Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tokenizer,
    template: str | None = None,
    state: dict,
    optimizers: list[torch.optim.Optimizer],
    named_parameters: dict[str, Tensor],
) -> Path:
    """Write the checkpoint of `step` into a run's folder, whole or not at all; returns its path.

    write_model(folder): writes config.json and weights. tokenizer: a `Tokenizer` or None. template: the prompt format
    to record with it (None: its own). state: values for JSON. Raises `UserError` if the disk is full or read-only;
    earlier checkpoints are untouched.
    """
    path = Path(folder) / run.step_name(step)
    tensors, described = flatten_optimizers(optimizers, named_parameters)

    def fill(scratch: Path) -> None:
        (scratch / "resume").mkdir()
        try:
            write_model(scratch)
            save_file(tensors, scratch / OPTIMIZER)
        except SafetensorError as problem:
            raise _as_os_error(problem) from None
        if tokenizer is not None:
            tokenizer.save(scratch, template=template)
        text = json.dumps({**state, "format": 1, "step": step, "optimizer": described}, indent=1)
        (scratch / STATE).write_text(text + "\n", encoding="utf-8")

    files.write_folder(path, fill)
    return path


def _as_os_error(problem: SafetensorError) -> Exception:
    """safetensors reports a full disk as text, "… (os error 28)"; turn that back into an OSError."""
    found = re.search(r"I/O error: (.*) \(os error (\d+)\)", str(problem))
    return OSError(int(found[2]), found[1]) if found else problem


def flatten_optimizers(
    optimizers: list[torch.optim.Optimizer], named_parameters: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict]:
    """The state of one or several optimizers as flat tensors, "parameter/key", in any order of parameters.

    Returns the tensors and, per parameter, {"kind": the optimizer's class, "keys": names of its tensors}. Options
    (learning rate, weight decay…) are left out: a resumed run takes them from its configuration.
    """
    names = {parameter: name for name, parameter in named_parameters.items()}
    tensors, described = {}, {}
    for optimizer in optimizers:
        for parameter in _parameters(optimizer):
            name, held = names[parameter], optimizer.state.get(parameter, {})
            described[name] = {"kind": type(optimizer).__name__, "keys": sorted(held)}
            tensors |= {f"{name}/{key}": value.detach().contiguous() for key, value in held.items()}
    return tensors, described


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# ---- reading what resuming needs


def read_state(folder: str | Path) -> dict:
    """A checkpoint's train_state.json. Raises `UserError` if the folder holds only a model."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != 1:
            raise UserError(f"{path}: format {state['format']}, but this version reads 1; resume with a newer minillm")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no {STATE} there, so it is no checkpoint; start from it by --init_from") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path}: not a training state ({type(problem).__name__}: {problem})") from None
    return state


def restore_optimizers(
    folder: str | Path, optimizers: list[torch.optim.Optimizer], named_parameters: dict[str, Tensor]
) -> None:
    """Load a checkpoint's optimizer state, bit for bit; the optimizers' options stay as they are.

    Raises `UserError` listing all that is missing, unexpected or of another shape, before anything is changed.
    """
    described = read_state(folder)["optimizer"]
    tensors = load_tensors(Path(folder) / OPTIMIZER)
    names = {parameter: name for name, parameter in named_parameters.items()}
    wanted = {names[p]: (type(o).__name__, p.shape) for o in optimizers for p in _parameters(o)}
    problems = [f"{name} is not trained any more" for name in described if name not in wanted]
    expected = {}
    for name, (kind, shape) in wanted.items():
        saved = described.get(name, {"kind": "nothing", "keys": []})
        if saved["kind"] != kind:
            problems.append(f"{name} was trained by {saved['kind']}, now by {kind}")
        # a tensor of state is as large as its parameter, or one number (AdamW's count of steps)
        scalars = {key for key in saved["keys"] if f"{name}/{key}" in tensors and not tensors[f"{name}/{key}"].dim()}
        expected |= {f"{name}/{key}": () if key in scalars else shape for key in saved["keys"]}
    if problems:
        raise UserError(f"{folder}: its optimizer is of another set-up: {'; '.join(problems)}; choose another --out")
    match_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()}, f"{folder}/{OPTIMIZER}")
    for optimizer in optimizers:
        whole = optimizer.state_dict()
        whole["state"] = {
            i: {key: tensors[f"{names[p]}/{key}"] for key in described[names[p]]["keys"]}
            for i, p in enumerate(_parameters(optimizer))
            if described[names[p]]["keys"]
        }
        optimizer.load_state_dict(whole)  # torch knows which tensor belongs on which device


def compare_fingerprints(
    saved: dict, now: dict, allow_data_change: bool = False, source: str | Path = "the checkpoint"
) -> list[str]:
    """What changed between a saved state, that of the folder `source`, and the present one, as lines to print.

    Both hold "fingerprints" {name: value} and may hold "config" {option: value}, "threads", "world", "torch". Raises
    `UserError` naming the remedy when a fingerprint differs; with allow_data_change only those of
    tokenizer, model and its tuning must agree.
    """
    before, after = saved.get("fingerprints", {}), now.get("fingerprints", {})
    differs = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    fatal = [name for name in differs if name in FIXED or not allow_data_change]
    old, new = dict(saved.get("config", {})), dict(now.get("config", {}))
    changed = {
        name: f"--{name}: {old[name]} in the checkpoint, {value} now"
        for name, value in new.items()
        if name in old and _plain(old[name]) != _plain(value) and name not in ("resume", "allow_data_change")
    }
    if fatal:
        what = " and another ".join(name.replace(", ", "/").replace(" or ", "/") for name in fatal)
        options = "; ".join(line for name, line in changed.items() if name not in FREE)
        options = f" ({options})" if options else ""
        flag = "" if FIXED & set(fatal) else ", or accept it by --allow_data_change"
        raise UserError(
            f"{source} was made with another {what}{options}: choose another --out, or give what it was made with{flag}"
        )
    lines = [f"{name}: changed since the checkpoint, as --allow_data_change allows" for name in differs]
    lines += changed.values()
    words = {"threads": "threads", "world": "ranks", "torch": "torch version"}
    return lines + [
        f"{word}: {saved[key]} in the checkpoint, {now[key]} now; results agree to rounding, not bit for bit"
        for key, word in words.items()
        if key in saved and key in now and saved[key] != now[key]
    ]


def _plain(value):
    """A value after a round trip through JSON (a tuple becomes a list)."""
    return json.loads(json.dumps(value, default=str))


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

    A safetensors file or llama2.c model begins with a number, which may have the same first bytes, but has a 0 as its
    fourth.
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
