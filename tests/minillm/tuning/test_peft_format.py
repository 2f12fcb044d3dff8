import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.base.errors import UserError
from minillm.checkpoint.huggingface import export_name
from minillm.tuning import folders, peft_format
from minillm.tuning.adapter import active_adapter, attach, set_adapter
from minillm.tuning.options import TuningConfig
from tests.minillm.tuning import tiny

CASES = {  # ours, and what peft calls the same
    "lora": (TuningConfig("lora", lora_rank=4), dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "rslora": (
        TuningConfig("lora", rslora=True, lora_alpha=6.0, target_modules="q_proj,embed_tokens,lm_head"),
        dict(r=8, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    ),
    "rslora, its own alpha": (
        TuningConfig("lora", lora_rank=32, rslora=True),
        dict(r=32, lora_alpha=2 * 8**0.5, use_rslora=True, target_modules="all-linear"),
    ),
    "dora": (
        TuningConfig("dora", target_modules="k_proj,down_proj,embed_tokens,lm_head"),
        dict(r=8, lora_alpha=16, use_dora=True, target_modules=["k_proj", "down_proj", "embed_tokens", "lm_head"]),
    ),
    "in full, together": (
        TuningConfig("lora", target_modules="q_proj,up_proj", modules_to_save="embed_tokens,lm_head"),
        dict(
            r=8,
            lora_alpha=16,
            target_modules=r".*(q|up)_proj",
            modules_to_save=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
        ),
    ),
    "in full, apart": (
        TuningConfig("lora", target_modules="v_proj", modules_to_save="embed_tokens,norm"),
        dict(r=8, lora_alpha=16, target_modules=["self_attn.v_proj"], modules_to_save=["embed_tokens", "norm"]),
    ),
    "in full, one by its whole path": (
        TuningConfig("lora", target_modules="model.layers.0.mlp.up_proj,q_proj", modules_to_save="model.norm"),
        dict(
            r=8,
            lora_alpha=16,
            target_modules=["model.layers.0.mlp.up_proj", "q_proj"],
            modules_to_save=["model.norm"],
        ),
    ),
    "the head, by an expression": (
        TuningConfig("lora", target_modules="q_proj,lm_head"),
        dict(r=8, lora_alpha=16, target_modules=r".*\.q_proj|lm_head"),
    ),
    "ia3": (TuningConfig("ia3"), {}),
    "ia3, parts of paths": (
        TuningConfig("ia3", target_modules="k_proj,mlp.down_proj"),
        dict(target_modules=["k_proj", "mlp.down_proj"], feedforward_modules=["mlp.down_proj"]),
    ),
}
each_case = pytest.mark.parametrize("case", CASES)
each_base = pytest.mark.parametrize(("tie", "bias"), [(False, False), (True, True)], ids=["untied", "tied-biased"])


def peft_config(case: str):
    ours, options = CASES[case]
    kind = peft.IA3Config if ours.tune == "ia3" else peft.LoraConfig
    return kind(**options, task_type="CAUSAL_LM")


@each_base
@each_case
def test_peft_loads_ours_and_computes_the_same_gradients_too(case, tie, bias, tmp_path):
    model = tiny.base(tie, bias)
    base = tiny.write(model, tmp_path / "base")
    adapter = attach(model, CASES[case][0])
    tiny.shake(adapter.parameters())
    (tmp_path / "adapter").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "adapter")
    other = tiny.load_peft(base, tmp_path / "adapter", train=True)
    logits = other(tiny.IDS).logits
    torch.testing.assert_close(model(tiny.IDS), logits, atol=1e-5, rtol=0)
    assert (logits - tiny.theirs(base)(tiny.IDS).logits).abs().max() > 0.1

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tiny.TARGETS.flatten(), reduction="sum").backward()
    model(tiny.IDS, tiny.TARGETS).backward()
    wanted = tiny.peft_gradients(other)
    ours = {f"base_model.model.{export_name(name)}": p.grad for name, p in adapter.parameters().items()}
    if tie and "together" in case:  # one weight under two names there, too
        wanted.setdefault("base_model.model.lm_head.weight", wanted["base_model.model.model.embed_tokens.weight"])
    assert ours.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(
            ours[name], grad, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not any(p.grad is not None for n, p in model.named_parameters() if "base_layer" in n)


@each_base
@each_case
def test_we_load_peft_s_own(case, tie, bias, tmp_path):
    model = tiny.base(tie, bias)
    other = tiny.with_peft(tiny.write(model, tmp_path / "base"), peft_config(case))
    folder = tiny.save_peft(other, tmp_path / "adapter")
    adapter = peft_format.load_adapter(model, folder)
    torch.testing.assert_close(model(tiny.IDS), other(tiny.IDS).logits, atol=1e-5, rtol=0)
    (tmp_path / "again").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "again")  # and hand it on as it came
    torch.testing.assert_close(
        tiny.load_peft(tmp_path / "base", tmp_path / "again")(tiny.IDS).logits,
        other(tiny.IDS).logits,
        atol=1e-5,
        rtol=0,
    )


