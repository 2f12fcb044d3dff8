"""Our models against transformers' own, both ways: an independent oracle for the whole architecture."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.base.errors import UserError
from minillm.checkpoint.architectures import from_hf, model_type, to_hf
from minillm.checkpoint.huggingface import load_config, load_model, open_folder, save_model, write_folder
from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.rope import rotary_tables
from minillm.model.transformer import Transformer
from tests.minillm.model_options import OPTIONS, build, tokens_of

BASE = ModelConfig(vocab_size=160, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=128)
CASES = {
    "llama": BASE,
    "llama-untied": dataclasses.replace(BASE, tie_embeddings=False),
    "qwen2": dataclasses.replace(BASE, qkv_bias=True),
    "qwen2-untied": dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, head_dim=32),
    "qwen3-untied": dataclasses.replace(BASE, qk_norm=True, tie_embeddings=False, norm_eps=1e-6),
    "mistral": dataclasses.replace(BASE, window=8, tie_embeddings=False),
    "mistral-without-window": dataclasses.replace(BASE, dim=60, n_heads=8, head_dim=16),  # no Llama of transformers
    "linear": dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 2.0, 128)),
    "yarn": dataclasses.replace(BASE, rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "yarn-long": dataclasses.replace(
        BASE, head_dim=64, rope_theta=1e6, rope_scaling=RopeScaling("yarn", 8.0, 1024, attention_factor=1.3)
    ),
    "llama3": dataclasses.replace(BASE, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 64)),
}


def random_model(config: ModelConfig) -> Transformer:
    """Weights far from their usual scale (std 0.1), norms and biases too: a wrong formula then shows."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return model


