"""A request that has a slot, and what is worked out for it alone."""

import torch
from torch import Tensor

from minillm.generation.requests import Ticket, TokenLogProbs
from minillm.generation.sampling import Draws
from minillm.generation.slots import Slot


class Running:
    """A request that has a slot."""

    def __init__(self, ticket: Ticket, slot: Slot, context: int, vocab_size: int, device: torch.device):
        """slot: holds as much of the prompt as was in the cache. context: tokens of prompt and answer at most."""
        request = ticket.request
        self.ticket = ticket
        self.slot = slot
        self.prompt = list(request.prompt)
        self.n_cached = len(slot.text)
        self.most = min(request.max_new_tokens, context - len(self.prompt))  # new tokens
        self.n_new = 0
        self.last = 0  # the newest token, which no pass has read yet
        self.draws = Draws(request.sampling, request.choice, self.most, self.prompt, vocab_size, device)
        self.prompt_log_probs: list[TokenLogProbs | None] | None = [None] if request.prompt_log_probs else None

    @property
    def n_unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return max(0, len(self.prompt) - len(self.slot.text))

    def unread(self, n: int) -> list[int]:
        """The next n of them."""
        begin = len(self.slot.text)
        return self.prompt[begin : begin + n]


def log_probs_of(logits: Tensor, tokens: list[int], n_top: int) -> list[TokenLogProbs]:
    """Log-probabilities of these tokens, one for each row of logits (T, V), and of each row's `n_top` best."""
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (T, V)
    ids = torch.tensor(tokens, device=logits.device)  # (T,)
    chosen = log_p.gather(-1, ids[:, None])[:, 0].tolist()
    best, best_ids = (part.tolist() for part in log_p.topk(min(n_top, log_p.shape[-1]), dim=-1))  # (T, n_top)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(best_ids, best, strict=True)]
    return [TokenLogProbs(*pair) for pair in zip(chosen, tops, strict=True)]
