"""Rollouts: a policy's own answers to prompts, drawn to be trained on.

    prompts (P) → each read once → its cache copied to the places of its group → one token a step → answers (P × G)

What a policy gradient needs of its samples holds here by construction. Tokens are drawn at one temperature from the
whole vocabulary, without top-k, top-p or penalties, and their log-probabilities are those of the distribution they
were drawn from. The ids that were drawn are the ids that are trained on, never a text encoded again. The end of an
answer is one of its tokens if it was drawn, and is missing if the answer was cut. Each draw is a function of (seed,
step, the answer's number in the run, token), so neither the number of ranks nor a resume changes it. Ranks that share
rows draw the same answers together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.datasets.batch import Batch
from minillm.distributed.lockstep import Lockstep
from minillm.distributed.rows import from_first
from minillm.distributed.shards import without_gradients
from minillm.generation.completion import check_prompts, is_recorded, prefill
from minillm.generation.recorded_step import RecordedStep, next_logits
from minillm.generation.sampling import draw, not_finite, random_numbers
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import context_of

# Places without an answer are given up: on a CPU all but what fills the last 8, so that there are few numbers of them
# (oneDNN keeps memory for each); on a GPU, which records its step anew, once a quarter of them is without.
TOGETHER = 8
KEPT_SHARE = 0.75


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are drawn: `group_size` to each prompt, of at most `max_new_tokens` tokens each."""

    group_size: int
    max_new_tokens: int
    temperature: float  # logits are divided by it, above 0; log-probabilities of the trainer must be taken at the same
    stop_ids: tuple[int, ...]  # an answer ends with the first of these
    pad_id: int  # fills the rows of the batch, where nothing is learned
    seed: int
    rows_at_once: int = 512  # answers under way at a time, which bounds the cache; the others wait


class Rollouts(NamedTuple):
    """N = P × G answers, those of a prompt side by side, as a batch to train on.

    batch: a row a conversation, right-padded; its mask is True where y is a token of the answer, the end that was drawn
    included. log_probs: (N, T) fp32, log-probability of each y under the sampler where the mask is True, else 0.
    answers: the tokens of each, without its end. ended: (N,) bool, False where an answer was cut. prompt: (N,) int64,
    index of the prompt that each one answers.
    """

    batch: Batch
    log_probs: Tensor
    answers: list[list[int]]
    ended: Tensor
    prompt: Tensor


def roll_out(
    model: Transformer, prompts: Sequence[Sequence[int]], numbers: Sequence[int], step: int, config: RolloutConfig
) -> Rollouts:
    """Draw a group of answers to each prompt.

    prompts: token ids, P lists. numbers: of each prompt in the run (its data position), from which with `step` and the
    seed follow its random numbers. Raises `UserError` for a prompt that nothing can be generated from.
    """
    check_prompts(model, prompts, config.max_new_tokens)
    was_training = model.training
    model.eval()  # no dropout: the trainer has none either
    answers = _Answers(model, prompts, numbers, step, config)
    lockstep = Lockstep(model)
    try:
        with without_gradients(model):
            _sample(model, prompts, answers, config, lockstep)
            lockstep.end()
    finally:
        model.train(was_training)

    # the end is one of the tokens that are trained on, but not of the answer that is read
    ended = [tokens[-1] in config.stop_ids for tokens in answers.tokens]
    said = [tokens[:-1] if stopped else tokens for tokens, stopped in zip(answers.tokens, ended, strict=True)]
    prompt_of = [index for index in range(len(prompts)) for _ in range(config.group_size)]
    texts = [[*prompts[index], *tokens] for index, tokens in zip(prompt_of, answers.tokens, strict=True)]
    batch, log_probs = _as_batch(texts, answers.log_probs, config.pad_id)
    device = model.norm.weight.device
    ended, prompt_of = torch.tensor(ended), torch.tensor(prompt_of)
    return Rollouts(batch.to(device), log_probs.to(device), said, ended.to(device), prompt_of.to(device))


