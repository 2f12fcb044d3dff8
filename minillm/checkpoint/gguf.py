"""Models in GGUF files: llama.cpp's names and conventions ↔ ours.

Architecture "llama" keeps query and key rows for interleaved rotary positions; "qwen2" and "qwen3" keep them
half-split, as Hugging Face does. A model whose options llama.cpp would ignore is refused, not written wrongly.
"""

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.errors import UnsupportedError, UserError, naming_damage
from minillm.checkpoint import gguf_format, tensor_files
from minillm.checkpoint.gguf_format import Entry
from minillm.checkpoint.huggingface import (
    OURS_ALONE,
    ROTATED,
    StoredModel,
    half_split,
    interleaved,
    model_type,
    shapes_of,
)
from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.rope import rotary_tables
from minillm.tokenizer import byte_bpe
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.tokenizer import JsonTokenizer, Tokenizer

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # our name → GGUF's
TYPES = {1: "NORMAL", 2: "UNKNOWN", 3: "CONTROL", 4: "USER_DEFINED", 5: "UNUSED", 6: "BYTE"}  # of pieces
OWN_FILE = "minillm.tokenizer_file"  # the tokenizer's file in base64: the standard keys say only how it cuts text
UNUSED, PADDING = 5, "[PAD{}]"  # type and text of rows of the embedding for which the tokenizer has no piece
FACTORS = "rope_freqs.weight"  # Llama 3's scaling: what each pair's frequency is divided by
LLAMA3_LENGTH = 8192  # context that Llama 3 was trained on
PARTS = {
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
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(key: str) -> str:
    """GGUF's name of the tensor with this Hugging Face key."""
    stem, _, suffix = key.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PARTS[part]}.{suffix}"


def open_file(path: str | Path) -> tuple[StoredModel, dict]:
    """The model of a GGUF file, and its metadata; only the header has been read.

    Quantised weights count as float32. Raises `UserError` listing all tensors that do not fit, or options that are not
    supported.
    """
    path = Path(path)
    metadata, entries = gguf_format.read_header(path)
    with naming_damage(path):
        config = _config(metadata, entries, path)
    keys = {gguf_name(key): key for key in shapes_of(config)}
    held = {keys.get(name, name): entry for name, entry in entries.items() if name != FACTORS}
    tensor_files.match_tensors(shapes_of(config), {key: entry.shape for key, entry in held.items()}, path)

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = held[key].read(dtype)
        tensor_files.check_finite(key, tensor, path)
        rotated = metadata["general.architecture"] == "llama" and key.endswith(ROTATED)
        return half_split(tensor, config.head_dim) if rotated else tensor

    dtype = gguf_format.PLAIN.get(entries["token_embd.weight"].kind, torch.float32)
    ids = {f"{role}_token_id": i for role, i in _special_ids(metadata).items() if role != "unk"}
    return StoredModel(config, dtype, read, ids), metadata


