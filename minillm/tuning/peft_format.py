"""Adapters on disk, as PEFT writes and reads them.

adapter_config.json           the method and its options, in PEFT's terms
adapter_model.safetensors     what is trained
minillm_base.json             only ours; the adapter's base: its folder relative to this one, its fingerprint, and its
                              bits if it is quantized. Without this file an adapter is accepted if its shapes fit

Partly frozen models and bottleneck adapters have no counterpart in PEFT; their peft_type is a name of our own, which
PEFT refuses. Formats of PEFT 0.21.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.contents import Contents
from minillm.base.errors import UserError, naming
from minillm.base.json_door import read_object
from minillm.checkpoint import huggingface, run_folder, tensor_files
from minillm.checkpoint.tensor_writer import write_file
from minillm.checkpoint.together import Source, ToWrite, tensors_to_write
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import Adapter, attach, remove_adapter
from minillm.tuning.options import VIRTUAL, TuningConfig
from minillm.tuning.target_modules import linear_paths, matching_targets, split_names
from minillm.tuning.virtual_tokens import PEFT_TYPES

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "minillm_base.json"
ENCODER = "resume/virtual.safetensors"
HEADER = {"format": "pt"}  # what the header of PEFT's files says
PREFIX = "base_model.model."
SCORE, SCORE_TASK = "score", "SEQ_CLS"  # the head of a reward or value model, and PEFT's name for such a model
BESIDE_VIRTUAL = "base_model.score.weight"  # PEFT's key of that head beside virtual tokens
OWN = {"freeze": ("train_layers",), "adapter": ("bottleneck_dim",)}  # unknown to PEFT: options under our names
VIRTUAL_TYPES = {theirs: kind for kind, theirs in PEFT_TYPES.items()}
# Fields of a LoRA or IA3 config: those that are read here, and those that have no effect, whatever their value
READ = {"target_modules", "modules_to_save", "feedforward_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"}
READ |= {"use_dora", "ensure_weight_tying", "init_lora_weights"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"}
HARMLESS |= {"qalora_group_size", "revision", "task_type", "init_ia3_weights"}
KINDS = {  # of the values that are read, where one is given
    "base_model_name_or_path": str,
    "lora_dropout": float,
    "use_rslora": bool,
    "use_dora": bool,
    "ensure_weight_tying": bool,
    "modules_to_save": list[str],
    "task_type": str,
    "train_layers": str,
}
PEFT_ALPHA = 8  # where lora_alpha is missing, whatever the rank
SIZES = {"LORA": "r", "MINILLM_ADAPTER": "bottleneck_dim", **dict.fromkeys(VIRTUAL_TYPES, "num_virtual_tokens")}
MATCHING = """import json, re, sys
pattern, names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))"""
MATCHING_S = 10  # seconds that a regular expression may take: "(.+)+Z" would take years


# ---- writing


def describe(adapter: Adapter) -> dict:
    """The contents of adapter_config.json."""
    options = adapter.options
    tune = options.tune
    shared = {
        "base_model_name_or_path": None if adapter.base_folder is None else str(adapter.base_folder),
        "inference_mode": True,
        "task_type": SCORE_TASK if SCORE in adapter.parts else "CAUSAL_LM",
    }
    in_full = split_names(options.modules_to_save) if options.modules_to_save else []
    if SCORE in adapter.parts and SCORE not in in_full:
        in_full.append(SCORE)
    if tune in VIRTUAL:
        return {**adapter.parts["virtual"].peft_config(), **shared, "modules_to_save": in_full or None}
    if tune in OWN:
        own = {name: getattr(options, name) for name in OWN[tune]}
        return {"peft_type": f"MINILLM_{tune.upper()}", **own, **shared}
    shared["target_modules"] = split_names(options.target_modules)
    shared["modules_to_save"] = in_full or None
    if tune == "ia3":
        inputs = [name for name in shared["target_modules"] if name.endswith("down_proj")]
        return {"peft_type": "IA3", "feedforward_modules": inputs, **shared}
    return {
        "peft_type": "LORA",
        "r": options.lora_rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.rslora,
        "use_dora": tune == "dora",
        "bias": "none",
        "ensure_weight_tying": adapter.tied and _shares_weight(adapter),
        **shared,
    }


def _shares_weight(adapter: Adapter) -> bool:
    """Whether two modules of the adapter have one parameter in common: a tied embedding and head."""
    parameters = adapter.parameters().values()
    return len({id(parameter) for parameter in parameters}) < len(parameters)


def is_of_reward_model(written: dict) -> bool:
    """Whether an adapter_config.json is that of a model with a score head, which is in the adapter."""
    return written.get("task_type") == SCORE_TASK


def adapter_to_write(adapter: Adapter, in_checkpoint: bool) -> list[ToWrite]:
    """The files of an adapter's tensors; in_checkpoint: with all that is needed to go on training."""
    if adapter.options.tune not in VIRTUAL:
        named = adapter.parameters().items()
        return _one_file(WEIGHTS, {PREFIX + huggingface.export_name(name): parameter for name, parameter in named})
    tensors = adapter.parts["virtual"].peft_tensors()
    if SCORE in adapter.parts:
        tensors[BESIDE_VIRTUAL] = adapter.parts[SCORE].weight
    parts = _one_file(WEIGHTS, tensors)
    if in_checkpoint:  # PEFT's file has only the encoder's output
        parts += _one_file(ENCODER, dict(adapter.parts["virtual"].named_parameters()), metadata=None)
    return parts