@each_case
def test_we_load_what_we_have_saved(case, tmp_path):
    model = tiny.base()
    adapter = attach(model, CASES[case][0])
    tiny.shake(adapter.parameters())
    peft_format.save_adapter(adapter, tmp_path)
    again = tiny.base()
    assert list(peft_format.load_adapter(again, tmp_path).parts) == list(adapter.parts)
    assert torch.equal(again(tiny.IDS), model(tiny.IDS))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_a_file_leaves_out_is_what_peft_takes(rslora, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj"])
    other = tiny.with_peft(tiny.write(tiny.base(), tmp_path / "base"), config)
    folder = tiny.save_peft(other, tmp_path / "adapter")
    kept = ("peft_type", "r", "target_modules", "use_rslora", "base_model_name_or_path")
    written = json.loads((folder / "adapter_config.json").read_text())
    short = {name: written[name] for name in kept if rslora or name != "use_rslora"}
    (folder / "adapter_config.json").write_text(json.dumps(short))
    model = tiny.base()
    peft_format.load_adapter(model, folder)
    wanted = tiny.load_peft(tmp_path / "base", folder)(tiny.IDS).logits
    torch.testing.assert_close(model(tiny.IDS), wanted, atol=1e-5, rtol=0)


def test_an_embedding_and_head_that_peft_adapts_as_one(tmp_path):
    model = tiny.base(tie=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    other = tiny.with_peft(tiny.write(model, tmp_path / "base"), config)
    peft_format.load_adapter(model, tiny.save_peft(other, tmp_path / "adapter"))
    torch.testing.assert_close(model(tiny.IDS), other(tiny.IDS).logits, atol=1e-5, rtol=0)


OWN = [TuningConfig("adapter", bottleneck_dim=4), TuningConfig("freeze", train_layers="1,embed")]


@pytest.mark.parametrize("options", OWN, ids=["adapter", "freeze"])
def test_methods_that_peft_does_not_have_are_refused_there_and_read_here(options, tmp_path):
    model = tiny.base(tie=True)
    base = tiny.write(model, tmp_path / "base")
    adapter = attach(model, options)
    tiny.shake(adapter.parameters())
    (tmp_path / "adapter").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "adapter")
    again = tiny.base(tie=True)
    peft_format.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(tiny.IDS), model(tiny.IDS))
    with pytest.raises(Exception, match="MINILLM"):
        tiny.load_peft(base, tmp_path / "adapter")


