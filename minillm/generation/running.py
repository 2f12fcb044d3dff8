"""A request that has a slot, and what is worked out for it alone."""

import torch
from torch import Tensor

from minillm.generation.requests import Ticket, TokenLogProbs
from minillm.generation.sampling import Draws
from minillm.generation.slots import Slot


class Running:
    """A request that has a slot."""

    slot: Slot
    n_cached: int  # tokens of the prompt that the slot held already

    def __init__(self, ticket: Ticket, context: int, vocab_size: int, device: torch.device):
        """context: tokens of prompt and answer at most."""
        request = ticket.request
        self.ticket = ticket
        self.prompt = list(request.prompt)
        self.most = min(request.max_new_tokens, context - len(self.prompt))  # new tokens
        self.n_new = 0
        self.last = 0  # the newest token, which no pass has read yet
        self.draws = Draws(request.sampling, request.choice, self.most, self.prompt, vocab_size, device)
        self.prompt_log_probs: list[TokenLogProbs | None] | None = [None] if request.prompt_log_probs else None


def log_probs_of(logits: Tensor, tokens: list[int], n_top: int) -> list[TokenLogProbs]:
    """Log-probabilities of these tokens, one for each row of logits (T, V), and of each row's `n_top` best."""
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (T, V)
    ids = torch.tensor(tokens, device=logits.device)  # (T,)
    chosen = log_p.gather(-1, ids[:, None])[:, 0].tolist()
    best, best_ids = (part.tolist() for part in log_p.topk(min(n_top, log_p.shape[-1]), dim=-1))  # (T, n_top)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(best_ids, best, strict=True)]
    return [TokenLogProbs(*pair) for pair in zip(chosen, tops, strict=True)]