def _one_file(name: str, tensors: dict[str, Tensor], metadata: dict | None = HEADER) -> list[ToWrite]:
    sources = {key: Source.of(tensor) for key, tensor in tensors.items()}
    return tensors_to_write(name.removesuffix(".safetensors"), sources, None, metadata=metadata)


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files into an existing folder, which is no checkpoint."""
    for file, sources in adapter_to_write(adapter, in_checkpoint=False):
        write_file(folder, file, [source.values for source in sources.values()])
    write_beside_adapter(adapter, folder)


def write_beside_adapter(adapter: Adapter, folder: Path) -> None:
    """Write into a folder what belongs to an adapter besides its tensors."""
    written = {CONFIG: describe(adapter)}
    if adapter.base_folder is not None:
        seen_from_here = Path(os.path.relpath(adapter.base_folder, folder)).as_posix()
        bits = adapter.options.base_bits
        written[BASE] = {"folder": seen_from_here, "sha256": adapter.base_sha256, "bits": bits}
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- reading


def read_config(folder: Path) -> tuple[dict, dict]:
    """adapter_config.json, and what minillm_base.json says of the base; each value is of its kind."""
    written = read_object(folder / CONFIG)
    for name, kind in KINDS.items():
        written.get(name, kind)
    written.get("lora_alpha", float, above=0)
    if not isinstance(written.values.get("feedforward_modules"), str):  # a regular expression, refused later
        written.get("feedforward_modules", list[str])
    if size := SIZES.get(written.need("peft_type", str)):
        written.need(size, int, at_least=1)
    recorded = read_object(folder / BASE) if os.path.lexists(folder / BASE) else Contents({}, str(folder / BASE))
    kinds = {"folder": str, "sha256": str, "bits": int}
    return written.values, {name: recorded.get(name, kind) for name, kind in kinds.items()}


def to_options(written: dict, model: Transformer, source: str) -> TuningConfig:
    """The options that an adapter_config.json means. Raises `UserError` for what we do not compute."""
    kind = written["peft_type"]
    for tune, names in OWN.items():
        if kind == f"MINILLM_{tune.upper()}":
            return _tuning_config(source, tune=tune, **{name: written.get(name) for name in names})
    if kind in VIRTUAL_TYPES:
        encoder = "auto" if kind == "PROMPT_TUNING" else "none"
        return _tuning_config(
            source, tune=VIRTUAL_TYPES[kind], n_virtual=written.get("num_virtual_tokens"), encoder=encoder
        )
    if kind not in ("LORA", "IA3"):
        raise UserError(f"{source}: peft_type {kind!r} is not supported")
    targets = _targets_of(written.get("target_modules"), model, source)
    unsupported = _unsupported(written, targets)
    if unsupported:
        raise UserError(f"{source}: {', '.join(sorted(unsupported))} as set there is not supported")
    if written.get("ensure_weight_tying") and model.config.tie_embeddings and "embed_tokens" in targets:
        # PEFT then adapts the head by the same matrices, transposed
        targets = list(dict.fromkeys([*targets, "lm_head"]))
    in_full = written.get("modules_to_save") or ()
    if is_of_reward_model(written):  # its head is trained in full anyway; PEFT lists other names of heads, too
        in_full = [name for name in in_full if name not in (SCORE, "classifier")]
    saved = ",".join(in_full) or None
    shared = {"target_modules": ",".join(targets), "modules_to_save": saved}
    if kind == "IA3":
        return _tuning_config(source, tune="ia3", **shared)
    return _tuning_config(
        source,
        tune="dora" if written.get("use_dora") else "lora",
        lora_rank=written.get("r"),
        lora_alpha=written.get("lora_alpha") or PEFT_ALPHA,
        lora_dropout=0.0 if "lm_head" in targets else written.get("lora_dropout") or 0.0,  # the head cannot have any
        rslora=bool(written.get("use_rslora")),
        ensure_weight_tying=bool(written.get("ensure_weight_tying")),
        **shared,
    )


def _tuning_config(source: str, **values) -> TuningConfig:
    """These options; a `UserError` for one out of range names the file that it is from."""
    with naming(source):
        return TuningConfig(**values)


def _unsupported(written: dict, targets: list[str]) -> list[str]:
    """Fields of a LoRA or IA3 config with a value that we do not compute; targets: paths of its target modules."""
    # a field that is not read here must have no effect
    unsupported = []
    for name, value in written.items():
        has_effect = (value or type(value) is int) and (name, value) != ("bias", "none")  # layer 0 is a layer
        if has_effect and name not in READ | HARMLESS:
            unsupported.append(name)

    # PiSSA and the like change the base
    start = written.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        unsupported.append("init_lora_weights")

    # IA3 scales the input of the feed-forward network's last layer, and of no other
    scaled_inputs = written.get("feedforward_modules") or ()
    for path in targets if written["peft_type"] == "IA3" else ():
        is_last = path.endswith("down_proj")
        is_scaled_input = any(huggingface.export_name(path).endswith(name) for name in scaled_inputs)
        if isinstance(scaled_inputs, str) or is_scaled_input != is_last:
            return [*unsupported, "feedforward_modules"]
    return unsupported


def _targets_of(wanted: list[str] | str | None, model: Transformer, source: str) -> list[str]:
    """Paths of what PEFT's target_modules mean: ends of paths, "all-linear", or a regular expression."""
    linears = linear_paths(model)
    if wanted is None:
        raise UserError(
            f"{source}: target_modules is missing; write in the names of the modules that it was trained on"
        )
    if wanted == "all-linear":
        return [path for path in linears if path not in ("lm_head", SCORE)]
    targets = []
    if isinstance(wanted, str):
        names = {huggingface.export_name(path): path for path in [*linears, "embed_tokens"]}
        targets = [names[name] for name in _matched_in_time(wanted, list(names), source)]
    elif wanted:
        contents = Contents({"target_modules": wanted}, source)
        names = ",".join(contents.need("target_modules", list[str]))
        targets = matching_targets(model, names, f"{source}: target_modules")
    if not targets:
        raise UserError(f"{source}: no target_modules of this model in it")
    return targets


