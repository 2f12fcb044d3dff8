"""Prefix, prompt and P-tuning against peft's own, both ways, and against what virtual tokens mean by themselves."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.datasets.batch import Batch
from minillm.distributed.ranks import Ranks
from minillm.evaluation.validation import TextTokens as Tokens
from minillm.evaluation.validation import Validation
from minillm.generation import completion as generate
from minillm.generation.recorded_step import RecordedStep
from minillm.generation.sampling import GREEDY
from minillm.model.config import ModelConfig
from minillm.model.kv_cache import KVCache
from minillm.model.transformer import Transformer
from minillm.tuning.peft_format import load_adapter
from minillm.tuning.virtual_tokens import LSTM, PEFT_TYPES, VirtualTokens, attach_virtual, context_of, virtual_tokens

BASE = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=48)
MODELS = {
    "grouped, tied": BASE,
    "one head each, untied": dataclasses.replace(BASE, n_kv_heads=4, tie_embeddings=False),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, head_dim=16),
}
METHODS = [("prefix", "none"), ("prefix", "mlp"), ("prompt", "none"), ("ptuning", "mlp"), ("ptuning", "lstm")]
N = 4  # virtual tokens


def build(config: ModelConfig = BASE) -> Transformer:
    """Weights far from their usual scale (std 0.1): a wrong formula then shows."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + ("norm" in name))
    return model.requires_grad_(False).eval()


def tuned(kind: str, encoder: str | None = None, config: ModelConfig = BASE) -> Transformer:
    """A model with virtual tokens far from any real ones."""
    model = build(config)
    weight = attach_virtual(model, kind, N, encoder=encoder, hidden=24).embedding.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return model


def save_as_peft(virtual: VirtualTokens, folder) -> None:
    save_file(virtual.peft_tensors(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(virtual.peft_config()))


def twin(model: Transformer, folder):
    """The base as transformers loads it."""
    (folder / "base").mkdir()
    huggingface.save_model(model, folder / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")


def peft_config(kind: str, encoder: str) -> peft.PeftConfig:
    common = dict(task_type="CAUSAL_LM", num_virtual_tokens=N)
    if kind == "prefix":
        return peft.PrefixTuningConfig(**common, encoder_hidden_size=24, prefix_projection=encoder == "mlp")
    if kind == "prompt":
        return peft.PromptTuningConfig(**common)
    return peft.PromptEncoderConfig(**common, encoder_hidden_size=24, encoder_reparameterization_type=encoder.upper())


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed))


TEXT = torch.stack((text(20, 1), text(20, 2)))


def loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of each token after the first."""
    return model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()


# ---- peft as the oracle.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind, encoder", METHODS)
def test_peft_loads_ours(kind, encoder, name, tmp_path):
    theirs, model = twin(build(MODELS[name]), tmp_path), tuned(kind, encoder, MODELS[name])
    save_as_peft(model.virtual, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ours = model(TEXT)
    torch.testing.assert_close(loaded(TEXT).logits[:, -20:], ours, atol=1e-5, rtol=0)
    assert (ours - theirs(TEXT).logits).abs().max() > 0.1  # they do something


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind, encoder", METHODS)
def test_ours_trains_like_peft_and_loads_what_it_saves(kind, encoder, name, tmp_path):
    model = build(MODELS[name])
    torch.manual_seed(3)
    theirs = peft.get_peft_model(twin(model, tmp_path), peft_config(kind, encoder))
    virtual = attach_virtual(model, kind, N, encoder=encoder, hidden=24)
    own = dict(theirs.prompt_encoder["default"].named_parameters())
    with torch.no_grad():
        for p, q in zip(virtual.parameters(), own.values(), strict=True):
            p.copy_(q)
    labels = TEXT.clone()
    labels[:, 0] = -100  # peft would also learn the first token from the last virtual one
    expected, got = theirs(TEXT, labels=labels).loss, loss(model, TEXT)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected.backward()
    got.backward()
    for p, (label, q) in zip(virtual.parameters(), own.items(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() > 0, label

    theirs.eval().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    left_to_others = dict(base_model_name_or_path=None, peft_version=None)
    assert virtual.peft_config() | left_to_others == written | left_to_others
    model.virtual = None
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TEXT), theirs(TEXT).logits[:, -20:], atol=1e-5, rtol=0)
    assert [name for name, _ in model.virtual.named_parameters()] == ["embedding.weight"]


# ---- What virtual tokens are.


@pytest.mark.parametrize("config", [*MODELS.values(), dataclasses.replace(BASE, positions="learned", window=6)])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_begun_with_a_text_they_are_that_text(kind, config):
    model = build(config)
    whole = model(torch.cat((torch.tensor([[7, 8, 9, 7]] * 2), TEXT), 1))[:, 4:]
    attach_virtual(model, kind, 4).start_from(model, [7, 8, 9, 7])
    torch.testing.assert_close(model(TEXT), whole, atol=1e-5, rtol=0)


def test_by_default_they_begin_as_random_entries_of_the_vocabulary():
    model = build()
    table = attach_virtual(model, "prompt", 30, seed=5).table()
    ids = torch.cdist(table, model.embed_tokens.weight).argmin(1)
    assert torch.equal(table, model.embed_tokens.weight[ids]) and len(set(ids.tolist())) > 15
    assert torch.equal(attach_virtual(build(), "prompt", 30, seed=5).table(), table)
    assert not torch.equal(attach_virtual(build(), "prompt", 30, seed=6).table(), table)


@pytest.mark.parametrize("kind, encoder", METHODS)
def test_the_base_stays_as_it_is(kind, encoder):
    model, untouched = tuned(kind, encoder), build()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"virtual.{name}" for name, _ in model.virtual.named_parameters()
    ]
    optimizer = torch.optim.AdamW(model.virtual.parameters(), lr=0.03)
    losses = []
    for _ in range(30):  # to say the same all the time
        optimizer.zero_grad()
        losses.append(loss(model, torch.full((1, 20), 7)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    model.virtual = None
    assert torch.equal(model(TEXT), untouched(TEXT))


@pytest.mark.parametrize("kind, encoder", METHODS)
def test_packed_texts_are_refused_and_each_in_its_row_is_as_alone(kind, encoder):
    model = tuned(kind, encoder)
    texts = [text(n, seed=n) for n in (5, 1, 9)]
    row = torch.cat(texts)[None]
    numbers = torch.tensor([[0] * 5 + [3] * 1 + [4] * 9], dtype=torch.int32)
    with pytest.raises(UserError, match="4 virtual tokens stand before one text a row"):
        model(row, documents=numbers)
    batch = Batch(row, row, None, numbers).one_text_a_row()
    apart = model(batch.x, documents=batch.documents)[batch.mask]
    alone = torch.cat([model(t[None])[0] for t in texts])
    torch.testing.assert_close(apart, alone, atol=1e-5, rtol=0)
    grads = []
    for logits in (apart, alone):
        logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.virtual.parameters()])
        model.virtual.zero_grad()
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_they_cost_no_positions_in_the_rows(kind, monkeypatch):
    """The layers read the n vectors once at most, whatever the number of rows."""
    model, shapes = tuned(kind), []
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    assert model(TEXT).shape == (2, 20, 50)
    assert shapes == [(1, N, 32)] * (kind != "prefix") + [(2, 20, 32)]


def test_the_lstm_knows_no_autocast():
    lstm = LSTM(8, 8)
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = lstm(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, lstm(x))


@pytest.mark.parametrize(
    "kind, encoder, checkpointed",
    [("prefix", "none", False), ("prefix", "mlp", True), ("ptuning", "lstm", False), ("prompt", "none", True)],
)
def test_compiles_in_one_piece(kind, encoder, checkpointed):
    model = tuned(kind, encoder).train()
    model.checkpoint_activations = checkpointed
    mask = torch.arange(20).expand(2, 20) > 3
    values = []
    for trained in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        values.append([trained(TEXT, TEXT, mask=mask)])
        values[-1][0].backward()
        values[-1] += [p.grad.clone() for p in model.virtual.parameters()]
        model.virtual.zero_grad()
    torch.testing.assert_close(*values, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_a_text_is_scored_as_its_documents(kind):
    model, texts = tuned(kind), [text(n, seed=n) % 49 + 1 for n in (5, 2, 9)]  # 0 is the eos
    stream = torch.cat([torch.cat((t, torch.tensor([0]))) for t in texts])
    scores = Validation(Tokens([stream.numpy()], 0, 0, "", np.array([5, 2, 9])), None, 40, 100, documents=True)
    got = scores.scores(model, Ranks(0, 1, torch.device("cpu")), torch.no_grad())["val_loss"]
    alone = [loss(model, torch.cat((torch.tensor([0]), t, torch.tensor([0])))[None]) * (len(t) + 1) for t in texts]
    torch.testing.assert_close(torch.tensor(got), sum(alone) / len(stream), atol=1e-5, rtol=0)


# ---- Generation.


@pytest.mark.parametrize("kind, encoder", METHODS)
@torch.no_grad()
def test_cache_equals_no_cache(kind, encoder):
    model = tuned(kind, encoder)
    cache = KVCache(model.config, 2, N + 20)
    model.virtual.fill(model, cache)
    pieces = [model(TEXT[:, i:j], cache=cache) for i, j in pairwise([0, 5, 6, 20])]
    torch.testing.assert_close(torch.cat(pieces, 1), model(TEXT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind, encoder", METHODS)
def test_a_padded_batch_generates_what_each_prompt_does(kind, encoder, recorded, monkeypatch):
    model, made = tuned(kind, encoder), []
    monkeypatch.setattr(generate, "is_recorded", lambda cache: recorded)
    monkeypatch.setattr(generate, "RecordedStep", lambda *given: made.append(1) or RecordedStep(*given))
    prompts = [text(n, seed=n).tolist() for n in (3, 9, 1)]
    done = generate.generate(model, prompts, 12, sampling=GREEDY)
    for prompt, completion in zip(prompts, done, strict=True):
        whole = torch.tensor([prompt + completion.tokens])
        assert model(whole)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == completion.tokens
    assert len({tuple(c.tokens) for c in done}) == 3 and len(made) == recorded


def test_virtual_tokens_take_room_in_the_context_and_are_not_shown():
    model = tuned("prefix")
    assert (virtual_tokens(model).n, context_of(model)) == (4, 44)
    done = generate.generate(model, [text(40).tolist(), text(43).tolist()], 9)
    assert [(len(c.tokens), c.reason) for c in done] == [(4, "context"), (1, "context")]
    with pytest.raises(UserError, match="prompt 0: 44 tokens leave no room for a new one in the model's context of 44"):
        generate.generate(model, [text(44).tolist()], 9)


# ---- Bad input.


@pytest.mark.parametrize(
    "kind, n, options, message",
    [
        ("soft", 4, {}, "kind 'soft': choose one of prefix, prompt, ptuning"),
        ("prompt", 4, dict(encoder="mlp"), "prompt tuning with encoder 'mlp': choose one of none"),
        ("prefix", 0, {}, "--n_virtual 0: must be 1 to 47"),
        ("prefix", 48, {}, "--n_virtual 48: must be 1 to 47"),
    ],
)
def test_what_cannot_be_is_refused(kind, n, options, message):
    with pytest.raises(UserError, match=message):
        attach_virtual(build(), kind, n, **options)


def test_a_second_set_is_refused():
    with pytest.raises(UserError, match="4 virtual tokens already"):
        attach_virtual(tuned("prompt"), "prompt", 4)


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_an_adapter_of_another_base_is_refused(kind, tmp_path):
    save_as_peft(tuned(kind).virtual, tmp_path)
    other = build(dataclasses.replace(BASE, dim=64, n_heads=8, n_kv_heads=4))
    with pytest.raises(
        UserError, match=rf"of this model are prompt_embeddings of \(4, {128 if kind == 'prefix' else 64}\)"
    ):
        load_adapter(other, tmp_path)
    assert other.virtual is None
    save_file({"extra": torch.zeros(4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="extra"):
        load_adapter(build(), tmp_path)
