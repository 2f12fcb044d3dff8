"""The command that folds an adapter into its base."""

import json

import pytest

from minillm.checkpoint import huggingface
from minillm.tuning import folders, peft_format
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("of no run", "python -m minillm chat --model 'mer ged of no run'"),
        ("instructed", "python -m minillm chat --model 'mer ged instructed'"),
        ("pretrained", "python train_sft.py --init_from 'mer ged pretrained'"),
        ("reward", "python train_ppo.py --reward_model 'mer ged reward' --init_from out/sft"),
    ],
)
def test_it_ends_with_the_command_that_follows_the_script_of_the_adapter(home, call, kind, step):
    base = home.path / "out" / "sft" / "step-00000003"
    model = huggingface.load_model(base)
    if kind == "reward":
        model.give_score_head(seed=3)
    adapter = attach(model, TuningConfig("lora"))
    adapter.base_folder, adapter.base_sha256 = base, folders.base_sha256(base)
    (home.path / kind / "resume").mkdir(parents=True)
    peft_format.save_adapter(adapter, home.path / kind)
    trained = {"format": 1, "step": 1, "config": {} if kind == "pretrained" else {"template": "auto"}}
    (home.path / kind / "resume" / "train_state.json").write_text(json.dumps(trained))
    if kind == "of no run":
        (home.path / kind / "resume" / "train_state.json").unlink()
        (home.path / kind / "resume").rmdir()

    status, out, _ = call("merge", "--model", "out/sft", "--adapter", kind, "--out", f"mer ged {kind}")
    assert status == 0 and out.endswith(f" modules changed\nnext: {step}\n")
