"""Adapters on the disk, as PEFT writes and reads them.

adapter_config.json           the method and its options, in PEFT's words
adapter_model.safetensors     what is trained
minillm_base.json             ours alone, for which base: its folder seen from here, its fingerprint, and to how many
                              bits it is quantized; without it an adapter is accepted wherever its shapes fit

Partly frozen models and bottleneck adapters have no twin in PEFT; peft_type is then a name of our own, which PEFT
refuses. Formats of PEFT 0.21.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm import UserError, checkpoint, files, huggingface, run
from minillm.config import VIRTUAL, TuningConfig
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer
from minillm.tuning.attach import (
    Adapter,
    active_adapter,
    attach,
    default_targets,
    merge,
    names,
    remove_adapter,
    targets,
)

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "minillm_base.json"
ENCODER = "resume/virtual.safetensors"
MERGED = "merged_adapter.json"  # in a merged model's folder: which adapter is in it
PREFIX = "base_model.model."
SAMPLES = 256  # numbers of each tensor that its fingerprint looks at
OWN = {"freeze": ("train_layers",), "adapter": ("bottleneck_dim",)}  # no twin in PEFT: options under their own names
VIRTUAL_TYPES = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning"}
# Fields of a LoRA config that change nothing here, whatever they say
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"}
HARMLESS |= {"qalora_group_size", "revision", "task_type", "init_ia3_weights"}


# ---- the base


def base_sha256(folder: str | Path) -> str:
    """A fingerprint of a model folder: of its config and some numbers of every weight, rounded to bf16.

    So it is the same for every split into shards and for a copy in bf16, and reads little. It tells apart models of
    other training, not one number changed.
    """
    config = huggingface.load_config(folder)
    described = hashlib.sha256(json.dumps(huggingface.to_hf(config), sort_keys=True).encode())

    for name, place in sorted(checkpoint.find_weights(folder).items()):
        second_copy = name == "lm_head.weight" and config.tie_embeddings
        if not second_copy and not name.endswith("rotary_emb.inv_freq"):
            described.update(name.encode() + _sample(place))
    return described.hexdigest()


def _sample(place: checkpoint.Place) -> bytes:
    """Some numbers of a tensor, evenly apart, as bf16; only the pages of the file that hold them are read."""
    size, count = place.dtype.itemsize, math.prod(place.shape)
    numbers = np.memmap(place.file, f"i{size}", "r", place.offset, (max(1, count),))[:: max(1, count // SAMPLES)]
    return torch.from_numpy(numbers.copy()).view(place.dtype).bfloat16().view(torch.int16).numpy().tobytes()


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in place of a model."""
    return (Path(folder) / CONFIG).exists()


def find_base(folder: Path, given: str | None, recorded: dict, written: dict) -> Path:
    """The base's folder: as given, or as the adapter records it, seen from its own folder or as it was then."""
    if given is not None:
        return run.resolve_checkpoint(given)
    named = written.get("base_model_name_or_path") or ""
    for place in (folder / str(recorded["folder"] or "?"), Path(named or "?")):
        if (place / "config.json").exists():
            return run.resolve_checkpoint(os.path.normpath(place))
    raise UserError(f"{folder}: its base {named or '(not named)'} is not there; give its folder by --base")


# ---- writing


def describe(adapter: Adapter) -> dict:
    """The contents of adapter_config.json."""
    options, tune = adapter.options, adapter.options.tune
    shared = {"base_model_name_or_path": str(adapter.base_folder or "") or None, "inference_mode": True}
    shared |= {"task_type": "CAUSAL_LM"}
    if tune in VIRTUAL:
        return {**adapter.parts["virtual"].peft_config(), **shared}
    if tune in OWN:
        own = {name: getattr(options, name) for name in OWN[tune]}
        return {"peft_type": f"MINILLM_{tune.upper()}", **own, **shared}
    shared["target_modules"] = names(default_targets(options))
    shared["modules_to_save"] = names(options.modules_to_save) if options.modules_to_save else None
    if tune == "ia3":
        inputs = [name for name in shared["target_modules"] if name.endswith("down_proj")]
        return {"peft_type": "IA3", "feedforward_modules": inputs, **shared}
    return {
        "peft_type": "LORA",
        "r": options.lora_rank,
        "lora_alpha": 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.rslora,
        "use_dora": tune == "dora",
        "bias": "none",
        "ensure_weight_tying": adapter.tied and _shares_weight(adapter),
        **shared,
    }


