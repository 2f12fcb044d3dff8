"""llama2.c's legacy format: a model as one `.bin` of seven numbers and all weights, its vocabulary as another.

    int32  dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: the head is not tied), seq_len
    fp32   embedding; then each kind of tensor for all layers in turn; the final norm; tables of cosines and sines,
           (seq_len, D/2) each; the head, if it is not tied

Everything is little-endian. Query and key rows are for interleaved rotary positions (0, 1), (2, 3), … of a head.
tokenizer.bin: int32 longest piece; then for each id float32 score, int32 length, and the piece in UTF-8. The number of
pieces is not in the file: there is one for each row of the embedding, padding where the tokenizer has none.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.errors import UnsupportedError, UserError
from minillm.checkpoint import tensor_files
from minillm.checkpoint.gguf import PADDING, unpadded
from minillm.checkpoint.huggingface import ROTATED, StoredModel, half_split, interleaved, shapes_of
from minillm.model.config import LARGEST, ModelConfig
from minillm.model.rope import rotary_tables
from minillm.tokenizer.edit import from_pieces
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import JsonTokenizer, Tokenizer

HEADER = struct.Struct("<7i")
KINDS = (  # in the order of the file
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "down", "up")),
)
TABLES = "cosines and sines"
ROPE_THETA, NORM_EPS = 1e4, 1e-5  # not in the file: fixed in llama2.c
UNKNOWN, CONTROL, BYTE = 2, 3, 6  # SentencePiece's types
NEVER = -1e10  # a score: llama2.c merges two pieces only into one with a higher score
BOS, EOS, FIRST_BYTE = 1, 2, 3  # ids that are fixed in llama2.c, with 0 for unknown


def _layout(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of each tensor in the order of the file."""
    shapes = shapes_of(config)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{kind}.weight" for kind in KINDS for layer in range(config.n_layers)]
    for name in (*names, "model.norm.weight"):
        yield name, tuple(shapes[name])
    yield TABLES, (2, config.max_seq_len, config.head_dim // 2)
    if not config.tie_embeddings:
        yield "lm_head.weight", tuple(shapes["lm_head.weight"])


def open_file(path: str | Path) -> StoredModel:
    """The model of a `.bin`; only the header has been read. Raises `UserError` if sizes do not agree."""
    path = Path(path)
    with path.open("rb") as stream:
        start = stream.read(HEADER.size)
    size = path.stat().st_size
    if len(start) < HEADER.size:
        raise UserError(f"{path} ({size} bytes): shorter than the header of a llama2.c model; get a whole copy")
    if start[:4] == b"24ka":
        raise UserError(f"{path}: llama2.c's newer format; only its legacy format (version 0) is read: export to that")
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(start)
    counts = (dim, ffn_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), max_seq_len)
    if not 1 <= min(counts) <= max(counts) <= LARGEST or dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
        kinds = "a Hugging Face folder, a .gguf file or llama2.c's .bin"
        raise UserError(f"{path}: no llama2.c model: its header says {counts}; give {kinds}")
    config = ModelConfig(
        abs(vocab_size),
        dim,
        n_layers,
        n_heads,
        n_kv_heads,
        ffn_dim=ffn_dim,
        max_seq_len=max_seq_len,
        rope_theta=ROPE_THETA,
        norm_eps=NORM_EPS,
        tie_embeddings=vocab_size > 0,
    )
    expected = HEADER.size + 4 * (config.n_parameters() + max_seq_len * config.head_dim)
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes, but its header {counts} asks for {expected:,}; get a whole copy")
    places, offset = {}, HEADER.size
    for key, shape in _layout(config):
        places[key] = tensor_files.Place(path, offset, shape, torch.float32)
        offset += 4 * math.prod(shape)

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = places[key].read(dtype)
        tensor_files.check_finite(key, tensor, path)
        return half_split(tensor, config.head_dim) if key.endswith(ROTATED) else tensor

    return StoredModel(config, torch.float32, read, {"bos_token_id": BOS, "eos_token_id": EOS})


