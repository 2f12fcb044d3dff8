"""The value model: its clipped loss against trl's numbers, its start at zero, and models over one set of weights."""

import math

import pytest
import torch

from minillm.alignment.value import explained_variance, make_value_model, share_equal_weights, start_in_unit, value_loss
from minillm.distributed.ranks import Ranks
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach, switched_off
from minillm.tuning.options import VIRTUAL, TuningConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
OLD = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0, 0]], dtype=torch.float64)
CHANGE = torch.tensor([[0.5, -0.1, 0.3, -0.4], [0.1, -0.3, 7, 7]], dtype=torch.float64)
RETURNS = torch.tensor([[0.849796875, 0.9103125, 0.96875, 1.025], [-0.9125, -1, 9, 9]], dtype=torch.float64)


def small_model(seed: int = 0, **options) -> Transformer:
    shape = dict(vocab_size=19, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=32, max_seq_len=16)
    model = Transformer(ModelConfig(**shape | options))
    model.init_weights(seed)
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
    assert explained_variance(RETURNS, RETURNS, MASK, ALONE) == pytest.approx(1)
    assert explained_variance(torch.zeros_like(RETURNS) + 3, RETURNS, MASK, ALONE) == pytest.approx(0)
    assert explained_variance(-RETURNS, RETURNS, MASK, ALONE) == pytest.approx(-3)  # Var(2R) = 4 Var(R)
    errors = RETURNS - OLD
    by_hand = 1 - float(errors[MASK].double().var() / RETURNS[MASK].double().var())
    assert explained_variance(OLD, RETURNS, MASK, ALONE) == pytest.approx(by_hand)
    assert math.isnan(explained_variance(RETURNS, torch.full_like(RETURNS, 0.7), MASK, ALONE))


def new_value_model() -> Transformer:
    return make_value_model(TuningConfig(), small_model(), None, seed=0)


def test_values_may_start_as_the_scores_of_the_reward_model_in_the_unit_of_the_rewards():
    judge = small_model()
    judge.give_score_head(3)
    value = make_value_model(TuningConfig(), small_model(), judge.requires_grad_(False), seed=0, keep_head=True)
    start_in_unit(value, 2.5)
    tokens = torch.randint(0, value.config.vocab_size, (2, 9))
    torch.testing.assert_close(value(tokens), judge(tokens) / 2.5, atol=1e-6, rtol=1e-5)
    assert value.score.weight.requires_grad and not judge.score.weight.requires_grad


def test_values_start_at_zero_and_the_head_gets_a_gradient():
    model = new_value_model()
    tokens = torch.arange(12).view(2, 6)
    values = model(tokens)
    assert values.shape == (2, 6) and values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(2, 6))
    (values - 1).square().sum().backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_a_value_knows_the_tokens_so_far_and_no_later_one():
    model = new_value_model()
    torch.nn.init.normal_(model.score.weight)
    tokens = torch.arange(6).view(1, 6)
    changed = tokens.clone()
    changed[0, 4] = 17
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_values_learn_a_constant():
    model = new_value_model()
    tokens = torch.randint(0, 19, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    returns = torch.full(tokens.shape, 0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 100)
    for _ in range(100):
        loss, _ = value_loss(model(tokens), model(tokens).detach(), returns, mask, clip=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    assert (model(tokens) - 0.7).abs().max() < 1e-2


def test_a_value_model_of_its_own_begins_as_the_reward_model():
    policy, reward_model = small_model(), small_model(seed=5)
    reward_model.give_score_head(0)
    value = make_value_model(TuningConfig(), policy, reward_model, seed=0)
    assert torch.equal(value.layers[0].mlp.up_proj.weight, reward_model.layers[0].mlp.up_proj.weight)
    assert value.layers[0].mlp.up_proj.weight is not reward_model.layers[0].mlp.up_proj.weight
    assert all(parameter.requires_grad for parameter in value.parameters())
    assert reward_model.score.weight.abs().sum() > 0  # only the copy's is zero


METHODS = ("lora", "dora", "ia3", "adapter", "prefix", "prompt", "ptuning")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tune", METHODS)
def test_policy_and_value_model_are_adapters_over_one_base(tune, tied):
    model = small_model(tie_embeddings=tied)
    tokens = torch.arange(12).view(2, 6)
    base_logits = model(tokens)
    options = TuningConfig(tune, **({"n_virtual": 3} if tune in VIRTUAL else {}))
    attach(model, options, seed=0)
    value = make_value_model(options, model, None, seed=1)

    # all that is not trained is one set of weights
    of_policy = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    of_value = {p.data_ptr() for p in value.parameters() if not p.requires_grad}
    assert of_value <= of_policy
    trained = [p for p in value.parameters() if p.requires_grad]
    assert not {p.data_ptr() for p in trained} & {p.data_ptr() for p in model.parameters()}
    assert torch.equal(value(tokens), torch.zeros(2, 6))

    # every trained number gets a gradient, and changing it changes neither the policy nor the reference
    torch.nn.init.normal_(value.score.weight)
    value(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    before, values = model(tokens), value(tokens)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    assert not torch.allclose(value(tokens), values)
    assert torch.equal(model(tokens), before)
    with switched_off(model):
        assert torch.equal(model(tokens), base_logits)


def test_a_reward_model_over_the_same_base_costs_its_adapter_alone():
    policy, reward_model, other = small_model(), small_model(), small_model(seed=1)
    options = TuningConfig(tune="lora", lora_rank=2)
    attach(policy, options, seed=0)
    n_layers = sum(p.nbytes for p in reward_model.layers.parameters())
    reward_model.give_score_head(0)
    attach(reward_model, options, seed=3)
    tokens = torch.arange(12).view(2, 6)
    before = reward_model(tokens)
    freed = share_equal_weights(reward_model, policy)
    assert freed == n_layers + reward_model.embed_tokens.weight.nbytes + reward_model.norm.weight.nbytes
    assert torch.equal(reward_model(tokens), before)
    assert share_equal_weights(reward_model, policy) == 0
    assert share_equal_weights(other, policy) < n_layers / 10  # only norms are equal


def test_a_reward_model_never_shares_what_is_trained():
    policy, reward_model = small_model(), small_model()
    reward_model.requires_grad_(False)
    assert share_equal_weights(reward_model, policy) == 0
