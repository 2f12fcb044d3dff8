"""The value model: its clipped loss against trl's numbers, its start at zero, and models over one set of weights."""

import math

import pytest
import torch

from minillm.alignment.value import ValueModel, explained_variance, over_same_weights, value_loss
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach, set_adapter
from minillm.tuning.options import TuningConfig

MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
OLD = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0, 0]], dtype=torch.float64)
CHANGE = torch.tensor([[0.5, -0.1, 0.3, -0.4], [0.1, -0.3, 7, 7]], dtype=torch.float64)
RETURNS = torch.tensor([[0.849796875, 0.9103125, 0.96875, 1.025], [-0.9125, -1, 9, 9]], dtype=torch.float64)


def small_model() -> Transformer:
    config = ModelConfig(vocab_size=19, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=16)
    model = Transformer(config)
    model.init_weights(0)
    return model


def test_value_loss_and_clip_share():
    loss, n_clipped = value_loss(OLD + CHANGE, OLD, RETURNS, MASK, clip=0.2)
    assert float(loss) / 6 == pytest.approx(0.4682825637, abs=1e-9)
    assert int(n_clipped) == 3  # half of the six


def test_gradient_of_the_value_loss():
    """V − R where the plain error decides, else 0: there the clipped side is constant."""
    values = (OLD + CHANGE).requires_grad_()
    loss, _ = value_loss(values, OLD, RETURNS, MASK, clip=0.2)
    loss.backward()
    plain, moved = (values.detach() - RETURNS), OLD + CHANGE.clamp(-0.2, 0.2) - RETURNS
    expected = torch.where(plain.square() >= moved.square(), plain, torch.zeros(())).masked_fill(~MASK, 0.0)
    assert torch.allclose(values.grad, expected, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, OLD, RETURNS, MASK, 0.2)[0], (OLD + CHANGE).requires_grad_()
    )


def test_without_clipping_it_is_half_the_squared_error():
    loss, n_clipped = value_loss(OLD + CHANGE, OLD, RETURNS, MASK, clip=math.inf)
    assert float(loss) == pytest.approx(float((OLD + CHANGE - RETURNS)[MASK].square().sum() / 2))
    assert int(n_clipped) == 0


def test_explained_variance():
    assert explained_variance(RETURNS, RETURNS, MASK) == pytest.approx(1)
    assert explained_variance(torch.zeros_like(RETURNS) + 3, RETURNS, MASK) == pytest.approx(0)
    assert explained_variance(-RETURNS, RETURNS, MASK) == pytest.approx(-3)  # Var(2R) = 4 Var(R)
    assert math.isnan(explained_variance(RETURNS, torch.ones_like(RETURNS), MASK))


def test_values_start_at_zero_and_the_head_gets_a_gradient():
    model = ValueModel(small_model())
    tokens = torch.arange(12).view(2, 6)
    values = model(tokens)
    assert values.shape == (2, 6) and values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(2, 6))
    (values - 1).square().sum().backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_a_value_knows_the_tokens_so_far_and_no_later_one():
    model = ValueModel(small_model())
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.arange(6).view(1, 6)
    changed = tokens.clone()
    changed[0, 4] = 17
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_values_learn_a_constant():
    model = ValueModel(small_model())
    tokens = torch.randint(0, 19, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    returns = torch.full(tokens.shape, 0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        loss, _ = value_loss(model(tokens), model(tokens).detach(), returns, mask, clip=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(tokens) - 0.7).abs().max() < 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_models_over_the_same_weights_have_adapters_of_their_own(tied):
    model = small_model()
    if tied:
        model.config = ModelConfig(**{**vars(model.config), "tie_embeddings": True})
        model.tie()
    tokens = torch.arange(12).view(2, 6)
    base_logits = model(tokens)
    attach(model, TuningConfig(tune="lora", lora_rank=2), seed=0)
    other = over_same_weights(model)

    # one set of weights, and without an adapter the other is the base
    own = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in other.parameters()} == own
    assert torch.equal(other(tokens), base_logits)

    # training one changes neither the other nor the base
    attach(other, TuningConfig(tune="lora", lora_rank=2), seed=1)
    before = model(tokens)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.allclose(other(tokens), base_logits)
    assert torch.equal(model(tokens), before)
    set_adapter(other, None)
    assert torch.equal(other(tokens), base_logits)