def _matched_in_time(pattern: str, names: list[str], source: str) -> list[str]:
    """The names that a regular expression matches as a whole.

    It is matched in a process of its own, which can be ended: some expressions take years. Raises `UserError` for one
    that takes long or is none.
    """
    try:
        matching = subprocess.run(
            [sys.executable, "-I", "-c", MATCHING],
            input=json.dumps([pattern, names]),
            capture_output=True,
            text=True,
            timeout=MATCHING_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"takes more than {MATCHING_S} s to match"
    else:
        if matching.returncode == 0:
            return json.loads(matching.stdout)
        reason = "is no regular expression"
    raise UserError(f"{source}: target_modules {pattern[:80]!r} {reason}; write a list of names") from None


def load_adapter(model: Transformer, folder: str | Path, name: str = "default", sha256: str | None = None) -> Adapter:
    """Attach the adapter in a folder (ours, PEFT's, or a run's newest checkpoint), and make it active.

    sha256: fingerprint of the model's base (`base_sha256`), compared with the recorded one if both are known. Raises
    `UserError` listing all that does not fit; the model then computes as before.
    """
    folder = run_folder.resolve_checkpoint(folder)
    written, recorded = read_config(folder)
    if sha256 and recorded["sha256"] not in (None, sha256):
        raise UserError(
            f"{folder}: made for another base ({written.get('base_model_name_or_path')}), not this model; "
            "give that one by --base, or for merging by --model"
        )
    options = to_options(written, model, str(folder / CONFIG))
    options = _tuning_config(str(folder / BASE), **vars(options) | {"base_bits": recorded["bits"]})
    _check_size(written, folder)
    with naming(folder):
        adapter = attach(model, options, name=name)
    try:
        read_tensors(adapter, folder)
    except UserError:
        remove_adapter(model, name)
        raise
    return adapter


def _check_size(written: dict, folder: Path) -> None:
    """Raise `UserError` for a rank or the like that is above every size in the file, before memory is taken for it."""
    name = SIZES.get(written["peft_type"])
    largest = max((size for shape in tensor_files.shapes_in(folder / WEIGHTS).values() for size in shape), default=0)
    if name and written[name] > largest:
        raise UserError(f"{folder / CONFIG}: {name} is {written[name]:,}, but {WEIGHTS} has no size above {largest:,}")


@torch.no_grad()
def read_tensors(adapter: Adapter, folder: str | Path) -> None:
    """Load a folder's weights into an attached adapter; for virtual tokens the encoder's, if it was saved to resume.

    Raises `UserError` listing all that is missing or has another shape.
    """
    path = Path(folder) / WEIGHTS
    got = tensor_files.load_tensors(path)
    if adapter.options.tune in VIRTUAL:
        virtual, kept = adapter.parts["virtual"], Path(folder) / ENCODER
        if SCORE in adapter.parts:
            stored = {key: got.pop(key) for key in (BESIDE_VIRTUAL,) if key in got}
            _copy_tensors({BESIDE_VIRTUAL: adapter.parts[SCORE].weight}, stored, path)
        if virtual.encoder == "none" or not kept.exists():
            for key, tensor in got.items():
                tensor_files.check_finite(key, tensor, path)
            return virtual.load_peft(got)
        return _copy_tensors(dict(virtual.named_parameters()), tensor_files.load_tensors(kept), kept)
    _check_copies_of_base(adapter, got, path)
    got = {name: tensor for name, tensor in got.items() if ".base_layer." not in name}
    wanted = {PREFIX + huggingface.export_name(name): p for name, p in adapter.parameters().items()}
    _copy_tensors(wanted, got, path)


def _copy_tensors(parameters: dict[str, Tensor], stored: dict[str, Tensor], source: Path) -> None:
    """Give parameters their values in a file. Raises `UserError` listing all that does not fit."""
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (parameters, stored))
    tensor_files.match_tensors(*shapes, source)
    for name, parameter in parameters.items():
        tensor_files.check_finite(name, stored[name], source)
        parameter.copy_(stored[name])


def _check_copies_of_base(adapter: Adapter, got: dict[str, Tensor], source: Path) -> None:
    """Raise `UserError` unless the base weights that PEFT saves beside an adapted embedding equal our base's."""
    for path, part in adapter.parts.items():
        copy = got.get(f"{PREFIX}{huggingface.export_name(path)}.base_layer.weight")
        if copy is None:
            continue
        ours = part.base_layer.weight
        if copy.shape != ours.shape or not torch.allclose(copy.to(ours), ours, atol=1e-6):
            raise UserError(f"{source}: made for another base: its {path} is not this model's; give that one")
