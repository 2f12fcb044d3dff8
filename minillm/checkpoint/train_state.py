"""Checkpoints: weights, optimizer and progress as safetensors and JSON in a Hugging Face model folder.

step-00000060/
    config.json model.safetensors      the model, as transformers, vLLM and others read it
    tokenizer.model …                  its tokenizer
    resume/optimizer.safetensors       what only resuming needs; in a folder of its own, since some loaders
    resume/train_state.json            read every *.safetensors beside the model
    resume/options.toml                the run's options, as --config reads them
    manifest.json                      size and SHA-256 of each file (see base/files.py)
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import run_folder
from minillm.checkpoint.tensor_files import load_tensors, match_tensors


def fingerprint(*parts) -> str:
    """Short SHA-256 of any values that JSON can represent (others by `str`)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


STATE = "resume/train_state.json"
OPTIMIZER = "resume/optimizer.safetensors"
FIXED = {"tokenizer", "architecture", "base model", "tuning"}  # fingerprints that no run may change


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
    path = Path(folder) / run_folder.step_name(step)
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
    saved: dict,
    now: dict,
    allow_data_change: bool = False,
    source: str | Path = "the checkpoint",
    free: Collection[str] = (),
) -> list[str]:
    """What changed between a saved state, that of the folder `source`, and the present one, as lines to print.

    Both hold "fingerprints" {name: value} and may hold "config" {option: value}, "threads", "world", "torch". Raises
    `UserError` naming the remedy when a fingerprint differs; with allow_data_change only those of
    tokenizer, model and its tuning must agree. free: options that no fingerprint depends on, so that a refusal does not
    mention them.
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
        options = "; ".join(line for name, line in changed.items() if name not in free)
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
