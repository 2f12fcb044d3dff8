"""How likely a model finds texts after other texts: log-likelihoods as lm-evaluation-harness counts them.

A request is a context and a continuation, "Question: … Answer:" and " Paris". Its score is the sum of ln p over the ids
of the continuation, in nats, each predicted from all ids before it. A beginning that requests share is read once:

    family    ^ examples                         what many contexts begin with (the examples of an exam), in a cache
    trees       question 1 ┬ a ball ┬ of glass   what is left of requests that share much of it: a row in which a token
                           │        └ of gold    sees those on its way from the root, no others
                           └ a cat

The choices of a question have its text in common, the two sentences of WinoGrande what stands before the gap, and the
ways of PIQA often half of their words. Trees of like size are read together. The last layer and the head compute only
the states that predict something.
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
from minillm.model.kv_cache import KVCache, TreeCache
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import virtual_tokens

PLACES = 8192  # in the cache of a batch, which bounds its memory
NEW_TOKENS = {"cpu": 1024}  # of one pass; more would not stay in a CPU's cache
ALIKE = 32  # ids with which the contexts of a family begin alike
SMALLEST_FAMILY = 4  # contexts; fewer have no cache in common
SHARED = 0.25  # of its ids a request has in common with another of its tree
NEVER = 1 << 30  # a place beyond any row
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
        batches += _batches(family, NEW_TOKENS.get(device_type, PLACES))
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
    """The pair with a context short enough for `max_len` ids; the last one of the continuation is not read."""
    n_continuation = len(pair.continuation)
    if n_continuation > max_len:
        raise UserError(
            f"a continuation of {n_continuation} tokens is longer than --seq_len {max_len}; raise it, or take a model "
            "with a longer context"
        )
    return pair._replace(context=pair.context[-(max_len + 1 - n_continuation) :])


# ---- families, trees and batches


class Family(NamedTuple):
    """Pairs whose contexts begin with the same n_alike ids; each context has more ids than these."""

    n_alike: int
    pairs: list[Pair]


def _families(pairs: Sequence[Pair]) -> list[Family]:
    """The pairs, each once: those whose contexts begin with the same ALIKE ids together, and all others together."""
    by_beginning: dict[tuple[int, ...], list[Pair]] = {}
    for pair in dict.fromkeys(pairs):
        by_beginning.setdefault(pair.context[:ALIKE], []).append(pair)
    families = []
    others = []
    for beginning, members in by_beginning.items():
        contexts = {pair.context for pair in members}
        if len(beginning) < ALIKE or len(contexts) < SMALLEST_FAMILY:
            others += members
            continue
        shortest = min(map(len, contexts))
        first, last = min(contexts), max(contexts)  # in the order of their ids these differ the most
        families.append(Family(min(_n_alike(first, last), shortest - 1), members))
    return [*families, Family(0, others)]


def _n_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with that are the same."""
    both = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(both) if a != b), min(len(first), len(second)))


class Tree(NamedTuple):
    """The ids of some pairs, without those that their family begins with, as one row: see `TreeCache`."""

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    asked: list[tuple[Pair, list[int]]]  # each pair, and the places in the row after which its continuation's ids come

    @property
    def is_branched(self) -> bool:
        return min(self.ends) < len(self.tokens)


def _trees(family: Family, most_tokens: int) -> Iterator[Tree]:
    """The pairs of a family as trees of up to `most_tokens` ids, unless one pair alone has more.

    In the order of their ids a pair follows the one with which it has the most in common, so the way of each begins as
    that of the pair before it, and its other ids come to the end of the row.
    """

    def ids_of(pair: Pair) -> tuple[int, ...]:
        return pair.context[family.n_alike :] + pair.continuation[:-1]

    tree = Tree([], [], [], [])
    before: tuple[int, ...] = ()  # the ids of the last pair
    way: list[int] = []  # and where in the row they are
    for pair in sorted(family.pairs, key=ids_of):
        ids = ids_of(pair)
        n_known = _n_alike(before, ids)
        size = len(tree.tokens) + len(ids) - n_known
        if tree.tokens and (n_known < SHARED * len(ids) or size > most_tokens):
            yield tree
            tree = Tree([], [], [], [])
            n_known = 0
            size = len(ids)

        # branches that this pair has left see no more; its own goes on
        n_before = len(tree.tokens)
        for place in way[n_known:] if n_before else ():
            tree.ends[place] = n_before
        way = [*way[:n_known], *range(n_before, size)]
        tree.tokens.extend(ids[n_known:])
        tree.depths.extend(range(n_known, len(ids)))
        tree.ends.extend([NEVER] * (len(ids) - n_known))
        tree.asked.append((pair, way[len(pair.context) - family.n_alike - 1 :]))
        before = ids
    if tree.tokens:
        yield tree


class Batch(NamedTuple):
    """Trees that are read together, after what their family begins with."""

    beginning: tuple[int, ...]
    trees: list[Tree]


def _batches(family: Family, most_tokens: int) -> Iterator[Batch]:
    """The trees of a family in parts of like size: up to `most_tokens` new ids and PLACES places, unless it is one."""
    beginning = family.pairs[0].context[: family.n_alike] if family.pairs else ()
    part: list[Tree] = []
    for tree in sorted(_trees(family, most_tokens), key=lambda tree: len(tree.tokens)):
        n_rows = len(part) + 1
        n_new = len(tree.tokens)  # of a row, since this is the largest so far
        if part and (n_rows * n_new > most_tokens or n_rows * (family.n_alike + n_new) > PLACES):
            yield Batch(beginning, part)
            part = []
        part.append(tree)
    if part:
        yield Batch(beginning, part)