def _shares_weight(adapter: Adapter) -> bool:
    return len({id(p) for p in adapter.parameters().values()}) < len(adapter.parameters())


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files into an existing folder."""
    if adapter.options.tune in VIRTUAL:
        tensors = adapter.parts["virtual"].peft_tensors()
        if (folder / ENCODER).parent.exists():  # in a checkpoint: PEFT's file knows the encoder's result alone
            save_file(dict(adapter.parts["virtual"].state_dict()), folder / ENCODER)
    else:
        tensors = {PREFIX + huggingface.export_name(n): p.detach().clone() for n, p in adapter.parameters().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = {CONFIG: describe(adapter)}
    if adapter.base_folder is not None:
        seen_from_here = Path(os.path.relpath(adapter.base_folder, folder)).as_posix()
        bits = adapter.options.base_bits
        written[BASE] = {"folder": seen_from_here, "sha256": adapter.base_sha256, "bits": bits}
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- reading


def read_config(folder: Path) -> tuple[dict, dict]:
    """adapter_config.json, and what minillm_base.json says of the base."""
    try:
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(written, dict) or not isinstance(written.get("peft_type"), str):
            raise ValueError("no peft_type in it")
        base = json.loads((folder / BASE).read_text(encoding="utf-8")) if (folder / BASE).exists() else {}
        return written, {name: base.get(name) for name in ("folder", "sha256", "bits")}
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{folder / CONFIG}: not the config of an adapter ({problem})") from None


def to_options(written: dict, model: Transformer, source: str) -> TuningConfig:
    """The options that an adapter_config.json means. Raises `UserError` for what we would compute wrongly."""
    kind = written["peft_type"]
    own = next((tune for tune in OWN if kind == f"MINILLM_{tune.upper()}"), None)
    if own:
        return TuningConfig(tune=own, **{name: written.get(name) for name in OWN[own]})
    if kind in VIRTUAL_TYPES:
        encoder = "auto" if kind == "PROMPT_TUNING" else "none"
        return TuningConfig(tune=VIRTUAL_TYPES[kind], n_virtual=written.get("num_virtual_tokens"), encoder=encoder)
    if kind not in ("LORA", "IA3"):
        raise UserError(f"{source}: peft_type {kind!r} is not supported")
    known = {"target_modules", "modules_to_save"}
    known |= {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "ensure_weight_tying", "init_lora_weights"}
    other = {name: value for name, value in written.items() if name not in HARMLESS | known | {"feedforward_modules"}}
    strange = [name for name, value in other.items() if value and not (name == "bias" and value == "none")]
    if isinstance(written.get("init_lora_weights"), str) and written["init_lora_weights"] != "gaussian":
        strange.append("init_lora_weights")  # PiSSA and the like change the base
    places = _targets_of(written.get("target_modules"), model, source)
    inputs = set(written.get("feedforward_modules") or ())
    if kind == "IA3" and any((path.rpartition(".")[2] in inputs) != path.endswith("down_proj") for path in places):
        strange.append("feedforward_modules")
    if written.get("ensure_weight_tying") and model.config.tie_embeddings and "embed_tokens" in places:
        places = list(dict.fromkeys([*places, "lm_head"]))  # PEFT then adapts the head by the same matrices, transposed
    if strange:
        raise UserError(f"{source}: {', '.join(sorted(strange))} as set there is not supported")
    shared = {"target_modules": ",".join(places), "modules_to_save": ",".join(written.get("modules_to_save") or ())}
    shared["modules_to_save"] = shared["modules_to_save"] or None
    if kind == "IA3":
        return TuningConfig(tune="ia3", **shared)
    return TuningConfig(
        tune="dora" if written.get("use_dora") else "lora",
        lora_rank=written.get("r"),
        lora_alpha=written.get("lora_alpha"),
        lora_dropout=0.0 if "lm_head" in places else written.get("lora_dropout") or 0.0,  # the head cannot have any
        rslora=bool(written.get("use_rslora")),
        ensure_weight_tying=bool(written.get("ensure_weight_tying")),
        **shared,
    )


def _targets_of(wanted: list[str] | str | None, model: Transformer, source: str) -> list[str]:
    """Places of what PEFT's target_modules mean: ends of paths, "all-linear", or a regular expression."""
    linears = [path for path, m in model.named_modules() if hasattr(m, "in_features")]
    if wanted == "all-linear":
        return [path for path in linears if path != "lm_head"]
    if isinstance(wanted, str):
        places = (path for path in [*linears, "embed_tokens"] if re.fullmatch(wanted, huggingface.export_name(path)))
    else:
        places = targets(model, ",".join(wanted)) if wanted else ()
    if not (found := list(places)):
        raise UserError(f"{source}: no target_modules of this model in it")
    return found


