"""One token a row on a GPU: the model's own forward pass, recorded as one CUDA graph.

A step of a 1.1 B model in bf16 reads 2.2 GB of weights, which an H100 does in 0.73 ms; launching its about 300 kernels
one by one takes the CPU several times longer. So the second step records them in a CUDA graph, which every later step
replays with a single launch. A replay runs the same kernels with the same arguments at the same addresses. Therefore
everything that changes from step to step is a number on the device, at a fixed address: the tokens, and the lengths of
the cache's rows (`KVCache.recordable`), from which positions, slots and the ends of the keys are computed. The last
kernel adds one to the lengths. Sampling is not recorded.

The step itself knows nothing of graphs: on a CPU it runs without one, and is tested there.
"""

import torch
from torch import Tensor, nn

from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer


def can_be_recorded(model: nn.Module) -> bool:
    """Whether a replay does all that a forward pass does: not where hooks run, which may do anything."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in _layers(model))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that a step calls: all but the model itself, whose `forward` a step does not use."""
    return [module for module in model.modules() if module is not model]


class RecordedStep:
    """Reads one token a row, after a prefill has put the prompts into the cache.

    The recording is thrown away, and made anew, when the cache has other tensors (rows were dropped), or when the model
    has other modules or its weights other memory (an adapter was switched). Where recording fails because a layer waits
    for the device, each step runs without one.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        """model: on the cache's device and in its dtype."""
        self.model = model
        self.cache = cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = cache.lengths.is_cuda
        self._prepare()

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token a row, (B,) int64; valid until the next step. The cache grows by one."""
        self.cache.check_room(1)
        if self._signature() != self.signature:
            self._prepare()
        self.tokens.copy_(tokens)  # (B,)
        if self.can_record and self.graph is None:
            self._record()
        if self.graph is None:
            self.logits = self._compute()
            self.can_record = self.records and not self.refused  # the first step compiles kernels, a recording cannot
        else:
            self.graph.replay()
            self.cache.host_lengths += 1
        return self.logits

    def _prepare(self) -> None:
        """Begin anew, for cache and model as they are now."""
        self.graph = None
        self.can_record = False
        self.refused = not can_be_recorded(self.model)
        self.tokens = torch.zeros_like(self.cache.lengths)
        self.tables = []  # name → submodule or tensor
        for module in self.model.modules():
            self.tables += [module._modules, module._parameters, module._buffers]
        self.hooks = []
        for module in _layers(self.model):
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.signature = self._signature()

    def _signature(self) -> list:
        """Values that change when a module is replaced or hooked, a weight or the cache gets other memory, or other ops
        are selected.
        """
        parts = [self.cache.keys[0].data_ptr(), len(self.cache.host_lengths), ops.selected(), self.model.training]
        parts += [len(table) for table in self.hooks]
        for table in self.tables:
            for part in table.values():
                parts.append(part.data_ptr() if isinstance(part, Tensor) else id(part))
        return parts

    def _record(self) -> None:
        """Record a step into `graph`, or note that this model cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        lengths = self.cache.host_lengths.copy()
        try:
            # what other threads do (NCCL's, a server's) must not invalidate the recording
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._compute()
            self.graph = graph  # only now: after a recording that failed no step may replay part of one
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.refused = True
            self.can_record = False
        finally:
            self.cache.host_lengths[:] = lengths  # recording computes nothing

    def _compute(self) -> Tensor:
        """The step: reads tokens and cache, writes the cache. Returns logits (B, V)."""
        self.cache.recordable = True
        try:
            return next_logits(self.model, self.cache, self.tokens)
        finally:
            self.cache.recordable = False


def next_logits(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    """Logits (B, V) after one more token a row, (B,) int64, without a recording. The cache grows by one."""
    if model.compiled_step is not None and len(tokens) == 1:  # compiled_step.py
        return model.compiled_step(cache, tokens)
    hidden = model.hidden(tokens[:, None], cache=cache)  # (B, 1, C)
    return model.logits(hidden)[:, 0]
