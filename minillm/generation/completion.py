"""Generation: prompts in, new tokens out, one at a time through the KV cache.

    logits → repetition penalty → / temperature → top-k → top-p → min-p → draw      (temperature 0: the largest)

Row r of a batch draws with its own random numbers, a pure function of (seed, r), so its text does not
depend on the other rows. See docs/en/generation.md.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.distributed.lockstep import Lockstep
from minillm.distributed.shards import is_sharded_model, without_gradients
from minillm.generation.pieces import Pieces
from minillm.generation.recorded_step import RecordedStep, next_logits
from minillm.generation.sampling import GREEDY, Sampling, not_finite, pick, random_numbers
from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import context_of, virtual_tokens

ROWS_AT_ONCE = 512  # prompts that are continued together, which bounds the cache


class Completion(NamedTuple):
    """New tokens of one prompt, without a stop id, and why they end there.

    reason: "stop" (a stop id or stop string came), "length" (max_new_tokens) or "context" (the model's
    max_seq_len is full).
    """

    tokens: list[int]
    reason: str


def check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, first_row: int = 0
) -> None:
    """Raise UserError for prompts that nothing can be generated from. first_row: the number of the first."""
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    vocab_size = model.config.vocab_size
    context = context_of(model)
    for row, prompt in enumerate(prompts, first_row):
        if not len(prompt):
            raise UserError(f"prompt {row}: is empty; begin it with the tokenizer's bos")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {row}: {len(prompt)} tokens leave no room for a new one in the model's context of "
                f"{context}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompt {row}: holds ids from {min(prompt)} to {max(prompt)}, but the model knows 0 to "
                f"{vocab_size - 1}; it belongs to another tokenizer"
            )


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], max_len: int) -> tuple[KVCache, Tensor]:
    """A cache for `max_len` tokens a row that holds the prompts, and the logits (B, V) after each.

    Shorter prompts are padded on the right. No token sees a later one, so padding changes nothing; the cache then
    forgets it. The model's virtual tokens come before each prompt, and are not counted in `max_len`.
    """
    device = model.norm.weight.device
    dtype = model.norm.weight.dtype
    n_prompts = len(prompts)

    # an empty cache, which the virtual tokens are the first to enter
    virtual = virtual_tokens(model)
    n_virtual = 0 if virtual is None else virtual.n
    cache = KVCache(model.cache_config, n_prompts, n_virtual + max_len, device=device, dtype=dtype)
    if virtual is not None:
        virtual.fill(model, cache)

    # all prompts in one forward pass, padded to the longest
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(n_prompts, max(lengths), dtype=torch.int64)  # (B, T)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.tensor([*prompt])
    hidden = model.hidden(tokens.to(device), cache=cache)  # (B, T, C)
    cache.shorten([n_virtual + length for length in lengths])

    # logits where each prompt ends
    last = torch.tensor(lengths, device=device) - 1  # (B,)
    logits = model.logits(hidden[torch.arange(n_prompts, device=device), last])  # (B, V)
    return cache, logits


def is_recorded(cache: KVCache) -> bool:
    """Whether the steps after a prefill are recorded (recorded_step.py): where our own kernels compute."""
    return ops.fused(cache.keys[0])


class _HostCopy:
    """A copy on the host of a step's tokens (B,), and of the sums that tell whether the logits they were drawn from
    are finite; begun at once, so that the GPU can go on with the next step.
    """

    def __init__(self, tokens: Tensor, logits: Tensor):
        """logits: (B, V)."""
        sums = logits.sum(-1, dtype=torch.float32)  # (B,), finite if all logits of the row are
        self.tokens = tokens.to("cpu", non_blocking=True)  # on a CPU: the same tensor
        self.sums = sums.to("cpu", non_blocking=True)
        self.event: torch.cuda.Event | None = None  # the end of the copy
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> list[tuple[int, bool]]:
        """Each row's token, and whether its logits are finite, once they are here; does not wait for work that was
        queued after them.
        """
        if self.event is not None:
            self.event.synchronize()
        is_finite = [math.isfinite(total) for total in self.sums.tolist()]
        return list(zip(self.tokens.tolist(), is_finite, strict=True))


class _Drawing:
    """Draws the next token of each row still in the cache: `pick`, with the row's own numbers and history."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], first_row: int, n_steps: int, logits: Tensor
    ):
        self.sampling = sampling
        self.uniform: Tensor | None = None  # (B, n_steps), what each row draws with at each step
        self.history: Tensor | None = None  # (B, V) bool, ids in prompt or answer
        self.counts: Tensor | None = None  # (B, V) fp32, how often each answer holds each id
        if sampling.temperature > 0:
            numbers = range(first_row, first_row + len(prompts))
            self.uniform = random_numbers(sampling.seed, numbers, n_steps, logits.device)
        if sampling.needs_counts:
            self.counts = torch.zeros_like(logits, dtype=torch.float32)
        if sampling.needs_history:
            self.history = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.history[row, list(prompt)] = True

    def tokens(self, logits: Tensor, step: int) -> Tensor:
        """The next token of each row, (B,) int64, from its logits (B, V)."""
        uniform = None if self.uniform is None else self.uniform[:, step]  # (B,)
        tokens = pick(logits, self.sampling, uniform, self.history, self.counts)
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.history is not None:
            self.history[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1
        return tokens

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,) int64."""
        if self.uniform is not None:
            self.uniform = self.uniform[rows]
        if self.history is not None:
            self.history = self.history[rows]
        if self.counts is not None:
            self.counts = self.counts[rows]


def steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    first_row: int = 0,
    ended=lambda row, token: False,
) -> Iterator[list[tuple[int, int]]]:
    """Yield the new (row, token) pairs of each step, until every row has ended.

    Call it under `without_gradients(model)`, which a generator cannot cheaply enter by itself at each step.
    first_row: the number that the first of these rows has among more, from which its random numbers follow.
    ended(row, token): called once for every new token, with the row's number among more; True ends the row. A row also
    ends when its context is full. Ended rows are dropped from the cache once they are half of it. Raises UserError as
    `check_prompts` does, and where the logits of a row that has not ended are not finite.
    """
    check_prompts(model, prompts, max_new_tokens, first_row)
    context = context_of(model)
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]  # new tokens of each row
    n_steps = max(limits)
    max_len = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    was_training = model.training
    model.eval()
    lockstep = Lockstep(model)
    try:
        # read the prompts
        lockstep.before_pass()
        cache, logits = prefill(model, prompts, max_len)
        drawing = _Drawing(sampling, prompts, first_row, n_steps, logits)
        runs_ahead = is_recorded(cache)  # a GPU computes the next step while the CPU looks at this one
        step = RecordedStep(model, cache).step if runs_ahead else partial(next_logits, model, cache)
        rows = list(range(len(prompts)))  # the cache's; those that ended are no longer in `alive`
        alive = set(rows)

        for number in range(n_steps):
            # draw a token for each row; on a GPU the next step begins before the host has them
            tokens = drawing.tokens(logits, number)  # (B,)
            host_copy = _HostCopy(tokens, logits)
            is_early = runs_ahead and number + 1 < n_steps and cache.longest < cache.max_len
            if is_early:
                lockstep.before_pass()
                logits = step(tokens)

            # hand the tokens out, and see which rows end with them
            drawn = [(row, *found) for row, found in zip(rows, host_copy.wait(), strict=True) if row in alive]
            if not all(is_finite for _, _, is_finite in drawn):
                raise not_finite(number)
            pairs = [(row, token) for row, token, _ in drawn]
            yield pairs
            for row, token in pairs:
                if ended(first_row + row, token) or number + 1 == limits[row]:
                    alive.remove(row)
            if not alive:
                return

            # rows that ended go when they are half of the cache, or when it has no room for another of their tokens
            is_full = cache.longest == cache.max_len and not is_early
            if is_full or 2 * len(alive) <= len(rows):
                alive_rows = torch.tensor([i for i, row in enumerate(rows) if row in alive], device=tokens.device)
                rows = [row for row in rows if row in alive]
                cache.keep(alive_rows)
                drawing.keep(alive_rows)
                tokens = tokens[alive_rows]
                logits = logits[alive_rows]
            if not is_early:
                lockstep.before_pass()
                logits = step(tokens)
    except Exception:
        lockstep.is_needed = False  # the others notice the loss of this rank
        raise
    finally:
        lockstep.end()
        model.train(was_training)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer=None,
) -> list[Completion]:
    """Continue each prompt until it ends; the completions are in the order of the prompts.

    prompts: token ids, at least one each; one that fills the model's context (max_seq_len) is refused. ROWS_AT_ONCE
    of them are continued together, then the next.
    max_new_tokens: at most this many each; fewer (reason "context") where prompt and new tokens fill the context.
    stop_ids: a row ends at one of these, which is left out. stop_strings: a row ends with the token that
    completes one of these in its text, decoded by `tokenizer`, as `stream` does; `text_before` removes it.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer that makes text of the tokens")
    if not prompts:
        with without_gradients(model):
            Lockstep(model).end()  # where the model is sharded, the other ranks' passes are made with them
        return []
    new_tokens: list[list[int]] = [[] for _ in prompts]
    is_stopped = [False] * len(prompts)
    texts = [Pieces(tokenizer, stop_strings) for _ in prompts] if stop_strings else []

    def ended(row: int, token: int) -> bool:
        """Note a row's new token, and say whether it is the last."""
        if token in stop_ids:
            is_stopped[row] = True
            return True
        new_tokens[row].append(token)
        if stop_strings:
            texts[row].push(token)
            is_stopped[row] = texts[row].is_stopped
        return is_stopped[row]

    # all steps, whose tokens `ended` collects; those of a sharded model at once, since ranks make them together
    n_at_once = len(prompts) if is_sharded_model(model) else ROWS_AT_ONCE
    with without_gradients(model):
        for begin in range(0, len(prompts), n_at_once):
            how = dict(sampling=sampling, first_row=begin, ended=ended)
            for _ in steps(model, prompts[begin : begin + n_at_once], max_new_tokens, **how):
                pass

    # why each row ended
    completions = []
    for tokens, stopped in zip(new_tokens, is_stopped, strict=True):
        reason = "stop" if stopped else _why_unstopped(tokens, max_new_tokens)
        completions.append(Completion(tokens, reason))
    return completions


def _why_unstopped(new_tokens: list[int], max_new_tokens: int) -> str:
    """The reason why a row without a stop ends."""
    return "length" if len(new_tokens) == max_new_tokens else "context"


@torch.inference_mode()
def stream(
    model: Transformer,
    tokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
) -> Iterator[str]:
    """Pieces of the text as it comes, each of whole characters; never any part of a stop string.

    Arguments as in `generate`. The iterator's return value is the `Completion`.
    """
    pieces = Pieces(tokenizer, stop_strings)
    new_tokens: list[int] = []
    for ((_, token),) in steps(model, [prompt], max_new_tokens, sampling=sampling):
        if token in stop_ids:
            reason = "stop"
            break
        new_tokens.append(token)
        text = pieces.push(token)
        if text:
            yield text
        if pieces.is_stopped:
            return Completion(new_tokens, "stop")
    else:  # no stop came
        reason = _why_unstopped(new_tokens, max_new_tokens)
    text = pieces.flush()
    if text:
        yield text
    return Completion(new_tokens, reason)
