"""How much memory training and generation take, by formula."""

import os

import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.model.config import ModelConfig
from minillm.model.quant import BLOCK, GROUP
from minillm.model.size import n_parameters


def _stored(n_in: int, n_out: int, bits: int | None) -> int:
    """Bytes of a weight as it is stored; bits None: in fp32."""
    blocks = -(-n_in // BLOCK)
    if bits == 4:
        return n_out * blocks * (BLOCK // 2 + 1) + 4 * -(-n_out * blocks // GROUP) + 4
    return n_out * (n_in + 4) if bits == 8 else n_out * n_in * (bits or 32) // 8


def memory_estimate(
    config: ModelConfig, bits: int | None, rank: int, rows: int, seq_len: int, size: int = 2
) -> dict[str, int]:
    """Peak bytes of training LoRA on a quantized base, item by item; their sum is the whole.

    bits: of the base (None: fp32). rank: of an adapter on every linear layer of the blocks, in fp32, with AdamW. rows ×
    seq_len tokens at once, layers recomputed in the backward pass, products in numbers of `size` bytes under autocast,
    the residual stream in fp32. Not counted: the columns that int8 keeps (at most 3 % of the base), and the CUDA
    context (about 0.5 GB).

    A layer keeps two inputs: the stream and what is to be added to it. At its peak a layer holds in addition two
    states of the stream, two normed ones, queries, keys, values and attention's output, and six tensors as wide as
    the feed-forward network: gate, up, their product, and the gradient of each. In the loss there are the logits of a
    chunk, at most `kernels.linear_cross_entropy.chunk_rows`, the head in numbers of `size`, and a gradient.
    """
    c, f, tokens = config.dim, config.ffn_dim, rows * seq_len
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    maps = ((c, q), (c, kv), (c, kv), (q, c), (c, f), (c, f), (f, c))
    weights = sum(n_in * n_out for n_in, n_out in maps)
    tables = config.max_seq_len * config.head_dim if config.positions == "rope" else 0
    scratch = 0 if (bits or 32) == 8 * size else max(n_in * n_out for n_in, n_out in maps) * size
    layer = tokens * (8 * c + size * (2 * c + 2 * q + 2 * kv + 6 * f)) + scratch
    logits = min(tokens * config.vocab_size, max((config.vocab_size + tokens) * c, 1 << 25))
    head = config.vocab_size * c if size < 4 else 0
    return {
        f"base, {bits or 32} bits": config.n_layers * sum(_stored(*shape, bits) for shape in maps),
        "embedding, norms, head": 4 * (n_parameters(config) - config.n_layers * weights + tables),
        f"adapters of rank {rank}, AdamW": 16 * config.n_layers * rank * sum(n_in + n_out for n_in, n_out in maps),
        "inputs of all layers": tokens * config.n_layers * c * (4 + size),
        "one layer, or the loss": max(layer, size * (logits + head + tokens * c)),
    }


def activations(shape: ModelConfig, rows: int, seq_len: int, size: int) -> tuple[float, float]:
    """Bytes kept for the backward pass, and the same when each layer is recomputed from its input.

    Counted per layer and token, for attention that never stores its scores: the inputs of two norms and their
    outputs, queries, keys and values before and after rotation, attention's output, and gate, up and their
    product. The loss keeps logits of the rows it handles at once; they are not counted. size: bytes of a number.
    """
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer = 4 * shape.dim + 3 * q + 3 * kv + 4 * shape.ffn_dim
    tokens = rows * seq_len * size
    return tokens * (shape.n_layers * layer + 2 * shape.dim), tokens * (shape.n_layers * shape.dim + layer)


def check_memory(cfg, shape: ModelConfig, device: torch.device) -> None:
    """Refuse a model that this machine's memory cannot hold, since the system would end the run without a word.

    On a CPU, and without activations: weights alone for a frozen base, else gradients and the optimizer's state too.
    """
    full = cfg.tune == "full"
    each = 12.0 if full else (cfg.base_bits or 32) / 8  # bytes a parameter; AdamW's two moments in place of one: 16
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, there = each * n_parameters(shape) * ranks_here, files.memory_bytes()
    if device.type == "cpu" and needed > there:
        what = "weights, gradients and optimizer" if full else "the base's weights"
        fewer = ", or train few parameters over it (--tune lora --base_bits 4)" if full and cfg.init_from else ""
        raise UserError(
            f"{n_parameters(shape):,} parameters need at least {needed / 1e9:.1f} GB ({what}), but this machine has "
            f"{there / 1e9:.1f}, swap included: choose a smaller model{fewer}"
        )
