import dataclasses

import pytest
import torch

from minillm.alignment.log_probs import Policy, answer_log_probs, loss_through_log_probs
from minillm.datasets.batch import Batch
from minillm.model import loss
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig

SHAPE = ModelConfig(vocab_size=61, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=32)
MODELS = {
    "plain": SHAPE,
    "untied": dataclasses.replace(SHAPE, tie_embeddings=not SHAPE.tie_embeddings),
    "softcap": dataclasses.replace(SHAPE, softcap=3.0),
}


def make_model(config: ModelConfig) -> Transformer:
    """A model whose logits are far from uniform."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_batch(n_rows: int = 6, length: int = 11) -> Batch:
    """Rows whose answers begin and end at different places."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(61, (n_rows, length + 1), generator=generator)
    begins = torch.randint(1, 5, (n_rows, 1), generator=generator)
    ends = begins + torch.randint(1, 6, (n_rows, 1), generator=generator)
    places = torch.arange(length)
    return Batch(tokens[:, :-1], tokens[:, 1:], (places >= begins) & (places < ends))


def plain_log_probs(model, batch: Batch, temperature: float) -> torch.Tensor:
    """The same by the whole matrix of logits, with gradients."""
    logits = model(batch.x) / temperature
    log_p = torch.log_softmax(logits, -1).gather(-1, batch.y[..., None]).squeeze(-1)
    return log_p * batch.mask


def preference_loss(log_probs: torch.Tensor) -> torch.Tensor:
    """A loss that is no sum over tokens: DPO's, of rows 0, 2, 4 against 1, 3, 5."""
    sums = log_probs.sum(1)
    return -torch.nn.functional.logsigmoid(0.7 * (sums[0::2] - sums[1::2])).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict, other: dict) -> None:
    largest = max(float(g.abs().max()) for g in other.values())
    for name, gradient in other.items():
        torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_and_entropy_are_those_of_the_logits(kind, temperature, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 61 * 16)  # several chunks
    model, batch = make_model(MODELS[kind]), make_batch()
    found, entropy = answer_log_probs(model, batch, temperature=temperature, with_entropy=True)
    torch.testing.assert_close(found, plain_log_probs(model, batch, temperature), rtol=1e-5, atol=1e-5)
    log_p = torch.log_softmax(model(batch.x) / temperature, -1)
    right = -(log_p.exp() * log_p).sum(-1) * batch.mask
    torch.testing.assert_close(entropy, right, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    torch.testing.assert_close(answer_log_probs(model, batch, temperature=temperature), found, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_and_its_gradient_are_those_of_plain_autograd(kind, temperature):
    model, batch = make_model(MODELS[kind]), make_batch()
    right = preference_loss(plain_log_probs(model, batch, temperature))
    right.backward()
    wanted = gradients(model)
    found = Policy(model)(batch, preference_loss, temperature)
    torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
    (2 * found).backward()
    assert_same({name: gradient / 2 for name, gradient in gradients(model).items()}, wanted)


@pytest.mark.parametrize("tune", ["lora", "prefix", "prompt", "ia3"])
def test_adapters_and_virtual_tokens_take_part(tune):
    model, batch = make_model(SHAPE), make_batch()
    options = TuningConfig(tune, n_virtual=3) if tune in ("prefix", "prompt") else TuningConfig(tune)
    attach(model, options, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    right = preference_loss(plain_log_probs(model, batch, 1.0))
    right.backward()
    wanted = gradients(model)
    found = loss_through_log_probs(model, batch, preference_loss)
    torch.testing.assert_close(found, right.detach(), rtol=1e-5, atol=1e-5)
    found.backward()
    assert_same(gradients(model), wanted)


def test_rows_without_an_answer_give_every_parameter_a_gradient_of_zero():
    model, batch = make_model(MODELS["untied"]), make_batch()
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    found = loss_through_log_probs(model, batch, lambda log_probs: log_probs.sum())
    found.backward()
    assert found.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert not answer_log_probs(model, batch).any()


def test_a_loss_that_does_not_depend_on_the_model_has_no_gradient():
    model, batch = make_model(SHAPE), make_batch()
    found = loss_through_log_probs(model, batch, lambda log_probs: torch.tensor(2.5))
    found.backward()
    assert found.item() == 2.5
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_padding_changes_nothing():
    model, batch = make_model(SHAPE), make_batch()
    wider = Batch(*(torch.nn.functional.pad(tensor, (0, 7)) for tensor in batch[:3]))
    found = answer_log_probs(model, wider)[:, : batch.y.shape[1]]
    torch.testing.assert_close(found, answer_log_probs(model, batch), rtol=1e-5, atol=1e-5)


def test_under_autocast_both_passes_see_the_same_log_probs():
    model, batch = make_model(SHAPE), make_batch()
    seen = []

    def loss_of(log_probs):
        seen.append(log_probs.detach().clone())
        return log_probs.sum()

    with torch.autocast("cpu", torch.bfloat16):
        found = loss_through_log_probs(model, batch, loss_of)
        before = answer_log_probs(model, batch)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], before, rtol=0, atol=0)
    torch.testing.assert_close(found, before.sum())
    found.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_dropout_is_off_while_log_probs_are_read():
    model, batch = make_model(dataclasses.replace(SHAPE, dropout=0.5)), make_batch()
    model.train()
    one, other = (answer_log_probs(model, batch) for _ in range(2))
    assert model.training
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_target_gives_no_number():
    log_probs, entropy = loss.target_log_probs(torch.zeros(0, 8), torch.zeros(5, 8), torch.zeros(0, dtype=torch.long))
    assert log_probs.shape == (0,) and entropy is None
