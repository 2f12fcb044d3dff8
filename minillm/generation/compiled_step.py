"""One token more of one row on a CPU: the model's own forward pass, compiled between its products.

A step of a small model spends more time on calls there than on arithmetic: around the four products of a layer lie some
50 small ops. torch.compile turns what is between two products into one loop. It does not look into the products: each
stays what it is in every other pass (`packed.py`, `one_token.py`), behind an op that calls it by a number.

What is compiled is a twin of the model, which has its weights. A step reads a `_Row` in place of a `KVCache`, whose
length is the size of a tensor, so that one compilation serves all lengths.
"""

import copy
import functools
import itertools
import os
import shutil
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.packed import Int8Matrix, Matrix, PackedLinear
from minillm.model.quant import QuantLinear
from minillm.model.transformer import Transformer

BACKEND = "inductor"  # of torch.compile; tests take a quicker one, which writes no C++
Product = Callable[[Tensor], Tensor]  # (…, K) → (…, N)


class CompiledStep:
    """`next_logits` of one row. The model's modules and weights must stay as they are."""

    def __init__(self, model: Transformer):
        """Compiles, which takes seconds. Raises `UserError` where there is no compiler, or the model is on a GPU."""
        weight = model.norm.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            kind = f"{weight.dtype} on {weight.device}"
            raise UserError(f"--compile: is for float32 on a CPU, and the model is {kind}; leave --compile out")
        if not (os.environ.get("CXX") or any(shutil.which(name) for name in ("g++", "clang++", "cl"))):
            raise UserError("--compile: torch needs a C++ compiler, and there is none (apt install g++)")
        self.context = model.config.max_seq_len
        self.positions = torch.arange(self.context)  # (T_max,)
        twin = _twin(model)

        def step(token: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
            """Logits (1, V) after a token (1, 1)."""
            hidden = twin.hidden(token, cache=_Row(keys, values, positions))  # (1, 1, C)
            return twin.logits(hidden)[:, 0]

        # torch.compile finds what it compiled by the code object, and checks by hundreds of guards whether it was for
        # this model, which takes as long as two layers. With a code object of its own only the sizes are left to check.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self.step = torch.compile(own, fullgraph=True, backend=BACKEND, options={"guard_filter_fn": _about_sizes})
        lengths = [min(3, self.context)]
        if model.config.window and model.config.window < self.context:
            lengths.append(model.config.window + 1)  # beyond the window there is a mask
        for length in lengths:
            self._compile(KVCache(model.cache_config, 1, length + 1), length)

    def __call__(self, cache: KVCache, token: Tensor) -> Tensor:
        """Logits (1, V) after one more token (1,) int64. The cache, of one row, grows by one."""
        cache.check_room(1)
        length = cache.longest + 1
        if length > self.context:
            raise UserError(f"{length} tokens are more than the model's max_seq_len {self.context}")
        logits = self.step(token[None], self.positions[:length], cache.keys, cache.values)
        cache.advance(1)
        return logits

    @torch.inference_mode()
    def _compile(self, cache: KVCache, length: int) -> None:
        """Compute a step of a text of so many tokens, which compiles it for others and for other caches."""
        for tensor in (*cache.keys, *cache.values):  # (1, K, T_max, D)
            torch._dynamo.mark_dynamic(tensor, 2)
        positions = self.positions[:length]
        torch._dynamo.mark_dynamic(positions, 0)
        try:
            self.step(torch.zeros(1, 1, dtype=torch.int64), positions, cache.keys, cache.values)
        except Exception as problem:  # the compiler's own, of many kinds
            first_line = str(problem).strip().partition("\n")[0]
            raise UserError(f"--compile: torch.compile failed ({first_line}); leave --compile out") from problem


def _about_sizes(guards) -> list[bool]:
    """Which guards torch.compile keeps."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


class _Row:
    """Keys and values of one text within a compiled step."""

    stores = True
    seen = None
    ends = None

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Tensor):
        """keys, values: of each layer (1, K, T_max, D). positions: (T_k,) int64, up to the new token's."""
        self.keys = keys
        self.values = values
        self.newest = positions[-1:]  # (1,)
        self.length = len(positions)

    def reach(self, n_tokens: int) -> int:
        """0: `CompiledStep` has compared the length with the model's context."""
        return 0

    def reserve(self, n_tokens: int) -> Tensor:
        """The new token's position, (1, 1)."""
        return self.newest[None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new token's k and v, (1, 1, K, D). Returns all of the layer's keys and values, (1, T_k, K, D)."""
        row = torch.zeros_like(self.newest)
        heads = torch.arange(k.shape[2])
        read = []
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            # by indices of the whole tensor: where a part of it is written to, the compiler copies all of it
            stored.index_put_((row, heads, self.newest), new[0, 0])
            read.append(stored[:, :, : self.length].transpose(1, 2))
        return tuple(read)

    def advance(self, n_tokens: int) -> None:
        """`CompiledStep` lets the cache grow."""


# ---- products that the compiler does not look into

_products: weakref.WeakValueDictionary[int, Product] = weakref.WeakValueDictionary()  # by their numbers
_numbers = itertools.count()


@torch.library.custom_op("minillm::hidden_product", mutates_args=())
def _hidden_product(x: Tensor, number: int, width: int) -> Tensor:
    return _products[number](x)


@_hidden_product.register_fake
def _shape_of_product(x: Tensor, number: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


class _Hidden(nn.Module):
    """A product behind an op."""

    def __init__(self, product: Product, width: int):
        """width: N, the numbers in a row of its output."""
        super().__init__()
        self.product = product  # kept as long as this is
        self.width = width
        self.number = next(_numbers)
        _products[self.number] = product

    def forward(self, x: Tensor) -> Tensor:
        return _hidden_product(x, self.number, self.width)


def _twin(model: Transformer) -> Transformer:
    """A model of the same tensors, whose products are hidden."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    matrices = {id(layer.matrix): layer.matrix for layer in packed}
    shared = [*model.parameters(), *model.buffers(), *matrices.values()]
    twin = copy.deepcopy(model, {id(part): part for part in shared}).eval()
    hidden = {key: _hide_matrix(matrix) for key, matrix in matrices.items()}  # layers of one input share one
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, PackedLinear):
            key = id(layer.matrix)
            del layer.matrix
            layer.matrix = hidden[key]
        elif isinstance(layer, nn.Linear | QuantLinear):
            twin.set_submodule(path, _Hidden(functools.partial(ops.linear, layer=layer), layer.out_features))
    return twin


def _hide_matrix(matrix: Matrix) -> Matrix | _Hidden:
    """A packed matrix with a hidden product; in 8 bits the rows are rounded outside of it, where they are compiled."""
    width = sum(matrix.sizes)
    if isinstance(matrix, Int8Matrix):
        outside = copy.copy(matrix)
        outside.of_unit_rows = _Hidden(matrix.of_unit_rows, width)
        return outside
    hidden = _Hidden(matrix, width)
    hidden.sizes = matrix.sizes
    return hidden
