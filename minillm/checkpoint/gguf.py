"""Models in GGUF files: llama.cpp's names and conventions ↔ ours.

Architecture "llama" keeps query and key rows for interleaved rotary positions; "qwen2" and "qwen3" keep them
half-split, as Hugging Face does. What llama.cpp would not compute is refused, not written wrongly: of a model's options
only those named here have a place in the file.
"""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.checkpoint import gguf_blocks, gguf_file, gguf_tokenizer, tensor_files
from minillm.checkpoint.gguf_file import GGUFTensor
from minillm.checkpoint.huggingface import ROTATED, StoredModel, shapes_of
from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.rope import rotary_tables
from minillm.tokenizer.tokenizer import Tokenizer

# What most of a file's tensors are: GGML's name → GGUF's number.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
BLOCKS_VERSION = 2  # of the layout of Q8_0, Q4_0 and others
KINDS = {dtype: kind for kind, dtype in gguf_file.FLOATS.items()}  # dtype → GGML's name

# The options that an architecture decides.
ARCHITECTURES = {
    "llama": {"qk_norm": False, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "qkv_bias": False},
}
# The options that every file of these architectures states under "<architecture>.<name>": our name → GGUF's, and kind.
STATED = {
    "max_seq_len": ("context_length", int),
    "dim": ("embedding_length", int),
    "n_layers": ("block_count", int),
    "ffn_dim": ("feed_forward_length", int),
    "n_heads": ("attention.head_count", int),
    "norm_eps": ("attention.layer_norm_rms_epsilon", float),
}
# The options that follow from what else is in the file: optional values, and which tensors there are.
OTHERWISE = ("n_kv_heads", "head_dim", "rope_theta", "rope_scaling", "vocab_size", "tie_embeddings")
TRAINING_ONLY = ("dropout", "trained_seq_len")  # they do not change what a trained model computes

FACTORS = "rope_freqs.weight"  # Llama 3's scaling: what each pair's frequency is divided by
LLAMA3_LENGTH = 8192  # context that Llama 3 was trained on
SCALINGS = ("linear", "yarn")  # of the rotary positions, that have a name in the metadata

# Keys under "<architecture>." that are read besides, and those that say nothing of what is computed from ids.
READ = {"attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.scale_linear"}
READ |= {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length")}
SAYS_NOTHING = {
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "pooling_type",
    "classifier.output_labels",
}
SAYS_NOTHING |= {"attention.layer_norm_epsilon", "expert_used_count"}  # of norms with a mean; of no experts

PARTS = {  # of a layer: Hugging Face's name → GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE_LAYERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def gguf_name(key: str) -> str:
    """GGUF's name of the tensor with this Hugging Face key. Raises `UserError` if there is none."""
    stem, _, suffix = key.rpartition(".")  # "model.layers.0.mlp.up_proj", "weight"
    if stem in OUTSIDE_LAYERS:
        return f"{OUTSIDE_LAYERS[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")  # "0", "mlp.up_proj"
    if part not in PARTS:
        raise UserError(f"--format gguf: that format has no place for a model with a tensor {key}; choose hf")
    return f"blk.{layer}.{PARTS[part]}.{suffix}"


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Query or key rows (n·D, …) with rotary pairs (0, 1), (2, 3), … → rows with pairs (0, D/2), (1, D/2 + 1), …"""
    pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])  # (n, D/2, 2, …)
    return pairs.transpose(1, 2).reshape(weight.shape)


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `half_split`."""
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])  # (n, 2, D/2, …)
    return halves.transpose(1, 2).reshape(weight.shape)


# ---- reading


def open_file(path: str | Path) -> tuple[StoredModel, dict]:
    """The model of a GGUF file, and its metadata; only the header has been read.

    Quantized weights count as float32. Raises `UserError` listing all tensors that do not fit, or options that are not
    supported.
    """
    path = Path(path)
    metadata, tensors = gguf_file.read_header(path)
    contents = Contents(metadata, str(path))
    config = _read_config(contents, tensors)
    expected = shapes_of(config)
    keys = {gguf_name(key): key for key in expected}
    ignored = {FACTORS, HEAD} if config.tie_embeddings else {FACTORS}
    by_key = {keys.get(name, name): tensor for name, tensor in tensors.items() if name not in ignored}
    tensor_files.match_tensors(expected, {key: tensor.shape for key, tensor in by_key.items()}, path)
    is_interleaved = contents.need("general.architecture", str) == "llama"

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = by_key[key].read(dtype)
        tensor_files.check_finite(key, tensor, path, by_key[key].read)
        if is_interleaved and key.endswith(ROTATED):
            return half_split(tensor, config.head_dim)
        return tensor

    special_ids = gguf_tokenizer.special_ids(contents)
    ids = {f"{role}_token_id": i for role, i in special_ids.items() if role != "unk"}
    if len(ends := gguf_tokenizer.end_ids(contents)) > 1:
        ids["eos_token_id"] = ends
    return StoredModel(config, tensors[EMBEDDING].dtype, read, ids), metadata


