"""How likely a model finds texts after other texts: log-likelihoods as lm-evaluation-harness counts them.

A request is a context and a continuation, "Question: … Answer:" and " Paris". Its score is the sum of ln p over the ids
of the continuation, in nats, each predicted from all ids before it. Requests with one context (the choices of a
question) read it once, and what the contexts of a batch begin with alike (examples) is read once for the batch:

    read once               ^ examples
    once a context          ^ examples question 1          ^ examples question 2
    once a continuation     ^ examples question 1 choice   …
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.distributed.lockstep import Lockstep
from minillm.distributed.ranks import Ranks
from minillm.distributed.shards import without_gradients
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import context_of, virtual_tokens

BATCH_TOKENS = 8192  # places in the cache of a batch
LOGITS_AT_ONCE = 1 << 24  # numbers


class Request(NamedTuple):
    """A text, and the text after it whose log-likelihood is asked for."""

    context: str
    continuation: str


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each of its ids was the likeliest."""

    nats: float
    is_greedy: bool


class Pair(NamedTuple):
    """A request in ids; the context holds at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def loglikelihoods(model: Transformer, tokenizer: Tokenizer, requests: Sequence[Request], max_len: int) -> list[Score]:
    """The score of each request, in their order.

    max_len: most ids that the model reads for one request; longer contexts lose their beginning. Raises `UserError` for
    a continuation without ids or longer than that, and for a model whose logits are not finite.
    """
    return scores_of(model, [fitted(pair, max_len) for pair in pairs_of(tokenizer, requests)])


def scores_of(model: Transformer, pairs: Sequence[Pair], ranks: Ranks | None = None) -> list[Score]:
    """The score of each pair, in their order.

    ranks: share the batches, and each gets the scores of all; every one must call this. None: this process is alone.
    """
    batches = list(_batches(pairs, context_of(model)))
    of_rank = batches if ranks is None else batches[ranks.data_rank :: ranks.data_world]
    scores: dict[Pair, Score] = {}
    was_training = model.training
    model.eval()
    lockstep = Lockstep(model)  # the ranks of a sharded model make equally many passes
    with without_gradients(model):
        try:
            for batch in of_rank:
                scores |= _scores(model, batch, lockstep)
        except Exception:
            lockstep.is_needed = False  # the others notice the loss of this rank
            raise
        finally:
            lockstep.end()
            model.train(was_training)

    # the scores of all ranks; pairs go by their numbers
    if ranks is not None and ranks.world > 1:
        different = list(dict.fromkeys(pairs))
        own = [(number, *scores[pair]) for number, pair in enumerate(different) if pair in scores]
        for of_one in ranks.exchange(own):
            scores |= {different[number]: Score(nats, is_greedy) for number, nats, is_greedy in of_one}
    return [scores[pair] for pair in pairs]


# ---- text → ids


def pairs_of(tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Pair]:
    """Each request in ids.

    Spaces at the end of a context belong to the continuation, as they do in the pieces of most vocabularies. The ids of
    the whole text are cut where the context alone would end, by count. A bos begins the text if the tokenizer puts one
    there; an empty context is bos, or eos where there is none.
    """
    contexts = []
    wholes = []
    for context, continuation in requests:
        without_spaces = context.rstrip()
        contexts.append(without_spaces)
        wholes.append(context + continuation)
    start = [tokenizer.bos_id] if tokenizer.begins_with_bos else []

    # contexts come several times, one after another
    context_ids = dict(zip(set(contexts), tokenizer.encode_many(list(set(contexts))), strict=True))
    pairs = []
    for text, whole, request in zip(contexts, tokenizer.encode_many(wholes), requests, strict=True):
        context = [*start, *context_ids[text]]
        continuation = [*start, *whole][len(context) :]
        if not text:
            context = [tokenizer.bos_id]
            continuation = whole
        if not continuation:
            raise UserError(f"the continuation {request.continuation!r:.60} has no ids of its own after its context")
        pairs.append(Pair(tuple(context), tuple(continuation)))
    return pairs


def fitted(pair: Pair, max_len: int) -> Pair:
    """The pair with a context short enough for `max_len` ids, since the last id of the continuation is not read."""
    n_continuation = len(pair.continuation)
    if n_continuation > max_len:
        raise UserError(f"a continuation of {n_continuation} tokens is longer than --seq_len {max_len}; raise it")
    return pair._replace(context=pair.context[-(max_len + 1 - n_continuation) :])


# ---- batches


Batch = dict[tuple[int, ...], list[tuple[int, ...]]]  # context → its continuations


def _batches(pairs: Sequence[Pair], most_places: int) -> Iterator[Batch]:
    """The pairs, each once, as batches of contexts of like length.

    A batch fits into a cache of BATCH_TOKENS places, with rows of at most `most_places`, unless it is one context.
    """
    by_context: Batch = {}
    for context, continuation in dict.fromkeys(pairs):
        by_context.setdefault(context, []).append(continuation)

    batch: Batch = {}
    n_rows = 0
    longest = 0  # of the continuations
    for context in sorted(by_context, key=len):
        continuations = by_context[context]
        longest_after = max(longest, *map(len, continuations), 1)
        places = len(context) + longest_after - 1  # of each row, since this is the longest context so far
        rows_after = n_rows + len(continuations)
        if batch and (places > most_places or rows_after * places > BATCH_TOKENS):
            yield batch
            batch = {}
            rows_after = len(continuations)
            longest_after = max(map(len, continuations))
        batch[context] = continuations
        n_rows = rows_after
        longest = longest_after
    if batch:
        yield batch


# ---- ids → scores


def _scores(model: Transformer, batch: Batch, lockstep: Lockstep) -> dict[Pair, Score]:
    """The score of each pair of a batch. lockstep: is told of each pass."""
    contexts = list(batch)
    pairs = [Pair(context, continuation) for context in contexts for continuation in batch[context]]
    row_of = np.repeat(np.arange(len(contexts)), [len(batch[context]) for context in contexts])  # (N,), of the context
    max_len = max(map(len, contexts)) + max(len(pair.continuation) for pair in pairs) - 1

    # what all contexts begin with, in one row, and then the rest of each; the last id of each is left for this
    n_shared = min(_n_alike(contexts), min(map(len, contexts)) - 1)
    cache = _empty_cache(model, 1 if n_shared else len(contexts), max_len)
    if n_shared:
        lockstep.before_pass()
        _read(model, cache, [contexts[0][:n_shared]])
        cache = _copied(model, cache, np.zeros(len(contexts), dtype=np.int64))
    lockstep.before_pass()
    hidden = _read(model, cache, [context[n_shared:] for context in contexts])  # (B, T, C)
    last = torch.tensor([len(context) - n_shared - 1 for context in contexts], device=hidden.device)
    ends = hidden[torch.arange(len(contexts), device=hidden.device), last]  # (B, C)

    # states that predict: the end of the context, then all ids of the continuation but the last
    states = [[ends[row]] for row in row_of]
    longer = [i for i, pair in enumerate(pairs) if len(pair.continuation) > 1]
    if longer:
        cache = _copied(model, cache, row_of[longer])
        lockstep.before_pass()
        hidden = _read(model, cache, [pairs[i].continuation[:-1] for i in longer])  # (n, T, C)
        for row, i in enumerate(longer):
            states[i] += hidden[row, : len(pairs[i].continuation) - 1].unbind()
    predicting = torch.stack([state for of_pair in states for state in of_pair])  # (all targets, C)
    targets = torch.tensor([i for pair in pairs for i in pair.continuation], device=predicting.device)
    nats, is_likeliest = _of_targets(model, predicting, targets)

    # sums over each continuation
    lengths = [len(pair.continuation) for pair in pairs]
    parts = zip(nats.split(lengths), is_likeliest.split(lengths), strict=True)
    return {pair: Score(float(n.sum()), bool(g.all())) for pair, (n, g) in zip(pairs, parts, strict=True)}


def _n_alike(rows: Sequence[tuple[int, ...]]) -> int:
    """With how many equal ids all rows begin; the first and the last in the order of their ids differ the most."""
    if len(rows) == 1:
        return 0  # nothing to share it with
    pairs = zip(min(rows), max(rows), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, rows)))


def _empty_cache(model: Transformer, n_rows: int, max_len: int) -> KVCache:
    """A cache for `max_len` ids a row, which holds the model's virtual tokens."""
    weight = model.embed_tokens.weight
    virtual = virtual_tokens(model)
    n_virtual = 0 if virtual is None else virtual.n
    cache = KVCache(model.cache_config, n_rows, n_virtual + max_len, device=weight.device, dtype=weight.dtype)
    if virtual is not None:
        virtual.fill(model, cache)
    return cache


