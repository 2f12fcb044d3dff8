import dataclasses
import itertools

import pytest
import torch

from minillm.alignment import rollouts
from minillm.alignment.rollouts import RolloutConfig, roll_out
from minillm.base.errors import UserError
from minillm.generation.completion import prefill
from minillm.generation.sampling import Sampling, draw, filtered, pick, random_numbers
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach, set_adapter
from minillm.tuning.options import TuningConfig
from tests.minillm.tuning import tiny

STOPS = (3, 7, 11, 12)
CONFIG = RolloutConfig(group_size=4, max_new_tokens=12, temperature=1.0, stop_ids=STOPS, pad_id=0, seed=5)
PROMPTS = [[1, 20, 21, 22], [1, 9], [1, 30, 31, 32, 33, 34, 35], [1, 40, 41]]


def build(**shape) -> Transformer:
    return tiny.base(**shape).eval()


def by_training_forward(model: Transformer, batch, temperature: float) -> torch.Tensor:
    """The log-probability of each y, (N, T), by one pass over whole rows."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(batch.x).float() / temperature, -1)  # (N, T, V)
    return log_p.gather(-1, batch.y[..., None])[..., 0]


# ---- what is trained on is what was drawn


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_the_ratio_of_trainer_and_sampler_is_one(temperature):
    model = build()
    rolled = roll_out(model, PROMPTS, range(4), 1, dataclasses.replace(CONFIG, temperature=temperature))
    again = by_training_forward(model, rolled.batch, temperature)
    ratio = (again - rolled.log_probs)[rolled.batch.mask].exp()
    assert (ratio - 1).abs().max() < 1e-4
    assert (rolled.log_probs[~rolled.batch.mask] == 0).all()


def test_rows_hold_the_prompt_and_the_sampled_ids_with_their_end():
    rolled = roll_out(build(), PROMPTS, range(4), 1, CONFIG)
    assert rolled.prompt.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert 0 < rolled.ended.sum() < 16  # some were cut
    for row in range(16):
        x, y, mask, _ = (None if t is None else t[row] for t in rolled.batch[:4])
        prompt = PROMPTS[row // 4]
        learned = y[mask].tolist()
        assert x[: len(prompt)].tolist() == prompt
        assert x[len(prompt) : len(prompt) + len(learned) - 1].tolist() == learned[:-1]
        assert mask.nonzero().flatten().tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(learned)))
        if rolled.ended[row]:  # the end that was drawn is learned, and is no part of the answer
            assert learned[-1] in STOPS and learned[:-1] == rolled.answers[row]
        else:  # a cut answer has no end
            assert learned == rolled.answers[row] and len(learned) == 12
        assert not set(rolled.answers[row]) & set(STOPS)


def test_answers_can_be_trained_on_and_the_model_is_left_in_its_mode():
    model = build(seed=2).train()
    rolled = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    assert model.training
    model(rolled.batch.x, rolled.batch.y, mask=rolled.batch.mask).backward()  # no tensor is one of inference mode


# ---- a group shares the reading of its prompt


def test_the_shared_prompt_is_bit_equal_to_reading_it_for_every_answer():
    model = build()
    with torch.inference_mode():
        shared, logits = prefill(model, PROMPTS, 7)
        every, every_logits = prefill(model, [prompt for prompt in PROMPTS for _ in range(4)], 20)
        rows = torch.arange(16)
        cache = KVCache(model.config, 16, 20)
        cache.copy_rows(rows.numpy(), shared, rows.numpy() // 4)
    assert torch.equal(logits[rows // 4], every_logits)
    assert cache.lengths.tolist() == cache.host_lengths.tolist() == every.lengths.tolist()
    for ours, theirs in zip(cache.keys + cache.values, every.keys + every.values, strict=True):
        for row, length in enumerate(every.lengths.tolist()):
            assert torch.equal(ours[row, :, :length], theirs[row, :, :length])


@pytest.mark.parametrize("n_places", [1, 3, 5, 16])
def test_waiting_answers_take_the_places_of_those_that_ended(n_places):
    model = build()
    together = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    few = roll_out(model, PROMPTS, range(4), 1, dataclasses.replace(CONFIG, rows_at_once=n_places))
    assert few.answers == together.answers
    assert torch.equal(few.batch.x, together.batch.x) and torch.equal(few.batch.mask, together.batch.mask)
    torch.testing.assert_close(few.log_probs, together.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_answers_that_close_up_stay_the_same(together, monkeypatch):
    """1: as soon as one ends, the last one takes its place; 100: none ever moves."""
    model = build()
    expected = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    moved = []
    monkeypatch.setattr(rollouts, "TOGETHER", together)
    close_up = rollouts._close_up
    monkeypatch.setattr(rollouts, "_close_up", lambda *args: moved.append(args[2]) or close_up(*args))
    rolled = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    assert rolled.answers == expected.answers
    torch.testing.assert_close(rolled.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    assert bool(moved) == (together < 100) and moved == sorted(moved, reverse=True)


def test_answers_are_those_of_one_token_at_a_time_without_cache():
    model = build()
    rolled = roll_out(model, PROMPTS[:2], [6, 2], 3, dataclasses.replace(CONFIG, temperature=0.8))
    for row in range(8):
        number = [6, 2][row // 4] * 4 + row % 4
        uniform = random_numbers((5, 3), [number], 12, "cpu")[0]  # (12,)
        tokens = list(PROMPTS[row // 4])
        for position in range(12):
            logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(pick(logits, Sampling(temperature=0.8), uniform[position : position + 1])))
            if tokens[-1] in STOPS:
                tokens.pop()
                break
        assert rolled.answers[row] == tokens[len(PROMPTS[row // 4]) :]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_the_run(value):
    """By a token of an answer whose embedding is damaged; the first one that any answer holds."""
    model = build()
    answers = roll_out(model, PROMPTS, range(4), 1, CONFIG).answers
    damaged = next(token for token in answers[3] if token not in (*STOPS, *itertools.chain(*PROMPTS)))
    n_fine = min(answer.index(damaged) + 1 for answer in answers if damaged in answer[:-1])
    with torch.no_grad():
        model.embed_tokens.weight[damaged] = value
    with pytest.raises(UserError, match=f"logits are not finite after {n_fine} new tokens: its weights are damaged"):
        roll_out(model, PROMPTS, range(4), 1, CONFIG)


def test_an_answer_ends_where_the_context_is_full():
    model = build(max_seq_len=10)
    rolled = roll_out(model, PROMPTS, range(4), 1, dataclasses.replace(CONFIG, stop_ids=()))
    assert [len(answer) for answer in rolled.answers[::4]] == [6, 8, 3, 7]
    assert not rolled.ended.any()
    with pytest.raises(UserError, match="prompt 0: is empty"):
        roll_out(model, [[]], [0], 1, CONFIG)


# ---- the draws are a function of seed, step and number


def test_ranks_and_order_do_not_change_the_answers():
    model = build()
    whole = roll_out(model, PROMPTS, [8, 9, 10, 11], 3, CONFIG)
    halves = [roll_out(model, PROMPTS[i : i + 2], [8 + i, 9 + i], 3, CONFIG) for i in (0, 2)]
    assert whole.answers == halves[0].answers + halves[1].answers
    assert whole.ended.tolist() == torch.cat([half.ended for half in halves]).tolist()
    assert roll_out(model, PROMPTS, [8, 9, 10, 11], 3, CONFIG).answers == whole.answers
    assert len({tuple(answer) for answer in whole.answers[:4]}) == 4  # a group's answers differ
    for other in (dict(step=4), dict(config=dataclasses.replace(CONFIG, seed=6)), dict(numbers=[4, 5, 6, 7])):
        changed = dict(numbers=[8, 9, 10, 11], step=3, config=CONFIG) | other
        assert roll_out(model, PROMPTS, **changed).answers != whole.answers


def test_the_draw_has_the_distribution_of_the_softmax():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 3
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, log_probs = draw(logits.expand(20_000, -1), 0.7, uniform)
    expected, _ = filtered(logits, Sampling(temperature=0.7))  # (1, V) fp64
    assert (torch.bincount(tokens, minlength=50) / 20_000 - expected[0]).abs().max() < 1.01 / 20_000
    torch.testing.assert_close(log_probs.double(), expected[0].log()[tokens], atol=2e-6, rtol=0)


# ---- adapters


@pytest.mark.parametrize("tune", ["lora", "prefix", "prompt"])
def test_an_adapter_answers_and_is_trained(tune):
    model = build()
    plain = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    attach(model, TuningConfig(tune=tune, n_virtual=3) if tune != "lora" else TuningConfig(tune=tune))
    tiny.shake({name: p for name, p in model.named_parameters() if p.requires_grad})
    rolled = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    again = by_training_forward(model, rolled.batch, 1.0)
    assert (again - rolled.log_probs)[rolled.batch.mask].abs().max() < 1e-4
    assert rolled.answers != plain.answers
    set_adapter(model, None)
    assert roll_out(model, PROMPTS, range(4), 1, CONFIG).answers == plain.answers


def test_the_places_of_the_cache_are_bounded(monkeypatch):
    made = []

    def noted(config, rows, *args, **options):
        made.append(rows)
        return KVCache(config, rows, *args, **options)

    monkeypatch.setattr(rollouts, "KVCache", noted)
    roll_out(build(), PROMPTS, range(4), 1, dataclasses.replace(CONFIG, rows_at_once=6))
    assert made == [6]


def test_log_probabilities_are_fp32_whatever_the_model_is():
    config = ModelConfig(vocab_size=50, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=64)
    model = Transformer(config).bfloat16().eval()
    model.init_weights()
    rolled = roll_out(model, PROMPTS, range(4), 1, CONFIG)
    assert rolled.log_probs.dtype == torch.float32
    assert (rolled.log_probs[rolled.batch.mask] < 0).all()
