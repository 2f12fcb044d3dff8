"""Keys and values of the tokens already read, so that each new token costs one step.

Each row of the cache has room for one text, and rows differ in length:

    row 0   a b c d . . . .     length 4          one more token a row:   a b c d E . . .
    row 1   f g . . . . . .     length 2                                  f g H . . . . .
    row 2   . . . . . . . .     free (length 0)                           I . . . . . . .

A text can leave (`free`) and another can take its row (`rows`, then a forward pass over its prompt) while the others go
on.
"""

import copy

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Keys and values of B texts, up to T_max tokens each.

    keys, values: per layer (B, K, T_max, D), so that what a head reads lies together: a step's attention on a CPU takes
    half as long as over (B, T_max, K, D). lengths: (B,) int64 on their device, how many tokens each row holds;
    host_lengths: the same numbers on the host, so that nothing has to wait for the device. A forward pass over T new
    tokens a row calls `reserve`, then `update` in each layer, then `advance`.
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
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.host_lengths = np.zeros(batch_size, dtype=np.int64)
        self.max_len = max_len
        self.recordable = False  # True: a pass depends on no number of the host, so it can be recorded (CUDA graph)
        self.ends: Tensor | None = None  # (B,) end of each row's keys in this pass; None: all end with the last key
        self.seen: Tensor | None = None  # (B, T, T_k) bool, what each new token sees; None: itself and all before it
        self.window = config.window

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(self.host_lengths.tolist())

    def reach(self, n_tokens: int) -> int:
        """One past the last position of T more tokens a row."""
        return self.longest + n_tokens

    def check_room(self, n_tokens: int) -> None:
        """Raise ValueError unless every row has room for `n_tokens` more."""
        if self.longest + n_tokens > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, {self.longest + n_tokens} were given")

    def reserve(self, n_tokens: int) -> slice | Tensor:
        """Make room for T more tokens a row; the pass reads the first `n_read` slots.

        Returns their positions: a slice, or (B, T) int64 where rows differ in length.
        """
        self.check_room(n_tokens)
        lengths = self.host_lengths.tolist()
        begin = max(lengths)
        end = begin + n_tokens

        # all rows have the same length: their new slots are one slice
        if not self.recordable and min(lengths) == begin:
            self.ends = None
            self.new_slots = slice(begin, end)
            self.n_read = end
            return self.new_slots

        # rows differ in length: head h of row b begins at slot (b·K + h)·T_max of the flattened cache (B·K·T_max, D)
        device = self.lengths.device
        offsets = torch.arange(n_tokens, device=device)  # (T,)
        n_heads = self.keys[0].shape[1]
        first_slots = torch.arange(len(lengths) * n_heads, device=device) * self.max_len  # (B·K,)
        positions = self.lengths[:, None] + offsets  # (B, T)
        self.ends = self.lengths + n_tokens  # (B,)
        self.new_slots = (first_slots.view(-1, 1, n_heads) + positions[:, :, None]).flatten()  # (B·T·K,)
        self.n_read = self.max_len if self.recordable else end
        return positions

    def seen_by(self, chosen: Tensor) -> Tensor:
        """Which slots some of the new tokens see, (B, n, T_k) bool, after `reserve`.

        chosen: (B, n) int64, their numbers among the T new ones.
        """
        if self.seen is not None:
            return self.seen.gather(1, chosen[:, :, None].expand(-1, -1, self.seen.shape[2]))
        slots = torch.arange(self.n_read, device=chosen.device)  # (T_k,)
        own = self.lengths[:, None, None] + chosen[:, :, None]  # (B, n, 1)
        seen = slots <= own
        return seen if self.window is None else seen & (slots > own - self.window)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' k and v, (B, T, K, D), where `reserve` made room.

        Returns the layer's keys and values (B, T_k, K, D). A row's own are those before `ends`; what is beyond
        them belongs to no text.
        """
        read = []
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):  # (B, K, T_max, D), (B, T, K, D)
            if self.ends is None:
                stored.narrow(2, self.new_slots.start, new.shape[1]).copy_(new.transpose(1, 2))
            else:  # (B·K·T_max, D) at B·T·K slots ← (B·T·K, D)
                stored.flatten(0, 2).index_copy_(0, self.new_slots, new.flatten(0, 2).to(stored.dtype))
            read.append(stored.narrow(2, 0, self.n_read).transpose(1, 2))  # a slice takes Python longer
        if self.ends is None and self.new_slots.start == 0 and k.dtype == read[0].dtype:
            return k, v  # all that there is, and in the order that GPUs copy quickest (TMA)
        return tuple(read)

    def advance(self, n_tokens: int) -> None:
        """All layers have stored the T new tokens: they count from now on."""
        self.lengths.add_(n_tokens)
        self.host_lengths += n_tokens

    # ---- rows come and go

    def _copy_lengths(self) -> None:
        """Let the device know the lengths that the host has set."""
        self.lengths.copy_(torch.from_numpy(self.host_lengths))

    def shorten(self, lengths: list[int]) -> None:
        """Forget the tokens of each row beyond its new length, for example the padding of a shorter prompt."""
        self.host_lengths[:] = lengths
        self._copy_lengths()

    def free(self, row: int | np.ndarray) -> None:
        """Forget a row's text, or those of several rows, so that others can take their places."""
        self.host_lengths[row] = 0
        self._copy_lengths()

    def copy_rows(self, rows: np.ndarray, source: "KVCache", source_rows: np.ndarray) -> None:
        """Let these rows, (n,), hold the texts that rows `source_rows`, (n,), of another cache hold."""
        self.host_lengths[rows] = source.host_lengths[source_rows]
        self._copy_lengths()
        longest = int(source.host_lengths[source_rows].max())
        to = torch.from_numpy(rows).to(self.lengths.device)
        from_ = torch.from_numpy(source_rows).to(self.lengths.device)
        for ours, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for layer, tensor in enumerate(ours):  # (B, K, T_max, D)
                tensor[to, :, :longest] = theirs[layer][from_, :, :longest]

    def swap_rows(self, first: int, second: int) -> None:
        """Let two rows exchange their texts."""
        pair = [first, second]
        longest = int(self.host_lengths[pair].max())
        self.host_lengths[pair] = self.host_lengths[[second, first]]
        self._copy_lengths()
        for tensors in (self.keys, self.values):
            for tensor in tensors:  # (B, K, T_max, D)
                kept = tensor[first, :, :longest].clone()
                tensor[first, :, :longest] = tensor[second, :, :longest]
                tensor[second, :, :longest] = kept

    def begin_row(self, row: int, source_row: int, length: int) -> None:
        """Let a row hold the first `length` tokens of the text that `source_row` holds; both may be the same row."""
        self.host_lengths[row] = length
        self._copy_lengths()
        if row == source_row:
            return
        for tensors in (self.keys, self.values):
            for tensor in tensors:  # (B, K, T_max, D)
                tensor[row, :, :length] = tensor[source_row, :, :length]

    def rows(self, begin: int, end: int) -> "KVCache":
        """Rows `begin` to `end` as another cache over the same memory: what it stores, these rows hold."""
        part = copy.copy(self)
        part.keys = [keys[begin:end] for keys in self.keys]
        part.values = [values[begin:end] for values in self.values]
        part.lengths = self.lengths[begin:end]
        part.host_lengths = self.host_lengths[begin:end]
        part.recordable = False
        part.ends = None
        part.seen = None
        return part

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,) int64, and give the memory of the others back."""
        self.host_lengths = self.host_lengths[rows.cpu().numpy()]
        self.lengths = self.lengths[rows]
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # (B, K, T_max, D) → (n, K, T_max, D)
                tensors[layer] = old.new_zeros(len(rows), *old.shape[1:])
                tensors[layer][:, :, : self.longest] = old[rows, :, : self.longest]


class TreeCache(KVCache):
    """A cache for rows that hold several texts each; a beginning that some of them share is stored once.

        a b c d     tokens  a b c d e f     c and e follow b, f follows a
        a b e       depths  0 1 2 3 2 1
        a f         ends    6 5 4 4 5 6     token i sees token j where j ≤ i < ends[j]

    All rows begin with equally many tokens that were read before. Nothing can follow the pass that reads the trees.
    """

    depths: Tensor | None = None  # of the pass that comes; None: one text a row

    def branch(self, depths: Tensor, ends: Tensor) -> None:
        """Let the next pass read trees. depths, ends: (B, T) int64, see above; where rows are filled up, any depth."""
        self.depths = depths
        self.branch_ends = ends
        self.deepest = int(depths.max())

    def reach(self, n_tokens: int) -> int:
        return super().reach(n_tokens if self.depths is None else self.deepest + 1)

    def reserve(self, n_tokens: int) -> slice | Tensor:
        slots = super().reserve(n_tokens)
        if self.depths is None:
            return slots
        n_before = self.new_slots.start
        positions = n_before + self.depths  # (B, T)
        before = torch.arange(n_before, device=positions.device).expand(len(positions), -1)  # (B, T_k − T)
        own = torch.arange(n_tokens, device=positions.device)[:, None]  # (T, 1)
        in_tree = (own >= own.T) & (own < self.branch_ends[:, None, :])  # (B, T, T)
        self.seen = torch.cat((torch.ones_like(in_tree[:, :, :1]).expand(-1, -1, n_before), in_tree), 2)
        if self.window is not None:
            distance = positions[:, :, None] - torch.cat((before, positions), 1)[:, None, :]  # (B, T, T_k)
            self.seen &= distance < self.window
        return positions
