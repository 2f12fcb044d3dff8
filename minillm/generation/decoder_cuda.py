"""One token at a time on a GPU: the step of `decode.Decoder` as one CUDA graph.

A step of a 1.1 B model in bf16 reads 2.2 GB of weights, which an H100 does in 0.73 ms; launching its about 270 kernels
one by one takes the CPU several times longer. So the second step captures them in a CUDA graph, which every later step
replays with a single launch. A replay runs the same kernels with the same arguments at the same addresses. Therefore
everything that changes from step to step is a number on the device, at a fixed address:

    clock = [end of each row's keys | position of each row's token | slot the token is written to]      int64, (2B + 1)

The step adds one to all of it. Attention takes the whole cache with begin and end as tensors
(`ops.decode_attention`), keys and values are written by `index_copy_` at `slot`, and cos and sin are looked up at
`position`. Sampling stays outside.

The step itself knows nothing of graphs: on a CPU it runs without one, and is tested there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Block, Transformer


class GraphDecoder:
    """Reads one token a row, after a prefill has put the prompts into the cache: `decode.Decoder` for GPUs."""

    def __init__(self, model: Transformer, cache: KVCache, joined: bool | None = None):
        """model: a plain one (`decode.is_plain`), on the cache's device and in its dtype.

        joined: whether to compute q, k and v in one product, and gate and up in one. That saves three launches per
        layer and costs a copy of these weights, about half of the model. None: on a GPU with twice that memory free.
        """
        self.config, self.cache, self.model = model.config, cache, model
        joined = _has_room_for_copies(model) if joined is None else joined
        self.layers = [_Layer(layer, joined) for layer in model.layers]
        self._prepare()

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token a row, (B,) int64, overwritten by the next. The cache grows by one."""
        if self.cache.length >= self.cache.max_len:
            raise ValueError(f"the cache holds {self.cache.max_len} tokens and is full")
        if self.keys is not self.cache.keys[0]:  # rows were dropped: the cache has new tensors of another size
            self._prepare()
        if self.length != self.cache.length:
            self._set_clock()
        self.tokens.copy_(tokens)
        if self.warm and self.graph is None:
            self._capture()
        if self.graph is None:  # the first step compiles kernels and allocates memory, which a capture cannot
            self.logits, self.warm = self._compute(), self.tokens.is_cuda
        else:
            self.graph.replay()
        self.cache.advance(1)
        self.length += 1
        return self.logits

    def _prepare(self) -> None:
        """Allocate what the step reads, for the cache as it is now."""
        self.keys, self.graph, self.warm, self.length = self.cache.keys[0], None, False, -1
        batch, device = self.keys.shape[0], self.keys.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.clock = torch.zeros(2 * batch + 1, dtype=torch.int64, device=device)
        self.end, self.position, self.slot = self.clock.split((batch, batch, 1))
        padding = self.cache.padding
        self.begin = (torch.zeros_like(self.tokens) if padding is None else padding).to(torch.int32, copy=True)

    def _set_clock(self) -> None:
        self.length = self.cache.length
        self.end.fill_(self.length + 1)
        self.position.copy_(self.length - self.begin)
        self.slot.fill_(self.length)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # what other threads do (NCCL's, a server's) must not invalidate the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._compute()
        self.graph = graph  # only now: after a failed capture no step may replay part of one

    def _compute(self) -> Tensor:
        """The step: reads `tokens`, clock and cache, writes the cache, advances the clock. Returns logits (B, V)."""
        config, model, batch = self.config, self.model, self.tokens.shape[0]
        heads, kv_heads, size = config.n_heads, config.n_kv_heads, config.head_dim
        x = F.embedding(self.tokens, model.embed_tokens.weight)  # (B, C)
        rotation = None
        if config.positions == "learned":
            x = x + F.embedding(self.position, model.embed_positions.weight)
        else:
            rotation = [t.index_select(0, self.position)[:, None] for t in (model.cos, model.sin)]  # (B, 1, D/2)
        for layer, keys, values in zip(self.layers, self.cache.keys, self.cache.values, strict=True):
            q, k, v = layer.qkv(ops.rms_norm(x, layer.norm1.weight, layer.norm1.eps))
            q, k = layer.turn(q.view(batch, 1, heads, size), k.view(batch, 1, kv_heads, size), rotation)
            keys.index_copy_(1, self.slot, k)
            values.index_copy_(1, self.slot, v.view(batch, 1, kv_heads, size))
            attended = ops.decode_attention(q, keys, values, self.begin, self.end, config.window)
            x.addmm_(attended.reshape(batch, heads * size), layer.out)  # in place: `addmm` would copy x first
            x.addmm_(ops.swiglu(*layer.gate_up(ops.rms_norm(x, layer.norm2.weight, layer.norm2.eps))), layer.down)
        self.clock.add_(1)
        logits = torch.mm(ops.rms_norm(x, model.norm.weight, model.norm.eps), model.lm_head.weight.t())
        return logits if config.softcap is None else config.softcap * torch.tanh(logits / config.softcap)


class _Layer:
    """What a step needs of a layer: its norms and its weights, these as (in, out) views or joined copies."""

    def __init__(self, layer: Block, joined: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm1, self.norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _Products((attention.q_proj, attention.k_proj, attention.v_proj), joined)
        self.out, self.down = attention.o_proj.weight.t(), mlp.down_proj.weight.t()
        self.gate_up = _Products((mlp.gate_proj, mlp.up_proj), joined)
        self.qk_norms = (attention.q_norm, attention.k_norm) if attention.config.qk_norm else None

    def turn(self, q: Tensor, k: Tensor, rotation: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed if the model has QK-norm, and rotated to their positions."""
        if rotation is None:
            return (q, k) if self.qk_norms is None else tuple(n(x) for n, x in zip(self.qk_norms, (q, k), strict=True))
        if self.qk_norms is None:
            return ops.rope(q, k, *rotation)
        q_norm, k_norm = self.qk_norms
        return ops.rope(q, k, *rotation, q_norm.weight, k_norm.weight, q_norm.eps)


class _Products:
    """x (B, in) → [x Wᵀ + b for each of some layers], by one product where their weights are joined."""

    def __init__(self, layers: tuple[nn.Linear, ...], joined: bool):
        self.sizes = [layer.out_features for layer in layers]
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        if joined:
            weights = [torch.cat(weights)]
            biases = [None if biases[0] is None else torch.cat(biases)]
        self.weights = [(weight.t(), bias) for weight, bias in zip(weights, biases, strict=True)]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = [torch.mm(x, w) if b is None else torch.addmm(b, x, w) for w, b in self.weights]
        return tuple(outs) if len(outs) == len(self.sizes) else outs[0].split(self.sizes, dim=-1)


def _has_room_for_copies(model: Transformer) -> bool:
    """Whether the model's GPU has twice the memory of all q, k, v, gate and up weights free."""
    device = model.embed_tokens.weight.device
    if device.type != "cuda":
        return False
    split = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    needed = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.endswith(split))
    return torch.cuda.mem_get_info(device)[0] > 2 * needed
