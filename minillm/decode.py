"""One token at a time: the model's forward pass with everything but the arithmetic taken out.

A small model's time goes into calling modules, not into multiplying: per new token, this loop over plain
tensors does in half the time what `Transformer.hidden` does, and gives the same logits (a test holds it).
The method is in model.py; read that first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm import model as parts
from minillm import ops
from minillm.kv_cache import KVCache

PLAIN = (nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList)
PLAIN += (parts.Transformer, parts.Block, parts.Attention, parts.MLP, parts.RMSNorm)


def is_plain(model: nn.Module) -> bool:
    """Whether the model is only what model.py builds, so that its weights alone say what it does.

    False once anything was put around or into a layer (an adapter, a hook, quantized weights).
    """
    return all(type(m) in PLAIN and not (m._forward_hooks or m._forward_pre_hooks) for m in model.modules())


class Decoder:
    """Reads one token a row, after a prefill has put the prompts into the cache."""

    def __init__(self, model: parts.Transformer, cache: KVCache):
        """model: a plain one (see `is_plain`), on the cache's device and in its dtype."""
        self.config, self.cache, self.model = model.config, cache, model
        self.layers = [self._weights(layer) for layer in model.layers]
        if model.config.positions == "rope":  # both halves of a head turn by the same angle: (T_max, D)
            self.cos = torch.cat((model.cos, model.cos), -1).to(cache.keys[0].dtype)
            self.sin = torch.cat((-model.sin, model.sin), -1).to(cache.keys[0].dtype)

    @staticmethod
    def _weights(layer: parts.Block) -> tuple:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [(p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.config.qk_norm else None
        return (
            *(layer.input_layernorm.weight, qkv, norms, attention.o_proj.weight),
            *(layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight),
            mlp.down_proj.weight,
        )

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token a row, (B,) int64. The cache grows by one."""
        config, cache = self.config, self.cache
        batch, slot = tokens.shape[0], cache.length
        end, begin = slot + 1, max(0, slot + 1 - config.window) if config.window else 0
        position = slot if cache.padding is None else slot - cache.padding  # int, or (B,)
        seen = None  # which slots of the cache are text: (B, 1, 1, Tk)
        if cache.padding is not None:
            seen = (torch.arange(begin, end, device=tokens.device) >= cache.padding[:, None])[:, None, None]
        x = F.embedding(tokens, self.model.embed_tokens.weight)  # (B, C)
        if config.positions == "learned":
            x = x + self.model.embed_positions.weight[position]
            cos = sin = None
        else:  # (D,), or (B, 1, 1, D)
            cos, sin = self.cos[position], self.sin[position]
            if cache.padding is not None:
                cos, sin = cos[:, None, None], sin[:, None, None]
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.head_dim
        for i, (norm1, qkv, qk_norms, out, norm2, gate, up, down) in enumerate(self.layers):
            normed = ops.rms_norm(x, norm1, config.norm_eps)
            q, k, v = (F.linear(normed, weight, bias) for weight, bias in qkv)
            q, k = q.view(batch, 1, heads, size), k.view(batch, 1, kv_heads, size)
            if qk_norms is not None:
                q = ops.rms_norm(q, qk_norms[0], config.norm_eps)
                k = ops.rms_norm(k, qk_norms[1], config.norm_eps)
            if cos is not None:
                q, k = _turn(q, cos, sin), _turn(k, cos, sin)
            cache.keys[i][:, slot:end] = k
            cache.values[i][:, slot:end] = v.view(batch, 1, kv_heads, size)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),  # (B, H, 1, D)
                cache.keys[i][:, begin:end].transpose(1, 2),  # (B, K, Tk, D)
                cache.values[i][:, begin:end].transpose(1, 2),
                attn_mask=seen,
                enable_gqa=heads != kv_heads,
            )
            x = x + F.linear(attended.reshape(batch, -1), out)
            normed = ops.rms_norm(x, norm2, config.norm_eps)
            x = x + F.linear(F.silu(F.linear(normed, gate)).mul_(F.linear(normed, up)), down)
        cache.advance(1)
        return self.model.logits(ops.rms_norm(x, self.model.norm.weight, config.norm_eps))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`kernels.reference.rope` for (B, 1, H, D), with cos and sin laid out for the whole head."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
