"""One token at a time: the model's forward pass reduced to its arithmetic.

A small model spends its time on calling modules, not on multiplying: per new token, this loop over plain
tensors takes less than half the time of `Transformer.hidden` and gives the same logits (a test checks it).
The computation is explained in model.py; read that first.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import MLP, Attention, Block, RMSNorm, Transformer

PLAIN = (nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList)
PLAIN += (Transformer, Block, Attention, MLP, RMSNorm)
# Options that the loop below computes, or that it need not know; with any other one it is not used.
KNOWN = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len", "norm_eps"}
KNOWN |= {"positions", "rope_theta", "rope_scaling", "tie_embeddings", "qk_norm", "qkv_bias", "window", "softcap"}
KNOWN |= {"dropout"}


def is_plain(model: nn.Module) -> bool:
    """Whether the model consists of model.py's modules alone, so that its weights fully determine its output.

    False once a layer was wrapped or changed (an adapter, a hook, quantized weights). Virtual tokens do not matter: the
    prefill has put them into the cache.
    """
    fields = dataclasses.fields(model.config)
    if any(f.name not in KNOWN and getattr(model.config, f.name) != f.default for f in fields):
        return False
    within = [m for name, m in model.named_modules() if name.split(".")[0] != "virtual"]
    return all(type(m) in PLAIN and not (m._forward_hooks or m._forward_pre_hooks) for m in within)


class Decoder:
    """Reads one token a row, after a prefill has put the prompts into the cache."""

    def __init__(self, model: Transformer, cache: KVCache):
        """model: a plain one (see `is_plain`), on the cache's device and in its dtype. Its weights are not copied."""
        self.config, self.cache, self.model = model.config, cache, model
        self.layers = [self._weights(layer) for layer in model.layers]
        self.final_norm, self.head, self.cap = _Norm(model.norm), _product(model.lm_head), model.config.softcap
        if model.config.positions == "rope":  # both halves of a head turn by the same angle: (T_max, D)
            self.cos = torch.cat((model.cos, model.cos), -1)
            self.sin = torch.cat((-model.sin, model.sin), -1)

    @staticmethod
    def _weights(layer: Block) -> tuple:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if attention.config.qk_norm else None
        return (
            _Norm(layer.input_layernorm),
            [_product(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)],
            norms,
            _Norm(layer.post_attention_layernorm),
            # transposed views, (in, out): a product is then one call
            [p.weight.t() for p in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)],
        )

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token a row, (B,) int64. The cache grows by one."""
        config, cache, batch = self.config, self.cache, tokens.shape[0]
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.head_dim
        end = cache.length + 1
        begin = max(0, end - config.window) if config.window else 0
        x, cos, sin, seen = self._start(tokens, begin, end)
        for i, (norm1, (to_q, to_k, to_v), qk_norms, norm2, (out, gate, up, down)) in enumerate(self.layers):
            normed = norm1(x)  # (B, C)
            q = to_q(normed).view(batch, 1, heads, size)
            k = to_k(normed).view(batch, 1, kv_heads, size)
            if qk_norms is not None:
                q, k = qk_norms[0](q), qk_norms[1](k)
            if cos is not None:  # `kernels.reference.rope`, queries and keys at once: (B, 1, H + K, D)
                both = torch.cat((q, k), 2)
                both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin).to(x.dtype)
                q, k = both[:, :, :heads], both[:, :, heads:]
            cache.keys[i][:, end - 1 : end] = k
            cache.values[i][:, end - 1 : end] = to_v(normed).view(batch, 1, kv_heads, size)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),  # (B, H, 1, D)
                cache.keys[i][:, begin:end].transpose(1, 2),  # (B, K, Tk, D)
                cache.values[i][:, begin:end].transpose(1, 2),
                attn_mask=seen,
                enable_gqa=heads != kv_heads,
            )
            x = torch.addmm(x, attended.reshape(batch, heads * size), out)
            normed = norm2(x)
            x = torch.addmm(x, F.silu(torch.mm(normed, gate), inplace=True).mul_(torch.mm(normed, up)), down)
        cache.advance(1)
        logits = self.head(self.final_norm(x))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _start(
        self, tokens: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What all layers share: the embedding (B, C), cos and sin of the position, and which cache slots hold text."""
        padding = self.cache.padding
        position = end - 1 if padding is None else end - 1 - padding  # int, or (B,)
        seen = cos = sin = None
        if padding is not None:
            seen = (torch.arange(begin, end, device=tokens.device) >= padding[:, None])[:, None, None]  # (B, 1, 1, Tk)
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        if self.config.positions == "learned":
            x = x + self.model.embed_positions.weight[position]
        else:
            cos, sin = self.cos[position], self.sin[position]  # (D,)
            if padding is not None:
                cos, sin = cos[:, None, None], sin[:, None, None]  # (B, 1, 1, D)
        return x, cos, sin, seen


def _product(layer: nn.Linear):
    """x (B, in) → x Wᵀ + b, in one call."""
    transposed, bias = layer.weight.t(), layer.bias
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


class _Norm:
    """RMS norm in four small calls where fp32 allows it: x / √(|x|²/C + ε) = x √C / hypot(|x|, √(Cε))."""

    def __init__(self, norm: RMSNorm):
        width, weight = norm.weight.numel(), norm.weight.detach()
        self.norm, self.quick = norm, weight.dtype == torch.float32
        self.scaled = weight * width**0.5
        self.floor = torch.tensor((width * norm.eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.quick:
            return ops.rms_norm(x, self.norm.weight, self.norm.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.scaled).div_(length.hypot_(self.floor))