def _read_config(contents: Contents, tensors: dict[str, GGUFTensor]) -> ModelConfig:
    """The config that metadata and tensors describe. Raises `UserError` for what we would compute wrongly."""
    path = contents.source
    kind = contents.get("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {kind!r} is not supported; choose one of {', '.join(ARCHITECTURES)}")
    if contents.get("split.count", int, 1) > 1:
        raise UserError(f"{path}: lacks the other parts of a split file: join them first")
    missing = [f"{kind}.{name}" for name, _ in STATED.values() if f"{kind}.{name}" not in contents.values]
    if EMBEDDING not in tensors:
        missing.append(EMBEDDING)
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}")

    # What every file states.
    values = {ours: contents.need(f"{kind}.{theirs}", of_kind) for ours, (theirs, of_kind) in STATED.items()}
    if values["n_layers"] > len(tensors):  # listing what is missing would take long
        raise UserError(f"{path}: {values['n_layers']:,} layers, as its header says, in {len(tensors):,} tensors")

    # What has a usual value if it is not stated.
    usual_head_dim = values["dim"] // max(1, values["n_heads"])
    n_rotated = contents.get(f"{kind}.rope.dimension_count", int)
    head_dim = contents.get(f"{kind}.attention.key_length", int, n_rotated or usual_head_dim)
    values["head_dim"] = head_dim
    values["n_kv_heads"] = contents.get(f"{kind}.attention.head_count_kv", int, values["n_heads"])
    values["rope_theta"] = contents.get(f"{kind}.rope.freq_base", float, 1e4)

    # What our model has no option for must have the value that changes nothing: of most keys nothing at all.
    neutral = {
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "attention.causal": 1.0,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": -1.0,  # as usual for the kind of scaling
        "rope.scaling.yarn_beta_fast": RopeScaling.beta_fast,
        "rope.scaling.yarn_beta_slow": RopeScaling.beta_slow,
    }
    known = {*READ, *SAYS_NOTHING, *(theirs for theirs, _ in STATED.values())}
    unsupported = []
    for key, value in contents.values.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or name in known:
            continue
        if value != neutral[name] if name in neutral else value:
            unsupported.append(name)
    if unsupported:
        raise UserError(f"{path}: {', '.join(sorted(unsupported)):.200} as set there is not supported")

    config = ModelConfig(
        **values,
        **ARCHITECTURES[kind],
        vocab_size=tensors[EMBEDDING].shape[0],
        tie_embeddings=_is_tied(tensors),
        rope_scaling=_read_scaling(contents, kind),
    )
    if FACTORS in tensors:
        if config.rope_scaling:
            raise UserError(f"{path}: {FACTORS} beside the rope scaling {config.rope_scaling.type} is not supported")
        length = contents.get(f"{kind}.rope.scaling.original_context_length", int, LLAMA3_LENGTH)
        return _with_llama3_scaling(config, length, tensors[FACTORS], path)
    return config


def _is_tied(tensors: dict[str, GGUFTensor]) -> bool:
    """Whether the head is the embedding: it is not in the file, or the same numbers again."""
    if HEAD not in tensors:
        return True
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    return torch.equal(head.read(head.dtype), embedding.read(embedding.dtype))


def _read_scaling(contents: Contents, kind: str) -> RopeScaling | None:
    """The scaling of rotary positions that the metadata name, which is never Llama 3's.

    As in llama.cpp a factor without a type is that of linear scaling, and `rope.scale_linear` is its older name.
    """
    older = contents.get(f"{kind}.rope.scale_linear", float, 1.0)
    factor = contents.get(f"{kind}.rope.scaling.factor", float, older) or 1.0
    scaling = contents.get(f"{kind}.rope.scaling.type", str, "none" if factor == 1 else "linear")
    if scaling == "none":
        return None
    if scaling not in SCALINGS:
        known = " or ".join(SCALINGS)
        raise UserError(f"{contents.source}: rope scaling {scaling!r} is not supported; choose none, {known}")
    context_length = contents.need(f"{kind}.context_length", int)
    original_length = contents.get(f"{kind}.rope.scaling.original_context_length", int, context_length)
    return RopeScaling(scaling, factor, original_length)


def _with_llama3_scaling(config: ModelConfig, length: int, stored: GGUFTensor, path: str) -> ModelConfig:
    """The config with Llama 3's scaling. Raises `UserError` unless its formula gives the factors in the file.

    length: context that the model was trained on before.
    """
    factors = stored.read(torch.float32).flatten()  # (D/2,)
    scaling = RopeScaling("llama3", round(float(factors.max()), 4), length)
    config = dataclasses.replace(config, rope_scaling=scaling)
    expected = _llama3_factors(config)  # (D/2,)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"{path}: {FACTORS}: not the factors of Llama 3's scaling (low 1, high 4); not supported")
    return config


