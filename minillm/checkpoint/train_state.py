"""Checkpoints: weights, optimizer and progress as safetensors and JSON in a Hugging Face model folder.

step-00000060/
    config.json model.safetensors      the model, as transformers, vLLM and others read it; in several files and an
                                       index if it is large (tensor_writer.py), and so the optimizer
    tokenizer.model …                  its tokenizer
    resume/optimizer.safetensors       what only resuming needs; in a folder of its own, since some loaders
    resume/train_state.json            read every *.safetensors beside the model
    resume/value.safetensors           a model trained beside it, if there is one: PPO's value model
    resume/outer.safetensors           of workers that train alone in between (DiLoCo): the outer momentum, and
    resume/workers.safetensors         the optimizer state of each, stacked, in place of optimizer.safetensors
    resume/options.toml                the run's options, as --config reads them
    manifest.json                      size and SHA-256 of each file (see base/files.py)
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.contents import Contents
from minillm.base.errors import MissingError, UserError
from minillm.base.json_door import read_object
from minillm.base.options import spelled
from minillm.checkpoint import run_folder, tensor_writer
from minillm.checkpoint.tensor_files import Place, check_finite, find_tensors, match_tensors
from minillm.checkpoint.together import SharedSave, Source, ToWrite, tensors_to_write
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import local, place_of, whole_shape

STATE = "resume/train_state.json"
OPTIMIZER = "resume/optimizer"  # how the names of its files begin
KINDS = {  # of what a state may hold besides its step
    "time_s": float,
    "optimizer": dict[str, dict],
    "scaler": dict[str, float],
    "scalers": dict[str, dict],  # of models beside it
    "score_scale": dict[str, float],  # of a reward model
    "beta": float,  # of PPO, if it follows a target
    "fingerprints": dict[str, str],
    "config": dict,
    "day": int,  # on which the run began; templates that write the day write this one
    "threads": int,
    "turns": int,
    "started_from": str,  # the folder of the model that the run began with, seen from the run's folder
    "world": int,
    "torch": str,
    "device": str,
    "precision": str,
}
ORDER = "batch size, sequence length or seed"  # the name of the fingerprint of the data's order
OF_ORDER = ("seed", "seq_len", "packing", "pack", "group_size")  # options that are in it, besides the batch size
CONTENT = "content of the "  # how the fingerprint of some bytes of data is called
FIXED = {"tokenizer", "architecture", "base model", "tuning"}  # fingerprints that no run may change
MACHINE = {  # what rounding depends on: its name
    "threads": "threads",
    "world": "ranks",
    "torch": "torch version",
    "device": "device",
    "precision": "matrix products",
}


def fingerprint(*parts) -> str:
    """Short SHA-256 of any values that JSON can represent (others by `str`)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- writing


@dataclass
class Checkpoint:
    """What a checkpoint is to hold."""

    model: list[ToWrite]  # the files of weights, or of an adapter
    write_beside: Callable[[Path], None]  # writes config.json, the tokenizer and the like into the new folder
    state: dict  # values for JSON
    optimizers: list[torch.optim.Optimizer]
    named_parameters: dict[str, Tensor]
    beside: dict[str, dict[str, Tensor]] = field(
        default_factory=dict
    )  # name → tensors of a model trained along with it


def save(folder: Path, step: int, ranks: Ranks, checkpoint: Checkpoint, in_background: bool = False) -> SharedSave:
    """Begin to write the checkpoint of `step` into a run's folder, on all ranks; it is there once it is finished.

    Raises `UserError` if it cannot be written; earlier checkpoints are untouched. in_background: see `SharedSave`.
    """
    sources, described = flatten_optimizers(checkpoint.optimizers, checkpoint.named_parameters)
    limit = tensor_writer.MOST_BYTES
    parts = [*checkpoint.model, *tensors_to_write(OPTIMIZER, sources, limit)]
    for name, weights in checkpoint.beside.items():
        of_model = {key: Source.of(tensor) for key, tensor in weights.items()}
        parts += tensors_to_write(f"resume/{name}", of_model, limit)
    written = {**checkpoint.state, "format": 1, "step": step, "optimizer": described}
    text = json.dumps(written, indent=1) + "\n"

    def write_rest(scratch: Path) -> None:
        checkpoint.write_beside(scratch)
        (scratch / STATE).write_text(text, encoding="utf-8")

    return SharedSave(folder / run_folder.step_name(step), ranks, parts, write_rest, in_background)


