import pytest
import torch
from torch import nn

from minillm.model import ops
from minillm.tuning.adapter import attach
from minillm.tuning.lora import LoraEmbedding, LoraLinear, kaiming, row_norms
from minillm.tuning.options import TuningConfig
from tests.kernels.check import DEVICE, error
from tests.minillm.model.test_transformer import build, tokens_of


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_row_norms_without_the_product():
    weight, a, b = drawn(7, 5), drawn(3, 5), drawn(7, 3)
    known = weight.square().sum(1), weight @ a.T, a @ a.T
    torch.testing.assert_close(row_norms(*known, b, 0.7), (weight + 0.7 * b @ a).norm(dim=1))
    assert row_norms(*known, b.bfloat16(), 0.7).dtype == torch.float32


def test_a_begins_as_torch_s_linear_layers_do():
    ours = kaiming((64, 400), torch.Generator().manual_seed(0))
    other = nn.Linear(400, 64).weight.detach()
    assert ours.abs().max() <= 1 / 20 and abs(float(ours.std() / other.std()) - 1) < 0.02 and abs(ours.mean()) < 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_the_formula(dora):
    layer = LoraLinear(nn.Linear(5, 7), 3, 0.5, 0.0, dora, torch.Generator().manual_seed(0))
    layer.lora_B.weight.data = drawn(7, 3)
    x, w, bias = drawn(4, 5), layer.base_layer.weight, layer.base_layer.bias
    whole = w + 0.5 * drawn(7, 3) @ layer.lora_A.weight
    if dora:  # the length of each row is the base's own at first
        whole = whole / whole.norm(dim=1, keepdim=True) * w.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ whole.T + bias)
    torch.testing.assert_close(layer.weight, whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), x @ whole.T + bias, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding(dora):
    table = LoraEmbedding(nn.Embedding(9, 6), 3, 0.5, dora, torch.Generator().manual_seed(0))
    table.lora_embedding_A.data = drawn(3, 9)
    w, ids = table.base_layer.weight, torch.tensor([[0, 8, 3]])
    whole = w + 0.5 * (table.lora_embedding_B @ drawn(3, 9)).T
    if dora:
        whole = whole / whole.norm(dim=0) * w.norm(dim=0)
    torch.testing.assert_close(table(ids), whole[ids])
    torch.testing.assert_close(table.merged()(ids), whole[ids])


def test_dropout_is_of_the_input_of_a_alone():
    layer = LoraLinear(nn.Linear(5, 7), 3, 0.5, 0.9, False, torch.Generator().manual_seed(0))
    x = drawn(4, 5)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero
    layer.lora_B.weight.data = drawn(7, 3)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), x @ layer.weight.T + layer.base_layer.bias)


@pytest.mark.parametrize("tune", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}], ids=["plain", "biases"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_joined_products_have_the_gradients_of_each_alone(tune, options, dropout):
    """q, k and v, and gate and up, share their x: `ops.linears` multiplies it by all their W and A."""
    model = build(**options).to(DEVICE).train()
    attach(model, TuningConfig(tune, lora_rank=4, lora_dropout=dropout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(drawn(*parameter.shape) / 10)
    tokens, found = tokens_of(2, 20).to(DEVICE), []
    for implementation in ("triton", "torch"):
        ops.select(implementation)
        torch.manual_seed(0)
        loss = model(tokens, tokens.roll(-1, 1))
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    ops.select("auto")
    assert len(found[0]) > 2 * 14 and all(error(a, b) < 2e-5 for a, b in zip(*found, strict=True))


def test_squares_of_frozen_rows_are_not_rounded_with_the_model():
    layer = LoraLinear(nn.Linear(64, 8), 3, 0.5, 0.0, True, torch.Generator().manual_seed(0))
    table = LoraEmbedding(nn.Embedding(64, 8), 3, 0.5, True, torch.Generator().manual_seed(0))
    for module in (layer, table):
        before = module.square.clone()
        assert module.to(torch.bfloat16).square.dtype == torch.float32 and torch.equal(module.square, before)
