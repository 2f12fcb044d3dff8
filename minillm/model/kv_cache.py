"""Keys and values of the tokens already read, so that each new token costs one step."""

import torch
from torch import Tensor


class KVCache:
    """A preallocated cache for a batch of sequences that grow together.

    Rows of unequal length are padded on the left: the first `padding[b]` slots of row b hold no token.
    keys, values: per layer (B, T_max, K, D). `length` counts the slots filled so far.
    """

    def __init__(
        self,
        config,
        batch_size: int,
        max_len: int,
        *,
        padding: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """config: a `ModelConfig`; max_len in tokens; padding: (B,) int64 or None."""
        shape = (batch_size, max_len, config.n_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.padding = None if padding is None else padding.to(device)
        self.max_len = max_len
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, T, K, D) to a layer and return all its keys and values so far (views).

        `length` moves only at `advance`, once all layers have been given the same T tokens.
        """
        end = self.length + k.shape[1]
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, {end} were given")
        self.keys[layer][:, self.length : end] = k
        self.values[layer][:, self.length : end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,) int64, and the slots that are padding in all of them."""
        unused = 0
        if self.padding is not None:
            self.padding = self.padding[rows]
            unused = int(self.padding.min())
            self.padding = self.padding - unused if int(self.padding.max()) > unused else None
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(len(rows), *old.shape[1:])
                new[:, : self.length - unused] = old[rows, unused : self.length]
                tensors[layer] = new
        self.length -= unused

    def positions(self, n_tokens: int, device) -> Tensor:
        """Position of each of the next `n_tokens` in its own sequence: (T,), or (B, T) with padding."""
        slots = torch.arange(self.length, self.length + n_tokens, device=device)
        return slots if self.padding is None else (slots - self.padding[:, None]).clamp(min=0)

    def documents(self, n_tokens: int, device) -> Tensor | None:
        """0 where a slot is padding, 1 where it is text, over all slots so far: (B, T_k) int32 or None."""
        if self.padding is None:
            return None
        slots = torch.arange(self.length + n_tokens, device=device)
        return (slots >= self.padding[:, None]).int()
