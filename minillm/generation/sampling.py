"""How the next token is drawn from the logits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.base.options import Options, option


@dataclass(frozen=True)
class Sampling(Options):
    """How the next token is drawn. Raises UserError for values out of range."""

    temperature: float = option(
        0.8, "logits are divided by it; 0: always the most probable token (greedy)", at_least=0, group="sampling"
    )
    top_k: int = option(0, "keep the k most probable; 0 or more than the vocabulary: all", at_least=0, group="sampling")
    top_p: float = option(
        1.0,
        "keep the fewest most probable that sum to p or more; 0: the best one, 1: all",
        at_least=0,
        at_most=1,
        group="sampling",
    )
    min_p: float = option(
        0.0,
        "keep those with at least min_p × the best one's probability; 0: all",
        at_least=0,
        at_most=1,
        group="sampling",
    )
    repetition_penalty: float = option(
        1.0,
        "divides positive, multiplies negative logits of ids that occurred before; 1: none",
        above=0,
        group="sampling",
    )
    presence_penalty: float = option(
        0.0,
        "subtracted from the logits of ids that the answer holds already; 0: none",
        at_least=-2,
        at_most=2,
        group="sampling",
    )
    frequency_penalty: float = option(
        0.0,
        "the same, as often as the answer holds them; 0: none",
        at_least=-2,
        at_most=2,
        group="sampling",
    )
    seed: int = option(0, "same seed, same text", at_least=0, at_most=(1 << 64) - 1, group="sampling")

    @property
    def needs_history(self) -> bool:
        """Whether it matters which ids occurred in prompt or answer."""
        return self.repetition_penalty != 1

    @property
    def needs_counts(self) -> bool:
        """Whether it matters how often the answer holds each id."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = Sampling(temperature=0.0)


def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities after temperature, top-k, top-p and min-p, unnormalised: (B, n) float64.

    logits: (B, V), for temperature > 0. Also returns the ids they belong to, (B, n) int64, best first,
    or None when the columns are the ids themselves. The best token always stays.
    """
    ids = None
    vocab_size = logits.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:  # "the most probable that sum to p" needs an order
        logits, ids = logits.sort(dim=-1, descending=True)
    largest = logits.amax(-1, keepdim=True)  # (B, 1): subtracted before dividing, so that no temperature overflows
    p = torch.softmax((logits - largest).double() / sampling.temperature, dim=-1)  # (B, n)
    best = p.amax(-1, keepdim=True)  # (B, 1)
    if sampling.top_p < 1:  # Holtzman et al. 2020, arXiv:1904.09751: kept while the sum of those before is below p
        sum_before = p.cumsum(-1) - p  # (B, n), of the more probable ones
        sum_before[:, 0] = -1.0  # the best always stays
        p = p.masked_fill(sum_before >= sampling.top_p, 0.0)
    if sampling.min_p > 0:  # Nguyen et al. 2024, arXiv:2407.01082
        p = p.masked_fill(p < sampling.min_p * best, 0.0)
    return p, ids


def penalized(logits: Tensor, sampling: Sampling, history: Tensor | None, counts: Tensor | None) -> Tensor:
    """Logits after the penalties, (B, V). history, counts: see `pick`; None: there is no such penalty."""
    if history is not None:  # Keskar et al. 2019, arXiv:1909.05858, section 4.1, with both signs made less likely
        limits = torch.finfo(logits.dtype)  # an extreme penalty leads beyond them, and the softmax of ∞ is NaN
        penalty = min(max(sampling.repetition_penalty, limits.tiny), limits.max)
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(history, lowered.clamp(limits.min, limits.max), logits)
    if counts is not None:  # OpenAI's API reference: z_i − c_i · frequency − [c_i > 0] · presence
        price = sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)  # (B, V) fp32
        logits = logits - price
    return logits


def pick(
    logits: Tensor,
    sampling: Sampling,
    uniform: Tensor | None,
    history: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The next token of each row, (B,) int64.

    logits: (B, V). uniform: (B,) float64 in [0, 1): where in the cumulated probabilities the draw falls
    (inverse transform sampling). history: (B, V) bool, ids that the repetition penalty is for. counts: (B, V) fp32, how
    often the answer holds each id, for the other two penalties.
    """
    logits = penalized(logits, sampling, history, counts)
    if sampling.temperature == 0:
        return logits.argmax(-1)

    # the first column whose cumulated probability is above the row's random number
    p, ids = filtered(logits.float(), sampling)
    cumulated = p.cumsum(-1)  # (B, n), unnormalised
    threshold = uniform[:, None] * cumulated[:, -1:]  # (B, 1)
    column = _column(cumulated, threshold)  # (B, 1)
    token = column if ids is None else ids.gather(-1, column)  # (B, 1)
    return token.squeeze(-1)