def compare(ours: Transformer, theirs) -> None:
    tokens = torch.randint(0, 160, (2, 64), generator=torch.Generator().manual_seed(2))
    logits = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), logits, atol=1e-4, rtol=0)
    loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    theirs(tokens, labels=tokens).loss.backward()
    grads = dict(theirs.named_parameters())
    checked = 0
    for name, p in ours.named_parameters():
        other = grads[name if name.startswith("lm_head") else "model." + name].grad
        assert (p.grad - other).norm() <= 1e-4 * other.norm(), name
        checked += 1
    assert checked == len(grads)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_ours(case, tmp_path):
    ours = random_model(CASES[case])
    save_model(ours, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    named = case.split("-")[0]
    expected = named if named in ("qwen2", "qwen3", "mistral") else "llama"
    assert theirs.config.model_type == model_type(CASES[case]) == expected
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    compare(ours, theirs)


THEIRS = dict(
    vocab_size=160,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=128,
    initializer_range=0.1,
    attn_implementation="eager",
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_ours_loads_theirs(kind, tied, tmp_path):
    torch.manual_seed(0)
    more = {"sliding_window": 8 if tied else None} if kind == "Mistral" else {}
    hf_config = getattr(transformers, kind + "Config")(**THEIRS, tie_word_embeddings=tied, **more)
    theirs = getattr(transformers, kind + "ForCausalLM")(hf_config)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1  # sharded, with an index
    compare(load_model(tmp_path), theirs)


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_round_trip(case, tmp_path):
    assert from_hf(json.loads(json.dumps(to_hf(CASES[case])))) == CASES[case]


def test_old_style_config_is_read(tmp_path):
    """Defaults of files that transformers 4 and earlier wrote: no rope_parameters, few keys."""
    old = {
        "model_type": "llama",
        "vocab_size": 160,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "torch_dtype": "bfloat16",
    }
    config = from_hf(old)
    assert (config.n_kv_heads, config.head_dim, config.norm_eps, config.tie_embeddings) == (
        4,
        16,
        1e-6,
        False,
    )
    assert config.rope_theta == 5e5 and config.rope_scaling == RopeScaling("linear", 4.0, 2048)


NULLS = [None, "num_key_value_heads", "sliding_window", "max_position_embeddings", "rms_norm_eps"]


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_takes(kind, null, tmp_path):
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 64}
    written = {"model_type": kind, "vocab_size": 160, "num_hidden_layers": 2, **sizes} | ({null: None} if null else {})
    (tmp_path / "config.json").write_text(json.dumps(written))
    ours = load_config(tmp_path)
    if null == "num_key_value_heads":
        assert ours.n_kv_heads == 32  # as many as queries; for Mistral null is refused there
    if null in ("max_position_embeddings", "rms_norm_eps") or (kind, null) == ("mistral", "num_key_value_heads"):
        del written[null]
        (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.n_kv_heads == theirs.num_key_value_heads or null == "num_key_value_heads"
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2048 // 32)
    assert (ours.norm_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "change",
    [
        dict(positions="learned"),
        dict(softcap=30.0),
        dict(qk_norm=True, qkv_bias=True),
        dict(window=4, qk_norm=True),
    ],
)
def test_our_own_options_get_a_name_that_others_refuse(change, tmp_path):
    config = dataclasses.replace(BASE, **change)
    model = random_model(config)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="minillm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config == config
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(again(tokens), model(tokens), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(model_type="gpt2"), "gpt2"),
        (dict(softcap=30.0), "softcap"),
        (dict(qk_norm=True), "qk_norm"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(is_causal=False), "is_causal"),
        (dict(per_layer_config={"1": {"rms_norm_eps": 1.0}}), "per_layer_config"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}), "partial_rotary_factor"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        from_hf({**to_hf(BASE), **change})


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kinds", [["full"] * 2, ["sliding"] * 2, ["full", "sliding"], ["chunked", "full"], None])
@torch.no_grad()
def test_kinds_of_layers_are_computed_as_transformers_does_or_refused(case, kinds, tmp_path):
    """With layer_types, transformers makes of a Mistral model a Ministral, whose layers differ."""
    save_model(random_model(CASES[case]), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"layer_types": kinds and [f"{kind}_attention" for kind in kinds], "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(written))
    try:
        ours = load_model(tmp_path)
    except UserError as problem:
        assert "layer_types as set there is not supported" in str(problem)
        assert kinds is not None  # what most folders have
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = tokens_of(2, 40)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_saved_model_is_computed_alike_or_refused(name, tmp_path):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 12)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(again(tokens), model(tokens), atol=0, rtol=0)
    if model_type(model.config) == "minillm":
        with pytest.raises(ValueError, match="minillm"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)


def test_an_option_of_our_own_that_is_not_known_is_refused():
    """It was written by a newer minillm, or by code that a reader changed: without it the model is another."""
    written = to_hf(dataclasses.replace(BASE, softcap=30.0), {"bos_token_id": 1})
    assert from_hf(written).softcap == 30.0
    with pytest.raises(UserError, match="activation, sinks: this minillm has no such option"):
        from_hf(written | {"activation": "relu2", "sinks": True})


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(tmp_path)


@torch.no_grad()
def test_weights_of_several_dtypes_become_one_and_a_line_says_so(tmp_path, capsys):
    """bf16 with gains and a head in fp32, as some tools write it; computed before only where a dtype was asked for."""
    save_model(random_model(dataclasses.replace(BASE, tie_embeddings=False)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    is_wide = {key: "norm" in key or "lm_head" in key for key in weights}
    save_file({k: v if is_wide[k] else v.bfloat16() for k, v in weights.items()}, tmp_path / "model.safetensors")
    tokens = torch.arange(40)[None]
    wide = load_model(tmp_path, dtype=torch.float32)
    assert capsys.readouterr().out == ""
    model = load_model(tmp_path)
    said = capsys.readouterr().out
    assert f"{sum(is_wide.values())} tensors, as " in said and "(torch.float32): rounded to torch.bfloat16" in said
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(tokens).float(), wide(tokens), atol=0.1, rtol=0.1)
    stored = open_folder(tmp_path)
    assert stored.dtype == torch.bfloat16 and "rounded to" in capsys.readouterr().out
    assert torch.equal(stored.read("lm_head.weight", torch.float32), weights["lm_head.weight"])


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", None])
def test_quantized_weights_are_called_so(method, tmp_path):
    save_model(random_model(BASE), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(1)
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.ones(4, dtype=torch.int32)
    save_file(weights, tmp_path / "model.safetensors")
    for read in (load_model, open_folder):
        with pytest.raises(UserError, match=rf"its weights are quantized \('?{method}'?\), as config\.json says"):
            read(tmp_path)


def test_weights_that_do_not_fit_are_all_listed(tmp_path):
    save_model(random_model(BASE), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"num_hidden_layers": 3, "intermediate_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    for name in ("layers.2.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "options", "parameter"),
    [
        (dict(qk_norm=True), r"qk_norm True \(there False\)", "model.layers.0.self_attn.q_norm.weight"),
        (dict(n_layers=3, window=5), r"n_layers 3 \(there 2\)", "model.layers.2.input_layernorm.weight"),
        (dict(tie_embeddings=False), "tie_embeddings False", "lm_head.weight"),
        (dict(n_heads=3, n_kv_heads=3), r"n_heads 3 \(there 4\), n_kv_heads 3", "self_attn.q_proj.weight"),
        (dict(positions="learned", dropout=0.5), "positions learned", "embed_positions.weight"),
    ],
)
def test_an_option_that_asks_for_other_parameters_is_refused(change, options, parameter, tmp_path):
    save_model(random_model(BASE), tmp_path)
    config = dataclasses.replace(BASE, **change)
    with pytest.raises(
        UserError, match=f"config.json decides .*, and {options}.* would change .*{parameter}"
    ) as caught:
        load_model(tmp_path, config=config)
    assert "window" not in str(caught.value) and "dropout" not in str(caught.value)


def test_an_option_that_asks_for_no_other_parameters_is_taken(tmp_path):
    save_model(random_model(BASE), tmp_path)
    config = dataclasses.replace(BASE, max_seq_len=256, window=4, softcap=5.0, dropout=0.1, rope_theta=5e4)
    assert load_model(tmp_path, config=config).config == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(hidden_size="wide"), "damaged"),
        (dict(rope_parameters=[1]), "damaged"),
        (dict(rope_parameters={"rope_type": "yarn"}), "damaged"),
        (dict(vocab_size=None), "damaged.*vocab_size is missing"),
        (dict(num_attention_heads=4.5), r"damaged: num_attention_heads is 4\.5, not a whole number"),
        (dict(tie_word_embeddings="no"), "damaged: tie_word_embeddings is 'no', not true or false"),
        (dict(model_type=["llama"]), "damaged: model_type is"),
        (dict(model_type="gemma", hidden_size=[64, 64]), "model_type 'gemma' is not supported"),
        (dict(rms_norm_eps=10**400), "a whole number of 401 digits"),
        (dict(model_type="minillm", softcap="high"), "damaged: softcap is 'high', not a number"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2, "beta_fast": "x"}), "damaged: beta_fast is 'x'"),
        (dict(num_hidden_layers=10**7), "10,000,000 layers, as config.json says"),
        (dict(num_hidden_layers=0), "n_layers is 0"),
        (dict(hidden_size=2**62), "hidden_size is 4611686018427387904: must be at most"),
        (dict(hidden_size=2**24, num_attention_heads=2**24, head_dim=2**24), "larger than any memory"),
    ],
)
def test_a_config_with_wrong_values_is_refused_at_once(change, words, tmp_path):
    save_model(random_model(BASE), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | change))
    for load in (load_model, open_folder):
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_shards_are_no_larger_than_asked_and_transformers_reads_them(tmp_path):
    model = random_model(CASES["qwen2-untied"])
    save_model(model, tmp_path)
    stored = open_folder(tmp_path)
    (tmp_path / "shards").mkdir()
    write_folder(stored, tmp_path / "shards", max_shard_size=50_000)
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 50_000 + 4_000  # and the header
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", attn_implementation="eager")
    compare(load_model(tmp_path / "shards"), theirs)


