"""Our options ↔ the architectures that config.json names.

qk_norm → Qwen3, qkv_bias → Qwen2, window → Mistral, none of them → Llama, or Mistral without a window where the heads
do not divide the width, since transformers takes no such Llama. A model with any other option, or with one
that was added to `ModelConfig` after this file was written, goes under a name of our own, with all its options: other
loaders refuse it rather than compute something wrong. How positions are rotated is written in the style of
transformers 5, and read in that of 4 as well.
"""

import dataclasses
import json

from minillm.base.errors import UserError
from minillm.checkpoint import score_head
from minillm.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "minillm": "MinillmForCausalLM",  # ours
}
OWN = "minillm"
# our option → their key, where the value is the same
SHARED = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "trained_seq_len": "trained_seq_len",  # others ignore and keep it
}
ROPE = ("rope_theta", "rope_scaling")  # every architecture has them, under `rope_parameters`
NOT_STORED = ("dropout",)  # an option of training: it does not change what a trained model computes
HEAD = ("score_head",)  # every architecture has it, under a name of its own (score_head.py)

# What each architecture computes, apart from the options above: the only value of an option, or ANY. An option that is
# not named here, since it is newer, must have its default: what models computed before there was that option.
ANY = object()
LLAMA = {"positions": "rope", "qk_norm": False, "qkv_bias": False, "window": None, "softcap": None}
COMPUTES = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "window": ANY},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": True},
}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers takes where a config.json leaves a key out; null for heads means that they follow from the others.
LEFT_OUT = {"norm_eps": 1e-6, "tie_embeddings": False, "max_seq_len": 2048, "n_kv_heads": None, "head_dim": None}
LEFT_OUT_OF = {
    "mistral": {"max_seq_len": 131_072, "n_kv_heads": 8, "window": 4096},
    "qwen2": {"max_seq_len": 32_768, "n_kv_heads": 32},
    "qwen3": {"max_seq_len": 32_768, "n_kv_heads": 32, "head_dim": 128},
}


def _special_names() -> list[str]:
    """The options that not every architecture has: all fields of `ModelConfig` that are not shared, old and new."""
    common = {*SHARED, *ROPE, *NOT_STORED, *HEAD}
    return [f.name for f in dataclasses.fields(ModelConfig) if f.name not in common]


def special_options(config: ModelConfig) -> dict:
    """Name and value of each option that not every architecture has."""
    return {name: getattr(config, name) for name in _special_names()}


def _defaults() -> dict:
    return {f.name: f.default for f in dataclasses.fields(ModelConfig)}


def computes(kind: str, config: ModelConfig) -> bool:
    """Whether the Hugging Face architecture `kind` takes this config and computes exactly what it does."""
    if kind == "llama" and config.dim % config.n_heads:  # Mistral computes the same, and takes it
        return False
    expected = _defaults() | COMPUTES[kind]
    return all(expected[name] in (ANY, value) for name, value in special_options(config).items())


def model_type(config: ModelConfig) -> str:
    """The Hugging Face model type that computes exactly what this config does, or our own."""
    return next((kind for kind in COMPUTES if computes(kind, config)), OWN)


# ---- writing config.json


def to_hf(config: ModelConfig, special_ids: dict[str, int] | None = None, dtype: str = "float32") -> dict:
    """The contents of config.json. special_ids: bos_token_id and the like, copied as they are."""
    kind = model_type(config)
    rope = rope_parameters(config)
    shared = {theirs: getattr(config, ours) for ours, theirs in SHARED.items()}
    if config.trained_seq_len is None:  # not known
        del shared["trained_seq_len"]
    written = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **shared,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_parameters": rope,  # transformers 5
        "rope_theta": config.rope_theta,  # transformers 4 and most other loaders
        "rope_scaling": None if config.rope_scaling is None else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
        **(special_ids or {}),
    }
    if kind in ("llama", "qwen3"):
        written["attention_bias"] = False
    if kind == "llama":
        written["mlp_bias"] = False
    if kind == "mistral":
        written["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        written |= {"use_sliding_window": False, "sliding_window": None}
    if kind == OWN:
        written |= _own_values(config)
    return score_head.with_one_label(written) if config.score_head else written


def _own_values(config: ModelConfig) -> dict:
    """What config.json says of our special options under our own name. A newer one is left out at its default, so that
    files (and what is compared with them) do not change when options are added.
    """
    defaults, values = _defaults(), {}
    for name, value in special_options(config).items():
        if name in LLAMA or value != defaults[name]:
            if _from_json(json.loads(json.dumps(value, default=repr))) != value:
                raise UserError(f"{name} {value!r}: config.json cannot hold it; choose numbers, text or tuples of them")
            values[name] = value
    return values


def _from_json(value):
    """A value of JSON as an option holds it: an option is hashable, so that its lists are tuples."""
    return tuple(_from_json(item) for item in value) if isinstance(value, list) else value


# ---- reading config.json


def from_hf(written: dict) -> ModelConfig:
    """A `ModelConfig` from a config.json, old style or new. Raises `UserError` for options that we do not compute."""
    kind = written.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"model_type {kind!r} is not supported; choose one of {', '.join(ARCHITECTURES)}")
    missing = [SHARED[k] for k in ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim") if SHARED[k] not in written]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}")
    _refuse_unsupported(written)

    # what every architecture has
    given = {ours: written[theirs] for ours, theirs in SHARED.items() if theirs in written}
    if kind == "mistral" and "sliding_window" in written:
        given["window"] = written["sliding_window"]
    may_be_null = ("n_kv_heads", "head_dim", "window")
    values = LEFT_OUT | LEFT_OUT_OF.get(kind, {})
    values |= {name: value for name, value in given.items() if value is not None or name in may_be_null}
    rope = rope_values(written)
    values["score_head"] = score_head.is_classifier(written)
    values["rope_theta"] = float(rope.get("rope_theta", 1e4))
    values["rope_scaling"] = read_scaling(rope, values["max_seq_len"])

    # what makes the architecture this one
    if kind == OWN:
        return _read_own(written, values)
    return ModelConfig(**COMPUTES[kind] | values)


