"""How positions are rotated, in terms of config.json: transformers 5's style is written, 4's is read as well."""

from minillm.model.config import ModelConfig, RopeScaling


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
    return old | (written.get("rope_scaling") or written.get("rope_parameters") or {})  # as transformers prefers them


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