# ---- how positions are rotated

ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
ROPE_NAMES = ["rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]
ROPE_NAMES += ["beta_fast", "beta_slow", "attention_factor"]
MEANINGLESS = [float("nan"), float("inf"), -float("inf"), -1, -0.5, 0, 1e300, 2**62, True, False, "2", [2.0], {"a": 1}]
UNUSUAL = [0.25, 1, 1.5, 2, 3, 20, 40, 100, 1000]


def read_rope(folder, kind: str, changes: dict) -> ModelConfig:
    """The model config of a folder with these values of its rotary positions."""
    written = json.loads(json.dumps(to_hf(BASE)))
    del written["rope_theta"], written["rope_parameters"]
    written["rope_scaling"] = {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind], **changes}
    (folder / "config.json").write_text(json.dumps(written))
    return load_config(folder)


@pytest.mark.parametrize("name", ROPE_NAMES)
@pytest.mark.parametrize("kind", ROPE)
def test_no_value_that_makes_no_sense_comes_in(kind, name, tmp_path):
    for value in MEANINGLESS:
        with pytest.raises(UserError, match=r"config\.json: ") as caught:
            config = read_rope(tmp_path, kind, {name: value})
            pytest.fail(f"{value!r} was read as {config.rope_scaling}")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def same_tables(config: ModelConfig, folder) -> None:
    """Raise AssertionError unless transformers turns positions as we do, by the config.json of a folder."""
    theirs = transformers.AutoConfig.from_pretrained(folder)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    positions = torch.arange(BASE.max_seq_len)
    cos, sin = rotary(torch.zeros(1), positions[None])  # (1, T, D): each half the same
    half = config.head_dim // 2
    for ours, expected in zip(rotary_tables(config, "cpu"), (cos, sin), strict=True):
        torch.testing.assert_close(ours, expected[0, :, :half], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROPE_NAMES)
