"""Adapters of reward models: the score head is trained with them, is saved with them, and PEFT reads both."""

import json

import peft
import pytest
import torch
import transformers

from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.tuning import folders, peft_format
from minillm.tuning.adapter import attach, set_adapter
from minillm.tuning.options import TuningConfig
from tests.minillm.model_options import build, tokens_of

METHODS = {
    "lora": TuningConfig("lora"),
    "dora": TuningConfig("dora", target_modules="q_proj,down_proj"),
    "ia3": TuningConfig("ia3"),
    "more in full": TuningConfig("lora", modules_to_save="embed_tokens"),
    "freeze": TuningConfig("freeze", train_layers="last:1,head"),
    "adapter": TuningConfig("adapter"),
    "prefix": TuningConfig("prefix", n_virtual=3),
    "prompt": TuningConfig("prompt", n_virtual=3),
    "ptuning": TuningConfig("ptuning", n_virtual=3),
}
IN_PEFT = ("lora", "dora", "ia3", "more in full")


@pytest.fixture
def base(tmp_path):
    """A language model's folder."""
    folder = tmp_path / "base"
    folder.mkdir()
    huggingface.save_model(build(), folder, special_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
    return folder


def trained(base, options: TuningConfig):
    """A reward model on the base with an adapter, whose trained parameters are far from their first values."""
    model = huggingface.load_model(base)
    model.give_score_head(seed=3)
    adapter = attach(model, options)
    adapter.base_folder, adapter.base_sha256 = base, folders.base_sha256(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), adapter


@pytest.mark.parametrize("name", METHODS)
def test_the_head_is_trained_and_comes_back_with_the_adapter(name, base, tmp_path):
    model, adapter = trained(base, METHODS[name])
    assert model.score.weight.requires_grad and "score.weight" in adapter.parameters()
    tokens = tokens_of(2, 12)
    tokens[tokens == 3] = 4
    peft_format.save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again, _ = folders.load_adapted(tmp_path, with_score_head=True)
    torch.testing.assert_close(again.eval()(tokens), model(tokens), atol=0, rtol=0)
    with pytest.raises(UserError, match=r"is a reward model .* gives a score and no text"):
        folders.load_adapted(tmp_path)
    if name not in IN_PEFT:
        return

    # PEFT reads ours, and ours what PEFT then writes
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits[:, 0], model(tokens)[:, -1], atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = folders.load_adapted(tmp_path / "theirs", str(base), with_score_head=True)
    torch.testing.assert_close(again.eval()(tokens), model(tokens), atol=1e-5, rtol=0)


def test_without_the_adapter_the_first_head_is_back(base):
    model = huggingface.load_model(base)
    model.give_score_head(seed=3)
    tokens = tokens_of(1, 6)
    before = model(tokens)
    adapter = attach(model, TuningConfig("lora"))
    with torch.no_grad():
        adapter.parts["score"].weight.add_(1.0)
    assert not torch.equal(model(tokens), before)
    set_adapter(model, None)
    assert torch.equal(model(tokens), before)


def test_merging_gives_a_reward_model_that_transformers_reads(base, tmp_path, monkeypatch):
    model, adapter = trained(base, METHODS["lora"])
    (tmp_path / "adapter").mkdir()
    peft_format.save_adapter(adapter, tmp_path / "adapter")
    merged, _ = folders.load_adapted(tmp_path / "adapter", merged=True, with_score_head=True)
    (tmp_path / "merged").mkdir()
    huggingface.save_model(merged, tmp_path / "merged")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokens = tokens_of(1, 12)
    torch.testing.assert_close(theirs(tokens).logits[:, 0], model(tokens)[:, -1], atol=1e-5, rtol=0)


def test_the_head_is_not_adapted(base):
    model = huggingface.load_model(base)
    model.give_score_head(seed=3)
    with pytest.raises(UserError, match="--target_modules score"):
        attach(model, TuningConfig("lora", target_modules="q_proj,score"))
    adapter = attach(model, TuningConfig("lora", modules_to_save="score"))
    assert peft_format.describe(adapter)["modules_to_save"] == ["score"]
