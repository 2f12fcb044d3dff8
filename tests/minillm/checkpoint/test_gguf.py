"""Models through GGUF; transformers and the gguf package, which read it themselves, are the oracles."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
import transformers

from minillm.base.errors import UserError
from minillm.checkpoint import gguf_file, huggingface
from minillm.checkpoint.gguf import gguf_name, half_split, interleaved, open_file, write_file
from minillm.checkpoint.huggingface import StoredModel
from minillm.model.config import ModelConfig, RopeScaling

BASE = ModelConfig(vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, max_seq_len=64)
CASES = {
    "llama": BASE,
    "llama-untied": dataclasses.replace(BASE, tie_embeddings=False, rope_theta=5e5, norm_eps=1e-6),
    "llama-wide": dataclasses.replace(BASE, head_dim=32),
    "qwen2": dataclasses.replace(BASE, qkv_bias=True),
    "qwen2-untied": dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, head_dim=128),  # transformers' reader knows no other head size
    "qwen3-untied": dataclasses.replace(BASE, qk_norm=True, head_dim=128, tie_embeddings=False),
}
SCALED = {
    "linear": RopeScaling("linear", 2.0, 32),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "llama3": RopeScaling("llama3", 8.0, 32),
}


def stored(config: ModelConfig) -> StoredModel:
    """Weights far from their usual scale, where a wrong formula shows."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(shape, generator=generator) * 0.15 + (len(shape) == 1)
        for key, shape in huggingface.shapes_of(config).items()
    }
    return StoredModel(config, torch.float32, lambda key, dtype: weights[key].to(dtype))


def load(model: StoredModel, folder):
    folder.mkdir(exist_ok=True)
    huggingface.write_folder(model, folder)
    return huggingface.load_model(folder).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))


