"""The engine's two passes over the model: one over parts of prompts, one over a token more for every row in use."""

import torch
from torch import Tensor

from minillm.generation.completion import is_recorded
from minillm.generation.recorded_step import RecordedStep, next_logits
from minillm.generation.running import Running, log_probs_of
from minillm.generation.slots import Slots
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer


class Passes:
    """Computes logits for requests that have a slot, and notes in the slots what was read."""

    def __init__(self, model: Transformer, slots: Slots):
        self.model = model
        self.slots = slots
        self.device = slots.cache.lengths.device
        self._caches: dict[int, KVCache] = {}  # of rows 0 to n − 1
        self._records = is_recorded(slots.cache)  # on a GPU
        self._recorded: dict[int, RecordedStep] = {}  # for 1, 2, 4, 8 … rows

    def read(self, group: list[Running], most: int) -> Tensor:
        """Read the next tokens of these prompts, whose rows follow one another, at most so many of each.

        Returns logits (B, V) after the B prompts that are now read to their end.
        """
        # the tokens, padded on the right, where no token sees them, by the last of each row
        parts = [running.unread(most) for running in group]
        width = max(map(len, parts))
        padded = torch.tensor([part + part[-1:] * (width - len(part)) for part in parts])  # (B, T)
        cache = self.slots.cache.rows(group[0].slot.row, group[-1].slot.row + 1)
        hidden = self.model.hidden(padded.to(self.device), cache=cache)  # (B, T, C)
        for running, part in zip(group, parts, strict=True):
            running.slot.text += part
        cache.shorten([self.slots.n_virtual + len(running.slot.text) for running in group])

        # log-probabilities of the prompts' own tokens, each given by the position before it
        for row, running in enumerate(group):
            if running.prompt_log_probs is not None:
                following = running.prompt[len(running.prompt_log_probs) : len(running.slot.text) + 1]
                logits = self.model.logits(hidden[row : row + 1, : len(following)])[0]  # (T, V)
                running.prompt_log_probs += log_probs_of(logits, following, running.ticket.request.log_probs)

        # where the prompts end
        ends = [hidden[row, len(parts[row]) - 1] for row, running in enumerate(group) if not running.n_unread]
        last = torch.stack(ends) if ends else hidden[:0, 0]  # (B, C)
        return self.model.logits(last[:, None])[:, 0]

    def next(self, rows: list[Running]) -> Tensor:
        """Logits (B, V) after the newest token of each of the rows in use."""
        n = len(rows)
        tokens = [running.last for running in rows]
        for running in rows:
            running.slot.text.append(running.last)
        if not self._records:
            if n not in self._caches:
                self._caches[n] = self.slots.cache.rows(0, n)
            return next_logits(self.model, self._caches[n], torch.tensor(tokens, device=self.device))

        # recorded for 1, 2, 4, 8 … rows; those beyond n write where their next token will
        size = min(1 << (n - 1).bit_length(), len(self.slots.slots))
        if size not in self._recorded:
            self._recorded[size] = RecordedStep(self.model, self.slots.cache.rows(0, size))
        logits = self._recorded[size].step(torch.tensor(tokens + [0] * (size - n)))[:n]
        self.slots.cache.lengths[n:size] -= 1
        self.slots.cache.host_lengths[n:size] -= 1
        return logits