def load_adapter(model: Transformer, folder: str | Path, name: str = "default", sha256: str | None = None) -> Adapter:
    """Attach the adapter in a folder, ours or PEFT's, and make it active.

    sha256: fingerprint of the model's base (`base_sha256`), compared with the recorded one if both are known. Raises
    `UserError` with all that does not fit; the model then computes as before.
    """
    folder = Path(folder)
    written, recorded = read_config(folder)
    if sha256 and recorded["sha256"] not in (None, sha256):
        raise UserError(
            f"{folder}: made for another base ({written.get('base_model_name_or_path')}), not this model; "
            "give that one by --base, or for merging by --model"
        )
    try:
        options = to_options(written, model, str(folder / CONFIG))
        options = dataclasses.replace(options, base_bits=recorded["bits"])
        problems = options.tuning_problems()
    except (TypeError, AttributeError, re.error) as problem:
        raise UserError(f"{folder / CONFIG}: a value of the wrong kind in it ({problem})") from None
    if problems:
        raise UserError(f"{folder / CONFIG}: {'; '.join(problems)}")
    adapter = attach(model, options, name=name)
    try:
        read_tensors(adapter, folder)
    except UserError:
        remove_adapter(model, name)
        raise
    return adapter


@torch.no_grad()
def read_tensors(adapter: Adapter, folder: str | Path) -> None:
    """Give an attached adapter the weights of a folder; virtual tokens, their encoder if it was kept for resuming.

    Raises `UserError` listing all that is missing or misshaped.
    """
    path = Path(folder) / WEIGHTS
    got = checkpoint.load_tensors(path)
    if adapter.options.tune in VIRTUAL:
        virtual, kept = adapter.parts["virtual"], Path(folder) / ENCODER
        if virtual.encoder == "none" or not kept.exists():
            return virtual.load_peft(got)
        return virtual.load_state_dict(checkpoint.load_tensors(kept))
    _check_copies_of_base(adapter, got, path)
    got = {name: tensor for name, tensor in got.items() if ".base_layer." not in name}
    wanted = {PREFIX + huggingface.export_name(name): p for name, p in adapter.parameters().items()}
    checkpoint.match_tensors({n: p.shape for n, p in wanted.items()}, {n: t.shape for n, t in got.items()}, path)
    for name, parameter in wanted.items():
        checkpoint.check_finite(name, got[name], path)
        parameter.copy_(got[name])


def _check_copies_of_base(adapter: Adapter, got: dict[str, Tensor], source: Path) -> None:
    """PEFT lays an adapted embedding's base weight beside the adapter: it must be our base's."""
    for path, part in adapter.parts.items():
        copy = got.get(f"{PREFIX}{huggingface.export_name(path)}.base_layer.weight")
        if copy is None:
            continue
        ours = part.base_layer.weight
        if copy.shape != ours.shape or not torch.allclose(copy.to(ours), ours, atol=1e-6):
            raise UserError(f"{source}: made for another base: its {path} is not this model's; give that one")


def load_adapted(
    folder: str | Path,
    base: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    merged: bool = False,
) -> tuple[Transformer, Path]:
    """The base model of an adapter's folder with the adapter active, and the base's folder.

    base: its folder, if it is not where the adapter says. dtype: convert floating weights to it, at last. merged: have
    the adapter merged if that is worth it.
    """
    folder = Path(folder)
    written, recorded = read_config(folder)
    found = find_base(folder, base, recorded, written)
    model = huggingface.load_model(found, device=device, base_bits=recorded["bits"])
    sha256 = base_sha256(found)
    adapter = load_adapter(model, folder, sha256=sha256)
    adapter.base_folder, adapter.base_sha256 = found.absolute(), sha256
    if merged and adapter.worth_merging:
        merge(model, keep=False)
    if dtype is not None:
        model.to(dtype).build_rotation()  # its tables stay in fp32
    return model, found


def tokenizer_of(adapter: Path, base: Path) -> Tokenizer:
    """The tokenizer beside an adapter, which knows the prompt format it was taught with; else the base's."""
    return Tokenizer.load(adapter if (adapter / "tokenizer.model").exists() else base)


def merge_folder(model: str | Path, adapter: str | Path, out: str | Path) -> str:
    """Write `out`, a plain model folder: `model` with the adapter merged in. Returns a line that says what was done.

    Raises `UserError` if the adapter is for another base or is in already, or if `out` is there already.
    """
    base, adapter = run.resolve_checkpoint(model), run.resolve_checkpoint(adapter)
    if Path(out).exists():
        raise UserError(f"--out {out}: is there already; choose another folder or delete it")
    if not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: no {CONFIG} there, so it is no adapter")
    with (adapter / WEIGHTS).open("rb") as stream:
        digest = {"adapter_sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    before = base / MERGED
    if before.exists() and json.loads(before.read_text(encoding="utf-8")) == digest:
        raise UserError(f"--model {base}: has this adapter merged in already; a second time would apply it twice")
    merged, _ = load_adapted(adapter, str(base))
    changed = len(active_adapter(merged).parts)
    merge(merged, keep=False)
    tokenizer = tokenizer_of(adapter, base)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}

    def fill(folder: Path) -> None:
        huggingface.save_model(merged, folder, special_ids=special)
        tokenizer.save(folder)
        (folder / MERGED).write_text(json.dumps(digest) + "\n", encoding="utf-8")

    files.write_folder(out, fill)
    return f"{out}: {adapter} merged into {base}, {changed} modules changed"
