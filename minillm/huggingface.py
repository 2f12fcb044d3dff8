"""Model folders in Hugging Face's format: our options ↔ their architectures, weights as they lie.

qk_norm → Qwen3, qkv_bias → Qwen2, window → Mistral, none of them → Llama; anything else is written
under a name of our own, which other loaders refuse instead of computing something wrong.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm import UserError, checkpoint, quant
from minillm.config import ModelConfig, RopeScaling
from minillm.model import Transformer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "minillm": "MinillmForCausalLM",
}
# our name → theirs, where the value is the same
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
}
OURS_ALONE = ("positions", "qk_norm", "qkv_bias", "window", "softcap")  # spelled out under our own name


def model_type(config: ModelConfig) -> str:
    """The Hugging Face model type that computes exactly what this config does."""
    if config.positions == "rope" and config.softcap is None:
        options = (config.qk_norm, config.qkv_bias, config.window is not None)
        known = {
            (False, False, False): "llama",
            (True, False, False): "qwen3",
            (False, True, False): "qwen2",
            (False, False, True): "mistral",
        }
        return known.get(options, "minillm")
    return "minillm"


def to_hf(config: ModelConfig, special_ids: dict[str, int] | None = None, dtype: str = "float32") -> dict:
    """The contents of config.json. special_ids: bos_token_id and the like, copied as they are."""
    kind = model_type(config)
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
        kept = {  # each type's own fields only: transformers warns of others
            "linear": (),
            "yarn": ("beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[scaling["type"]]
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
        rope |= {key: scaling[key] for key in kept if key in scaling}
    written = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in SHARED.items()},
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
    if kind == "minillm":
        written |= {name: getattr(config, name) for name in OURS_ALONE}
    return written


def from_hf(written: dict, source: str = "config.json") -> ModelConfig:
    """A `ModelConfig` from a config.json, old style or new. Raises `UserError` for what we would compute wrongly."""
    kind = written.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{source}: model_type {kind!r} is not supported; choose one of {', '.join(ARCHITECTURES)}")
    missing = [SHARED[k] for k in ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim") if SHARED[k] not in written]
    if missing:
        raise UserError(f"{source}: lacks {', '.join(missing)}")
    windowed = kind != "mistral" and written.get("use_sliding_window")
    unsupported = {
        "attention_bias": kind in ("llama", "mistral", "qwen3") and written.get("attention_bias"),
        "mlp_bias": written.get("mlp_bias"),
        "use_sliding_window": windowed,
        "hidden_act": written.get("hidden_act", "silu") not in ("silu", "swish"),
    }
    if any(unsupported.values()):
        raise UserError(f"{source}: {', '.join(k for k, v in unsupported.items() if v)} as set there is not supported")
    defaults = {
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "max_seq_len": 2048,
        "n_kv_heads": None,
        "head_dim": None,
    }
    values = {ours: written[theirs] for ours, theirs in SHARED.items() if theirs in written}
    values = {**defaults, **{k: v for k, v in values.items() if v is not None}}
    rope = written.get("rope_parameters") or written.get("rope_scaling") or {}
    values["rope_theta"] = float(rope.get("rope_theta") or written.get("rope_theta") or 1e4)
    values["rope_scaling"] = _read_scaling(rope, values["max_seq_len"], source)
    if kind == "minillm":
        values |= {name: written[name] for name in OURS_ALONE if name in written}
    else:
        values |= {"qk_norm": kind == "qwen3", "qkv_bias": kind == "qwen2"}
        values["window"] = written.get("sliding_window") if kind == "mistral" else None
    return ModelConfig(**values)


def _read_scaling(rope: dict, max_seq_len: int, source: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(f"{source}: rope type {kind!r} is not supported; choose default, linear, yarn or llama3")
    unknown = set(rope) & {"mscale", "mscale_all_dim", "truncate"}
    if unknown:
        raise UserError(f"{source}: the rope options {', '.join(sorted(unknown))} are not supported")
    optional = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    return RopeScaling(
        kind,
        float(rope["factor"]),
        int(rope.get("original_max_position_embeddings") or max_seq_len),
        **{name: rope[name] for name in optional if rope.get(name) is not None},
    )


def export_name(name: str) -> str:
    """The key of our parameter `name` in a Hugging Face file."""
    return name if name.startswith("lm_head.") else "model." + name


def weights_of(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors to save under Hugging Face's keys; a tied head is left out, as their files do.

    Raises `UserError` for a quantized model, whose codes no other loader would understand.
    """
    if quant.is_quantized(model):
        raise UserError("a quantized base is not saved: save its adapter, or call quant.dequantize_base first")
    tensors = {
        export_name(name): t.detach().to(dtype or t.dtype).contiguous()
        for name, t in model.state_dict().items()
        if not (model.config.tie_embeddings and name == "lm_head.weight")
    }
    return tensors


def save_model(
    model: Transformer,
    folder: Path,
    *,
    special_ids: dict[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors into an existing folder. dtype: of the file; None: the model's."""
    tensors = weights_of(model, dtype)
    name = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(to_hf(model.config, special_ids, name), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def load_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a model folder."""
    path = Path(folder) / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json there, so it is no model folder") from None
    except ValueError as problem:
        raise UserError(f"{path}: not valid JSON ({problem})") from None
    return from_hf(written, str(path))


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    base_bits: int | None = None,
) -> Transformer:
    """Load a model folder, tensor by tensor, so that memory holds the model and one tensor more.

    dtype: convert floating weights to it (None: as stored). config: to use in place of the folder's, e.g. with
    dropout or a longer context. base_bits: 8 or 4, quantize on the way (see `minillm.quant`). Raises `UserError` with
    the complete list of what does not fit.
    """
    if base_bits is not None:
        quant.check_bits(base_bits)
    config = config or load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {export_name(n): t.shape for n, t in model.state_dict().items()}
    if config.tie_embeddings:
        expected.pop("lm_head.weight")
    ours = {export_name(n): n for n in model.state_dict()}
    shapes, loaded = {}, {}
    for name, tensor in checkpoint.read_weights(folder):
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue  # a second copy of the embedding; a table that we compute
        shapes[name] = tensor.shape
        if name in expected and tensor.shape == expected[name]:
            checkpoint.check_finite(name, tensor, folder)
            tensor = tensor.to(device=device, dtype=dtype or tensor.dtype)
            if base_bits is None or not quant.take_weight(model, ours[name], tensor, base_bits):
                loaded[ours[name]] = tensor
    checkpoint.match_tensors(expected, shapes, str(folder))
    model.load_state_dict(loaded, strict=False, assign=True)
    model.tie()
    model.build_rotation()
    if base_bits is not None:
        quant.prepare_base(model)
    return model