def _refuse_unsupported(written: dict) -> None:
    """Raise `UserError` naming the options of other architectures that we do not compute."""
    kind = written["model_type"]
    unsupported = {
        "attention_bias": kind in ("llama", "mistral", "qwen3") and written.get("attention_bias"),
        "mlp_bias": written.get("mlp_bias"),
        "use_sliding_window": kind != "mistral" and written.get("use_sliding_window"),
        "partial_rotary_factor": rope_values(written).get("partial_rotary_factor", 1.0) != 1.0,
        "hidden_act": written.get("hidden_act", "silu") not in ("silu", "swish"),
        "is_causal": not written.get("is_causal", True),
        "layer_types": _layers_differ(written),
        "per_layer_config": written.get("per_layer_config"),
    }
    wrong = [name for name, is_set in unsupported.items() if is_set]
    if kind != OWN:  # an option of ours has no place under another architecture
        expected = _defaults() | COMPUTES[kind]
        wrong += [name for name in _special_names() if name in written and written[name] != expected[name]]
    if wrong:
        raise UserError(f"{', '.join(wrong)} as set there is not supported")


def _layers_differ(written: dict) -> bool:
    """Whether layer_types names layers that attend otherwise than ours, which are all alike: with a window or without.

    transformers takes a Mistral model for a Ministral where there is that list, and then goes by it.
    """
    has_window = written["model_type"] == "mistral" and written.get("sliding_window", 0) is not None
    ours = "sliding_attention" if has_window else "full_attention"
    return any(kind != ours for kind in written.get("layer_types") or ())


def _read_own(written: dict, values: dict) -> ModelConfig:
    """The config of a model of our own architecture. Raises `UserError` for a key that means nothing here."""
    special = {name: _from_json(written[name]) for name in _special_names() if name in written}
    config = ModelConfig(**values, **special)
    unknown = [key for key in written if key not in {*to_hf(config), *special, *SPECIAL_IDS}]
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: this minillm has no such option; load the model with the version, or the "
            "changed code, that wrote it"
        )
    return config


# ---- positions


def rope_parameters(config: ModelConfig) -> dict:
    """How positions are rotated, in transformers' terms. Each type has its own fields only: it warns of others."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is None:
        return rope
    rope |= {"rope_type": scaling.type, "factor": scaling.factor}
    names = {
        "linear": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }
    values = {name: getattr(scaling, name) for name in names[scaling.type]}
    rope |= {name: value for name, value in values.items() if value is not None}
    if scaling.type != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    return rope


def rope_values(written: dict) -> dict:
    """A config's rotary options, from the style of transformers 5 or 4."""
    old = {key: written[key] for key in ("rope_theta", "partial_rotary_factor") if written.get(key) is not None}
    rope = old | (written.get("rope_scaling") or written.get("rope_parameters") or {})  # as transformers prefers them
    if (length := written.get("original_max_position_embeddings")) is not None:  # beside them it counts more, as there
        rope["original_max_position_embeddings"] = length
    return rope


def read_scaling(rope: dict, max_seq_len: int) -> RopeScaling | None:
    """How positions are stretched; None for "default", whose values are checked all the same."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    given = {name: value for name, value in rope.items() if value is not None}
    optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    scaling = RopeScaling(
        "linear" if kind == "default" else kind,
        float(given.get("factor", 1)),  # where it is needed, `check_kinds` has seen it
        given.get("original_max_position_embeddings", max_seq_len),
        **{name: given[name] for name in optional if name in given},
    )
    return None if kind == "default" else scaling
