"""How much memory training and generation take, by formula, item by item; the sum of the items is the whole.

All sizes are bytes. Numbers of matrix products have `size` bytes: 4 in fp32; 2 under bf16 or fp16 autocast, where
weights, gradients, optimizer and the residual stream stay in fp32. Not counted: the columns that int8 keeps (at most
3 % of the base), and the CUDA context (about 0.5 GB).
"""

import math
import os

import torch

from minillm.base import files
from minillm.base.errors import UserError
from minillm.model.config import ModelConfig
from minillm.model.layouts import GRADIENT, WEIGHT, Work
from minillm.model.quant import BLOCK, GROUP
from minillm.model.size import layer_parameters, linear_shapes, n_parameters

FP32 = 4


def _stored(n_in: int, n_out: int, bits: int | None) -> int:
    """Bytes of a weight as it is stored; bits None: in fp32."""
    if bits == 8:  # a byte a number, and an fp32 scale for each row
        return n_out * (n_in + FP32)
    if bits == 4:  # half a byte a number, a byte for each block's scale; in fp32 one number a group, and one mean
        n_blocks = n_out * math.ceil(n_in / BLOCK)
        n_groups = math.ceil(n_blocks / GROUP)
        return n_blocks * (BLOCK // 2 + 1) + FP32 * n_groups + FP32
    return n_out * n_in * (bits or 32) // 8


# ---- weights, and what training them needs


def weights(shape: ModelConfig, bits: int | None = None) -> dict[str, int]:
    """The model itself. bits: of the linear maps of its layers (None: fp32); all else is in fp32."""
    linears = linear_shapes(shape).values()
    n_linear = shape.n_layers * sum(n_in * n_out for n_in, n_out in linears)
    base = shape.n_layers * sum(_stored(n_in, n_out, bits) for n_in, n_out in linears)
    rest = FP32 * (n_parameters(shape) - n_linear)
    return {
        f"base, {bits or 32} bits": base,
        "embedding, norms, head": rest + rotary_tables(shape, shape.max_seq_len),
    }


def rotary_tables(shape: ModelConfig, n_positions: int) -> int:
    """Cosines and sines of so many positions."""
    return FP32 * n_positions * shape.head_dim if shape.positions == "rope" else 0


def adapter_parameters(shape: ModelConfig, rank: int) -> int:
    """Numbers in LoRA's A and B on every linear map of the layers."""
    return shape.n_layers * rank * sum(n_in + n_out for n_in, n_out in linear_shapes(shape).values())


def optimizer_state(n_trained: int, moments: int = 2) -> dict[str, int]:
    """What training `n_trained` parameters needs beside them. moments: 2 with AdamW, 1 with Muon."""
    return {"gradients": FP32 * n_trained, "moments": FP32 * moments * n_trained}


# ---- a step


def activations(shape: ModelConfig, rows: int, seq_len: int, size: int) -> dict[str, int]:
    """What the forward pass of rows × seq_len tokens keeps for the backward pass, all parameters being trained.

    Of a layer, for attention that never stores its scores: the inputs of two norms (the residual stream) and their
    outputs, queries, keys and values before and after rotation, attention's output, and gate, up, SiLU(gate) and the
    product; and with qk_norm what goes into the norms of queries and keys, and those normed. Autocast keeps each weight
    of a layer once more in numbers of `size` bytes. Of the loss: see `loss_memory`.

    In fp32 this is what PyTorch keeps on a CPU within 5 %; under autocast its own ops keep up to a third more there.
    """
    tokens = rows * seq_len
    q = shape.n_heads * shape.head_dim
    kv = shape.n_kv_heads * shape.head_dim
    # numbers a token that a layer keeps: in fp32, and of `size` bytes
    stream = 2 * shape.dim
    inner = 2 * shape.dim + 3 * q + 3 * kv + 4 * shape.ffn_dim + 2 * head_norms(shape)
    last_norm = shape.dim * (FP32 + size)
    return {
        "activations of all layers": tokens * (shape.n_layers * (FP32 * stream + size * inner) + last_norm),
        "weights in autocast": autocast_weights(shape, size),
        "loss": loss_memory(shape, tokens, size),
    }


def recomputed_activations(
    shape: ModelConfig, rows: int, seq_len: int, size: int, *, bits: int | None = None, frozen: bool = False
) -> dict[str, int]:
    """As `activations`, where each layer is computed again in the backward pass.

    frozen: whether the base is not trained. bits: of its weights as they are stored (None: 32).

    A layer keeps two inputs: the stream and what is to be added to it. At its peak a layer holds in addition two
    states of the stream, two normed ones, queries, keys, values and attention's output, and six tensors as wide as
    the feed-forward network: gate, up, their product, and the gradient of each; what goes into qk_norm's norms; and the
    largest of its weights once more in numbers of `size` bytes, unless they are stored so. Autocast keeps its
    copies of trained weights to the end of the forward pass, which is the loss.
    """
    tokens = rows * seq_len
    q = shape.n_heads * shape.head_dim
    kv = shape.n_kv_heads * shape.head_dim

    # one layer at its peak, with the largest of its weights converted
    converted = 0
    if (bits or 32) != 8 * size:
        converted = size * max(n_in * n_out for n_in, n_out in linear_shapes(shape).values())
    inner = 2 * shape.dim + 2 * q + 2 * kv + 6 * shape.ffn_dim + head_norms(shape)
    layer = tokens * (2 * FP32 * shape.dim + size * inner) + converted

    # the loss, beside autocast's copies of trained weights
    loss = loss_memory(shape, tokens, size)
    if not frozen:
        loss += autocast_weights(shape, size)
    return {
        "inputs of all layers": tokens * shape.n_layers * shape.dim * (FP32 + size),
        "one layer, or the loss": max(layer, loss),
    }


def head_norms(shape: ModelConfig) -> int:
    """Numbers a token that go into the norms of a layer's queries and keys; none without such norms."""
    return (shape.n_heads + shape.n_kv_heads) * shape.head_dim if shape.qk_norm else 0


def autocast_weights(shape: ModelConfig, size: int) -> int:
    """The copies in numbers of `size` bytes that autocast keeps of the fp32 weights of all layers."""
    if size == FP32:
        return 0
    return size * shape.n_layers * sum(n_in * n_out for n_in, n_out in linear_shapes(shape).values())


def loss_memory(shape: ModelConfig, tokens: int, size: int) -> int:
    """The loss at its peak: logits of the tokens that it handles at once (`kernels.linear_cross_entropy.chunk_rows`),
    the head in numbers of `size` bytes, and the gradient of its input.
    """
    logits = min(tokens * shape.vocab_size, max((shape.vocab_size + tokens) * shape.dim, 1 << 25))
    head = shape.vocab_size * shape.dim if size < FP32 else 0
    return size * (logits + head + tokens * shape.dim)


def adapter_training(
    shape: ModelConfig, bits: int | None, rank: int, rows: int, seq_len: int, size: int = 2
) -> dict[str, int]:
    """Training LoRA of this rank, with AdamW, on a frozen base of `bits` bits (None: fp32), layers recomputed."""
    n_trained = adapter_parameters(shape, rank)
    return {
        **weights(shape, bits),
        f"adapters of rank {rank}, AdamW": FP32 * n_trained + sum(optimizer_state(n_trained).values()),
        **recomputed_activations(shape, rows, seq_len, size, bits=bits, frozen=True),
    }


# ---- the same on many GPUs


def gpu_memory(shape: ModelConfig, work: Work) -> dict[str, int]:
    """Bytes that each GPU of a layout takes at its peak, all parameters being trained, in bfloat16.

    Weights, gradients and moments are divided among the GPUs that hold a copy together; each has the rotary tables. A
    layer's weights are whole only while it computes: those of two layers at a time, the second on its way. The head is
    whole in float32 from the forward to the backward pass. With them comes one layer's gradient in float32 beside what
    is sent of it, and that of the head. A single copy has what one device has: weights and gradients of its own, and
    what autocast converts.
    """
    n_state = work.layout.n_holding
    n_trained = n_parameters(shape)
    moments = optimizer_state(n_trained)["moments"]
    if work.muon:  # one moment for the matrices of the layers
        moments -= FP32 * shape.n_layers * sum(n_in * n_out for n_in, n_out in linear_shapes(shape).values())
    common = 2 * FP32 * n_trained if work.diloco_steps else 0  # weights of the last exchange, outer momentum
    state = 2 * FP32 * n_trained + moments + common

    if n_state == 1:
        gathered = autocast_weights(shape, WEIGHT)
        gradients = 0
    else:
        layer = layer_parameters(shape) // work.layout.tp
        head = FP32 * shape.vocab_size * shape.dim
        gathered = WEIGHT * 2 * layer + head
        gradients = (WEIGHT + GRADIENT) * layer + head

    # activations of this GPU's part of each row; of its weights no copies, since they come in bfloat16
    part = work.rows, work.seq_len // (work.layout.cp * work.layout.tp), WEIGHT
    if work.recompute:
        items = recomputed_activations(shape, *part, bits=8 * WEIGHT, frozen=True)
    else:
        items = activations(shape, *part)
        items.pop("weights in autocast")
    if work.layout.cp > 1:  # attention reads keys and values of the whole row
        n_layers = 1 if work.recompute else shape.n_layers
        heads = shape.n_kv_heads / min(work.layout.tp, shape.n_kv_heads)
        items["keys and values"] = round(n_layers * 2 * WEIGHT * work.rows * work.seq_len * heads * shape.head_dim)
    return {
        "state": state // n_state + rotary_tables(shape, max(shape.max_seq_len, work.seq_len)),
        "gathered": gathered,
        "gradients": gradients,
        "activations": sum(items.values()),
    }


# ---- generation


def generation(shape: ModelConfig, seq_len: int, size: int) -> dict[str, int]:
    """The weights, and the cache of one text of `seq_len` tokens, in numbers of `size` bytes."""
    cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * seq_len
    return {"weights": size * n_parameters(shape), "cache": size * cache}


# ---- the machine


def check_memory(training_config, shape: ModelConfig, device: torch.device, holders: int = 1) -> None:
    """Refuse a model that this machine's memory cannot hold, since the system would end the run without a message.

    On a CPU: the weights alone for a frozen base, else also gradients and one moment. Then what a step keeps for its
    backward pass, where it is known that all rows are full. holders: how many ranks hold one copy of it together.
    """
    if device.type != "cpu":
        return  # on a GPU torch raises an error

    # bytes that the processes of this machine need at least
    trains_all = training_config.tune == "full"
    needed = sum(weights(shape, training_config.base_bits).values())
    what = "the base's weights"
    if trains_all:
        needed += sum(optimizer_state(n_parameters(shape), moments=1).values())
        what = "weights, gradients and optimizer"
    is_whole = training_config.base_bits is not None  # a quantized base is not divided
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed *= n_here / (1 if is_whole else holders)
    present = files.memory_bytes()
    if needed <= present:
        if trains_all and training_config.rows_are_full:
            _check_step(training_config, shape, n_here, present - needed)
        return

    remedy = "choose a smaller model"
    if trains_all and training_config.init_from:
        remedy += ", or train few parameters over it (--tune lora --base_bits 4)"
    raise UserError(
        f"{n_parameters(shape):,} parameters need at least {needed / 1e9:.1f} GB ({what}), but this machine has "
        f"{present / 1e9:.1f}, swap included: {remedy}"
    )


def _check_step(training_config, shape: ModelConfig, n_here: int, room: float) -> None:
    """Refuse rows whose activations do not fit. n_here: ranks on this machine. room: bytes that are left for them."""
    size = 2 if training_config.dtype in ("bfloat16", "float16") else FP32
    kept = recomputed_activations if training_config.checkpoint_activations else activations
    rows, seq_len = training_config.micro_batch_size or training_config.batch_size, training_config.seq_len
    needed = sum(kept(shape, rows, seq_len, size).values())
    needed *= n_here / (training_config.context_parallel * training_config.tensor_parallel)
    if needed > room:
        remedy = "lower --micro_batch_size" if rows > 1 else "lower --seq_len"
        if not training_config.checkpoint_activations:
            remedy += ", or set --checkpoint_activations true"
        raise UserError(
            f"a pass over {rows} × {seq_len:,} tokens needs at least {needed / 1e9:.1f} GB beside the model, but this "
            f"machine has {max(0.0, room) / 1e9:.1f} for it, swap included: {remedy}"
        )