def flatten_optimizers(
    optimizers: list[torch.optim.Optimizer], named_parameters: dict[str, Tensor]
) -> tuple[dict[str, Source], dict]:
    """The state of one or several optimizers as flat tensors, "parameter/key", in any order of parameters.

    Returns the tensors and, per parameter, {"kind": the optimizer's class, "keys": names of its tensors}. Options
    (learning rate, weight decay…) are left out: a resumed run takes them from its configuration.
    """
    names = {parameter: name for name, parameter in named_parameters.items()}
    sources, described = {}, {}
    for optimizer in optimizers:
        for parameter in _parameters(optimizer):
            name = names[parameter]
            state = optimizer.state.get(parameter, {})
            described[name] = {"kind": type(optimizer).__name__, "keys": sorted(state)}
            for key, value in state.items():
                sources[f"{name}/{key}"] = Source.of(parameter, value)
    return sources, described


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# ---- reading what resuming needs


def read_state(folder: str | Path) -> dict:
    """A checkpoint's train_state.json, each value of its kind. Raises `UserError` if the folder holds only a model."""
    try:
        state = read_object(Path(folder) / STATE)
    except MissingError:
        raise UserError(f"{folder}: no {STATE} there, so it is no checkpoint; start from it by --init_from") from None
    version = state.need("format", int)
    if version != 1:
        raise UserError(f"{state.source}: format {version}, but this version reads 1; resume with a newer minillm")
    state.need("step", int, at_least=0)
    for name, kind in KINDS.items():
        state.get(name, kind)
    for name in ("init_from", "template"):  # what others read of the options
        state.part("config").get(name, str)
    for name, entry in state.get("optimizer", dict[str, dict], {}).items():
        described = Contents(entry, f"{state.source}: optimizer: {name:.80}")
        described.need("kind", str)
        described.need("keys", list[str])
    return {name: value for name, value in state.values.items() if value is not None}


def restore_optimizers(
    folder: str | Path, optimizers: list[torch.optim.Optimizer], named_parameters: dict[str, Tensor]
) -> None:
    """Load a checkpoint's optimizer state, bit for bit; the optimizers' options stay as they are.

    Of a sharded parameter's state each rank reads its own part alone. Raises `UserError` for all that is missing,
    unexpected or of another shape, before anything is changed.
    """
    described = read_state(folder).get("optimizer", {})
    places = find_tensors(Path(folder) / f"{OPTIMIZER}.safetensors")
    parameters = {p: optimizer for optimizer in optimizers for p in _parameters(optimizer)}
    names = {parameter: name for name, parameter in named_parameters.items()}

    # is each parameter trained by the same kind of optimizer, and is all of its state there?
    trained_now = {names[p]: (type(optimizer).__name__, whole_shape(p)) for p, optimizer in parameters.items()}
    faults = {"not trained any more": [name for name in described if name not in trained_now]}  # → of which parameters
    expected_shapes = {}
    for name, (kind, shape) in trained_now.items():
        saved = described.get(name, {"kind": "", "keys": []})
        if saved["kind"] != kind:
            by_another = f"--optimizer: {saved['kind'].lower()} in the checkpoint, {kind.lower()} now"
            faults.setdefault(by_another if saved["kind"] else "not trained before", []).append(name)
        for key in saved["keys"]:
            # a tensor of state is as large as its parameter, or one number (AdamW's count of steps)
            place = places.get(f"{name}/{key}")
            is_number = place is not None and place.shape == ()
            expected_shapes[f"{name}/{key}"] = () if is_number else shape
    problems = [f"{fault} ({_some(which)})" for fault, which in faults.items() if which]
    if problems:
        remedy = "give what it was made with, or choose another --out"
        raise UserError(f"{folder}: its optimizer is of another set-up: {'; '.join(problems)}; {remedy}")
    match_tensors(
        expected_shapes, {name: place.shape for name, place in places.items()}, f"{folder}/{OPTIMIZER}.safetensors"
    )

    # read all of it before anything changes: a part of it may be damaged
    states = {}
    for parameter in parameters:
        name = names[parameter]
        keys = described[name]["keys"]
        states[parameter] = {key: _read_for(parameter, f"{name}/{key}", places) for key in keys}
    for optimizer in optimizers:
        state_dict = optimizer.state_dict()
        in_order = enumerate(_parameters(optimizer))
        state_dict["state"] = {number: states[p] for number, p in in_order if states[p]}  # none before the first step
        optimizer.load_state_dict(state_dict)  # torch knows which tensor belongs on which device