class _Answers:
    """All answers of a step as they grow: their tokens, and the log-probability of each under the sampler."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], numbers: Sequence[int], step: int, config):
        self.config, self.model = config, model
        group = config.group_size
        context = context_of(model)
        self.limits = [min(config.max_new_tokens, context - len(prompt)) for prompt in prompts for _ in range(group)]
        self.tokens: list[list[int]] = [[] for _ in self.limits]
        self.log_probs: list[list[float]] = [[] for _ in self.limits]
        numbers_in_run = [number * group + i for number in numbers for i in range(group)]
        self.uniform = random_numbers((config.seed, step), numbers_in_run, max(self.limits), "cpu")  # (N, n_steps)

    def grow(self, logits: Tensor, answer_at: np.ndarray, goes_on: np.ndarray) -> Tensor:
        """Draw a token at each of B places, (B,) int64, add it to its answer, and note in `goes_on` which ended.

        logits: (B, V). answer_at: (B,), the answer at each place. goes_on: (B,) bool; False: its token is not used.
        Raises UserError for a token whose log-probability is not finite, as of logits with NaN or infinity.
        """
        positions = [len(self.tokens[answer]) if on else 0 for answer, on in zip(answer_at, goes_on, strict=True)]
        uniform = self.uniform[answer_at, positions].to(logits.device)  # (B,)
        drawn, log_probs = draw(logits, self.config.temperature, uniform)  # (B,), (B,)
        drawn, log_probs = from_first(self.model, drawn), from_first(self.model, log_probs)  # where ranks share rows
        found = zip(answer_at.tolist(), drawn.tolist(), log_probs.tolist(), strict=True)
        for place, (answer, token, log_prob) in enumerate(found):
            if goes_on[place]:
                tokens = self.tokens[answer]
                if not math.isfinite(log_prob):
                    raise not_finite(len(tokens))
                tokens.append(token)
                self.log_probs[answer].append(log_prob)
                goes_on[place] = token not in self.config.stop_ids and len(tokens) < self.limits[answer]
        return drawn


def _sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    answers: _Answers,
    config: RolloutConfig,
    lockstep: Lockstep,
) -> None:
    """Let all answers grow to their ends. lockstep: is told of each pass."""
    group = config.group_size
    device = model.norm.weight.device
    n_answers = len(answers.limits)

    # every prompt is read once
    longest_prompt = max(len(prompt) for prompt in prompts)
    lockstep.before_pass()
    prompt_cache, prompt_logits = prefill(model, prompts, longest_prompt)  # P rows, (P, V)
    n_places = min(n_answers, config.rows_at_once)
    max_len = prompt_cache.max_len + max(answers.limits)  # with virtual tokens
    cache = KVCache(model.cache_config, n_places, max_len, device=device, dtype=model.norm.weight.dtype)

    # the first answers begin with copies of what their prompts left in the cache; the others wait
    answer_at = np.arange(n_places)
    cache.copy_rows(answer_at, prompt_cache, answer_at // group)
    logits = prompt_logits[torch.from_numpy(answer_at // group)]  # (B, V)
    records = is_recorded(cache)
    next_step = _stepping(model, cache, records)
    goes_on = np.ones(n_places, dtype=bool)  # whether the answer at a place has not ended
    n_begun = n_places

    while True:
        drawn = answers.grow(logits, answer_at, goes_on)  # (B,)

        # answers that wait take the places of those that ended; with none waiting, the last answers do
        free = np.flatnonzero(~goes_on)
        joining = np.arange(n_begun, min(n_begun + len(free), n_answers))
        if not len(joining) and not goes_on.any():
            return
        cache.free(free)
        n_needed = 0 if len(joining) else _places_for(int(goes_on.sum()), records)
        if 0 < n_needed < n_places and (not records or n_needed <= KEPT_SHARE * n_places):
            _close_up(cache, goes_on, n_needed, answer_at, drawn)
            n_places = n_needed
            cache = cache.rows(0, n_places)
            next_step = _stepping(model, cache, records)
            answer_at, goes_on, drawn = answer_at[:n_places], goes_on[:n_places], drawn[:n_places]

        # the next logits: of one more token, or where an answer begins those of its prompt
        lockstep.before_pass()
        logits = next_step(drawn)
        if len(joining):
            places = free[: len(joining)]
            cache.copy_rows(places, prompt_cache, joining // group)
            logits[torch.from_numpy(places)] = prompt_logits[torch.from_numpy(joining // group)]
            answer_at[places] = joining
            goes_on[places] = True
            n_begun += len(joining)


def _stepping(model: Transformer, cache: KVCache, records: bool) -> Callable[[Tensor], Tensor]:
    """A function of the newest tokens (B,) that reads them into the cache and gives the next logits (B, V)."""
    return RecordedStep(model, cache).step if records else partial(next_logits, model, cache)


def _places_for(n_answers: int, records: bool) -> int:
    """How many places so many answers take."""
    return n_answers if records else -(-n_answers // TOGETHER) * TOGETHER


def _close_up(cache: KVCache, goes_on: np.ndarray, n: int, answer_at: np.ndarray, drawn: Tensor) -> None:
    """Let the answers that go on beyond the first n places move, with their newest tokens, to free ones among these."""
    late = np.flatnonzero(goes_on[n:]) + n
    gaps = np.flatnonzero(~goes_on[:n])[: len(late)]
    if len(late):
        cache.copy_rows(gaps, cache, late)
    answer_at[gaps] = answer_at[late]
    goes_on[gaps] = True
    drawn[torch.from_numpy(gaps).to(drawn.device)] = drawn[torch.from_numpy(late).to(drawn.device)]


def _as_batch(texts: list[list[int]], log_probs: list[list[float]], pad_id: int) -> tuple[Batch, Tensor]:
    """Rows of prompt and answer, right-padded, and the log-probabilities (N, T) where their y is of the answer."""
    length = max(len(text) for text in texts)
    tokens = torch.full((len(texts), length), pad_id)  # (N, T + 1)
    mask = torch.zeros(len(texts), length - 1, dtype=torch.bool)  # (N, T)
    placed = torch.zeros(len(texts), length - 1)
    for row, (text, values) in enumerate(zip(texts, log_probs, strict=True)):
        end = len(text) - 1  # of y
        tokens[row, : end + 1] = torch.tensor(text)
        mask[row, end - len(values) : end] = True
        placed[row, end - len(values) : end] = torch.tensor(values)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask), placed