@pytest.mark.parametrize("tune", ["prefix", "prompt", "ptuning"])
def test_virtual_tokens_go_there_and_come_back(tune, tmp_path):
    model = tiny.base(tie=True)
    base = tiny.write(model, tmp_path / "base")
    adapter = attach(model, TuningConfig(tune, n_virtual=4))
    adapter.base_folder, adapter.base_sha256 = base, folders.base_sha256(base)
    (tmp_path / "adapter").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "adapter")
    logits = model(tiny.IDS)
    other = tiny.load_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(other(tiny.IDS).logits[:, -20:], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(folders.load_adapted(tmp_path / "adapter")[0](tiny.IDS), logits, atol=1e-5, rtol=0)
    before = tiny.base(tie=True)(tiny.IDS)
    assert (logits - before).abs().max() > 0.1
    set_adapter(model, None)
    assert torch.equal(model(tiny.IDS), before)


# ---- what cannot be


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folders: a base, and an adapter of ours made for it."""
    here = tmp_path_factory.mktemp("adapter")
    model = tiny.base()
    base = tiny.write(model, here / "base")
    made = attach(model, TuningConfig("lora", lora_rank=2))
    made.base_folder, made.base_sha256 = base, folders.base_sha256(base)
    tiny.shake(made.parameters())
    (here / "lora").mkdir()
    peft_format.save_adapter(made, here / "lora")
    return here


def changed(adapter, tmp_path, tensors=None, **config):
    """A copy of the adapter's folder with other tensors or entries in its config."""
    folder = shutil.copytree(adapter / "lora", tmp_path / "changed")
    written = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    if tensors is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        tensors(weights)
        save_file(weights, folder / "adapter_model.safetensors")
    return folder


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(tensors=lambda t: t.pop(KEY)), [f"{KEY} is missing"]),
        (dict(tensors=lambda t: t.update({KEY: torch.zeros(2, 17)})), [f"{KEY} is (2, 17), expected (2, 16)"]),
        (dict(tensors=lambda t: t.update({KEY: torch.full((2, 16), torch.nan)})), ["not finite"]),
        (dict(tensors=lambda t: t.update(more=torch.zeros(1))), ["more is not expected"]),
        (dict(peft_type="VERA"), ["'VERA' is not supported"]),
        (dict(peft_type=None), ["peft_type is missing"]),
        (dict(rank_pattern={"q_proj": 4}, lora_bias=True), ["lora_bias, rank_pattern", "not supported"]),
        (dict(init_lora_weights="pissa"), ["init_lora_weights"]),
        (dict(bias="all"), ["bias as set there"]),
        (dict(target_modules=["q_projj"]), ["q_projj", "did you mean q_proj?"]),
        (dict(target_modules=["q_proj", "c_attn"]), ["adapter_config.json: target_modules c_attn: the model has no"]),
        (dict(target_modules=None), ["target_modules is missing; write in the names"]),
        (dict(layers_to_transform=0), ["layers_to_transform as set there"]),
        (dict(layers_to_transform=[0]), ["layers_to_transform as set there"]),
        (dict(peft_type="IA3", feedforward_modules=".*down_proj"), ["feedforward_modules as set there"]),
        (dict(peft_type="IA3", target_modules=["q_proj"], feedforward_modules=["proj"]), ["feedforward_modules as"]),
        (dict(peft_type="IA3", feedforward_modules=5), ["feedforward_modules is 5, not a list of texts"]),
        (dict(target_modules=5), ["target_modules is 5, not a list of texts"]),
        (dict(target_modules="(q_proj"), ["'(q_proj' is no regular expression"]),
        (dict(target_modules=".*x_proj"), ["no target_modules"]),
        (dict(r=0), ["r is 0: must be at least 1"]),
        (dict(r=20_000_000), ["r is 20,000,000, but adapter_model.safetensors has no size above"]),
        (dict(r=True), ["r is True, not a whole number"]),
        (dict(r="2"), ["r is '2', not a whole number"]),
        (dict(r=None), ["r is missing"]),
        (dict(r=2.5), ["r is 2.5, not a whole number"]),
        (dict(lora_alpha=[]), ["lora_alpha is [], not a number"]),
        (dict(use_rslora="no"), ["use_rslora is 'no', not true or false"]),
        (dict(modules_to_save="lm_head"), ["modules_to_save is 'lm_head', not a list of texts"]),
        (dict(base_model_name_or_path=["x"]), ["base_model_name_or_path is"]),
        (dict(peft_type="PROMPT_TUNING"), ["num_virtual_tokens is missing"]),
        (dict(tensors=lambda t: t.update({KEY: torch.ones(2, 16, dtype=torch.int64)})), ["holds whole numbers"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_left_as_it_was(adapter, tmp_path, how, words):
    model = tiny.base()
    before = model(tiny.IDS)
    with pytest.raises(UserError) as problem:
        peft_format.load_adapter(model, changed(adapter, tmp_path, **how))
    assert all(word in str(problem.value) for word in words), problem.value
    assert torch.equal(model(tiny.IDS), before) and active_adapter(model) is None
    peft_format.load_adapter(model, adapter / "lora")


def test_a_regular_expression_that_never_ends_is_refused_in_time(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_format, "MATCHING_S", 1)
    with pytest.raises(UserError, match=r"target_modules '\(\.\+\)\+Z' takes more than 1 s to match; write a list"):
        peft_format.load_adapter(tiny.base(), changed(adapter, tmp_path, target_modules="(.+)+Z"))