def _config(metadata: dict, entries: dict[str, Entry], path: Path) -> ModelConfig:
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {kind!r} is not supported; choose one of {', '.join(ARCHITECTURES)}")
    about = {name.removeprefix(f"{kind}."): value for name, value in metadata.items() if name.startswith(f"{kind}.")}
    needed = {
        "dim": "embedding_length",
        "n_layers": "block_count",
        "n_heads": "attention.head_count",
        "ffn_dim": "feed_forward_length",
        "max_seq_len": "context_length",
        "norm_eps": "attention.layer_norm_rms_epsilon",
    }
    missing = [f"{kind}.{name}" for name in needed.values() if name not in about]
    missing += ["token_embd.weight"] if "token_embd.weight" not in entries else []
    if missing or metadata.get("split.count", 1) > 1:
        raise UserError(f"{path}: lacks {', '.join(missing) or 'the other parts of a split file: join them first'}")
    values = {ours: about[theirs] for ours, theirs in needed.items()}
    values["n_kv_heads"] = about.get("attention.head_count_kv", values["n_heads"])
    if values["n_layers"] > len(entries):
        raise UserError(f"{path}: {values['n_layers']:,} layers, as its header says, in {len(entries):,} tensors")
    rotated = about.get("rope.dimension_count")
    head_dim = about.get("attention.key_length", rotated or values["dim"] // values["n_heads"])
    unsupported = {
        "expert_count": about.get("expert_count"),
        "rope.dimension_count": rotated not in (None, head_dim),
        "attention.value_length": about.get("attention.value_length", head_dim) != head_dim,
        "attention.sliding_window": about.get("attention.sliding_window"),
    }
    usual = {"attn_factor": 1.0, "yarn_beta_fast": RopeScaling.beta_fast, "yarn_beta_slow": RopeScaling.beta_slow}
    unsupported |= {f"rope.scaling.{k}": about.get(f"rope.scaling.{k}", value) != value for k, value in usual.items()}
    if any(unsupported.values()):
        raise UserError(f"{path}: {', '.join(k for k, v in unsupported.items() if v)} as set there is not supported")
    config = ModelConfig(
        **values,
        vocab_size=entries["token_embd.weight"].shape[0],
        head_dim=head_dim,
        rope_theta=about.get("rope.freq_base", 1e4),
        tie_embeddings="output.weight" not in entries,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        rope_scaling=_read_scaling(about, path),
    )
    return _with_llama3(config, about, entries[FACTORS], path) if FACTORS in entries else config


def _read_scaling(about: dict, path: Path) -> RopeScaling | None:
    kind = about.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{path}: rope scaling {kind!r} is not supported; choose none, linear or yarn")
    length = about.get("rope.scaling.original_context_length", about["context_length"])
    return RopeScaling(kind, about.get("rope.scaling.factor", 1.0), length)


def _llama3_factors(config: ModelConfig) -> Tensor:
    """The factors by which Llama 3's scaling divides the frequency of each pair, fp32 (D/2,)."""

    def frequencies(scaling: RopeScaling | None) -> Tensor:  # the angles of position 1
        cos, sin = rotary_tables(dataclasses.replace(config, max_seq_len=2, rope_scaling=scaling), "cpu")
        return torch.atan2(sin[1].double(), cos[1].double())

    return (frequencies(None) / frequencies(config.rope_scaling)).float()


def _with_llama3(config: ModelConfig, about: dict, entry: Entry, path: Path) -> ModelConfig:
    """The config with Llama 3's scaling. Raises `UserError` unless that gives the factors in the file."""
    factors = entry.read(torch.float32).flatten()
    length = about.get("rope.scaling.original_context_length", LLAMA3_LENGTH)
    scaling = RopeScaling("llama3", round(float(factors.max()), 4), length)
    config = dataclasses.replace(config, rope_scaling=scaling)
    ours = _llama3_factors(config)
    if factors.shape != ours.shape or not torch.allclose(factors, ours, rtol=1e-3):
        raise UserError(f"{path}: {FACTORS}: not the factors of Llama 3's scaling (low 1, high 4); not supported")
    return config


# ---- writing


def write_file(model: StoredModel, tokenizer: Tokenizer | None, path: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as GGUF; dtype: of the matrices, while gains and biases are float32.

    Raises `UserError` naming the options that the format lacks.
    """
    config, kind = model.config, model_type(model.config)
    scaling = config.rope_scaling
    # llama.cpp uses the usual values for YaRN's other numbers, whatever the file says.
    usual = scaling and RopeScaling(scaling.type, scaling.factor, scaling.original_max_seq_len)
    if kind not in ARCHITECTURES or scaling != usual or dtype not in FILE_TYPES:
        options = {name: getattr(config, name) for name in OURS_ALONE} | {"rope_scaling": scaling, "dtype": dtype}
        raise UserError(f"--format gguf: that format has no place for a model with {options}; choose hf")
    about = {
        "context_length": config.max_seq_len,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    tensors = {
        key: (tuple(shape), dtype if len(shape) > 1 else torch.float32) for key, shape in shapes_of(config).items()
    }
    factors = None
    if scaling:
        about["rope.scaling.original_context_length"] = scaling.original_max_seq_len
    if scaling and scaling.type == "llama3":
        factors = _llama3_factors(config)
        tensors[FACTORS] = (tuple(factors.shape), torch.float32)
    elif scaling:
        about |= {"rope.scaling.type": scaling.type, "rope.scaling.factor": float(scaling.factor)}
    metadata = {"general.architecture": kind, "general.type": "model", "general.file_type": FILE_TYPES[dtype]}
    metadata |= {f"{kind}.{name}": value for name, value in about.items()}
    if tokenizer:
        metadata |= _describe(tokenizer, config.vocab_size)
        metadata[OWN_FILE] = base64.b64encode(tokenizer.data).decode()
    keys = {FACTORS if key == FACTORS else gguf_name(key): key for key in tensors}

    def read(name: str) -> Tensor:
        if name == FACTORS:
            return factors
        tensor = model.read(keys[name], tensors[keys[name]][1])
        rotated = kind == "llama" and keys[name].endswith(ROTATED)
        return interleaved(tensor, config.head_dim) if rotated else tensor

    gguf_format.write(path, metadata, {name: tensors[key] for name, key in keys.items()}, read)


# ---- the tokenizer


def _special_ids(metadata: dict) -> dict[str, int]:
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in ROLES.items()}
    return {role: i for role, i in ids.items() if isinstance(i, int)}


def unpadded(tokens: list[str]) -> int:
    """How many tokens there are before the `PADDING` at the end."""
    n = len(tokens)
    while n and tokens[n - 1] == PADDING.format(n - 1):
        n -= 1
    return n


def read_tokenizer(metadata: dict, source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe. Raises `UserError` if its kind is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise UnsupportedError(f"{source}: a tokenizer of the kind {kind!r} is not supported; choose llama or gpt2")
    with naming_damage(f"{source}: its tokenizer"):
        tokens = metadata["tokenizer.ggml.tokens"]
        n = unpadded(tokens)
        types = [TYPES[t] for t in metadata["tokenizer.ggml.token_type"]]
        pieces = list(zip(tokens, types, strict=True))[:n]
        ids = _special_ids(metadata)
        config = {f"{role}_token": pieces[i][0] for role, i in ids.items()}
        config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")) and "bos" in ids
        config["chat_template"] = metadata.get("tokenizer.chat_template")
        if kind == "gpt2":
            return _read_byte_level(metadata, pieces, config, source)
        scored = [(text, score, t) for (text, t), score in zip(pieces, metadata["tokenizer.ggml.scores"], strict=False)]
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        made = from_pieces(scored, ids, dummy_prefix=prefix, source=source)
        made = _as_exported(made, lambda data: Tokenizer(data, source), metadata)
        return made.with_settings(add_bos=config["add_bos_token"], chat_template=config["chat_template"])


def _as_exported(made: Tokenizer, read: Callable[[bytes], Tokenizer], metadata: dict) -> Tokenizer:
    """`made`, or the exported file if it means the same: token bins identify a tokenizer by its file's SHA-256."""
    own = read(base64.b64decode(metadata[OWN_FILE])) if OWN_FILE in metadata else made
    return own if _describe(own, made.vocab_size) == _describe(made, made.vocab_size) else made


def _read_byte_level(metadata: dict, pieces: list[tuple[str, str]], config: dict, source: str) -> Tokenizer:
    split = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if split not in byte_bpe.SPLITS:
        known = ", ".join(byte_bpe.SPLITS)
        raise UnsupportedError(f"{source}: its tokenizer cuts text by the rules {split!r}; known are {known}")
    named = {name: {text: i for i, (text, t) in enumerate(pieces) if t == name} for name in TYPES.values()}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    qwen, llama = split == "qwen2", split == "llama-bpe"
    bpe = byte_bpe.ByteBPE(named["NORMAL"], merges, split, named["USER_DEFINED"], nfc=qwen, words_first=llama)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    bos = config["bos_token"] if config["add_bos_token"] else None
    files = {
        "tokenizer.json": byte_bpe.write(bpe, named["CONTROL"] | named["UNKNOWN"], bos),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False).encode(),
    }
    made = JsonTokenizer(files, source)
    return _as_exported(made, lambda data: JsonTokenizer(files | {"tokenizer.json": data}, source), metadata)


def _describe(tokenizer: Tokenizer, n_rows: int) -> dict:
    """Metadata with which llama.cpp encodes text as our tokenizer does; n_rows: of the embedding."""
    if isinstance(tokenizer, JsonTokenizer):
        kind, tokens, types, more = _describe_byte_level(tokenizer)
    else:
        pieces = tokenizer.model.proto.pieces
        if tokenizer.model.proto.trainer_spec.model_type != tokenizer.model.proto.trainer_spec.BPE:
            raise UserError("--format gguf: only BPE vocabularies have a place there; this one is of another kind")
        kind, tokens, types = "llama", [piece.piece for piece in pieces], [piece.type for piece in pieces]
        scores = [piece.score for piece in pieces] + [0.0] * (n_rows - len(pieces))
        more = {"pre": "default", "scores": scores, "add_space_prefix": tokenizer.model.dummy_prefix}
    for i in range(len(tokens), n_rows):  # llama.cpp wants a token for each row
        tokens.append(PADDING.format(i))
        types.append(UNUSED)
    more |= {f"{ROLES[role]}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    more["add_bos_token"] = tokenizer.start_id == tokenizer.bos_id != tokenizer.eos_id
    described = {"model": kind, "tokens": tokens, "token_type": types} | more
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{name}": value for name, value in described.items()} | template


def _describe_byte_level(tokenizer: JsonTokenizer) -> tuple[str, list[str], list[int], dict]:
    bpe, number = tokenizer.bpe, {name: t for t, name in TYPES.items()}
    tokens = [PADDING.format(i) for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for name, ids in (("NORMAL", bpe.ids), ("USER_DEFINED", bpe.whole), ("CONTROL", tokenizer.control)):
        for text, i in ids.items():
            tokens[i], types[i] = text, number[name]
    return "gpt2", tokens, types, {"pre": bpe.split, "merges": [" ".join(merge) for merge in bpe.merges]}