def test_weights_beyond_float16_are_told_from_damaged_ones(tmp_path):
    """However they are read: a folder by tensors, as a model or into one, and a GGUF file."""
    weights = {key: torch.full(shape, 0.5) for key, shape in huggingface.shapes_of(BASE).items()}
    weights["model.norm.weight"][3] = 1e5
    wide = StoredModel(BASE, torch.float32, lambda key, dtype: weights[key].to(dtype))
    model = load(wide, tmp_path)
    write_file(wide, None, tmp_path / "m.gguf", torch.float32)
    half = torch.float16
    ways = [
        lambda: huggingface.load_model(tmp_path, dtype=half),
        lambda: huggingface.fill_model(model.half(), tmp_path),
        lambda: huggingface.open_folder(tmp_path).read("model.norm.weight", half),
        lambda: open_file(tmp_path / "m.gguf")[0].read("model.norm.weight", half),
    ]
    for way in ways:
        with pytest.raises(
            UserError, match=r"model\.norm\.weight holds 1 of 64 values beyond float16's 65,504; choose"
        ):
            way()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same_from_our_file(case, tmp_path):
    model = stored(CASES[case])
    write_file(model, None, tmp_path / "m.gguf", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    assert theirs.config.model_type == case.split("-")[0]
    logits = theirs(tokens()).logits
    torch.testing.assert_close(load(model, tmp_path / "written")(tokens()), logits, atol=1e-4, rtol=0)
    again, _ = open_file(tmp_path / "m.gguf")
    assert again.config == CASES[case]
    torch.testing.assert_close(load(again, tmp_path / "read")(tokens()), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_package_finds_gains_in_float32_and_rows_in_llamas_order(dtype, tmp_path):
    model = stored(BASE)
    write_file(model, None, tmp_path / "m.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert "output.weight" not in values and "llama.rope.freq_base" in reader.fields
    k, v = (model.read(f"model.layers.1.self_attn.{n}_proj.weight", dtype).float().numpy() for n in "kv")
    head = 16
    order = [n * head + half * head // 2 + i for n in range(2) for i in range(head // 2) for half in range(2)]
    np.testing.assert_array_equal(values["blk.1.attn_k.weight"], k[order])
    np.testing.assert_array_equal(values["blk.1.attn_v.weight"], v)
    opened, _ = open_file(tmp_path / "m.gguf")
    assert opened.dtype == dtype


def test_rows_for_neighbouring_pairs_and_back():
    """Two heads of four: pairs (0, 1) and (2, 3) of a head become (0, 2) and (1, 3)."""
    rows = torch.arange(8.0)[:, None] * torch.ones(3)
    assert half_split(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(interleaved(half_split(rows, 4), 4), rows)


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_survive(kind, tmp_path):
    config = dataclasses.replace(BASE, rope_scaling=SCALED[kind])
    write_file(stored(config), None, tmp_path / "m.gguf", torch.float32)
    again, metadata = open_file(tmp_path / "m.gguf")
    assert again.config == config
    assert metadata.get("llama.rope.scaling.type") == (None if kind == "llama3" else kind)


def test_llama_3s_factors_are_those_of_its_formula(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 8192)
    config = dataclasses.replace(BASE, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    write_file(stored(config), None, tmp_path / "m.gguf", torch.float32)
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    expected = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 5e5 ** (i / 64)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        kept = wavelength < 8192 / 4
        expected.append(1 if kept else 8 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    "change",
    [
        dict(window=8),
        dict(softcap=30.0),
        dict(positions="learned"),
        dict(qk_norm=True, qkv_bias=True),
        dict(rope_scaling=RopeScaling("yarn", 2.0, 32, attention_factor=1.2)),
        dict(rope_scaling=RopeScaling("yarn", 2.0, 32, beta_slow=2.0)),
        dict(rope_scaling=RopeScaling("llama3", 2.0, 32, high_freq_factor=8.0)),
    ],
)
def test_what_the_format_cannot_say_is_refused(change, tmp_path):
    with pytest.raises(UserError, match=f"no place for a model with .*{next(iter(change))}"):
        write_file(stored(dataclasses.replace(BASE, **change)), None, tmp_path / "m.gguf", torch.float32)


@dataclasses.dataclass(frozen=True)
class Tomorrow(ModelConfig):
    """A config with an option that was added after the format's code was written."""

    activation: str = "silu"


def test_an_option_of_tomorrow_is_refused_by_name_unless_it_has_its_default(tmp_path):
    values = dataclasses.asdict(BASE)
    write_file(stored(Tomorrow(**values)), None, tmp_path / "m.gguf", torch.float32)
    assert open_file(tmp_path / "m.gguf")[0].config == BASE
    with pytest.raises(UserError, match="no place for a model with activation 'relu2'; choose hf"):
        write_file(stored(Tomorrow(**values, activation="relu2")), None, tmp_path / "n.gguf", torch.float32)
    with pytest.raises(UserError, match=r"no place for a model with a tensor model\.layers\.0\.self_attn\.sinks"):
        gguf_name("model.layers.0.self_attn.sinks")


def test_all_that_has_no_place_is_named_at_once(tmp_path):
    config = dataclasses.replace(BASE, window=8, softcap=30.0, dropout=0.1)
    with pytest.raises(UserError, match=r"no place for a model with window 8, softcap 30\.0, dtype torch.float64"):
        write_file(stored(config), None, tmp_path / "m.gguf", torch.float64)


def test_an_option_of_training_alone_changes_nothing(tmp_path):
    for number, options in enumerate(({}, {"dropout": 0.1}, {"trained_seq_len": 32})):
        config = dataclasses.replace(BASE, **options)
        write_file(stored(config), None, tmp_path / f"{number}.gguf", torch.float32)
    first, *others = [(tmp_path / f"{number}.gguf").read_bytes() for number in range(3)]
    assert others == [first, first]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma'"),
        ({"llama.block_count": 3}, r"layers\.2\.self_attn\.q_proj\.weight is missing"),
        ({"llama.block_count": 1 << 30}, "1,073,741,824 layers, as its header says"),
        ({"llama.rope.freq_base": "much"}, "damaged"),
        ({"llama.feed_forward_length": 81}, r"mlp\.up_proj\.weight is \(80, 64\), expected \(81, 64\)"),
        ({"llama.attention.head_count": [4, 4]}, "damaged"),
        ({"llama.attention.head_count": 0}, "n_heads is 0"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count"),
        ({"llama.attention.sliding_window": 8}, "sliding_window"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.yarn_beta_slow": 2.0}, "yarn_beta_slow"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor"),
        ({"llama.rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"llama.attention.causal": False}, "attention.causal"),
        ({"llama.attention.scale": 0.5, "llama.logit_scale": 2.0}, r"attention\.scale, logit_scale as set there"),
        ({"llama.rope.dimension_sections": [2, 1, 1]}, "dimension_sections"),
        ({"llama.use_parallel_residual": True}, "use_parallel_residual"),
        ({"llama.an_option_of_tomorrow": "yes"}, "an_option_of_tomorrow"),
        ({"split.count": 2}, "other parts of a split file"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(change, words, tmp_path, monkeypatch):
    write_file(stored(BASE), None, tmp_path / "m.gguf", torch.float32)
    metadata, entries = gguf_file.read_header(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "read_header", lambda path: (metadata | change, entries))
    with pytest.raises(UserError, match=words):
        open_file(tmp_path / "m.gguf")


HARMLESS = {  # what converters write, and values that change nothing
    "general.name": "a model",
    "llama.vocab_size": 96,
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.sliding_window": 0,
    "llama.attention.causal": True,
    "llama.attention.layer_norm_epsilon": 1e-5,
    "llama.final_logit_softcapping": 0.0,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.finetuned": True,
}


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        (HARMLESS, None),
        ({"llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0, 64)),
        ({"llama.rope.scale_linear": 4.0}, RopeScaling("linear", 4.0, 64)),
        ({"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0, 64)),
        ({"llama.rope.scaling.factor": 0.0}, None),
    ],
)
def test_what_says_nothing_is_read_over_and_a_factor_alone_is_linear(change, scaling, tmp_path, monkeypatch):
    """As in llama.cpp, src/llama-model.cpp: the type is linear unless told; the older name of the factor counts."""
    write_file(stored(BASE), None, tmp_path / "m.gguf", torch.float32)
    metadata, entries = gguf_file.read_header(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "read_header", lambda path: (metadata | change, entries))
    assert open_file(tmp_path / "m.gguf")[0].config == dataclasses.replace(BASE, rope_scaling=scaling)


def test_other_factors_than_llama_3s_are_refused(tmp_path, monkeypatch):
    config = dataclasses.replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 32))
    write_file(stored(config), None, tmp_path / "m.gguf", torch.float32)
    metadata, entries = gguf_file.read_header(tmp_path / "m.gguf")
    metadata["llama.rope.scaling.original_context_length"] = 64
    monkeypatch.setattr(gguf_file, "read_header", lambda path: (metadata, entries))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        open_file(tmp_path / "m.gguf")
