"""Generation: prompts in, new tokens out, one at a time through the KV cache.

    logits → repetition penalty → / temperature → top-k → top-p → min-p → draw      (temperature 0: the largest)

Row r of a batch draws with its own random numbers, a pure function of (seed, r), so its text does not
depend on the other rows. See docs/generation.md.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.generation.recorded_step import RecordedStep, next_logits
from minillm.generation.sampling import GREEDY, Sampling, pick, random_numbers
from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import StreamDecoder
from minillm.tuning.virtual_tokens import context_of, virtual_tokens


class Completion(NamedTuple):
    """New tokens of one prompt, without a stop id, and why they end there.

    reason: "stop" (a stop id or stop string came), "length" (max_new_tokens) or "context" (the model's
    max_seq_len is full).
    """

    tokens: list[int]
    reason: str


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise UserError for prompts that nothing can be generated from."""
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    vocab, context = model.config.vocab_size, context_of(model)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row}: is empty; begin it with the tokenizer's bos")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {row}: {len(prompt)} tokens leave no room for a new one in the model's context of "
                f"{context}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(
                f"prompt {row}: holds ids from {min(prompt)} to {max(prompt)}, but the model knows 0 to "
                f"{vocab - 1}; it belongs to another tokenizer"
            )


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], max_len: int) -> tuple[KVCache, Tensor]:
    """A cache for `max_len` tokens a row that has read the prompts, and the logits (B, V) after each.

    Shorter prompts are padded on the right. No token sees a later one, so padding changes nothing; the cache then
    forgets it. The model's virtual tokens come before each prompt, and are not counted in `max_len`.
    """
    weight, virtual = model.embed_tokens.weight, virtual_tokens(model)
    n_virtual = 0 if virtual is None else virtual.n
    cache = KVCache(model.config, len(prompts), n_virtual + max_len, device=weight.device, dtype=weight.dtype)
    if virtual is not None:
        virtual.fill(model, cache)
    lengths = [len(prompt) for prompt in prompts]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    hidden = model.hidden(torch.tensor(padded, device=weight.device), cache=cache)  # (B, T, C)
    cache.shorten([n_virtual + length for length in lengths])
    last = torch.tensor(lengths, device=weight.device) - 1
    logits = model.logits(hidden[torch.arange(len(prompts), device=weight.device), last])  # (B, V)
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged or its dtype too narrow")
    return cache, logits


def is_recorded(cache: KVCache) -> bool:
    """Whether the steps after a prefill are recorded (recorded_step.py): where our own kernels compute."""
    return ops.fused(cache.keys[0])


def _start_copy(tokens: Tensor) -> Callable[[], list[int]]:
    """Start copying tokens from their GPU; the returned function waits for the copy, not for work queued after it."""
    if not tokens.is_cuda:
        return tokens.tolist
    host, copied = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def arrived() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return arrived


class _Drawing:
    """Draws the next token of each row still in the cache: `pick`, with the row's own numbers and history."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], n_steps: int, logits: Tensor):
        self.sampling = sampling
        self.uniform: Tensor | None = None  # (B, n_steps), what each row draws with at each step
        self.seen: Tensor | None = None  # (B, V) bool, ids in prompt or answer
        if sampling.temperature > 0:
            self.uniform = random_numbers(sampling.seed, range(len(prompts)), n_steps, logits.device)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True

    def tokens(self, logits: Tensor, step: int) -> Tensor:
        """The next token of each row, (B,) int64, from its logits (B, V)."""
        uniform = None if self.uniform is None else self.uniform[:, step]
        tokens = pick(logits, self.sampling, uniform, self.seen)
        if self.seen is not None:
            self.seen[torch.arange(len(tokens), device=tokens.device), tokens] = True
        return tokens

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (n,) int64."""
        self.uniform = None if self.uniform is None else self.uniform[rows]
        self.seen = None if self.seen is None else self.seen[rows]


def steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    ended=lambda row, token: False,
) -> Iterator[list[tuple[int, int]]]:
    """Yield the new (row, token) pairs of each step, until every row has ended.

    Call it under `torch.inference_mode()`, which a generator cannot cheaply enter by itself at each step.
    ended(row, token): called once for every new token; True ends the row. A row also ends when its context
    is full. Ended rows are dropped from the cache once they are half of it.
    """
    check_prompts(model, prompts, max_new_tokens)
    context = context_of(model)
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        max_len = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        cache, logits = prefill(model, prompts, max_len)
        drawing = _Drawing(sampling, prompts, max(limits), logits)
        ahead = is_recorded(cache)  # a GPU computes the next step while the CPU looks at this one
        step = RecordedStep(model, cache).step if ahead else partial(next_logits, model, cache)
        rows = list(range(len(prompts)))  # the cache's; those that ended are no longer in `alive`
        alive = set(rows)
        for number in range(max(limits)):
            tokens = drawing.tokens(logits, number)
            arrived = _start_copy(tokens)
            early = ahead and number + 1 < max(limits) and cache.longest < cache.max_len
            if early:
                logits = step(tokens)

            # what this step said, and which rows end with it
            pairs = [(row, token) for row, token in zip(rows, arrived(), strict=True) if row in alive]
            yield pairs
            alive -= {row for row, token in pairs if ended(row, token) or number + 1 == limits[row]}
            if not alive:
                return

            # rows that ended go when they are half of the cache, or when it has no room for another of their tokens
            full = cache.longest == cache.max_len and not early
            if full or 2 * len(alive) <= len(rows):
                kept = torch.tensor([i for i, row in enumerate(rows) if row in alive], device=tokens.device)
                rows = [row for row in rows if row in alive]
                cache.keep(kept)
                drawing.keep(kept)
                tokens, logits = tokens[kept], logits[kept]
            if not early:
                logits = step(tokens)
    finally:
        model.train(was_training)


@torch.inference_mode()
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
    """What the model says after each prompt.

    prompts: token ids, at least one each; one that fills the model's context (max_seq_len) is refused.
    max_new_tokens: at most so many each; fewer (reason "context") where prompt and new tokens fill the context.
    stop_ids: a row ends at one of these, which is left out. stop_strings: a row ends with the token that
    completes one of these in its text, decoded by `tokenizer`; `cut` removes it from a text.
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer that makes text of the tokens")
    new: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    tail = max((len(s.encode()) for s in stop_strings), default=0)  # no stop string has more tokens than bytes

    def ended(row: int, token: int) -> bool:
        if token in stop_ids:
            stopped[row] = True
            return True
        new[row].append(token)
        if stop_strings:
            text = tokenizer.decode(new[row][-tail:])
            stopped[row] = any(s in text for s in stop_strings)
        return stopped[row]

    for _ in steps(model, prompts, max_new_tokens, sampling=sampling, ended=ended):
        pass
    return [
        Completion(tokens, "stop" if stop else "length" if len(tokens) == max_new_tokens else "context")
        for tokens, stop in zip(new, stopped, strict=True)
    ]


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((text.find(s) for s in stop_strings if s in text), default=len(text))]


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
    decoder, new, waiting, reason = StreamDecoder(tokenizer), [], "", None
    for ((_, token),) in steps(model, [prompt], max_new_tokens, sampling=sampling):
        if token in stop_ids:
            reason = "stop"
            break
        new.append(token)
        waiting += decoder.push(token)
        if any(s in waiting for s in stop_strings):
            waiting, reason = cut(waiting, stop_strings), "stop"
            break
        held = _could_become(waiting, stop_strings)
        if len(waiting) > held:
            yield waiting[: len(waiting) - held]
            waiting = waiting[len(waiting) - held :]
    else:
        waiting = cut(waiting + decoder.flush(), stop_strings)
        reason = "length" if len(new) == max_new_tokens else "context"
    if waiting:
        yield waiting
    return Completion(new, reason)


def _could_become(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(s) - 1 for s in stop_strings), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop_strings):
            return n
    return 0