# ---- ids → scores


class _Reader:
    """Reads ids into caches, and remembers what a family begins with."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.lockstep = Lockstep(model)  # the ranks of a sharded model make equally many passes
        self.beginning: tuple[int, ...] = ()  # that `begun` holds
        self.begun: KVCache | None = None

    def begin(self, beginning: tuple[int, ...], n_rows: int, n_more: int) -> TreeCache:
        """A cache whose rows hold these ids, with room for n more; they are read once for all batches of a family."""
        if not beginning:
            return self._empty_cache(n_rows, n_more)
        if self.begun is None or self.beginning != beginning:
            self.begun = self._empty_cache(1, len(beginning))
            self.beginning = beginning
            self.lockstep.before_pass()
            self.model.hidden(torch.tensor([beginning], device=self.device), cache=self.begun)
        cache = self._cache(n_rows, self.begun.max_len + n_more)
        cache.copy_rows(np.arange(n_rows), self.begun, np.zeros(n_rows, dtype=np.int64))
        return cache

    def _empty_cache(self, n_rows: int, max_len: int) -> TreeCache:
        """A cache for `max_len` ids a row, which holds the model's virtual tokens."""
        virtual = virtual_tokens(self.model)
        cache = self._cache(n_rows, (0 if virtual is None else virtual.n) + max_len)
        if virtual is not None:
            virtual.fill(self.model, cache)
        return cache

    def _cache(self, n_rows: int, max_len: int) -> TreeCache:
        dtype = self.model.embed_tokens.weight.dtype
        return TreeCache(self.model.cache_config, n_rows, max_len, device=self.device, dtype=dtype)

    def states(self, trees: Sequence[Tree], cache: TreeCache, places: Sequence[list[int]]) -> Tensor:
        """The states (n, C) at these places of each tree, one tree after the other.

        Shorter rows are filled up on the right. No token of a tree sees what comes after it, so this changes nothing.
        """
        self.lockstep.before_pass()
        tokens = self._filled_up([tree.tokens for tree in trees])  # (B, T)
        chosen = self._filled_up(places)  # (B, n)
        if any(tree.is_branched for tree in trees):
            cache.branch(
                self._filled_up([tree.depths for tree in trees]), self._filled_up([t.ends for t in trees], NEVER)
            )
        hidden = self.model.hidden(tokens, cache=cache, chosen=chosen)  # (B, n, C)
        return torch.cat([row[: len(own)] for row, own in zip(hidden, places, strict=True)])

    def _filled_up(self, rows: Sequence[Sequence[int]], filling: int = 0) -> Tensor:
        """Rows of numbers as one tensor (B, length of the longest) on the device."""
        width = max(map(len, rows))
        filled = [[*row, *[filling] * (width - len(row))] for row in rows]
        return torch.tensor(filled, device=self.device)


def _scores(reader: _Reader, batch: Batch) -> dict[Pair, Score]:
    """The score of each pair of a batch."""
    # the states that predict something, each once
    trees = batch.trees
    places = [sorted({place for _, its_places in tree.asked for place in its_places}) for tree in trees]
    cache = reader.begin(batch.beginning, len(trees), max(len(tree.tokens) for tree in trees))
    states = reader.states(trees, cache, places)  # (n, C)

    # for each id of each continuation the number of the state before it
    pairs = []
    numbers: list[int] = []
    n_before = 0
    for tree, its_places in zip(trees, places, strict=True):
        number_at = {place: n_before + n for n, place in enumerate(its_places)}
        for pair, way in tree.asked:
            pairs.append(pair)
            numbers += [number_at[place] for place in way]
        n_before += len(its_places)

    # ln p, and sums over each continuation
    targets = [i for pair in pairs for i in pair.continuation]
    nats, is_likeliest = _of_targets(reader.model, states, numbers, targets)
    lengths = [len(pair.continuation) for pair in pairs]
    parts = zip(nats.split(lengths), is_likeliest.split(lengths), strict=True)
    return {pair: Score(float(n.sum()), bool(g.all())) for pair, (n, g) in zip(pairs, parts, strict=True)}


def _of_targets(
    model: Transformer, states: Tensor, numbers: Sequence[int], targets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """ln p of each target, (m,) fp32, and whether it is the likeliest, (m,) bool.

    states: (n, C). numbers: for each target, of which of them it is predicted. Raises `UserError` for logits that are
    not finite.
    """
    of_state = torch.tensor(numbers, device=states.device)  # (m,)
    target = torch.tensor(targets, device=states.device)  # (m,)
    nats = torch.zeros(len(targets), device=states.device)
    is_likeliest = torch.zeros(len(targets), dtype=torch.bool, device=states.device)
    n_at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for begin in range(0, len(states), n_at_once):
        logits = model.logits(states[begin : begin + n_at_once]).float()  # (n, V)
        here = ((of_state >= begin) & (of_state < begin + n_at_once)).nonzero().squeeze(1)  # of all targets
        rows = of_state[here] - begin
        log_p = logits.log_softmax(-1)[rows, target[here]]
        if not torch.isfinite(log_p).all():  # so if any logit is not
            raise UserError("the model's logits are not finite: its weights are damaged or its dtype too narrow")
        nats[here] = log_p
        is_likeliest[here] = logits.argmax(-1)[rows] == target[here]
    return nats.cpu(), is_likeliest.cpu()
