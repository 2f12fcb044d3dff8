"""The slots of the engine: the rows of one cache, and which texts they hold.

    row 0   a b c d e . . .    in use: each gets a token a step
    row 1   f g h . . . . .    in use
    row 2   a b x . . . . .    its prompt is being read
    row 3   p q r s . . . .    free; still holds a text whose beginning another prompt may have

Rows in use come first, so that a step computes nothing else; then those whose prompts are being read, so that one pass
reads several. Where a text ends, it exchanges its row with the last one in use. A prompt that begins as some row's text
does takes the keys and values of that part from there: ids are compared, no hashes, and only texts of the same owner.
"""

import torch

from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import virtual_tokens


class Slot:
    """A row of the cache, and the text whose keys and values it holds."""

    def __init__(self, row: int):
        self.row = row
        self.text: list[int] = []
        self.owner = ""
        self.last_use = 0  # when it was freed, in steps


class Slots:
    """All slots, ordered by their rows: first those that get a token a step, then those whose prompts are being read,
    then the free ones.
    """

    def __init__(self, model: Transformer, n: int, context: int):
        """context: tokens of text that each can hold; the model's virtual tokens stand before them in every row."""
        device = model.norm.weight.device
        dtype = model.norm.weight.dtype
        virtual = virtual_tokens(model)
        self.n_virtual = 0 if virtual is None else virtual.n
        self.cache = KVCache(model.cache_config, n, self.n_virtual + context, device=device, dtype=dtype)
        if virtual is not None:
            with torch.no_grad():
                virtual.fill(model, self.cache)
        self.slots = [Slot(row) for row in range(n)]  # in the order of their rows
        self.n_active = 0  # get a token a step
        self.n_reading = 0  # whose prompts are being read

    @property
    def n_taken(self) -> int:
        """How many slots a request has: rows 0 to n_taken − 1."""
        return self.n_active + self.n_reading

    @property
    def n_free(self) -> int:
        """How many slots no request has."""
        return len(self.slots) - self.n_taken

    @property
    def n_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(tensor.nbytes for tensor in self.cache.keys + self.cache.values)

    def reading(self) -> list[Slot]:
        """The slots whose prompts are being read."""
        return self.slots[self.n_active : self.n_taken]

    # ---- texts come and go

    def longest_beginning(self, prompt: list[int], owner: str) -> tuple[Slot | None, int]:
        """The slot whose text begins most like a prompt of the same owner, and how many ids they share.

        At least one id of the prompt is left to be computed, which gives the first new token. None, 0: none begins so.
        """
        source = None
        n_shared = 0
        for slot in self.slots:
            if slot.owner == owner:
                n_common = common_prefix(slot.text, prompt[:-1])
                if n_common > n_shared:
                    source = slot
                    n_shared = n_common
        return source, n_shared

    def take(self, prompt: list[int], owner: str, source: Slot | None, n_shared: int) -> Slot:
        """A free slot for a prompt, which holds its first `n_shared` ids as `source` has them; None: it holds none."""
        # the source itself if it is free and loses little; else the one that was free for longest
        taken = min(self.slots[self.n_taken :], key=lambda slot: (len(slot.text) > 0, slot.last_use))
        if source is not None and source.row >= self.n_taken and 2 * n_shared >= len(source.text):
            taken = source
        source_row = taken.row if source is None else source.row
        self.cache.begin_row(taken.row, source_row, self.n_virtual + n_shared)
        taken.text = prompt[:n_shared]
        taken.owner = owner
        self._swap(taken, self.slots[self.n_taken])
        self.n_reading += 1
        return taken

    def activate(self, slot: Slot) -> None:
        """The prompt is read: the slot joins those that get a token a step."""
        self._swap(slot, self.slots[self.n_active])
        self.n_active += 1
        self.n_reading -= 1

    def release(self, slot: Slot, step: int) -> None:
        """The text has ended, at this step; the slot keeps it until another needs the room."""
        if slot.row < self.n_active:
            self._swap(slot, self.slots[self.n_active - 1])
            self.n_active -= 1
        else:
            self.n_reading -= 1
        self._swap(slot, self.slots[self.n_taken])  # behind those whose prompts are being read
        slot.last_use = step

    def forget(self, slot: Slot) -> None:
        """Overwrite a slot's text, whose numbers cannot be relied on, with zeros: NaN times a weight of 0 is NaN."""
        slot.text = []
        row = slot.row
        for tensor in self.cache.keys + self.cache.values:  # (S, K, T_max, D)
            tensor[row, :, self.n_virtual :] = 0
        self.cache.begin_row(row, row, self.n_virtual)

    def _swap(self, first: Slot, second: Slot) -> None:
        """Let two slots exchange their rows."""
        if first is second:
            return
        self.cache.swap_rows(first.row, second.row)
        first.row, second.row = second.row, first.row
        self.slots[first.row] = first
        self.slots[second.row] = second


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many ids two texts share from their beginning on."""
    n = min(len(first), len(second))
    if first[:n] == second[:n]:
        return n
    return next(i for i in range(n) if first[i] != second[i])