@pytest.mark.parametrize("kind", ROPE)
def test_every_value_that_comes_in_gives_the_tables_of_transformers(kind, name, tmp_path):
    n_accepted = 0
    for value in UNUSUAL:
        try:
            config = read_rope(tmp_path, kind, {name: value})
            rotary_tables(config, "cpu")
        except UserError:
            continue
        n_accepted += 1
        same_tables(config, tmp_path)
    assert n_accepted >= 2


@pytest.mark.parametrize("nested", [{}, {"original_max_position_embeddings": 16}])
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_the_original_length_may_stand_beside_the_rope_options(kind, nested, tmp_path):
    read_rope(tmp_path, kind, {})
    written = json.loads((tmp_path / "config.json").read_text())
    written["rope_scaling"].pop("original_max_position_embeddings", None)
    written["rope_scaling"] |= nested
    for beside in ({"original_max_position_embeddings": 32}, {}):
        written = {name: value for name, value in written.items() if name not in ROPE_NAMES} | beside
        (tmp_path / "config.json").write_text(json.dumps(written))
        same_tables(load_config(tmp_path), tmp_path)


def test_an_unknown_option_of_the_positions_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="the rope options long_factor, mscale are not supported"):
        read_rope(tmp_path, "yarn", {"mscale": 1.0, "long_factor": [1.0]})
    with pytest.raises(UserError, match="longrope"):
        read_rope(tmp_path, "linear", {"rope_type": "longrope"})


def test_rope_scaling_counts_more_than_rope_parameters_as_in_transformers(tmp_path):
    written = to_hf(BASE) | {"rope_scaling": {"type": "linear", "factor": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    config = load_config(tmp_path)
    assert (config.rope_scaling.type, config.rope_scaling.factor) == (theirs["rope_type"], theirs["factor"])
