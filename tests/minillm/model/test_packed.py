"""Packed weights against whole-number sums of their own, and models of them against the models they were."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.generation.completion import generate
from minillm.model import packed, quant
from minillm.model.packed import GROUP, Float16Matrix, Int4Matrix, Int8Matrix, PackedLinear
from minillm.model.quant import QuantLinear, quantize_for_generation
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.kernels.check import error
from tests.minillm.model_options import OPTIONS, build, tokens_of

pytestmark = pytest.mark.skipif(
    not all(packed.can_pack(bits) for bits in (16, 8, 4)), reason="torch lacks these products here"
)
BITS = (16, 8, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_model(bits: int, **change):
    model = build(**change)
    quantize_for_generation(model, bits)
    return model


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (48, 64), (100, 256)])
@pytest.mark.parametrize("n_rows", [1, 5, 70])
def test_sixteen_bits_are_products_with_weights_in_float16(shape, n_rows):
    """Numbers that are subnormal in float16 among them, x in any order in memory, and no rows at all."""
    weight = normal(*shape) * torch.logspace(-7, 3, shape[0])[:, None]
    x = normal(shape[1], n_rows, seed=1).T
    expected = x.double() @ weight.half().double().T  # (n_rows, N)
    got = Float16Matrix(weight)(x)
    assert error(got, expected.float()) < 1e-6
    columns = expected.abs().amax(0).clamp(min=1e-12)  # (N,): small ones are right too
    assert ((got - expected).abs() / columns).max() < 1e-4
    assert Float16Matrix(weight)(x[:0].view(0, 1, shape[1])).shape == (0, 1, shape[0])


@pytest.mark.parametrize("steps", [None, 63])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (48, 64), (100, 256)])
def test_eight_bits_are_sums_of_whole_numbers(shape, steps, monkeypatch):
    """Rows of x and of W of very different sizes, each with a scale of its own; 63 steps: processors without VNNI."""
    if steps:
        monkeypatch.setattr(packed, "activation_steps", lambda: steps)
    steps = packed.activation_steps()
    weight = normal(*shape) * torch.logspace(-3, 3, shape[0])[:, None]
    x = normal(2, 3, shape[1], seed=1) * torch.logspace(-4, 4, 6).view(2, 3, 1)
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().double()
    largest = x.abs().amax(-1, keepdim=True)
    whole = (x / largest * steps).round().double() @ codes.T
    expected = whole * scale.double() * largest.double() / steps
    assert error(Int8Matrix(weight)(x), expected.float()) < 1e-5


def test_the_number_of_steps_is_one_whose_products_are_exact():
    """The largest numbers there are, in rows of many: nothing overflows on the way."""
    weight = torch.full((32, 4096), 2.0)
    assert torch.allclose(Int8Matrix(weight)(torch.full((5, 4096), -3.0)), torch.full((5, 32), -6.0 * 4096))
    assert packed.activation_steps() in (63, 127)


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("matrix", [Float16Matrix, Int8Matrix, Int4Matrix])
def test_a_row_that_is_not_finite_gives_nothing_finite(matrix, value, n_rows):
    """So that logits show it: rounded to whole numbers it could look like any other row. The others stay finite."""
    x = normal(n_rows, 64)
    x[0, 5] = value
    y = matrix(normal(32, 64, seed=1))(x)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


ROWS = normal(40, 128, seed=1) * torch.logspace(-2, 2, 40)[:, None]


def test_in_eight_bits_a_row_has_the_same_bits_beside_others():
    matrix = Int8Matrix(normal(96, 128))
    together = matrix(ROWS)
    assert all(torch.equal(matrix(ROWS[n : n + 2]), together[n : n + 2]) for n in range(39))
    alone = torch.cat([matrix(row[None]) for row in ROWS])
    # a code may be rounded the other way where it lies between two
    assert ((alone - together).abs().amax(1) < 1e-2 * together.abs().amax(1)).all()
    assert ((alone - together).abs() < 1e-6 * together.abs().amax(1, keepdim=True)).float().mean() > 0.9


@pytest.mark.parametrize("n_rows", [1, 2, 7])
def test_in_sixteen_bits_a_row_is_the_same_beside_others_up_to_rounding(n_rows):
    matrix = Float16Matrix(normal(96, 128))
    together = matrix(ROWS)
    for n in range(40 - n_rows):
        few, many = matrix(ROWS[n : n + n_rows]), together[n : n + n_rows]
        assert ((few - many).abs().amax(1) < 2e-6 * many.abs().amax(1)).all()


def test_four_bits_are_within_half_a_step_of_each_weight():
    weight = normal(48, 128) + normal(48, 1, seed=2)  # groups that do not lie around zero
    got = Int4Matrix(weight)(torch.eye(128)).T  # the weights themselves: products of ones
    groups = weight.view(48, -1, GROUP)
    step = (groups.amax(2) - groups.amin(2)) / 15
    off = (got.reshape(groups.shape) - groups).abs()
    assert (off <= 0.5 * step[..., None] + 0.02 * groups.abs().amax(2, keepdim=True)).all()  # 0.02: of bfloat16
    x = normal(3, 5, 128, seed=1)
    assert error(Int4Matrix(weight)(x), x.bfloat16().float() @ got.T) < 0.005


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    weight, x = normal(32, 64), normal(4, 64, seed=1)
    weight[5] = 0.0
    x[2] = 0.0
    matrix = packed.MATRICES[bits](weight)
    y = matrix(x)
    assert not y[2].any() and not y[:, 5].any() and y.isfinite().all()
    assert not matrix(x[2:3]).any()


@pytest.mark.parametrize("bits", BITS)
def test_layers_of_one_matrix_are_the_layers_alone(bits):
    parent = nn.Module()
    for name, n_outputs in (("a", 32), ("b", 16), ("c", 64)):
        parent.add_module(name, nn.Linear(64, n_outputs, bias=name == "b"))
    alone = copy.deepcopy(parent)
    packed.pack_layers(parent, ("a", "b", "c"), bits)
    for name in "abc":
        packed.pack_layers(alone, (name,), bits)
    x = normal(2, 1, 64)
    with torch.no_grad():
        expected = [getattr(alone, name)(x) for name in "abc"]
        layers = (parent.a, parent.b, parent.c)
        assert all(torch.equal(a, b) for a, b in zip(packed.products(x, layers), expected, strict=True))
        assert all(torch.equal(layer(x), b) for layer, b in zip(layers, expected, strict=True))
        assert packed.products(x, (parent.a, alone.b)) is None and packed.products(x, (alone.a, parent.b)) is None
        seen = []
        parent.b.register_forward_hook(lambda *_: seen.append(1))
        assert packed.products(x, layers) is None and torch.equal(parent.b(x), expected[1]) and seen == [1]


@pytest.mark.parametrize(("bits", "least", "largest"), [(16, 1e-5, 0.002), (8, 1e-4, 0.08), (4, 1e-4, 0.45)])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_logits_stay_close_to_the_models_own(name, bits, least, largest):
    model = packed_model(bits, **OPTIONS[name])
    assert least < error(model(tokens_of(2, 20)), build(**OPTIONS[name])(tokens_of(2, 20))) < largest
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)]
    assert len(linears) == 2 * 7 + 1 and all(type(layer) is PackedLinear for layer in linears)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_the_loss_is_that_of_the_logits(bits):
    """Several parts of rows, some of which do not count, with a soft cap."""
    model = packed_model(bits, softcap=2.0)
    tokens, mask = tokens_of(5, 60), tokens_of(5, 60, seed=3) < 30
    targets = tokens.roll(-1, 1)
    rows = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(5, 60)
    assert torch.allclose(model(tokens, targets), rows.sum(), rtol=1e-5)
    assert torch.allclose(model(tokens, targets.masked_fill(~mask, -100)), rows[mask].sum(), rtol=1e-5)
    assert torch.allclose(model(tokens, targets, mask=mask), rows[mask].sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"z_loss .* packed for generation"):
        model(tokens, targets, z_loss=1e-4)


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_it_generates_what_its_logits_say(bits):
    """Greedily, alone and beside others, through the cache, by steps of one token."""
    model = packed_model(bits)
    prompts = [[1, 2, 3], [4], [7, 8, 9, 10, 11]]
    together = generate(model, prompts, 10)
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate(model, [prompt], 10)[0] == answer
        logits = model(torch.tensor([[*prompt, *answer.tokens]]))[0, len(prompt) - 1 : -1]  # (10, V)
        chosen = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (logits.amax(1) - chosen < 0.05 * logits.std()).all()  # a rounding may flip between steps and rows


@torch.inference_mode()
def test_rows_of_other_sizes_than_four_bits_suit_are_in_eight():
    model = packed_model(4, ffn_dim=40)
    assert type(model.layers[0].mlp.down_proj.matrix) is Int8Matrix
    assert type(model.layers[0].mlp.up_proj.matrix) is Int8Matrix and type(model.lm_head.matrix) is Int8Matrix
    assert type(model.layers[0].self_attn.q_proj.matrix) is Int4Matrix
    assert len(generate(model, [[1, 2]], 5)[0].tokens) == 5


@torch.inference_mode()
def test_a_machine_without_the_products_takes_those_of_a_quantized_base(monkeypatch):
    monkeypatch.setattr(packed, "can_pack", lambda bits: False)
    for bits in BITS:
        model = packed_model(bits)
        plain = copy.deepcopy(model)
        quant.dequantize_base(plain)
        assert type(model.layers[1].mlp.up_proj) is QuantLinear
        assert generate(model, [[1, 2, 3]], 8) == generate(plain, [[1, 2, 3]], 8)


@pytest.mark.parametrize("there", [set(kinds) for n in range(4) for kinds in itertools.combinations(BITS, n)], ids=str)
@pytest.mark.parametrize("shape", [{}, {"ffn_dim": 40}, {"ffn_dim": 40, "vocab_size": 51}], ids=str)
@torch.inference_mode()
def test_no_product_is_asked_for_that_a_machine_lacks(there, shape, monkeypatch):
    """Whichever of them there are: processors of ARM may have the one for 4 bits alone."""
    monkeypatch.setattr(packed, "can_pack", lambda bits: bits in there)
    monkeypatch.setattr(packed, "MATRICES", {bits: packed.MATRICES[bits] for bits in there})
    expected = build(**shape)(tokens_of(2, 20))
    for bits, largest in ((16, 0.01), (8, 0.1), (4, 0.6)):
        model = packed_model(bits, **shape)
        assert error(model(tokens_of(2, 20)), expected) < largest
        assert len(generate(model, [[1, 2]], 3)[0].tokens) == 3
        if there == {4} and bits == 4 and shape:
            mlp = model.layers[0].mlp
            assert type(mlp.down_proj) is type(mlp.up_proj) is nn.Linear  # 40 is no multiple of 32 or 16
            assert type(model.layers[0].self_attn.q_proj) is PackedLinear


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="--bits 3: choose one of 16, 8, 4"):
        quantize_for_generation(build(), 3)
    model = build()
    attach(model, TuningConfig("lora", lora_rank=2))
    with pytest.raises(UserError, match=r"--bits 8: layers\.0\.mlp\.down_proj is no linear layer of a plain model"):
        quantize_for_generation(model, 8)
    model = build()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        quantize_for_generation(model, 8)
    model = build()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = -1e5
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds 100,000, beyond float16's 65,504; leave"
    ):
        quantize_for_generation(model, 16)
    model = packed_model(8)
    for again in (lambda: quantize_for_generation(model, 8), lambda: quant.quantize_base(model, 4)):
        with pytest.raises(UserError, match="quantized already"):
            again()
    with pytest.raises(UserError, match="a quantized base is not saved"):
        huggingface.save_model(model, tmp_path)
    with pytest.raises(UserError):
        attach(model, TuningConfig("lora", lora_rank=2))
    model.embed_tokens.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="load the model without --bits to train it"):
        model(tokens_of(1, 4))
