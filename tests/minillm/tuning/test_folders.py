import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.base import files
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.tuning import folders, peft_format
from minillm.tuning.adapter import active_adapter, attach, merge
from minillm.tuning.options import TuningConfig
from tests.minillm.tuning import tiny


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


def test_another_base_is_refused(adapter, tmp_path):
    """Ours by its fingerprint; peft's own where it laid the embedding it adapts beside the adapter."""
    other = tiny.write(tiny.base(seed=2), tmp_path / "other")
    with pytest.raises(UserError, match="made for another base"):
        folders.load_adapted(adapter / "lora", str(other))
    made = tiny.with_peft(adapter / "base", peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    folder = tiny.save_peft(made, tmp_path / "peft")
    folders.load_adapted(folder, str(adapter / "base"))
    with pytest.raises(UserError, match="made for another base"):
        folders.load_adapted(folder, str(other))


def test_the_fingerprint_of_a_base(tmp_path):
    """Same in bf16 and for a tied model with its head written out; another for other weights or another config."""
    model = tiny.base(tie=True)
    one = folders.base_sha256(tiny.write(model, tmp_path / "a"))
    weights = load_file(tmp_path / "a" / "model.safetensors")
    doubled = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({name: t.bfloat16() for name, t in doubled.items()}, tmp_path / "a" / "model.safetensors")
    assert folders.base_sha256(tmp_path / "a") == one
    seen = {one, folders.base_sha256(tiny.write(tiny.base(tie=True, seed=2), tmp_path / "b"))}
    seen.add(folders.base_sha256(tiny.write(tiny.base(tie=True, rope_theta=2e4), tmp_path / "c")))
    seen.add(folders.base_sha256(tiny.write(tiny.base(tie=False), tmp_path / "d")))
    assert len(seen) == 4


def test_the_base_is_found_beside_a_moved_adapter_or_named(adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    model, found = folders.load_adapted(moved / "lora")
    assert found == moved / "base" and active_adapter(model).options.lora_rank == 2
    alone = shutil.copytree(adapter / "lora", tmp_path / "deep" / "lora")
    assert folders.load_adapted(alone)[1] == adapter / "base"  # where it was
    gone = shutil.copytree(adapter / "lora", tmp_path / "gone")
    written = json.loads((gone / "adapter_config.json").read_text()) | {"base_model_name_or_path": "meta/none"}
    (gone / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"its base meta/none is not there; .* or name it in adapter_config.json"):
        folders.load_adapted(gone)
    written["base_model_name_or_path"] = str(adapter / "base")  # as the error says
    (gone / "adapter_config.json").write_text(json.dumps(written))
    assert folders.load_adapted(gone)[1] == adapter / "base"


def test_a_run_stands_for_its_newest_adapter(adapter, tmp_path):
    for step in ("step-00000001", "step-00000002"):
        files.write_folder(
            tmp_path / step, lambda folder: shutil.copytree(adapter / "lora", folder, dirs_exist_ok=True)
        )
    weights = load_file(adapter / "lora" / "adapter_model.safetensors")
    made = peft_format.load_adapter(tiny.base(), tmp_path)
    key = "layers.1.mlp.down_proj.lora_B.weight"
    assert torch.equal(made.parameters()[key], weights[f"base_model.model.model.{key}"])


def test_loading_in_half_precision_to_generate_from(adapter):
    """Merged before it is rounded; rotary tables are not rounded at all."""
    exact, _ = folders.load_adapted(adapter / "lora")
    half, _ = folders.load_adapted(adapter / "lora", dtype=torch.bfloat16, merged=True)
    assert active_adapter(half) is None and half.cos.dtype == torch.float32
    merge(exact)
    assert torch.equal(half.layers[0].mlp.up_proj.weight, exact.layers[0].mlp.up_proj.weight.bfloat16())


def test_an_adapter_in_place_of_a_model_names_the_remedy(adapter):
    with pytest.raises(UserError, match="merge it into its base first: python -m minillm merge"):
        huggingface.load_config(adapter / "lora")
