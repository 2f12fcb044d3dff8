"""Targets are what a model has, whatever it is called; what cannot be adapted is refused by name."""

import pytest
import torch
from torch import nn

from minillm.base.errors import UserError
from minillm.tuning.adapter import attach, set_adapter
from minillm.tuning.lora import LoraLinear
from minillm.tuning.options import TuningConfig
from minillm.tuning.peft_format import load_adapter, save_adapter
from minillm.tuning.target_modules import linear_paths
from tests.minillm.tuning import tiny


class Squared(nn.Module):
    """A feed-forward network as a reader may write it: two layers, of names that nothing here knows."""

    def __init__(self, dim: int):
        super().__init__()
        self.widen = nn.Linear(dim, 2 * dim)
        self.stack = nn.Sequential(nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        return self.stack(self.widen(x))


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def changed(kind: type[nn.Module] = Squared):
    model = tiny.base()
    for layer in model.layers:
        layer.mlp = kind(16)
    return model


@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_by_default_all_linear_layers_of_the_layers_are_adapted(tune, tmp_path):
    model = changed()
    adapter = attach(model, TuningConfig(tune))
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    names = [*attention, "mlp.widen", "mlp.stack.1"]
    assert list(adapter.parts) == [f"layers.{i}.{name}" for i in range(2) for name in names]
    assert all(isinstance(part, LoraLinear) for part in adapter.parts.values())
    assert adapter.options.target_modules == "q_proj,k_proj,v_proj,o_proj,widen,mlp.stack.1"
    tiny.shake(adapter.parameters())
    before = model(tiny.IDS)
    save_adapter(adapter, tmp_path)
    set_adapter(model, None)
    load_adapter(model, tmp_path, "again")
    torch.testing.assert_close(model(tiny.IDS), before, atol=0, rtol=0)


def test_the_linear_layers_of_a_base_are_the_same_under_an_adapter():
    model = tiny.base()
    paths = linear_paths(model)
    assert len(paths) == 2 * 7 + 1
    for options in (TuningConfig("lora"), TuningConfig("adapter"), TuningConfig("prefix", n_virtual=2)):
        attach(model, options, name=options.tune)
        assert linear_paths(model) == paths


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (changed, TuningConfig("ia3"), "--tune ia3 adapts by default down_proj: the model has no such module"),
        (changed, TuningConfig("lora", target_modules="gate_proj"), "--target_modules gate_proj: the model has no"),
        (
            tiny.base,
            TuningConfig("lora", target_modules="q_proj,norm"),
            "norm: norm is a RMSNorm, which cannot",
        ),
        (
            tiny.base,
            TuningConfig("lora", target_modules="self_attn"),
            "layers.0.self_attn is a Attention",
        ),
        (
            lambda: changed(lambda dim: Doubled(dim, dim)),
            TuningConfig("lora"),
            "layers.0.mlp is a Doubled",
        ),
        (tiny.base, TuningConfig("ia3", target_modules="embed_tokens"), "--target_modules embed_tokens: IA3 scales"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(make, options, words):
    with pytest.raises(UserError, match=words):
        attach(make(), options)