def _column(cumulated: Tensor, threshold: Tensor) -> Tensor:
    """The first column of each row (B, n) above its threshold (B, 1), (B, 1) int64; of a row of NaN the last one."""
    column = torch.searchsorted(cumulated, threshold, right=True)  # n where no column is above it: with NaN
    return column.clamp_(max=cumulated.shape[-1] - 1)


def not_finite(n_new: int) -> UserError:
    """What to raise where a row's logits are not finite after so many new tokens: what is drawn of them is no text."""
    return UserError(
        f"the model's logits are not finite after {n_new} new tokens: its weights are damaged, or --dtype float16 is "
        "too narrow; choose bfloat16 or float32"
    )


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row from the whole distribution at `temperature`, (B,) int64, and its log-probability, fp32.

    logits: (B, V). temperature: above 0. uniform: (B,) float64, as in `pick`, from which it differs in its speed: there
    is one softmax, in fp32, and only its sum is in fp64.
    """
    logits = logits.float()
    p = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)  # (B, V)
    cumulated = p.cumsum(-1, dtype=torch.float64)  # (B, V)
    threshold = uniform[:, None] * cumulated[:, -1:]  # (B, 1)
    column = _column(cumulated, threshold)  # (B, 1)
    return column[:, 0], p.gather(-1, column)[:, 0].log()


def random_numbers(seed: int | tuple[int, ...], rows: Sequence[int], n: int, device) -> Tensor:
    """(len(rows), n) float64 in [0, 1): number t of row r is a function of (seed, r, t) alone.

    They are multiples of 2⁻²⁴, so that one of them times a sum in float64 stays below the sum.
    """
    draws = [np.random.default_rng([seed, row]).random(n, dtype=np.float32) for row in rows]
    numbers = np.stack(draws).astype(np.float64)
    return torch.from_numpy(numbers).to(device)


class Draws:
    """How the tokens of one text are drawn, of many whose rules differ: see `pick_each`."""

    def __init__(
        self, sampling: Sampling, choice: int, n: int, prompt: Sequence[int], vocab_size: int, device: torch.device
    ):
        """choice: the row whose random numbers it draws with; n: at most so many tokens."""
        self.rule = dataclasses.replace(sampling, seed=0)  # all but the random numbers
        self.n_drawn = 0
        self.uniform: np.ndarray | None = None  # (n,) float64, what each token is drawn with
        self.history: Tensor | None = None  # (V,) bool, ids in prompt or answer
        self.counts: Tensor | None = None  # (V,) fp32, how often the answer holds each id
        if sampling.temperature > 0:
            self.uniform = random_numbers(sampling.seed, [choice], n, "cpu")[0].numpy()
        if sampling.needs_history:
            self.history = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.history[list(prompt)] = True
        if sampling.needs_counts:
            self.counts = torch.zeros(vocab_size, device=device)


def pick_each(logits: Tensor, draws: Sequence[Draws]) -> list[int]:
    """The next token of each row by its own rule, from logits (B, V): `pick` for the rows of each rule together."""
    rows_of: dict[Sampling, list[int]] = {}
    for row, its in enumerate(draws):
        rows_of.setdefault(its.rule, []).append(row)

    tokens = [0] * len(draws)
    for rule, rows in rows_of.items():
        # what these rows draw with
        uniform = history = counts = None
        if rule.temperature > 0:
            numbers = [draws[row].uniform[draws[row].n_drawn] for row in rows]
            uniform = torch.from_numpy(np.stack(numbers)).to(logits.device)  # (n,)
        if rule.needs_history:
            history = torch.stack([draws[row].history for row in rows])  # (n, V)
        if rule.needs_counts:
            counts = torch.stack([draws[row].counts for row in rows])  # (n, V)

        # draw, and note what was drawn
        of_rule = logits if len(rows) == len(draws) else logits[rows]  # (n, V)
        for row, token in zip(rows, pick(of_rule, rule, uniform, history, counts).tolist(), strict=True):
            tokens[row] = token
            draws[row].n_drawn += 1
            if history is not None:
                draws[row].history[token] = True
            if counts is not None:
                draws[row].counts[token] += 1
    return tokens
