"""The decoder-only transformer, on one device, knowing nothing of ranks.

    tokens (B, T) → embedding (B, T, C) → L × [x += attention(norm(x)); x += mlp(norm(x))] → norm → logits (B, T, V)

A reward or value model ends in scores (B, T) instead: one number a position, by a head of its own (`score_head`).

Modules have the names of Hugging Face's Llama, so that a state dict can be saved as a checkpoint directly.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.base.errors import UserError
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.loss import cross_entropy_of
from minillm.model.packed import PackedLinear
from minillm.model.rope import rotary_tables


class AttentionMetadata(NamedTuple):
    """What every layer has to know of a forward pass's tokens besides their states; made once for all layers."""

    rotation: tuple[Tensor, ...] | None  # the angles of their positions, by which queries and keys are turned
    spans: Tensor | None  # where each token's document is, as `ops.document_spans` says it; None: one text a row
    cache: KVCache | None  # keys and values of the tokens before them; None: there are none
    positions: slice | Tensor | None = None  # in place of angles: of learned vectors, which are added to the states
    seen: Tensor | None = None  # (B, T, Tk) bool, which keys each token sees; None: its own and all before it
    chosen: Tensor | None = None  # (B, n) int64, the tokens whose states the layer gives; None: all of them
    ends: Tensor | None = None  # where the cached keys of rows of different lengths end, as `ops.visible_keys` says it


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (see `kernels.reference.rms_norm`)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm), in one pass over memory where there is a kernel for it. delta None: nothing to add."""
        return (x, self(x)) if delta is None else ops.add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        """layer: the number of the layer it is in, from 0, under which a cache has its keys and values."""
        super().__init__()
        self.config = config
        self.layer = layer
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if config.qk_norm:  # each head's query and key normed before the rotation (Qwen3, OLMo 2)
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        batch, length, _ = x.shape
        rotation, spans, cache, _, seen, chosen, ends = metadata
        q, k, v = ops.linears(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(batch, length, self.config.n_heads, self.config.head_dim)  # (B, T, H, D)
        k = k.view(batch, length, self.config.n_kv_heads, self.config.head_dim)  # (B, T, K, D)
        v = v.view(batch, length, self.config.n_kv_heads, self.config.head_dim)

        # norm each head's queries and keys, and turn them by their positions; one op where there are both
        if rotation is not None and self.config.qk_norm:
            q, k = ops.rope(q, k, rotation, self.q_norm.weight, self.k_norm.weight, self.config.norm_eps)
        elif rotation is not None:
            q, k = ops.rope(q, k, rotation)
        elif self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)

        # store keys and values, and read them with those of the tokens before
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Tk, K, D)

        # what is read of them: all tokens before the own, or what a mask says, for all tokens or for the chosen ones
        if seen is None:
            out = self.attend(q, k, v, spans, ends)  # (B, T, H, D)
        else:
            out = ops.masked_attention(q if chosen is None else of_tokens(q, chosen), k, v, seen)  # (B, T or n, H, D)
        return ops.linears(out.flatten(2), self.o_proj)[0]  # (B, T, H·D) → (B, T, C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, ends: Tensor | None) -> Tensor:
        """Causal attention, the queries being those of the last T of the Tk keys; ends: where rows differ in length."""
        if ends is not None:
            return ops.cached_attention(q, k, v, ends, window=self.config.window)
        return ops.attention(q, k, v, causal=True, window=self.config.window, spans=spans)


class MLP(nn.Module):
    """The gated feed-forward network: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = ops.linears(x, self.gate_proj, self.up_proj)  # (B, T, F)
        return ops.linears(ops.swiglu(gate, up), self.down_proj)[0]


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each on a normed input, each added back.

        x = x + attention(norm(x))
        x = x + mlp(norm(x))

    Each addition waits for the next norm, since the two are one op: `add_and_norm` gives x + delta and the norm of
    that. So a layer returns the stream x and what is still to be added to it, and the next layer, or the model's last
    norm, begins with that addition.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, delta: Tensor | None, metadata: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """x, delta: (B, T, C), delta not yet added (None: nothing). Returns the next x and delta, of chosen tokens."""
        x, normed = self.input_layernorm.add_and_norm(x, delta)
        delta = self.dropout(self.self_attn(normed, metadata))
        if metadata.chosen is not None:
            x = of_tokens(x, metadata.chosen)  # (B, n, C)
        x, normed = self.post_attention_layernorm.add_and_norm(x, delta)
        return x, self.dropout(self.mlp(normed))


