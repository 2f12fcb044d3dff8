"""Keys and values of the tokens already read, so that each new token costs one step.

Each row of the cache is a slot for one text, and has a length of its own:

    row 0   a b c d . . . .     length 4          one more token a row:   a b c d E . . .
    row 1   f g . . . . . .     length 2                                  f g H . . . . .
    row 2   . . . . . . . .     free (length 0)                           I . . . . . . .

A text can leave (`free`) and another take its row (`rows`, then a forward pass over its prompt) while the others go on.
"""

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Keys and values of B texts, up to T_max tokens each.

    keys, values: per layer (B, T_max, K, D). lengths: (B,) int64 on their device, how many tokens each row holds;
    filled is the same on the host, so that nothing has to wait for the device. A forward pass over T new tokens a row
    calls `reserve`, then `update` in each layer, then `advance`.
    """

    stores = True  # a forward pass changes it

    def __init__(
        self,
        config,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """config: a `ModelConfig`; max_len in tokens."""
        shape = (batch_size, max_len, config.n_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.filled = np.zeros(batch_size, dtype=np.int64)
        self.max_len = max_len
        self.recordable = False  # True: what a pass does depends on no number of the host, so it can be recorded
        self.ends: Tensor | None = None  # (B,) end of each row's keys in this pass; None: all end with the last key

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(self.filled.tolist())

    def check_room(self, n_tokens: int) -> None:
        """Raise ValueError unless every row can take so many more tokens."""
        if self.longest + n_tokens > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, {self.longest + n_tokens} were given")

    def reserve(self, n_tokens: int) -> slice | Tensor:
        """Make room for T more tokens a row.

        Returns their positions: a slice, or (B, T) int64 where rows differ in length.
        """
        self.check_room(n_tokens)
        filled = self.filled.tolist()
        begin, end = max(filled), max(filled) + n_tokens
        if not self.recordable and min(filled) == begin:  # all rows have one length: slices do
            self.ends, self.new, self.used = None, slice(begin, end), slice(end)
            return self.new
        offsets = torch.arange(n_tokens, device=self.lengths.device)
        first_slots = torch.arange(len(self.filled), device=self.lengths.device) * self.max_len
        positions = self.lengths[:, None] + offsets  # (B, T)
        self.ends = self.lengths + n_tokens
        self.new = (first_slots[:, None] + positions).flatten()  # (B·T,): where they go in (B·T_max, K, D)
        self.used = slice(None) if self.recordable else slice(end)
        return positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' k and v, (B, T, K, D), where `reserve` made room.

        Returns the layer's keys and values (B, T_k, K, D), views. A row's own are those before `ends`; what is beyond
        them belongs to nobody.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.ends is None:
            keys[:, self.new] = k
            values[:, self.new] = v
        else:
            keys.flatten(0, 1).index_copy_(0, self.new, k.flatten(0, 1).to(keys.dtype))
            values.flatten(0, 1).index_copy_(0, self.new, v.flatten(0, 1).to(values.dtype))
        return keys[:, self.used], values[:, self.used]

    def advance(self, n_tokens: int) -> None:
        """All layers have stored the T new tokens: they count from now on."""
        self.lengths.add_(n_tokens)
        self.filled += n_tokens

    # ---- rows come and go

    def shorten(self, lengths: list[int]) -> None:
        """Forget what each row holds beyond so many tokens, for example the padding of a shorter prompt."""
        self.filled[:] = lengths
        self.lengths.copy_(torch.from_numpy(self.filled))

    def free(self, row: int) -> None:
        """Forget a row's text, so that another can take its place."""
        self.filled[row] = 0
        self.lengths[row] = 0

    def rows(self, begin: int, end: int) -> "KVCache":
        """Some of the rows as a cache of their own over the same memory: what it reads, these rows hold."""
        part = KVCache.__new__(KVCache)
        part.keys = [keys[begin:end] for keys in self.keys]
        part.values = [values[begin:end] for values in self.values]
        part.lengths, part.filled = self.lengths[begin:end], self.filled[begin:end]
        part.max_len, part.recordable, part.ends = self.max_len, False, None
        return part

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,) int64, into tensors of their size."""
        self.filled = self.filled[rows.cpu().numpy()]
        self.lengths = self.lengths[rows]
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(len(rows), *old.shape[1:])
                tensors[layer][:, : self.longest] = old[rows, : self.longest]
