"""Generation: prompts in, new tokens out, one at a time through the KV cache.

    logits → repetition penalty → / temperature → top-k → top-p → min-p → draw      (temperature 0: the largest)

Row r of a batch draws with its own random numbers, a pure function of (seed, r), so its text does not
depend on the other rows. See docs/generation.md.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.generation.decoder import Decoder, is_plain
from minillm.generation.decoder_cuda import GraphDecoder
from minillm.generation.sampling import GREEDY, Sampling, pick, random_numbers
from minillm.model import ops
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import StreamDecoder


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
    vocab, context = model.config.vocab_size, model.context
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


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], room: int) -> tuple[KVCache, Tensor]:
    """A cache with `room` more slots that has read the prompts, and the logits (B, V) after each.

    Shorter prompts are padded on the left, so all end in the same slot; padding is never seen. Before each
    prompt stand the placeholders of the model's virtual tokens.
    """
    weight = model.embed_tokens.weight
    prompts = [[0] * model.n_virtual + list(prompt) for prompt in prompts]
    longest = max(map(len, prompts))
    lacking = [longest - len(prompt) for prompt in prompts]
    padding = torch.tensor(lacking, device=weight.device) if any(lacking) else None
    rows = [[0] * n + prompt for n, prompt in zip(lacking, prompts, strict=True)]
    where = dict(device=weight.device, dtype=weight.dtype)
    cache = KVCache(model.config, len(prompts), longest + room, padding=padding, **where)
    hidden = model.hidden(torch.tensor(rows, device=weight.device), cache=cache)
    logits = model.logits(hidden[:, -1])
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged or its dtype too narrow")
    return cache, logits


def _decoder(model: Transformer, cache: KVCache) -> Decoder | GraphDecoder | None:
    """The fast decoder for the steps after the prefill; None: only the model itself can do them."""
    if not is_plain(model) or ops.selected() == "reference":
        return None
    return GraphDecoder(model, cache) if ops.fused(cache.keys[0]) else Decoder(model, cache)


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
    device, context = model.embed_tokens.weight.device, model.context
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        longest = max(map(len, prompts))
        cache, logits = prefill(model, prompts, min(max(limits), context - longest))
        decoder = _decoder(model, cache)
        ahead = isinstance(decoder, GraphDecoder)  # the GPU computes the next step while the CPU looks at this one
        rows = list(range(len(prompts)))  # the cache's; those that ended are no longer in `alive`
        alive, seen, uniform = set(rows), None, None
        if sampling.temperature > 0:
            uniform = random_numbers(sampling.seed, rows, max(limits), device)
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, list(prompt)] = True
        for step in range(max(limits)):
            tokens = pick(logits, sampling, None if uniform is None else uniform[:, step], seen)
            arrived = _start_copy(tokens)
            early = ahead and step + 1 < max(limits) and cache.length < cache.max_len
            if early:
                logits = decoder.step(tokens)
            pairs = [(r, t) for r, t in zip(rows, arrived(), strict=True) if r in alive]
            yield pairs
            alive -= {r for r, t in pairs if ended(r, t) or step + 1 == limits[r]}
            if not alive:
                return
            if seen is not None:
                seen[torch.arange(len(rows), device=device), tokens] = True
            if (cache.length == cache.max_len and not early) or 2 * len(alive) <= len(rows):
                kept = torch.tensor([i for i, r in enumerate(rows) if r in alive], device=device)
                rows = [r for r in rows if r in alive]
                cache.keep(kept)
                tokens, logits = tokens[kept], logits[kept]
                uniform = None if uniform is None else uniform[kept]
                seen = None if seen is None else seen[kept]
            if early:
                continue
            if decoder is not None:
                logits = decoder.step(tokens)
            else:
                logits = model.logits(model.hidden(tokens[:, None], cache=cache))[:, -1]
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