def _some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def _read_for(parameter: Tensor, name: str, places: dict[str, Place]) -> Tensor:
    """A stored tensor that is sharded as the parameter is, or one number; each rank reads what it holds of it."""
    place = places[name]
    tensor = place.read(part=place_of(parameter) if place.shape else ())
    check_finite(name, tensor, place.file)
    return tensor


@torch.no_grad()
def restore_beside(folder: str | Path, beside: dict[str, dict[str, Tensor]]) -> None:
    """Load what a checkpoint holds of the models that are trained beside the one it is of, bit for bit.

    beside: as it is saved. Raises `UserError` for a file that is missing, or tensors that are not those.
    """
    for name, weights in beside.items():
        path = Path(folder) / "resume" / f"{name}.safetensors"
        places = find_tensors(path)
        shapes = {key: place.shape for key, place in places.items()}
        match_tensors({key: whole_shape(tensor) for key, tensor in weights.items()}, shapes, path)
        for key, weight in weights.items():
            local(weight).copy_(_read_for(weight, key, places))


def compare_fingerprints(
    saved: dict,
    now: dict,
    allow_data_change: bool = False,
    source: str | Path = "the checkpoint",
    free: Collection[str] = (),
) -> list[str]:
    """What changed between a saved state, that of the folder `source`, and the present one, as lines to print.

    Both hold "fingerprints" {name: value} and may hold "config" {option: value} and the names of
    `MACHINE`. Raises `UserError` naming the remedy when a fingerprint differs; with allow_data_change only those of
    tokenizer, model and its tuning must agree. free: options that no fingerprint depends on, so that a refusal does not
    mention them.
    """
    before, after = saved.get("fingerprints", {}), now.get("fingerprints", {})
    differing = _differing(before, after)
    fatal = [name for name in differing if name in FIXED or not allow_data_change]
    changed = _changed_options(saved.get("config", {}), now.get("config", {}))
    if fatal:
        what = " and another ".join(name.replace(", ", "/").replace(" or ", "/") for name in fatal)
        options = "; ".join(line for name, line in changed.items() if name not in free)
        options = f" ({options})" if options else ""
        flag = "" if FIXED & set(fatal) else ", or accept it by --allow_data_change"
        raise UserError(
            f"{source} was made with another {what}{options}: choose another --out, or give what it was made with{flag}"
        )
    lines = [f"{name}: changed since the checkpoint, as --allow_data_change allows" for name in differing]
    is_other = not {"data", f"{CONTENT}data"}.isdisjoint(differing)
    if is_other or ORDER in differing:
        lines.append(_changed_order(saved, now, other_data=is_other))
    lines += changed.values()
    for key, name in MACHINE.items():
        if key in saved and key in now and saved[key] != now[key]:
            change = f"{name}: {saved[key]} in the checkpoint, {now[key]} now"
            lines.append(f"{change}; results agree to rounding, not bit for bit")
    return lines


def _differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The names of the fingerprints that differ.

    The content of data is compared where these are not others altogether.
    """
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    needless = {f"{CONTENT}{name}" for name in names}
    return [name for name in names if name not in needless]


def _changed_order(saved: dict, now: dict, other_data: bool) -> str:
    """What --allow_data_change does to the order of the data; other_data: whether it is no longer the same text."""
    before, after = saved.get("config", {}), now.get("config", {})
    same_order = all(before.get(name) == after.get(name) for name in OF_ORDER)
    if other_data or not same_order or not isinstance(before.get("batch_size"), int):
        return "data: another order begins; some of what was read comes again, and some may never come"
    read, following = (saved["step"] * config["batch_size"] for config in (before, after))
    between = f"{abs(following - read):,} are {'left out' if following > read else 'read again'}"
    return f"data: {read:,} samples were read, and the next is number {following + 1:,}: {between}"


def _changed_options(before: dict, after: dict) -> dict[str, str]:
    """Option → a line that says how it changed; options that are new or gone are left out."""
    return {
        name: f"--{name}: {_typed(before[name])} in the checkpoint, {_typed(value)} now"
        for name, value in after.items()
        if name in before and _plain(before[name]) != _plain(value) and name not in ("resume", "allow_data_change")
    }


def _typed(value) -> str:
    """A value as it is typed on a command line: none, true; of several those with spaces between."""
    return spelled(tuple(value) if isinstance(value, list) else value)


def _plain(value):
    """A value after a round trip through JSON (a tuple becomes a list)."""
    return json.loads(json.dumps(value, default=str))
