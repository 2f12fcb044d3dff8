import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.generation import completion as generate
from minillm.generation.pieces import cut, text_before
from minillm.generation.recorded_step import next_logits
from minillm.generation.sampling import GREEDY, Sampling, penalized, pick, random_numbers
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from tests.minillm.model_options import OPTIONS
from tests.minillm.tokenizer.test_tokenizer import train_foreign, train_llama

BASE = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=96)
LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))


def build(seed=1, **change):
    model = Transformer(dataclasses.replace(BASE, **change))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name))
    return model.eval()


def prompt(length, seed=0):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def chosen(n=1000, **sampling):
    """How often each token is drawn from LOGITS when the uniform numbers are spread evenly: exact shares."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = pick(LOGITS.expand(n, -1), Sampling(**{"temperature": 1.0, **sampling}), uniform)
    return (torch.bincount(drawn, minlength=5) / n).tolist()


# ---- Drawing a token.


@pytest.mark.parametrize(
    "sampling, shares",
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        (dict(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (dict(top_k=99), [0.1, 0.4, 0.2, 0.25, 0.05]),
        (dict(top_p=0.0), [0, 1, 0, 0, 0]),
        (dict(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (dict(top_p=0.7), [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        (dict(top_p=1.0), [0.1, 0.4, 0.2, 0.25, 0.05]),
        (dict(min_p=0.45), [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        (dict(min_p=1.0), [0, 1, 0, 0, 0]),
        (dict(temperature=0.5), [0.01 / 0.275, 0.16 / 0.275, 0.04 / 0.275, 0.0625 / 0.275, 0.0025 / 0.275]),
        (dict(top_k=3, top_p=0.5), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (dict(temperature=1e-30), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_in_their_shares(sampling, shares):
    assert chosen(**sampling) == pytest.approx(shares, abs=2e-3)


def test_temperature_0_takes_the_best():
    assert pick(LOGITS, GREEDY, None).tolist() == [1]


def test_repetition_penalty_lowers_both_signs():
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.2]])
    seen = torch.tensor([[True, False, True, False]])
    assert pick(logits, Sampling(temperature=0, repetition_penalty=1.4), None, seen).tolist() == [0]
    assert pick(logits, Sampling(temperature=0, repetition_penalty=1.6), None, seen).tolist() == [1]
    assert pick(logits[:, 2:], Sampling(temperature=0, repetition_penalty=1.3), None, seen[:, 2:]).tolist() == [1]


def test_presence_and_frequency_penalties_are_subtracted_by_the_formula():
    """z − c · frequency − [c > 0] · presence, as OpenAI writes it, by hand for each id and row."""
    logits = torch.tensor([[3.0, 2.0, -1.0, 0.5], [0.0, 1.0, 2.0, 3.0]])
    counts = torch.tensor([[2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    for presence, frequency in ((0.7, 0.0), (0.0, 0.4), (-2.0, 1.5), (2.0, -2.0)):
        sampling = Sampling(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
        expected = [
            [z - c * frequency - (presence if c > 0 else 0.0) for z, c in zip(*row, strict=True)]
            for row in zip(logits.tolist(), counts.tolist(), strict=True)
        ]
        lowered = penalized(logits, sampling, None, counts)
        torch.testing.assert_close(lowered, torch.tensor(expected))
        assert pick(logits, sampling, None, None, counts).tolist() == torch.tensor(expected).argmax(-1).tolist()


def test_penalties_count_the_answer_and_not_the_prompt():
    """Greedy answers, again from whole passes and counts by hand; both rows at once, whose answers differ."""
    model = build()
    prompts = [[5, 6, 7, 5], [9, 9, 9]]
    sampling = Sampling(temperature=0, presence_penalty=0.3, frequency_penalty=0.2)
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                (row,) = model(torch.tensor([[*prompt, *answer]]))[:, -1].tolist()
            lowered = [z - 0.2 * answer.count(i) - 0.3 * (i in answer) for i, z in enumerate(row)]
            answer.append(max(range(len(lowered)), key=lowered.__getitem__))
        expected.append(answer)
    answers = generate.generate(model, prompts, 12, sampling=sampling)
    assert [answer.tokens for answer in answers] == expected
    assert [answer.tokens for answer in generate.generate(model, prompts, 12)] != expected


def test_no_value_however_odd_draws_what_is_no_token():
    """The numbers of fp32 end at 1e38: beyond them a softmax is NaN, and the token drawn is none of the vocabulary."""
    logits = torch.tensor([[3.0, 2.0, -1.0, 0.0, -50.0]])
    uniform = torch.tensor([0.999], dtype=torch.float64)
    odd = {"temperature": (0, 1e-320, 1e-40, 1e300), "repetition_penalty": (1e-320, 1e-38, 1e38, 1e300)}
    odd |= {"top_k": (0, 1, 3), "top_p": (0, 1e-320, 0.9, 1), "min_p": (0, 1e-320, 1)}
    for seen in (torch.zeros(1, 5, dtype=torch.bool), logits > 1, torch.ones(1, 5, dtype=torch.bool)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for values in itertools.product(*odd.values()):
                sampling = Sampling(**dict(zip(odd, values, strict=True)))
                assert 0 <= pick(logits.to(dtype), sampling, uniform, seen).item() < 5, (sampling, seen, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=1.1),
        dict(min_p=-1.0),
        dict(repetition_penalty=0.0),
        dict(presence_penalty=2.1),
        dict(frequency_penalty=-2.1),
        dict(seed=-1),
    ],
)
def test_sampling_refuses_what_has_no_meaning(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_row_s_numbers_depend_on_seed_row_and_place_alone():
    both = random_numbers(7, [0, 3], 20, "cpu")
    assert torch.equal(both[1], random_numbers(7, [3], 50, "cpu")[0, :20])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[1:], random_numbers(8, [3], 20, "cpu"))
    assert both.min() >= 0 and both.max() < 1


# ---- One step and the whole text.


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_step_gives_the_logits_of_the_whole_text(name, padded):
    model = build(**OPTIONS[name])
    prompts = [prompt(9), prompt(4 if padded else 9, seed=1)]
    more = torch.tensor(prompt(20, seed=2)).view(2, 10)
    cache, logits = generate.prefill(model, prompts, 19)
    steps = [logits] + [next_logits(model, cache, more[:, i]) for i in range(10)]
    for row in range(2):
        whole = model(torch.tensor([prompts[row] + more[row].tolist()]))[0, len(prompts[row]) - 1 :]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_step_is_as_exact_as_the_model_in_bfloat16():
    exact, model = build(), build().bfloat16()
    model.build_rotation()  # .bfloat16() rounded the tables too
    tokens = prompt(60)
    cache, _ = generate.prefill(model, [tokens[:50]], 60)
    steps = torch.cat([next_logits(model, cache, torch.tensor([token])) for token in tokens[50:]]).float()
    truth = exact(torch.tensor([tokens]))[0, 50:]
    usual = model(torch.tensor([tokens]))[0, 50:].float()
    assert (steps - truth).square().mean() < 1.5 * (usual - truth).square().mean()


def test_rows_that_went_leave_the_others_as_they_were():
    model = build()
    prompts = [prompt(9), prompt(4, seed=1), prompt(6, seed=2)]
    with torch.no_grad():
        cache, _ = generate.prefill(model, prompts, 17)
        assert cache.lengths.tolist() == [9, 4, 6]
        cache.keep(torch.tensor([1, 2]))
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == [4, 6]
        more = torch.tensor([[7], [8]])
        logits = model(more, cache=cache)[:, -1]
        for row, before in enumerate(prompts[1:]):
            alone = model(torch.tensor([before + more[row].tolist()]))[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=0)


def test_what_is_around_a_layer_is_heeded():
    model = build()
    plain = generate.generate(model, [prompt(5)], 12)
    handle = model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert generate.generate(model, [prompt(5)], 12) != plain
    handle.remove()
    for linear in (model.layers[0].self_attn.q_proj, model.lm_head):
        calls = []
        handle = linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert generate.generate(model, [prompt(5)], 12) == plain and len(calls) == 12
        handle.remove()
    ops.select("reference")
    try:
        assert generate.generate(model, [prompt(5)], 12) == plain
    finally:
        ops.select("auto")


# ---- Batches.


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)])
def test_a_row_says_the_same_alone_and_among_others(sampling):
    model = build()
    prompts = [prompt(n, seed=n) for n in (12, 3, 7, 1)]
    together = generate.generate(model, prompts, 40, sampling=sampling, stop_ids=[5, 6, 7])
    assert len({len(c.tokens) for c in together}) > 1  # rows end at different steps
    uniform = random_numbers(sampling.seed, range(4), 40, "cpu")
    for row, completion in enumerate(together):
        tokens, said = list(prompts[row]), []
        for step in range(40):  # without cache, batch or padding
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            seen = torch.zeros(1, 50, dtype=torch.bool)
            seen[0, tokens] = True
            token = int(pick(logits, sampling, uniform[row, step : step + 1], seen))
            if token in (5, 6, 7):
                break
            tokens.append(token)
            said.append(token)
        assert completion.tokens == said
        assert completion.reason == ("length" if len(said) == 40 else "stop")


@pytest.mark.parametrize("at_once", [1, 3, 4, 512])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=3)])
def test_rows_that_wait_for_others_say_the_same(sampling, at_once, monkeypatch):
    model = build()
    prompts = [prompt(n, seed=n) for n in (12, 3, 7, 1)]
    how = dict(sampling=sampling, stop_ids=[5, 6, 7])
    together = generate.generate(model, prompts, 40, **how)
    begun = []
    prefill = generate.prefill
    monkeypatch.setattr(generate, "prefill", lambda *args: begun.append(len(args[1])) or prefill(*args))
    monkeypatch.setattr(generate, "ROWS_AT_ONCE", at_once)
    assert generate.generate(model, prompts, 40, **how) == together
    assert sum(begun) == 4 and max(begun) == min(at_once, 4)
    if at_once < 4:
        with pytest.raises(UserError, match="prompt 3: is empty"):
            generate.generate(model, [*prompts[:3], []], 40)


def test_no_prompts_have_no_answers():
    model = build().train()
    assert generate.generate(model, [], 5) == [] and model.training


@pytest.mark.parametrize("plain", [True, False])
def test_generation_ends_where_the_context_is_full_and_says_so(plain):
    model = build(max_seq_len=16)
    if not plain:
        model.norm.register_forward_hook(lambda *_: None)
    prompts = [prompt(15), prompt(10), prompt(2), prompt(13)]
    done = generate.generate(model, prompts, 9)
    assert [len(c.tokens) for c in done] == [1, 6, 9, 3]
    assert [c.reason for c in done] == ["context", "context", "length", "context"]
    for before, completion in zip(prompts, done, strict=True):
        assert completion.tokens == generate.generate(model, [before], 9)[0].tokens
    with pytest.raises(UserError, match="prompt 1: 16 tokens leave no room"):
        generate.generate(model, [[1], prompt(16)], 1)


def test_prompts_that_cannot_be_are_refused():
    model = build()
    for prompts, new, message in (
        ([[]], 1, "empty"),
        ([[50]], 1, "0 to 49"),
        ([[-1]], 1, "ids from"),
        ([[1]], 0, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            generate.generate(model, prompts, new)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite after 0 new tokens"):
        generate.generate(model, [[1]], 1)


DRAWN = Sampling(temperature=1.0, seed=3)
WAYS = [GREEDY, DRAWN, Sampling(temperature=1.0, seed=3, top_k=5), Sampling(temperature=1.0, seed=3, top_p=0.9)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "drawn", "top_k", "top_p"])
def test_logits_that_are_not_finite_end_the_text_where_they_come(sampling, value):
    """By a token of the answer whose embedding is damaged: what was drawn from such logits, to the end, was token 0 or
    no token at all.
    """
    model = build(tie_embeddings=False)
    text = generate.generate(model, [prompt(5)], 12, sampling=sampling)[0].tokens
    n_fine = next(i + 1 for i, token in enumerate(text) if token not in prompt(5))
    with torch.no_grad():
        model.embed_tokens.weight[text[n_fine - 1]] = value
    message = f"not finite after {n_fine} new tokens: its weights are damaged, or --dtype float16 is too narrow"
    with pytest.raises(UserError, match=message):
        generate.generate(model, [prompt(5)], 12, sampling=sampling)
    assert generate.generate(model, [prompt(5)], n_fine, sampling=sampling)[0].tokens == text[:n_fine]
    pieces = []
    with pytest.raises(UserError, match=message):
        for piece in generate.stream(model, Bytes(), prompt(5), 12, sampling=sampling):
            pieces.append(piece)
    assert "".join(pieces) == bytes(text[:n_fine]).decode()


def test_logits_beyond_float16_end_the_text():
    """Weights that float16 holds, whose products it does not."""
    model = build()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight *= 1e5
    assert len(generate.generate(model, [prompt(5)], 3)[0].tokens) == 3
    with pytest.raises(UserError, match=r"after 0 new tokens: .* --dtype float16 is too narrow; choose bfloat16 or"):
        generate.generate(model.half(), [prompt(5)], 3)


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "drawn", "top_k", "top_p"])
def test_a_row_that_has_ended_spoils_no_other(sampling):
    """The row ends with a token that is damaged, and is read on beside three others until half of them have ended."""
    model = build(tie_embeddings=False)
    prompts = [prompt(n, seed=n) for n in (12, 3, 7, 1)]
    texts = [c.tokens for c in generate.generate(model, prompts, 12, sampling=sampling)]
    others = {token for tokens in (*prompts, *texts[1:]) for token in tokens}
    end = next(token for token in texts[0] if token not in others)
    with torch.no_grad():
        model.embed_tokens.weight[end] = torch.nan
    done = generate.generate(model, prompts, 12, sampling=sampling, stop_ids=[end])
    assert [c.tokens for c in done] == [texts[0][: texts[0].index(end)], *texts[1:]]


def test_the_model_is_left_as_it_was():
    model = build(dropout=0.5).train()
    assert generate.generate(model, [[1]], 20) == generate.generate(build(), [[1]], 20)  # no dropout in it
    assert model.training
    for _ in generate.stream(model, Bytes(), [1], 20):
        break
    assert model.training
    model(torch.tensor([[1]])).sum().backward()  # no tensor of inference mode is left in the model


@pytest.mark.parametrize(
    "change",
    [dict(), dict(qk_norm=True, head_dim=16), dict(qkv_bias=True, tie_embeddings=False)],
    ids=["llama", "qwen3", "qwen2"],
)
def test_greedy_tokens_are_those_of_transformers(change, tmp_path):
    import transformers

    model = build(vocab_size=300, max_seq_len=128, **change)
    huggingface.save_model(model, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    start = list(range(1, 20))
    mask = torch.ones(1, len(start), dtype=torch.long)
    limits = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs = twin.generate(torch.tensor([start]), attention_mask=mask, **limits)[0, len(start) :].tolist()
    assert generate.generate(model, [start], 64)[0].tokens == theirs
    assert len(set(theirs)) > 8  # not one token over and over, which a wrong model may say too


# ---- Text.


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    pieces = SimpleNamespace(table=[bytes([i]) for i in range(256)])

    def bytes_of(self, ids):
        return [bytes([i]) for i in ids]

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def says(monkeypatch, text: bytes):
    """Let every model say these bytes."""

    def steps(model, prompts, max_new_tokens, *, sampling, first_row=0, ended=lambda row, token: False):
        for token in text[:max_new_tokens]:
            yield [(0, token)]
            if ended(0, token):
                return

    monkeypatch.setattr(generate, "steps", steps)


def streamed(**options):
    pieces, stream = [], generate.stream(None, Bytes(), [1], options.pop("n", 99), **options)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_a_stream_never_shows_half_a_character(monkeypatch):
    says(monkeypatch, "a你😀b".encode())
    pieces, done = streamed()
    assert pieces == ["a", "你", "😀", "b"]
    assert done.reason == "context"
    says(monkeypatch, "a你".encode())
    assert streamed(n=3)[0] == ["a", "\ufffd"]  # the limit cut it


def test_a_stream_stops_before_a_stop_string(monkeypatch):
    says(monkeypatch, b"one\nUs two\nUser: three")
    pieces, done = streamed(stop_strings=["\nUser:"])
    assert "".join(pieces) == "one\nUs two" and done.reason == "stop"
    assert not any("\nUser"[:n] == piece for piece in pieces for n in range(1, 4))  # held back until it was clear
    says(monkeypatch, b"one\nUse")
    assert "".join(streamed(stop_strings=["\nUser:"])[0]) == "one\nUse"
    says(monkeypatch, b"ab\x02cd")
    pieces, done = streamed(stop_ids=[2])
    assert "".join(pieces) == "ab" and done == ([97, 98], "stop")


def test_stop_strings_end_rows_of_a_batch(monkeypatch):
    says(monkeypatch, "你好。再见".encode())
    (done,) = generate.generate(None, [[1]], 99, stop_strings=["。", "!"], tokenizer=Bytes())
    assert Bytes().decode(done.tokens) == "你好。" and done.reason == "stop"
    assert cut("你好。再见", ["再", "。"]) == "你好"
    assert cut("plain", ["x"]) == "plain"


SAID = "The man sat on the mat 🙂 Ana ran. ＡＢ the  cat\nis 猫 "
TOKENIZERS = {
    "bytes": Bytes,
    "dummy space": train_llama,
    "without a table of bytes": lambda: train_foreign("unigram", vocab_size=90),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rows_and_streams_stop_at_the_same_token_and_text(kind, monkeypatch):
    """Wherever an answer begins, with ids that have no text between, and stop strings of one to eight characters."""
    tokenizer = TOKENIZERS[kind]()
    ids = list(SAID.encode()) if kind == "bytes" else tokenizer.encode(SAID)
    if kind != "bytes":
        ids = [i for pair in zip(ids, [tokenizer.bos_id] * len(ids), strict=True) for i in pair]
    draw = random.Random(3)
    n_stopped = 0
    for _ in range(300):
        says(monkeypatch, ids[draw.randrange(len(ids) // 2) :])
        whole = "".join(generate.stream(None, tokenizer, [1], 99))
        begins = [0, *(draw.randrange(len(whole)) for _ in range(2))]
        stops = [whole[begin : begin + draw.randrange(1, 9)] for begin in draw.sample(begins, 2)]
        stream = generate.stream(None, tokenizer, [1], 99, stop_strings=stops)
        shown = ""
        try:
            while True:
                shown += next(stream)
        except StopIteration as end:
            done = end.value
        (row,) = generate.generate(None, [[1]], 99, stop_strings=stops, tokenizer=tokenizer)
        assert row == done
        n_left_out = len(shown) - len(text_before(tokenizer, row.tokens, stops))
        assert text_before(tokenizer, row.tokens, stops) == shown[n_left_out:] and shown[:n_left_out] in ("", " ")
        n_stopped += row.reason == "stop"
    assert n_stopped > 100


def test_a_stream_says_what_generate_says():
    model = build(vocab_size=256)
    sampling = Sampling(temperature=1.0, seed=5)
    whole = generate.generate(model, [[1, 2]], 30, sampling=sampling)[0]
    stream = generate.stream(model, Bytes(), [1, 2], 30, sampling=sampling)
    text = "".join(stream)
    assert text == Bytes().decode(whole.tokens)


def test_the_cache_refuses_more_than_it_holds():
    cache = KVCache(BASE, 1, 3)
    with pytest.raises(ValueError, match="holds 3 tokens, 4"):
        cache.reserve(4)