def _llama3_factors(config: ModelConfig) -> Tensor:
    """The factors by which Llama 3's scaling divides the frequency of each pair, fp32 (D/2,)."""
    unscaled = dataclasses.replace(config, rope_scaling=None)
    return (_frequencies(unscaled) / _frequencies(config)).float()


def _frequencies(config: ModelConfig) -> Tensor:
    """The angle by which each rotary pair turns from one position to the next, fp64 (D/2,)."""
    cos, sin = rotary_tables(dataclasses.replace(config, max_seq_len=2), "cpu")  # (2, D/2) each
    return torch.atan2(sin[1].double(), cos[1].double())


# ---- writing


def write_file(
    model: StoredModel, tokenizer: Tokenizer | None, path: Path, dtype: torch.dtype, blocks: str | None = None
) -> None:
    """Write a model and its tokenizer as GGUF; dtype: of the matrices, while gains and biases are float32.

    blocks: Q8_0 or Q4_0, in which to write matrices whose rows are whole blocks. Raises `UserError` naming the options
    that the format has no place for.
    """
    config = model.config
    kind = _architecture(config, dtype)
    scaling = config.rope_scaling

    # The metadata: of the file, of the model, of the tokenizer.
    file_type = FILE_TYPES[blocks or KINDS[dtype]]
    metadata = {"general.architecture": kind, "general.type": "model", "general.file_type": file_type}
    if blocks:
        metadata["general.quantization_version"] = BLOCKS_VERSION
    metadata |= {f"{kind}.{name}": value for name, value in _described(config).items()}
    if tokenizer:
        metadata |= gguf_tokenizer.describe(tokenizer, config.vocab_size)
        metadata[gguf_tokenizer.OWN_FILE] = base64.b64encode(tokenizer.data).decode()

    # The tensors, under GGUF's names.
    keys = {}
    tensors = {}
    for key, shape in shapes_of(config).items():
        name = gguf_name(key)
        keys[name] = key
        tensors[name] = (tuple(shape), _tensor_kind(shape, dtype, blocks))
    factors = None
    if scaling and scaling.type == "llama3":
        factors = _llama3_factors(config)
        tensors[FACTORS] = (tuple(factors.shape), "F32")

    def read(name: str) -> Tensor:
        if name == FACTORS:
            return factors
        _, tensor_kind = tensors[name]
        tensor = model.read(keys[name], gguf_file.FLOATS.get(tensor_kind, torch.float32))
        if kind == "llama" and keys[name].endswith(ROTATED):
            return interleaved(tensor, config.head_dim)
        return tensor

    gguf_file.write(path, metadata, tensors, read)


def _tensor_kind(shape: Sequence[int], dtype: torch.dtype, blocks: str | None) -> str:
    """GGML's type in which a tensor of this shape is written: see `write_file`."""
    if len(shape) == 1:
        return "F32"
    return blocks if blocks and shape[-1] % gguf_blocks.BLOCK == 0 else KINDS[dtype]


def _architecture(config: ModelConfig, dtype: torch.dtype) -> str:
    """The architecture that computes exactly what this config does.

    Raises `UserError` naming each option, known here or not, that has no place in the file.
    """
    has_a_place = {*ARCHITECTURES["llama"], *STATED, *OTHERWISE, *TRAINING_ONLY}
    without_place = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in has_a_place and value != field.default:
            without_place[field.name] = value
    scaling = config.rope_scaling
    # llama.cpp uses the usual values for a scaling's other numbers, whatever the file says.
    if scaling and scaling != RopeScaling(scaling.type, scaling.factor, scaling.original_max_seq_len):
        without_place["rope_scaling"] = scaling
    if dtype not in KINDS:
        without_place["dtype"] = dtype

    decided = {name: getattr(config, name) for name in ARCHITECTURES["llama"]}
    kinds = [kind for kind, options in ARCHITECTURES.items() if options == decided]
    if not kinds:
        without_place |= decided
    if without_place:
        options = ", ".join(f"{name} {value!r}" for name, value in without_place.items())
        raise UserError(f"--format gguf: that format has no place for a model with {options}; choose hf")
    return kinds[0]


def _described(config: ModelConfig) -> dict:
    """The metadata of a model, without the architecture's name in front."""
    described = {theirs: of_kind(getattr(config, ours)) for ours, (theirs, of_kind) in STATED.items()}
    described |= {
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    scaling = config.rope_scaling
    if scaling:
        described["rope.scaling.original_context_length"] = scaling.original_max_seq_len
    if scaling and scaling.type in SCALINGS:  # Llama 3's is a tensor
        described["rope.scaling.type"] = scaling.type
        described["rope.scaling.factor"] = float(scaling.factor)
    return described
