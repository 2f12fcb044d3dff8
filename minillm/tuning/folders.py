"""An adapter's folder and its base's: which belong together, loading both as one model, and merging them."""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.json_door import read_json
from minillm.checkpoint import architectures, huggingface, run_folder, tensor_files
from minillm.checkpoint.score_head import check_head
from minillm.model.transformer import Transformer
from minillm.tokenizer import folder_files
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.adapter import active_adapter, merge
from minillm.tuning.options import TuningConfig
from minillm.tuning.peft_format import CONFIG, WEIGHTS, is_of_reward_model, load_adapter, read_config

MERGED = "merged_adapter.json"  # in a merged model's folder: which adapter is in it
SAMPLES = 256  # numbers of each tensor that go into the fingerprint


def base_sha256(folder: str | Path) -> str:
    """A fingerprint of a model folder: of its config and some numbers of every weight, rounded to bf16.

    So it reads little, and is the same for any split into shards and for a copy in bf16. It distinguishes models that
    were trained differently, but does not notice every single changed number.
    """
    config = huggingface.load_config(folder, with_score_head=None)
    digest = hashlib.sha256(json.dumps(architectures.to_hf(config), sort_keys=True).encode())
    for name, place in sorted(tensor_files.find_weights(folder).items()):
        second_copy = name == "lm_head.weight" and config.tie_embeddings
        if not second_copy and not name.endswith("rotary_emb.inv_freq"):
            digest.update(name.encode() + _sample(place))
    return digest.hexdigest()


def _sample(place: tensor_files.Place) -> bytes:
    """Evenly spaced numbers of a tensor, as bf16; only the file's pages that hold them are read."""
    count = math.prod(place.shape)
    every = max(1, count // SAMPLES)
    integers = np.memmap(place.file, f"i{place.dtype.itemsize}", "r", place.offset, (max(1, count),))
    numbers = torch.from_numpy(integers[::every].copy()).view(place.dtype)  # the same bits, as what they are
    return numbers.bfloat16().view(torch.int16).numpy().tobytes()


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, not a model."""
    return (Path(folder) / CONFIG).exists()


def find_base(folder: Path, given: str | None, recorded: dict, written: dict) -> Path:
    """The base's folder: the given one, or the recorded one, relative to the adapter's folder or as it was then."""
    if given is not None:
        return run_folder.resolve_checkpoint(given)
    named = written.get("base_model_name_or_path") or ""
    places = []
    if recorded["folder"]:
        places.append(folder / str(recorded["folder"]))
    if named:
        places.append(Path(named))
    for place in places:
        if (place / "config.json").exists():
            return run_folder.resolve_checkpoint(os.path.normpath(place))
    raise UserError(
        f"{folder}: its base {named or '(not named)'} is not there; give its folder by --base, or name it in "
        f"{CONFIG} (base_model_name_or_path)"
    )


def load_adapted(
    folder: str | Path,
    base: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    merged: bool = False,
    with_score_head: bool | None = False,
) -> tuple[Transformer, Path]:
    """The base model of an adapter's folder with the adapter active, and the base's folder.

    with_score_head: as `huggingface.load_config` takes it, of base and adapter together.

    base: its folder, if it is not where the adapter says. dtype: convert floating weights to it at the end. merged:
    merge the adapter if that is worth it.
    """
    folder = Path(folder)
    written, recorded = read_config(folder)
    is_reward_model = is_of_reward_model(written)
    check_head(is_reward_model, with_score_head, folder, {"architectures": [f"{written['peft_type']} adapter"]})
    base_folder = find_base(folder, base, recorded, written)
    config = huggingface.load_config(base_folder, with_score_head=None if is_reward_model else False)
    model = huggingface.load_model(base_folder, device=device, base_bits=recorded["bits"], config=config)
    if is_reward_model and not config.score_head:
        model.give_score_head(seed=0)  # its values come with the adapter
    sha256 = base_sha256(base_folder)
    adapter = load_adapter(model, folder, sha256=sha256)
    adapter.base_folder = base_folder.absolute()
    adapter.base_sha256 = sha256
    if merged and adapter.worth_merging:
        merge(model, keep=False)
    if dtype is not None:
        model.to(dtype).build_rotation()  # its tables stay in fp32
    return model, base_folder


def tokenizer_of(adapter: Path, base: Path) -> Tokenizer:
    """The tokenizer beside an adapter, which records the prompt format of its training; else the base's."""
    if not any((adapter / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        return Tokenizer.load(base)
    tokenizer = Tokenizer.load(adapter)
    of_base = folder_files.read_companions(base)
    for name in (folder_files.MODEL_CONFIG, folder_files.GENERATION_CONFIG):  # where the base's texts end
        if name in of_base:
            tokenizer.files.setdefault(name, of_base[name])
    return tokenizer


def merge_folder(model: str | Path, adapter: str | Path, out: str | Path) -> str:
    """Write `out`, a plain model folder: `model` with the adapter merged in. Returns a line that says what was done.

    Raises `UserError` if the adapter is for another base or is merged in already, or if `out` exists.
    """
    base, adapter = run_folder.resolve_checkpoint(model), run_folder.resolve_checkpoint(adapter)
    files.refuse_existing(out)
    if not is_adapter(adapter):
        raise UserError(f"--adapter {adapter}: no {CONFIG} there, so it is no adapter")
    tensor_files.shapes_in(adapter / WEIGHTS)  # are they there at all
    digest = {"adapter_sha256": files.sha256(adapter / WEIGHTS)}
    before = base / MERGED
    if before.exists() and read_json(before) == digest:
        raise UserError(f"--model {base}: has this adapter merged in already; a second time would apply it twice")
    merged, _ = load_adapted(adapter, str(base), with_score_head=None)
    changed = len(active_adapter(merged).parts)
    merge(merged, keep=False)
    tokenizer = tokenizer_of(adapter, base)

    def fill(folder: Path) -> None:
        huggingface.save_model(merged, folder, special_ids=tokenizer.special_ids)
        tokenizer.save(folder)
        (folder / MERGED).write_text(json.dumps(digest) + "\n", encoding="utf-8")

    files.write_folder(out, fill)
    return f"{out}: {adapter} merged into {base}, {changed} modules changed"


def fingerprints(cfg: TuningConfig, base: Path | None) -> dict[str, str]:
    """What must not change during a run that trains an adapter: its base and its options; {} for a full run."""
    if cfg.tune == "full":
        return {}
    options = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(TuningConfig)}
    return {"base model": base_sha256(base), "tuning": json.dumps(options)}