class Transformer(nn.Module):
    """The decoder of a `ModelConfig`; `init_weights` draws its weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if config.score_head:
            self.score = nn.Linear(config.dim, 1, bias=False)
        else:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.cache_config = config  # of the layers whose keys and values a cache holds
        self.checkpoint_activations = False  # True: recompute each layer in the backward pass, to save memory
        self.compiled_step: Callable[[KVCache, Tensor], Tensor] | None = None  # for one row of generation
        self.tie()
        self.build_rotation()

    def tie(self) -> None:
        """Let the head share the embedding's weight, if the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def build_rotation(self) -> None:
        """Compute the rotary tables, fp32 (T_max, D/2); they are not part of a checkpoint."""
        if self.config.positions == "rope":
            cos, sin = rotary_tables(self.config, self.embed_tokens.weight.device)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def give_score_head(self, seed: int) -> None:
        """Put a new score head in the place of the language model's, drawn from N(0, 0.02²) by the seed alone."""
        weight = torch.randn(1, self.config.dim, generator=torch.Generator().manual_seed(seed)) * 0.02
        del self.lm_head
        self.score = nn.Linear(self.config.dim, 1, bias=False, device="meta")
        self.score.weight = nn.Parameter(weight.to(self.norm.weight))  # where the model is, in its dtype
        self.config = dataclasses.replace(self.config, score_head=True)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Give every parameter its first value, which depends on the seed alone, not on the device.

        Matrices of linear layers and embeddings are drawn from N(0, 0.02²), the two projections that write into the
        residual stream from N(0, (0.02/√(2L))²), so that its variance does not grow with depth (Radford et al. 2019,
        GPT-2, section 2.3); their biases start at 0. Any other parameter has the value that its module's
        `__init__` gives it: the gain of a norm is 1.
        """
        for name, value in self.first_values(seed):
            self.get_parameter(name).copy_(value)

    def first_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and first value of each parameter, one after the other, on the CPU: see `init_weights`."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: every device gets the same weights
        started = set()  # parameters that have their first value
        for path, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if module.weight not in started:  # else it is tied to one that is drawn already
                    residual = path.endswith(("o_proj", "down_proj"))
                    std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                    yield f"{path}.weight", torch.randn(module.weight.shape, generator=generator) * std
                if getattr(module, "bias", None) is not None:
                    yield f"{path}.bias", torch.zeros(module.bias.shape)
                started.update(module.parameters(recurse=False))
            elif isinstance(module, RMSNorm):
                yield f"{path}.weight", torch.ones(module.weight.shape)
                started.update(module.parameters(recurse=False))

        # parameters of any other module
        others = [name for name, parameter in self.named_parameters() if parameter not in started]
        if others:
            yield from self._as_built(others, seed)

    def _as_built(self, names: list[str], seed: int) -> Iterator[tuple[str, Tensor]]:
        """These parameters' values in a new model: here they may be trained, or (meta) never set."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            new_model = type(self)(self.config)
        for name in names:
            yield name, new_model.get_parameter(name).detach()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        z_loss: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V), or, with targets, the summed loss in nats; of a model with a score head its `scores`.

        tokens, targets: (B, T) int64. mask: (B, T) bool, True where a target counts (None: everywhere).
        documents: (B, T) int32, non-decreasing along a row; attention and positions stay inside a document.
        cache: keys and values of the tokens before each row; it grows by these T tokens.
        z_loss: weight ζ of ζ log² Z, which is added for each target; then returns two: the loss, and what was added.
        """
        hidden = self.hidden(tokens, documents=documents, cache=cache)
        if self.config.score_head:
            if targets is not None:
                raise ValueError("a model with a score head predicts no tokens: give it no targets")
            return self.scores(hidden)
        if targets is None:
            return self.logits(hidden)
        flat_mask = None if mask is None else mask.flatten()  # (B·T,)
        if isinstance(self.lm_head, PackedLinear):
            if z_loss is not None:
                raise ValueError("z_loss is for training, and a head packed for generation is not trained")
            return cross_entropy_of(hidden.flatten(0, 1), self.logits, targets.flatten(), flat_mask)
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), flat_mask, self.config.softcap, z_loss
        )

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The states (B, T, C) after the last norm, from which logits and losses are computed.

        chosen: (B, n) int64, with a cache: numbers of tokens, 0 to T − 1. Then the states (B, n, C) are those of these
        tokens, and the last layer computes no others: of the rest it needs keys and values only.
        """
        return self.through_layers(self.embed_tokens(tokens), documents=documents, cache=cache, chosen=chosen)

    def through_layers(
        self,
        x: Tensor,
        *,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """`hidden` of embeddings x (B, T, C) in place of tokens."""
        length = x.shape[1]
        metadata = self.attention_metadata(length, documents, cache, x.dtype)
        if metadata.positions is not None:
            x = x + self.embed_positions.weight[metadata.positions]  # (B, T, C) + (B, T, C) or (T, C)

        # through the layers, each of which leaves its last addition to the next norm
        x = self.dropout(x)
        delta = None
        # a layer that stores its keys and values cannot be computed a second time
        recompute = self.checkpoint_activations and self.training and not (cache is not None and cache.stores)
        for layer in self.layers:
            if chosen is not None and layer is self.layers[-1]:
                metadata = metadata._replace(seen=cache.seen_by(chosen), chosen=chosen)
            if recompute:
                x, delta = checkpoint(layer, x, delta, metadata, use_reentrant=False)
            else:
                x, delta = layer(x, delta, metadata)
        if cache is not None:
            cache.advance(length)
        return self.norm.add_and_norm(x, delta)[1]

    def attention_metadata(
        self, length: int, documents: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> AttentionMetadata:
        """What the layers need to know of T tokens a row. dtype: of the states."""
        positions = self._positions(length, documents, cache)  # (B, T), or (T,) if all rows have the same
        spans = None if documents is None else ops.document_spans(documents, self.config.window, dtype)
        seen = ends = None
        if cache is not None:
            seen = cache.seen
            if cache.ends is not None:
                ends = ops.visible_keys(cache.ends, length, cache.n_read, self.config.window, dtype)
        if self.config.positions == "learned":
            return AttentionMetadata(None, spans, cache, positions, seen, None, ends)
        rotation = ops.rotation(self.cos[positions], self.sin[positions], dtype)
        return AttentionMetadata(rotation, spans, cache, None, seen, None, ends)

    def _positions(self, length: int, documents: Tensor | None, cache: KVCache | None) -> slice | Tensor:
        """Position of each of T tokens in its text: (B, T) int64, or a slice where all rows have the same.

        Raises `UserError` for a position beyond max_seq_len; a row may be longer than that, a document may not.
        """
        if cache is not None and documents is not None:
            raise ValueError("a cache holds one text a row: documents cannot be given with it")
        positions = slice(length)
        reach = length  # one past the last position
        if cache is not None:
            reach = cache.reach(length)
        elif documents is not None:
            positions = positions_within(documents)
            if length > self.config.max_seq_len:
                reach = int(positions.max()) + 1
        if reach > self.config.max_seq_len:
            raise UserError(f"{reach} tokens are more than the model's max_seq_len {self.config.max_seq_len}")
        return positions if cache is None else cache.reserve(length)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry (B, T, V) from `hidden` (B, T, C), soft-capped if configured."""
        logits = ops.linear(hidden, self.lm_head)
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def scores(self, hidden: Tensor) -> Tensor:
        """The score (B, T) at every position from `hidden` (B, T, C), in fp32: in bf16 close scores would be equal."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.float() @ self.score.weight.float().T).squeeze(-1)  # (B, T, C) · (C, 1)


def of_tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """What x (B, T, …) holds of the tokens with these numbers, (B, n) → (B, n, …)."""
    rows = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
    return x[rows, chosen]


def positions_within(documents: Tensor) -> Tensor:
    """Position of each token inside its document: (B, T) int64 from non-decreasing numbers (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # (B, T)
    is_first = torch.ones_like(documents, dtype=torch.bool)  # (B, T), of its document
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begin = torch.where(is_first, index, 0).cummax(dim=1).values  # (B, T), of each token's document
    return index - begin
