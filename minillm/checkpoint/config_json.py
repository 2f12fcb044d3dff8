"""config.json of a model folder, in Hugging Face's format: read, and each value checked for its kind."""

import shlex
import types
import typing
from pathlib import Path

from minillm.base.contents import WORDS, Contents
from minillm.base.errors import MissingError, UserError
from minillm.base.json_door import read_object
from minillm.model.config import ModelConfig

REQUIRED = ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim")  # what no architecture has a default for
KINDS = {
    "model_type": str,
    "architectures": list[str],
    "id2label": dict,
    "num_labels": int,
    "hidden_act": str,
    "attention_bias": bool,
    "mlp_bias": bool,
    "use_sliding_window": bool,
    "is_causal": bool,
    "layer_types": list[str],
    "per_layer_config": dict,
    "original_max_position_embeddings": int,
    "partial_rotary_factor": float,
    "sliding_window": int,
    "rope_theta": float,
    "rope_parameters": dict,  # transformers 5
    "rope_scaling": dict,  # transformers 4
}
ROPE_KINDS = {  # in one of these two
    "rope_type": str,
    "type": str,
    "rope_theta": float,
    "partial_rotary_factor": float,
    "factor": float,
    "original_max_position_embeddings": int,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
}


def read_config(folder: str | Path) -> dict:
    """A model folder's config.json. Raises `UserError` if there is none or it is no object in JSON."""
    path = Path(folder) / "config.json"
    try:
        return read_object(path).values
    except MissingError:
        if (Path(folder) / "adapter_config.json").exists():
            raise UserError(
                f"{folder}: an adapter, and no model; merge it into its base first: "
                f"python -m minillm merge --model BASE --adapter {shlex.quote(str(folder))} --out DIR"
            ) from None
        raise UserError(f"{folder}: no config.json there, so it is no model folder") from None


def check_kinds(written: dict, source: str, shared: dict[str, str]) -> None:
    """Raise `UserError` naming a value of the wrong kind, among those that a `ModelConfig` is made from.

    shared: our option → the key in config.json that has the same value.
    """
    contents = Contents(written, source)
    for key, kind in KINDS.items():
        contents.get(key, kind)
    for ours, kind in _kinds_of_options().items():
        key = shared.get(ours, ours)  # options without a shared key are in files of our own architecture
        if ours in REQUIRED and key in written:
            contents.need(key, kind)
        else:
            contents.get(key, kind)
    for name in ("rope_parameters", "rope_scaling"):
        if written.get(name):
            _check_rope(Contents(written[name], f"{source}: {name}"))


def _check_rope(contents: Contents) -> None:
    """Raise `UserError` naming a wrong or unknown value of how positions are rotated, or a scaling without factor."""
    unknown = [name for name in contents.values if name not in ROPE_KINDS]
    if unknown:
        raise UserError(f"{contents.source}: the rope options {', '.join(sorted(unknown)):.200} are not supported")
    for key, kind in ROPE_KINDS.items():
        contents.get(key, kind)
    if "rope_theta" in contents.values:  # null is no frequency
        contents.need("rope_theta", float)
    if (contents.get("rope_type", str) or contents.get("type", str) or "default") != "default":
        contents.need("factor", float)


def _kinds_of_options() -> dict[str, type]:
    """The kind of each option of ModelConfig that is a number, a text or a truth value."""
    kinds = {}
    for name, hint in typing.get_type_hints(ModelConfig).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):  # such as int | None
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if hint in WORDS:
            kinds[name] = hint
    return kinds
