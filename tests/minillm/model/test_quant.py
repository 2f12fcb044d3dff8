"""Quantized bases: what rounding costs against theory, what training needs of memory against what it takes."""

import copy
import dataclasses
import json
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import quant_matmul, reference
from kernels.shared import launch
from minillm import __main__
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.generation.completion import generate
from minillm.model import ops, quant
from minillm.model.config import ModelConfig
from minillm.model.memory import adapter_training, weights
from minillm.model.quant import QuantLinear, quantize_base, quantize_int8, quantize_nf4
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.kernels.check import error
from tests.minillm.model_options import OPTIONS, build, tokens_of

BITS = (8, 4)
LLAMA_2_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
LLAMA_2_7B |= {"num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(bits: int, **change) -> Transformer:
    model = build(**change)
    quantize_base(model, bits)
    return model


def test_nf4_errs_by_what_theory_says():
    """In a block of 64 normal numbers the largest, m, is exact; the others are normal within ± m.

    m has the density 64 (2Φ(m) − 1)⁶³ 2φ(m). Integrated over m and over the numbers, to the nearest of 16 values.
    """
    m, z = torch.linspace(0.8, 6, 400, dtype=torch.float64), torch.linspace(-1, 1, 4001, dtype=torch.float64)
    density = torch.exp(-m.square() / 2) * torch.erf(m / 2**0.5) ** 63
    nearest = (z[:, None] - reference.nf4_values()).abs().amin(1)
    inside = torch.exp(-(m[:, None] * z).square() / 2)  # of the 63 others, at m z
    square = (inside * (m[:, None] * nearest).square()).sum(1) / inside.sum(1)
    theory = (63 / 64 * (density * square).sum() / density.sum()).sqrt()
    w = normal(512, 2048)
    got = (reference.dequantize(quantize_nf4(w), 2048) - w).double().square().mean().sqrt()
    assert abs(got / theory - 1) < 0.005


def test_double_quantization_costs_little_and_saves_what_the_paper_says():
    w = normal(256, 4096) * torch.rand(256, 1)
    codes, fine, coarse, offset = quantize_nf4(w)
    exact = w.view(256, 64, 64).abs().amax(2)
    step = coarse.repeat_interleave(256).view(256, 64)
    rounded = fine * step + offset
    assert ((rounded - exact).abs() <= step / 2 + 1e-6).all()
    assert (rounded - exact).square().mean().sqrt() < 0.01 * exact.mean()
    stored = sum(t.nbytes for t in (codes, fine, coarse)) * 8 / w.numel()
    assert stored == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125  # "0.127 bits per parameter"


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 64), (2, 65), (7, 300)])
@pytest.mark.parametrize("bits", [8, 4])
def test_shapes_that_do_not_match_blocks(bits, shape, monkeypatch):
    """Every number to the nearest value of its row or block; in parts of rows as in one."""
    w = normal(*shape)
    quantize = quantize_int8 if bits == 8 else quantize_nf4
    whole = quantize(w)
    back = reference.dequantize(whole, shape[1])
    assert back.shape == w.shape
    gap = 1 / 127 if bits == 8 else reference.nf4_values().diff().max().float()
    assert ((back - w).abs().amax(1) <= 0.51 * gap * 1.1 * w.abs().amax(1)).all()
    monkeypatch.setattr(quant, "CHUNK", 2 * shape[1])
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(w), strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits):
    w = normal(8, 256)
    w[2], w[5, 64:128] = 0.0, 0.0
    back = reference.dequantize((quantize_int8 if bits == 8 else quantize_nf4)(w), 256)
    assert not back[w == 0].any()
    zeros = (quantize_int8 if bits == 8 else quantize_nf4)(torch.zeros(4, 100))
    assert torch.equal(reference.dequantize(zeros, 100), torch.zeros(4, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_keeps_outliers_exactly_and_is_within_half_a_step_elsewhere(dtype):
    w = normal(64, 512).to(dtype)
    w[7, 100], w[:, 300] = 20.0, w[:, 300] * 30
    codes, scale, kept, columns = quantize_int8(w)
    assert columns.tolist() == [100, 300] and kept.dtype == dtype
    back = reference.dequantize([codes, scale, kept, columns], 512)
    assert torch.equal(back[:, columns], w[:, columns].float())
    assert ((back - w.float()).abs() <= 0.5001 * scale[:, None]).all()
    assert scale.max() < 5 / 127  # the outliers take no steps from their rows


def test_int8_keeps_none_of_a_normal_matrix_and_never_many():
    assert quantize_int8(normal(512, 1024))[3].numel() == 0
    w = normal(64, 640)
    w[torch.arange(40), torch.arange(40)] = torch.linspace(50, 90, 40)
    assert quantize_int8(w)[3].tolist() == list(range(30, 40))  # one in 64: the largest


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_quantized_model_is_the_dequantized_one(name, bits):
    """Logits, and the gradient that reaches the embedding through all layers."""
    model = quantized(bits, **OPTIONS[name])
    plain = copy.deepcopy(model)
    quant.dequantize_base(plain)
    assert not quant.is_quantized(plain)
    tokens, results = tokens_of(2, 20), []
    for m in (model, plain):
        m.embed_tokens.weight.requires_grad_()
        logits = m(tokens)
        loss = m(tokens, tokens.roll(-1, 1))
        results.append((logits, *torch.autograd.grad(loss, m.embed_tokens.weight)))
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize(("bits", "rounding"), [(8, 0.007), (4, 0.092)])
def test_logits_stay_close_to_the_models_own(bits, rounding):
    """Off by a few times what the weights are, 0.7 % or 9.2 % of their size: 14 maps, one after another."""
    tokens, models = tokens_of(2, 20), [build(dim=128, ffn_dim=256) for _ in range(2)]
    for p in (p for model in models for p in model.parameters() if p.dim() == 2):
        p.data *= 5 / p.shape[1] ** 0.5  # keeps the size of what it multiplies
    quantize_base(models[1], bits)
    before, after = models[0].layers[1].mlp.up_proj, models[1].layers[1].mlp.up_proj.dequantize()
    assert abs(error(after.weight, before.weight) / rounding - 1) < 0.1
    assert 1 < error(models[1](tokens), models[0](tokens)) / rounding < 5


@pytest.mark.parametrize(("implementation", "biases"), [("torch", False), ("triton", True)])
def test_sixteen_bits_change_nothing_under_autocast(implementation, biases):
    """Products would round the weights anyway; and the base's own file may hold no more."""
    results = []
    for bits in (None, 16):
        model = build(qkv_bias=biases)
        if bits:
            quantize_base(model, bits)
        attach(model, TuningConfig("lora", lora_rank=4))
        ops.select(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens_of(2, 20), tokens_of(2, 20).roll(-1, 1))
        results.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
        ops.select("auto")
    assert len(results[0]) == 1 + 2 * 14 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_quantized_and_what_is_not():
    model = build(qk_norm=True, qkv_bias=True).bfloat16()
    quantize_base(model, 4)
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert {kind for name, kind in kinds.items() if name.startswith("layers.")} == {QuantLinear}
    assert len(kinds) == 2 * 7 + 1 and kinds["lm_head"] is nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not any("proj.weight" in name or "codes" in name for name in model.state_dict())


@pytest.mark.parametrize("bits", BITS)
def test_backward_keeps_no_dequantized_weight(bits):
    layer = QuantLinear(nn.Linear(64, 32), bits)
    own, kept = {t.data_ptr() for t in layer.quantized}, []
    x = normal(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        layer(x)
    assert kept and set(kept) <= own


@pytest.mark.parametrize("bits", BITS)
def test_through_the_kernels_it_is_the_same(bits, monkeypatch):
    layer, x = QuantLinear(nn.Linear(70, 48), bits), normal(3, 5, 70).requires_grad_()
    torchs = layer(x)
    (torchs_grad,) = torch.autograd.grad(torchs.square().sum(), x)
    monkeypatch.setattr(ops, "_selected", "triton")
    monkeypatch.setattr(ops, "_triton", SimpleNamespace(quant_matmul=quant_matmul, launch=launch))
    ours = layer(x)
    (ours_grad,) = torch.autograd.grad(ours.square().sum(), x)
    assert error(ours, torchs) < 1e-6 and error(ours_grad, torchs_grad) < 1e-6


def test_checkpointed_compiled_and_under_autocast():
    model, tokens = quantized(4), tokens_of(2, 16)
    model.embed_tokens.weight.requires_grad_()

    def gradient(call) -> Tensor:
        return torch.autograd.grad(call(tokens, tokens.roll(-1, 1)), model.embed_tokens.weight)[0]

    plain = gradient(model)
    assert error(gradient(torch.compile(model, fullgraph=True, backend="aot_eager")), plain) < 1e-6
    model.checkpoint_activations = True
    assert error(gradient(model.train()), plain) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < error(gradient(model), plain) < 0.05
        assert model.layers[0].mlp.up_proj(normal(1, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_moving_and_casting_round_no_scale(bits):
    model = quantized(bits)
    before = [t.clone() for t in model.layers[0].mlp.up_proj.quantized]
    model.to(torch.bfloat16).half().to("cpu")
    after = model.layers[0].mlp.up_proj.quantized
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.inference_mode()
def test_it_generates_what_the_dequantized_model_does():
    model = quantized(8)
    plain = copy.deepcopy(model)
    quant.dequantize_base(plain)
    said = [generate(m, [[1, 2, 3], [4]], 12) for m in (model, plain)]
    assert said[0] == said[1] and len(said[0][0].tokens) == 12


def test_what_cannot_be_is_refused(tmp_path):
    model = build()
    with pytest.raises(UserError, match="--base_bits 3: choose one of 16, 8, 4"):
        quantize_base(model, 3)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        quantize_base(model, 4)
    model = quantized(4)
    with pytest.raises(UserError, match="quantized already"):
        quantize_base(model, 4)
    with pytest.raises(UserError, match="a quantized base is not saved"):
        huggingface.save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_base_is_a_plain_folder(dtype, tmp_path):
    model = quantized(4, qkv_bias=True, tie_embeddings=False)
    with pytest.raises(UserError, match="--base_bits 5"):
        huggingface.load_model(tmp_path, base_bits=5)
    quant.dequantize_base(model, dtype)
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())
    huggingface.save_model(model, tmp_path)
    again = huggingface.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("change", [{}, dict(qkv_bias=True, tie_embeddings=False)], ids=["tied", "bias"])
def test_quantized_while_loading_it_is_the_same(change, bits, tmp_path):
    model = build(**change)
    huggingface.save_model(model, tmp_path)
    quantize_base(model, bits)
    loaded = huggingface.load_model(tmp_path, base_bits=bits).eval()
    tokens = tokens_of(2, 20)
    assert torch.equal(loaded(tokens), model(tokens))
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


class Held(TorchDispatchMode):
    """Counts the bytes of all storages alive: those of `tensors` and what torch's ops give from then on."""

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.alive: dict[int, tuple] = {}
        self.most = self.now = 0
        self._see(tensors)

    def _see(self, values) -> None:
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in values:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.now = sum(size for _, size in self.alive.values())
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._see(tree_leaves(out))
        return out


WIDE = ModelConfig(vocab_size=64, dim=256, n_layers=8, n_heads=4, ffn_dim=512, max_seq_len=128)


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_needs_one_layer_more(bits, tmp_path):
    model = Transformer(WIDE)
    model.init_weights()
    huggingface.save_model(model, tmp_path)
    kept = sum(weights(WIDE, bits).values())
    weight, whole = 4 * 256 * 512, 4 * n_parameters(WIDE)  # bytes: of a layer's largest, and of all
    with Held() as held:
        loaded = huggingface.load_model(tmp_path, base_bits=bits)
    lying = sum(t.nbytes for t in {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values())
    assert kept <= lying < 1.01 * kept
    assert held.most < kept + 8 * weight < 0.5 * whole  # each weight some eight times on the way
    model.zero_grad()
    with Held((*model.parameters(), *model.buffers())) as held:
        quantize_base(model, bits)
        torch.empty(0)
    assert held.most < 1.02 * whole + 8 * weight and held.now < kept + 2 * weight


class LoRA(nn.Module):
    """y = base(x) + (x Aᵀ) Bᵀ, as small as it can be: what a quantized base is for."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(normal(rank, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.T) @ self.b.T


def with_lora(config: ModelConfig, bits: int | None, rank: int) -> Transformer:
    model = Transformer(config)
    model.init_weights()
    quantize_base(model, bits) if bits else model.requires_grad_(False)
    for name in [name for name, module in model.named_modules() if hasattr(module, "in_features")]:
        if name.startswith("layers."):
            model.set_submodule(name, LoRA(model.get_submodule(name), rank))
    model.checkpoint_activations = True
    return model.train()


@pytest.mark.parametrize(
    ("layers", "bits", "ffn", "more"),
    [
        *((4, None, 384, {}), (4, 16, 384, {}), (4, 8, 384, {}), (4, 4, 384, {}), (8, 4, 256, {}), (2, 4, 768, {})),
        (4, None, 384, dict(qk_norm=True)),
        (4, 8, 384, dict(qk_norm=True, head_dim=48, n_kv_heads=1)),
    ],
)
def test_training_takes_the_memory_that_is_estimated(layers, bits, ffn, more):
    """Within 4 %: what lies there (weights, codes, adapters, moments), and a step's largest moment."""
    shape = ModelConfig(vocab_size=64, dim=128, n_layers=layers, n_heads=4, ffn_dim=ffn, max_seq_len=256, **more)
    model = with_lora(shape, bits, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, tokens = torch.optim.AdamW(trained), torch.randint(0, 64, (4, 256))

    def step():
        model(tokens, tokens).backward()
        optimizer.step()

    step()  # the moments come to be
    optimizer.zero_grad()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    with Held((*model.parameters(), *model.buffers(), *moments)) as held:
        step()
    assert 0.98 < sum(adapter_training(shape, bits, 8, 4, 256, size=4).values()) / held.most < 1.04


def test_adapters_on_a_quantized_base_learn():
    model = with_lora(dataclasses.replace(WIDE, n_layers=2), 4, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert not any("codes" in name for name in model.state_dict())


@pytest.mark.parametrize(("bits", "gigabytes"), [(4, 6), (8, 9)])
def test_a_7b_base_trains_in_under_12_gb_by_calculation(bits, gigabytes, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    asked = f"info --model {tmp_path} --base_bits {bits} --lora_rank 8 --micro_batch_size 1 --seq_len 512"
    __main__.main(asked.split())
    told = capsys.readouterr().out
    assert "6,738,415,616" in told
    items = adapter_training(huggingface.load_config(tmp_path), bits, 8, 1, 512)
    assert sum(items.values()) < gigabytes * 1e9 < 12e9
    assert all(name in told for name in items) and f"{sum(items.values()) / 1e9:.2f} GB" in told
    # by hand: 32 layers of 4 · 4096² + 3 · 4096 · 11008 weights, of 4.127 or 8 bits and 4 bytes a row
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    stored = weights * 4.126953125 / 8 if bits == 4 else weights + 32 * 4 * (5 * 4096 + 2 * 11008)
    assert abs(items[f"base, {bits} bits"] / stored - 1) < 1e-6


@pytest.mark.parametrize("asked", ["--base_bits 4", "--lora_rank 0 --base_bits 4"])
def test_info_refuses_bits_without_adapters(asked):
    with pytest.raises(UserError, match="--lora_rank"):
        __main__.main(f"info --preset tiny {asked}".split())


@pytest.mark.parametrize("bits", quant.BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_quantized_weight_has_the_whole_s_numbers(bits, dim):
    """Of rows or columns, one of 3; columns that int8 keeps lie in all of them, groups of scales across them."""
    linear = nn.Linear(384, 90)
    with torch.no_grad():
        linear.weight[7, [3, 130, 300, 301]] = 9.0
    whole = QuantLinear(linear, bits)
    expected = whole.dequantize().weight.chunk(3, dim)
    assert bits != 8 or len(whole.columns) == 4
    for index in range(3):
        part = copy.deepcopy(whole)
        part.keep_part(dim, index, 3)
        part.in_features, part.out_features = reversed(expected[index].shape)
        assert torch.equal(part.dequantize().weight, expected[index])
