"""Log-likelihoods beside those of transformers' model, one whole forward pass a request."""

import itertools

import pytest
import torch

from minillm.base.errors import UserError
from minillm.evaluation import loglikelihood
from minillm.evaluation.loglikelihood import Pair, Request, loglikelihoods, pairs_of, scores_of
from minillm.generation.completion import prefill
from minillm.tuning.virtual_tokens import attach_virtual
from tests.minillm.tuning import tiny

EXAMPLES = "Who has the ball? Tom has the ball.\n\n谁有球？ Tom\n\n"
REQUESTS = [
    # two contexts with the same beginning and choices of several lengths
    *(
        Request(f"{EXAMPLES}Who has the cat?", choice)
        for choice in (" Tom", " Tom has the apple.", " 谁有ball？", " x")
    ),
    *(Request(f"{EXAMPLES}Who has the apple? Answer:", choice) for choice in (" Tom", " the cat has it")),
    # others, short, long and empty; spaces at the end of a context
    Request("ball", " cat"),
    Request("Who has  ", "the ball?"),
    Request("", "Tom has the ball."),
    Request("Tom has the cat. " * 9, "谁有apple？"),
    Request("ball", " cat"),
]


@pytest.fixture(scope="module")
def theirs(home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home.path / "out" / "sft" / "step-00000003"
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def by_transformers(theirs, request: Request, max_len: int) -> tuple[float, bool]:
    """The rule as its source has it: cut by the number of ids of the context, the last `max_len` ids read."""
    tokenizer, model = theirs
    n_spaces = len(request.context) - len(request.context.rstrip())
    context = request.context[: len(request.context) - n_spaces]
    continuation = request.context[len(context) :] + request.continuation
    if context:
        first = tokenizer(context)["input_ids"]
        ids = tokenizer(context + continuation)["input_ids"][len(first) :]
    else:
        first = [tokenizer.bos_token_id]
        ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    read = (first + ids)[-(max_len + 1) :][:-1]
    with torch.no_grad():
        logits = model(torch.tensor([read])).logits[0, -len(ids) :].log_softmax(-1)
    nats = sum(logits[i, token].item() for i, token in enumerate(ids))
    return nats, logits.argmax(-1).tolist() == ids


@pytest.fixture
def small_families(monkeypatch):
    """Two contexts that begin with the same eight ids are read together."""
    monkeypatch.setattr(loglikelihood, "ALIKE", 8)
    monkeypatch.setattr(loglikelihood, "SMALLEST_FAMILY", 2)


@pytest.mark.parametrize("max_len", [64, 33])
@pytest.mark.parametrize("places", [8192, 150, 1])
def test_the_scores_are_those_of_transformers(home, theirs, monkeypatch, small_families, max_len, places):
    monkeypatch.setattr(loglikelihood, "PLACES", places)
    scores = loglikelihoods(home.model, home.tokenizer, REQUESTS, max_len)
    for request, score in zip(REQUESTS, scores, strict=True):
        nats, is_greedy = by_transformers(theirs, request, max_len)
        assert score.nats == pytest.approx(nats, abs=1e-3), request
        assert score.is_greedy == is_greedy


def test_the_likeliest_continuation_is_greedy(home):
    """The flag is true for the id that the model would choose, and for no other."""
    (pair,) = pairs_of(home.tokenizer, [Request("Who has the", " ball")])
    with torch.no_grad():
        best = int(home.model(torch.tensor([pair.context]))[0, -1].argmax())
    pairs = [Pair(pair.context, (best,)), Pair(pair.context, ((best + 1) % 400,))]
    assert [score.is_greedy for score in scores_of(home.model, pairs)] == [True, False]


def test_what_is_alike_is_read_once(home, monkeypatch, small_families):
    """Eight questions with two choices after the same examples: the examples cost one row, not sixteen, however many
    passes it takes."""
    monkeypatch.setitem(loglikelihood.NEW_TOKENS, "cpu", 16)
    read = []
    hidden = home.model.hidden
    monkeypatch.setattr(
        home.model, "hidden", lambda tokens, **how: read.append(tokens.numel()) or hidden(tokens, **how)
    )
    contexts = [f"{EXAMPLES}{word}?" for word in "abcdefgh"]
    requests = [Request(*parts) for parts in itertools.product(contexts, [" Tom", " the ball"])]
    loglikelihoods(home.model, home.tokenizer, requests, 64)
    n_each = sum(len(pair.context) + len(pair.continuation) for pair in pairs_of(home.tokenizer, requests))
    assert sum(read) < n_each / 4


def test_what_cannot_be_scored_is_refused(home):
    with pytest.raises(UserError, match="no ids of its own"):
        loglikelihoods(home.model, home.tokenizer, [Request("ball", "")], 64)
    with pytest.raises(UserError, match=r"longer than --seq_len 3"):
        loglikelihoods(home.model, home.tokenizer, [Request("ball", " Tom has the ball and the cat")], 3)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_come_before_every_context(small_families, kind):
    """The oracle: what generation computes after the context and each beginning of the continuation."""
    model = tiny.base()
    weight = attach_virtual(model, kind, 4).embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    ids = tiny.IDS[0].tolist()
    contexts = [(*ids[:9], 1), (*ids[:9], 2, 3), (7,)]
    pairs = [Pair(context, part) for context in contexts for part in ((5,), (6, 7, 8), (9, 4))]
    for pair, score in zip(pairs, scores_of(model.eval(), pairs), strict=True):
        nats = 0.0
        for n, target in enumerate(pair.continuation):
            with torch.no_grad():
                _, logits = prefill(model, [[*pair.context, *pair.continuation[:n]]], 20)
            nats += float(logits[0].log_softmax(-1)[target])
        assert score.nats == pytest.approx(nats, abs=1e-4)