def _copied(model: Transformer, cache: KVCache, rows: np.ndarray) -> KVCache:
    """A cache whose row i holds what row rows[i] of the other one does."""
    weight = model.embed_tokens.weight
    copy = KVCache(model.cache_config, len(rows), cache.max_len, device=weight.device, dtype=weight.dtype)
    copy.copy_rows(np.arange(len(rows)), cache, rows)
    return copy


def _read(model: Transformer, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
    """The states (B, T, C) after these ids of each row, which the cache then holds.

    Shorter rows are filled up on the right. No id sees a later one, so this changes nothing; the cache forgets it.
    """
    before = cache.host_lengths.tolist()
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)  # (B, T)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    hidden = model.hidden(tokens.to(cache.lengths.device), cache=cache)
    cache.shorten([n + length for n, length in zip(before, lengths, strict=True)])
    return hidden


def _of_targets(model: Transformer, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of each target, (n,) fp32, and whether it is the likeliest, (n,) bool, from states (n, C) before them.

    Raises `UserError` for logits that are not finite.
    """
    nats = []
    is_likeliest = []
    n_at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for part, its_targets in zip(states.split(n_at_once), targets.split(n_at_once), strict=True):
        logits = model.logits(part).float()  # (n, V)
        if not torch.isfinite(logits).all():
            raise UserError("the model's logits are not finite: its weights are damaged or its dtype too narrow")
        nats.append(logits.log_softmax(-1).gather(1, its_targets[:, None]).squeeze(1))
        is_likeliest.append(logits.argmax(-1) == its_targets)
    return torch.cat(nats).cpu(), torch.cat(is_likeliest).cpu()