def write_file(model: StoredModel, path: Path) -> None:
    """Write a model as a `.bin`, tensor by tensor. Raises `UserError` naming the options that the format lacks."""
    config = model.config
    fits = {
        "positions": config.positions == "rope",
        "rope_theta": config.rope_theta == ROPE_THETA,
        "rope_scaling": config.rope_scaling is None,
        "norm_eps": math.isclose(config.norm_eps, NORM_EPS, rel_tol=1e-6),
        "head_dim": config.head_dim * config.n_heads == config.dim,
        "qk_norm": not config.qk_norm,
        "qkv_bias": not config.qkv_bias,
        "window": config.window is None,
        "softcap": config.softcap is None,
    }
    if not all(fits.values()):
        wrong = ", ".join(f"{name} {getattr(config, name)}" for name, fit in fits.items() if not fit)
        raise UserError(f"--format llama2c: that format has no place for {wrong}; choose hf")
    counts = [config.dim, config.ffn_dim, config.n_layers, config.n_heads, config.n_kv_heads]
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    with path.open("wb") as file:
        file.write(HEADER.pack(*counts, vocab_size, config.max_seq_len))
        for key, _ in _layout(config):
            tensor = torch.stack(rotary_tables(config, "cpu")) if key == TABLES else model.read(key, torch.float32)
            tensor = interleaved(tensor, config.head_dim) if key.endswith(ROTATED) else tensor
            file.write(tensor.contiguous().numpy())


def read_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """The vocabulary of a tokenizer.bin with `vocab_size` pieces, as a SentencePiece model that encodes text alike.

    Padding at its end is left out.
    """
    data = Path(path).read_bytes()
    pieces, at = [], 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            text = data[at + 8 : at + 8 + length].decode()
            if length < 0 or at + 8 + length > len(data):
                raise struct.error
            pieces.append((text.replace(" ", SPACE_MARK), score))
            at += 8 + length
    except (struct.error, UnicodeDecodeError):
        raise UserError(
            f"{path}: no tokenizer.bin of {vocab_size:,} pieces: damaged at piece {len(pieces):,}"
        ) from None
    if at != len(data):
        raise UserError(f"{path}: holds more than the model's {vocab_size:,} pieces; give the model's own tokenizer")
    del pieces[unpadded([piece for piece, _ in pieces]) :]
    kinds = dict.fromkeys(range(FIRST_BYTE, FIRST_BYTE + 256), "BYTE") | {0: "UNKNOWN", BOS: "CONTROL", EOS: "CONTROL"}
    pieces[:FIRST_BYTE] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]  # the file has newlines around the last two
    described = [(piece, score, kinds.get(i, "NORMAL")) for i, (piece, score) in enumerate(pieces)]
    made = from_pieces(described, {"bos": BOS, "eos": EOS}, dummy_prefix=True, source=str(path))
    return made.with_settings(add_bos=True)


def write_tokenizer(tokenizer: Tokenizer, path: Path, n_rows: int) -> None:
    """Write a vocabulary as tokenizer.bin, padded to the rows of the embedding.

    Raises `UnsupportedError` if llama2.c would encode text differently with it.
    """
    if isinstance(tokenizer, JsonTokenizer):
        raise UnsupportedError("llama2.c has no byte-level BPE, which this vocabulary is of")
    pieces = tokenizer.model.proto.pieces
    kinds = [piece.type for piece in pieces]
    usual = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    if (tokenizer.bos_id, tokenizer.eos_id) != (BOS, EOS) or kinds[: len(usual)] != usual:
        raise UnsupportedError("llama2.c takes unk, bos, eos to be ids 0 to 2 and the bytes to be ids 3 to 258")
    if not tokenizer.model.dummy_prefix:
        raise UnsupportedError("llama2.c puts a space before each text, this vocabulary does not")
    texts = [piece.piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
    texts[BOS], texts[EOS] = b"\n<s>\n", b"\n</s>\n"
    texts += [PADDING.format(i).encode() for i in range(len(pieces), n_rows)]
    scores = [piece.score for piece in pieces] + [NEVER] * (n_rows - len(pieces))
    rows = (struct.pack("<fi", score, len(text)) + text for score, text in zip(scores, texts, strict=True))
    path.write_bytes(struct.pack("<i", max(map(len, texts))) + b"".join(rows))
