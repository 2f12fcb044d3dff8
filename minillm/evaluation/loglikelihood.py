"""How likely a model finds texts after other texts: log-likelihoods as lm-evaluation-harness counts them.

A request is a context and a continuation, "Question: … Answer:" and " Paris". Its score is the sum of ln p over the ids
of the continuation, in nats, each predicted from all ids before it. What many contexts begin with alike (the examples
of an exam) is read once, each context once, with the longest of its continuations, and then the other ones:

    once a family           ^ examples
    once a context          ^ examples question 1 the longest choice     ^ examples question 2 …
    once a continuation     ^ examples question 1 choice                 …

Rows of like length are read together, and only states that predict something go through the head.
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

PLACES = 8192  # in the cache of a batch, which bounds its memory
NEW_TOKENS = {"cpu": 1024}  # of one pass; more would not stay in a CPU's cache
ALIKE = 32  # ids with which the contexts of a family begin alike
SMALLEST_FAMILY = 4  # contexts; fewer are read as they are
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
    device_type = model.embed_tokens.weight.device.type
    batches = []
    for family in _families(pairs):
        batches += _batches(family, context_of(model), NEW_TOKENS.get(device_type, PLACES))
    of_rank = batches if ranks is None else batches[ranks.data_rank :: ranks.data_world]
    scores: dict[Pair, Score] = {}
    was_training = model.training
    model.eval()
    reader = _Reader(model)
    with without_gradients(model):
        try:
            for batch in of_rank:
                scores |= _scores(reader, batch)
        except Exception:
            reader.lockstep.is_needed = False  # the others notice the loss of this rank
            raise
        finally:
            reader.lockstep.end()
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


# ---- families and batches


class Family(NamedTuple):
    """Contexts that begin alike, with their continuations. n_alike: with how many equal ids, less than any has."""

    n_alike: int
    continuations: dict[tuple[int, ...], list[tuple[int, ...]]]  # of each context, the longest first


def _families(pairs: Sequence[Pair]) -> list[Family]:
    """The pairs, each once: contexts that begin with the same ALIKE ids together, and all others together."""
    of_context: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context, continuation in dict.fromkeys(pairs):
        of_context.setdefault(context, []).append(continuation)
    by_beginning: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context, continuations in of_context.items():
        continuations.sort(key=len, reverse=True)
        by_beginning.setdefault(context[:ALIKE], []).append(context)

    families = []
    others: list[tuple[int, ...]] = []
    for beginning, contexts in by_beginning.items():
        if len(beginning) < ALIKE or len(contexts) < SMALLEST_FAMILY:
            others += contexts
            continue
        n_alike = min(_n_alike(contexts), min(map(len, contexts)) - 1)
        families.append(Family(n_alike, {context: of_context[context] for context in contexts}))
    return [*families, Family(0, {context: of_context[context] for context in others})]


def _n_alike(rows: Sequence[tuple[int, ...]]) -> int:
    """With how many equal ids all rows begin; the first and the last in the order of their ids differ the most."""
    pairs = zip(min(rows), max(rows), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, rows)))


def _batches(family: Family, most_places: int, most_tokens: int) -> Iterator[Family]:
    """The family in parts whose contexts, with their longest continuations, are of like length.

    A part has up to `most_tokens` new tokens and PLACES places, with rows of at most `most_places`, unless it is one
    context.
    """

    def length(context: tuple[int, ...]) -> int:
        return len(context) + len(family.continuations[context][0]) - 1

    part: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    longest = 0  # of the continuations
    for context in sorted(family.continuations, key=length):
        continuations = family.continuations[context]
        n_rows = len(part) + 1
        longest = max(longest, len(continuations[0]))
        n_new = n_rows * (length(context) - family.n_alike)
        places = max(map(len, [*part, context])) + longest - 1  # of a row
        if part and (n_new > most_tokens or places > most_places or n_rows * places > PLACES):
            yield Family(family.n_alike, part)
            part = {}
            longest = len(continuations[0])
        part[context] = continuations
    if part:
        yield Family(family.n_alike, part)


# ---- ids → scores


class _Reader:
    """Reads ids into caches, and remembers what a family begins with."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.lockstep = Lockstep(model)  # the ranks of a sharded model make equally many passes
        self.beginning: tuple[int, ...] = ()  # that `begun` holds
        self.begun: KVCache | None = None

    def empty_cache(self, n_rows: int, max_len: int) -> KVCache:
        """A cache for `max_len` ids a row, which holds the model's virtual tokens."""
        virtual = virtual_tokens(self.model)
        cache = self._cache(n_rows, (0 if virtual is None else virtual.n) + max_len)
        if virtual is not None:
            virtual.fill(self.model, cache)
        return cache

    def copied(self, cache: KVCache, rows: np.ndarray, n_more: int) -> KVCache:
        """A cache whose row i holds what row rows[i] of the other one does, with room for n more ids a row."""
        copy = self._cache(len(rows), int(cache.host_lengths[rows].max()) + n_more)
        copy.copy_rows(np.arange(len(rows)), cache, rows)
        return copy

    def _cache(self, n_rows: int, max_len: int) -> KVCache:
        dtype = self.model.embed_tokens.weight.dtype
        return KVCache(self.model.cache_config, n_rows, max_len, device=self.device, dtype=dtype)

    def read(self, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """The states (B, T, C) after these ids of each row, which the cache then holds.

        Shorter rows are filled up on the right. No id sees a later one, so this changes nothing; the cache forgets it.
        """
        before = cache.host_lengths.tolist()
        lengths = [len(row) for row in rows]
        tokens = np.zeros((len(rows), max(lengths)), dtype=np.int64)  # (B, T)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        self.lockstep.before_pass()
        hidden = self.model.hidden(torch.from_numpy(tokens).to(self.device), cache=cache)
        cache.shorten([n + length for n, length in zip(before, lengths, strict=True)])
        return hidden

    def begin(self, beginning: tuple[int, ...], n_rows: int, n_more: int) -> KVCache:
        """A cache whose rows hold these ids, with room for n more; they are read once for all batches of a family."""
        if not beginning:
            return self.empty_cache(n_rows, n_more)
        if self.begun is None or self.beginning != beginning:
            self.begun = self.empty_cache(1, len(beginning))
            self.beginning = beginning
            self.read(self.begun, [beginning])
        return self.copied(self.begun, np.zeros(n_rows, dtype=np.int64), n_more)


def _scores(reader: _Reader, batch: Family) -> dict[Pair, Score]:
    """The score of each pair of a part of a family."""
    contexts = list(batch.continuations)
    n_alike = batch.n_alike
    longest = [batch.continuations[context][0] for context in contexts]

    # each context, and after it the longest of its continuations but for its last id
    rows = [context[n_alike:] + first[:-1] for context, first in zip(contexts, longest, strict=True)]
    cache = reader.begin(contexts[0][:n_alike], len(contexts), max(map(len, rows)))
    hidden = reader.read(cache, rows)  # (B, T, C)
    cache.shorten([int(n) - len(first) + 1 for n, first in zip(cache.host_lengths, longest, strict=True)])

    # states that predict: the one at the end of the context, then those of all ids of the continuation but the last
    pairs = []
    states = []
    others = []  # (row, continuation) of those that have to be read
    for row, context in enumerate(contexts):
        end = len(context) - n_alike
        for number, continuation in enumerate(batch.continuations[context]):
            pairs.append(Pair(context, continuation))
            states.append(hidden[row, end - 1 : end - 1 + (len(continuation) if number == 0 else 1)])  # (n, C)
            if number > 0 and len(continuation) > 1:
                others.append((row, len(pairs) - 1))

    # the other continuations, those of like length together
    others.sort(key=lambda other: len(pairs[other[1]].continuation))
    for part in _of_like_length(others, pairs, int(cache.host_lengths.max())):
        after = [pairs[number].continuation[:-1] for _, number in part]
        part_cache = reader.copied(cache, np.array([row for row, _ in part]), len(after[-1]))
        hidden = reader.read(part_cache, after)  # (n, T, C)
        for row, (_, number) in enumerate(part):
            states[number] = torch.cat((states[number], hidden[row, : len(after[row])]))

    # ln p, and sums over each continuation
    targets = torch.tensor([i for pair in pairs for i in pair.continuation], device=reader.device)
    nats, is_likeliest = _of_targets(reader.model, torch.cat(states), targets)
    lengths = [len(pair.continuation) for pair in pairs]
    parts = zip(nats.split(lengths), is_likeliest.split(lengths), strict=True)
    return {pair: Score(float(n.sum()), bool(g.all())) for pair, (n, g) in zip(pairs, parts, strict=True)}


def _of_like_length(
    others: list[tuple[int, int]], pairs: Sequence[Pair], before: int
) -> Iterator[list[tuple[int, int]]]:
    """Those (row, number of a pair), sorted by length, in parts that need little filling up and PLACES places.

    before: most ids that a row of the cache holds.
    """
    part: list[tuple[int, int]] = []
    for other in others:
        length = len(pairs[other[1]].continuation)
        shortest = len(pairs[part[0][1]].continuation) if part else length
        if part and (length > 1.25 * shortest + 2 or (len(part) + 1) * (before + length) > PLACES):
            yield part
            part = []
        part.append(other)
    if part:
        yield part


def _of_targets(model: Transformer, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of each target, (n,) fp32, and whether it is the likeliest, (n,) bool, from states (n, C) before them.

    Raises `UserError` for logits that are not finite.
    """
    nats = []
    is_likeliest = []
    n_at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for part, its_targets in zip(states.split(n_at_once), targets.split(n_at_once), strict=True):
        logits = model.logits(part).float()  # (n, V)
        log_p = logits.log_softmax(-1).gather(1, its_targets[:, None]).squeeze(1)  # (n,)
        if not torch.isfinite(log_p).all():  # so if any logit is not
            raise UserError("the model's logits are not finite: its weights are damaged or its dtype too narrow")
        nats.append(log_p)
        is_likeliest.append(logits.argmax(-1) == its_targets)
    return torch.cat(nats).cpu(), torch.cat(is_likeliest).cpu()
