"""The decoder-only transformer, on one device, knowing nothing of ranks.

    tokens (B, T) → embedding (B, T, C) → L × [x += attention(norm(x)); x += mlp(norm(x))] → norm → logits (B, T, V)

Modules have the names of Hugging Face's Llama, so that a state dict can be saved as a checkpoint directly.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.base.errors import UserError
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.rope import rotary_tables


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (see `kernels.reference.rms_norm`)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm), in one pass over memory where there is a kernel for it. delta None: nothing to add."""
        return (x, self(x)) if delta is None else ops.add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if config.qk_norm:  # each head's query and key normed before the rotation (Qwen3, OLMo 2)
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rotation, spans: Tensor | None, cache: KVCache | None, layer: int, prefix) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = ops.linears(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(batch, length, self.config.n_heads, self.config.head_dim)  # (B, T, H, D)
        k = k.view(batch, length, self.config.n_kv_heads, self.config.head_dim)  # (B, T, K, D)
        v = v.view(batch, length, self.config.n_kv_heads, self.config.head_dim)
        if rotation is not None and self.config.qk_norm:
            q, k = ops.rope(q, k, *rotation, self.q_norm.weight, self.k_norm.weight, self.config.norm_eps)
        elif rotation is not None:
            q, k = ops.rope(q, k, *rotation)
        elif self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if prefix is not None:
            k, v = prefix(layer, k, v)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, Tk, K, D): all tokens so far
        out = ops.attention(q, k, v, causal=True, window=self.config.window, spans=spans)
        return ops.linears(out.reshape(batch, length, -1), self.o_proj)[0]  # (B, T, H·D) → (B, T, C)


class MLP(nn.Module):
    """The gated feed-forward network: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = ops.linears(x, self.gate_proj, self.up_proj)
        return ops.linears(ops.swiglu(gate, up), self.down_proj)[0]


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each on a normed input, each added back.

    What is to be added is passed on to the next norm, so that addition and norm are one op: with residual stream x,
    x₁ = x + delta, x₂ = x₁ + attention(norm(x₁)), and mlp(norm(x₂)) is the delta of the next layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotation, spans: Tensor | None, cache: KVCache | None, layer: int, prefix
    ) -> tuple[Tensor, Tensor]:
        """x, delta: (B, T, C), delta not yet added (None: nothing). Returns the next x and delta.

        prefix: a function (layer, k, v) → (k, v) that puts virtual tokens into keys and values, or None.
        """
        x, normed = self.input_layernorm.after_adding(x, delta)
        delta = self.dropout(self.self_attn(normed, rotation, spans, cache, layer, prefix))
        x, normed = self.post_attention_layernorm.after_adding(x, delta)
        return x, self.dropout(self.mlp(normed))


class Transformer(nn.Module):
    """A decoder of the given `ModelConfig`; weights are drawn by `init_weights`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.checkpoint_activations = False  # True: recompute each layer in the backward pass, to save memory
        self.virtual: nn.Module | None = None  # trained vectors before each document (tuning/virtual.py)
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

    @property
    def n_virtual(self) -> int:
        """How many placeholders each document must begin with: one for each of the model's virtual tokens."""
        return 0 if self.virtual is None else self.virtual.n

    @property
    def context(self) -> int:
        """How many tokens the model can read and write: max_seq_len minus its virtual tokens."""
        return self.config.max_seq_len - self.n_virtual

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Give every parameter its first value, which depends on the seed alone, whatever the device.

        Matrices of linear layers and embeddings are drawn from N(0, 0.02²), the two projections that write into the
        residual stream from N(0, (0.02/√(2L))²), so that its variance does not grow with depth (Radford et al. 2019,
        GPT-2, section 2.3); their biases start at 0. Any other parameter has the value that its module's
        `__init__` gives it: the gain of a norm is 1.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU: every device gets the same weights
        started = set()
        for path, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                if module.weight not in started:  # else it is tied to one that has been drawn
                    residual = path.endswith(("o_proj", "down_proj"))
                    std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
                started.update(module.parameters(recurse=False))
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
                started.update(module.parameters(recurse=False))
        others = [name for name, parameter in self.named_parameters() if parameter not in started]
        if others:
            self._start_as_built(others, seed)

    def _start_as_built(self, names: list[str], seed: int) -> None:
        """Give these parameters the values they have in a new model: here they may be trained, or (meta) never set."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            new = dict(type(self)(self.config).named_parameters())
        for name in names:
            self.get_parameter(name).copy_(new[name])

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or, with targets, the summed loss in nats.

        tokens, targets: (B, T) int64. mask: (B, T) bool, True where a target counts (None: everywhere).
        documents: (B, T) int32, non-decreasing along a row; attention and positions stay inside a document.
        cache: what came before; it grows by these T tokens. With virtual tokens each document begins with `n_virtual`
        placeholders of any id, whose logits mean nothing.
        """
        hidden = self.hidden(tokens, documents=documents, cache=cache)
        skipped = tokens.shape[1] - hidden.shape[1]
        if targets is None:
            return F.pad(self.logits(hidden), (0, 0, skipped, 0))
        flat_mask = None if mask is None else mask[:, skipped:].flatten()
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets[:, skipped:].flatten(), flat_mask, self.config.softcap
        )

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The final normed states (B, T, C), from which logits and losses are computed.

        With a prefix, and neither documents nor a cache, its n placeholders have no states: (B, T − n, C).
        """
        length = tokens.shape[1]
        positions, documents = self._placed(tokens, documents, cache)
        x = self.embed_tokens(tokens)  # (B, T, C)
        rotation = prefix = None
        if self.virtual is not None:
            x, prefix = self.virtual(x, positions)
        if positions is None:
            positions = slice(length - x.shape[1], length)
        if self.config.positions == "learned":
            x = x + self.embed_positions.weight[positions]
        else:
            rotation = self.cos[positions], self.sin[positions]  # (T, D/2) or (B, T, D/2)
        spans = None if documents is None else ops.document_spans(documents)
        x = self.dropout(x)
        delta = None
        for number, layer in enumerate(self.layers):
            if self.checkpoint_activations and self.training:
                x, delta = checkpoint(layer, x, delta, rotation, spans, cache, number, prefix, use_reentrant=False)
            else:
                x, delta = layer(x, delta, rotation, spans, cache, number, prefix)
        if cache is not None:
            cache.advance(length)
        return self.norm.after_adding(x, delta)[1]

    def _placed(
        self, tokens: Tensor, documents: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Position of each token, (B, T) int64 (None: 0 to T − 1), and its document; with a cache both come from that.

        Raises `UserError` for a position beyond max_seq_len; a row may be longer than that, a document may not.
        """
        length, limit = tokens.shape[1], self.config.max_seq_len
        if cache is not None:
            positions, documents = cache.positions(length, tokens.device), cache.documents(length, tokens.device)
            reach = cache.length + length
        else:
            positions, reach = None if documents is None else positions_within(documents), length
            if positions is not None and length > limit:
                reach = int(positions.max()) + 1
        if reach > limit:
            raise UserError(f"{reach} tokens are more than the model's max_seq_len {limit}")
        return positions, documents

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry (B, T, V) from `hidden` (B, T, C), soft-capped if configured."""
        logits = self.lm_head(hidden)
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def positions_within(documents: Tensor) -> Tensor:
    """Position of each token inside its document: (B, T) int64 from non-decreasing numbers (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values
