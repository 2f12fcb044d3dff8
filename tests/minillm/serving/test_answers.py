"""Events of the engine → text and tokens, whole or in parts."""

import random

import pytest

from minillm.generation.pieces import cut
from minillm.generation.requests import End, PromptRead, Token, TokenLogProbs
from minillm.serving.answers import Answer, Echo, Part
from tests.minillm.tokenizer.test_tokenizer import train_foreign, train_llama

NO_CHARACTER = "\ufffd"


def tokens_of(home, rng: random.Random, n: int) -> list[int]:
    """Ids of text in which characters are spelled by bytes now and then, or not completely."""
    ids = []
    while len(ids) < n:
        if rng.random() < 0.3:
            some = home.tokenizer.encode(rng.choice("龘🙂é"))  # which are no pieces
            ids += some[: rng.randrange(1, len(some) + 1)]
        else:
            ids += home.tokenizer.encode(rng.choice(home.texts))[: rng.randrange(1, 4)]
    return ids[:n]


def grow(home, events: list, stops: tuple[str, ...] = (), echo: Echo | None = None, step: int = 1):
    """The parts of an answer that gets its events `step` at a time, and the answer."""
    answer = Answer(0, home.tokenizer, stops, n_prompt=3, echo=echo)
    parts = [answer.take(events[i : i + step]) for i in range(0, len(events), step)]
    return parts, answer


def test_parts_joined_are_the_text_however_they_come(home):
    rng = random.Random(1)
    for _ in range(200):
        ids = tokens_of(home, rng, rng.randrange(1, 20))
        whole = home.tokenizer.decode(ids)
        begin = rng.randrange(len(whole))
        stops = tuple(
            stop
            for stop in (whole[begin : begin + rng.randrange(1, 5)], "never", whole[-2:] + "x")
            if rng.random() < 0.6 and NO_CHARACTER not in stop
        )
        events = [PromptRead(0, None), *(Token(i, TokenLogProbs(-1.0, ())) for i in ids), End("length")]
        for step in (1, 3, len(events)):
            parts, answer = grow(home, events, stops, step=step)
            assert "".join(part.text for part in parts) == cut(whole, stops)
            is_stopped = any(stop in whole for stop in stops)
            assert answer.end.reason == ("stop" if is_stopped else "length")
            given = [token for part in parts for token in part.tokens]
            assert [token.id for token in given] == ids[: len(given)] and answer.n_new <= len(ids)
            assert is_stopped or len(given) == len(ids) == answer.n_new
            text = cut(whole, stops)
            assert all(token.offset <= len(text) for token in given)


def test_no_part_shows_a_piece_of_a_stop_string(home):
    ids = home.tokenizer.encode("Tom has the ball. Tom has the cat.")
    events = [PromptRead(0, None), *(Token(i, None) for i in ids), End("length")]
    stop = "ball. Tom has the cat!"
    shown = ""
    for part in grow(home, events[:-1], (stop,))[0]:
        shown += part.text
        assert not shown.endswith(tuple(stop[:n] for n in range(1, len(stop))))
    parts, _ = grow(home, events, (stop,))  # it did not come, so what was held back is given
    assert "".join(part.text for part in parts) == "Tom has the ball. Tom has the cat."


def test_what_comes_after_the_end_adds_nothing(home):
    ids = home.tokenizer.encode("Tom has the ball.")
    events = [PromptRead(2, None), *(Token(i, None) for i in ids), End("length")]
    parts, answer = grow(home, events, (" has",))
    assert "".join(part.text for part in parts) == "Tom" and answer.end == End("stop")
    assert answer.take([Token(5, None), End("cancelled")]) == Part("", []) and answer.n_cached == 2


def test_an_echo_comes_first_with_its_tokens(home):
    ids = [home.tokenizer.bos_id, *home.tokenizer.encode("谁有ball？")]
    log_probs = [None, *(TokenLogProbs(-float(i), ()) for i in range(1, len(ids)))]
    (part, *_), _ = grow(home, [PromptRead(0, log_probs), End("length")], echo=Echo("谁有ball？", ids))
    assert part.text == "谁有ball？" and [token.id for token in part.tokens] == ids
    assert [token.log_probs for token in part.tokens] == log_probs
    assert part.tokens[0].offset == part.tokens[1].offset == 0


ECHOED = ["Ana ran.", "the  man sat", " the man", "  a\n\tthe 猫 sat🙂 on", "🙂", " ", "the mat\n"]
TOKENIZERS = {
    "ours": lambda: None,
    "dummy space": train_llama,
    "without a table of bytes": lambda: train_foreign("unigram", vocab_size=90),
}


@pytest.mark.parametrize("text", ECHOED)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_each_token_of_an_echo_stands_where_its_text_does(home, kind, text):
    """Whatever the tokenizer puts before a text; the text from one token's place to the next one's is the token's."""
    tokenizer = TOKENIZERS[kind]() or home.tokenizer
    ids = tokenizer.prompt_ids(text)
    text = tokenizer.decode(ids)  # one that normalizes echoes another text
    log_probs = [None, *(TokenLogProbs(-1.0, ()) for _ in ids[1:])]
    answer = Answer(0, tokenizer, (), len(ids), Echo(text, ids))
    part = answer.take([PromptRead(0, log_probs)])
    offsets = [token.offset for token in part.tokens]
    assert [token.id for token in part.tokens] == ids and offsets == sorted(offsets) and offsets[0] == 0
    for n, (begin, end) in enumerate(zip(offsets, [*offsets[1:], len(text)], strict=True)):
        if NO_CHARACTER not in tokenizer.decode(ids[: n + 1]):  # else a part of a character
            assert text[:end] == tokenizer.decode(ids[: n + 1]) and begin <= end


@pytest.mark.parametrize("log_probs", [None, TokenLogProbs(-0.5, ())])
def test_the_id_that_ends_an_answer_counts_where_log_probabilities_are_asked_for(home, log_probs):
    end = End("stop", last=Token(home.tokenizer.eos_id, log_probs))
    parts, answer = grow(home, [PromptRead(0, None), end])
    tokens = [token for part in parts for token in part.tokens]
    assert [token.id for token in tokens] == ([home.tokenizer.eos_id] if log_probs else [])
    assert answer.n_new == 0 and not any(part.text for part in parts)
