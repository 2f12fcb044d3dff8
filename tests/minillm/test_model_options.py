"""The list of model options is complete, and each of them is counted on the modules."""

import dataclasses

import pytest
import torch

from minillm.base.errors import UserError
from minillm.checkpoint import architectures, gguf, huggingface
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.tuning.adapter import attach
from minillm.tuning.options import TuningConfig
from tests.minillm.model_options import OPTIONS, SIZES, TRAINING_ONLY, build, tokens_of


def test_every_option_of_the_arithmetic_is_in_the_list():
    tested = {field for change in OPTIONS.values() for field in change}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    has_tests_of_its_own = {"score_head"}  # another output, not another arithmetic: model/test_scores.py
    expected = fields - SIZES - TRAINING_ONLY - has_tests_of_its_own
    assert tested == expected, "an option of ModelConfig needs a line in OPTIONS"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_in_the_list_is_not_the_default(name):
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert all(value != defaults[field] for field, value in OPTIONS[name].items())


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_counted(name):
    model = build(**OPTIONS[name])
    assert n_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_begins_at_the_base_and_trains_all_its_parts(name):
    model, tokens = build(**OPTIONS[name]), tokens_of(2, 12)
    before = model(tokens)
    adapter = attach(model, TuningConfig("lora"))
    assert (model(tokens) - before).abs().max() < 1e-5
    model(tokens, tokens.roll(-1, 1)).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters().values())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_gguf_file_holds_the_option_or_is_refused_by_its_name(name, tmp_path):
    model = build(**OPTIONS[name])
    tensors = {key: weight.clone() for key, weight in huggingface.weights_of(model).items()}
    stored = huggingface.StoredModel(model.config, torch.float32, lambda key, dtype: tensors[key].to(dtype))
    path = tmp_path / "m.gguf"
    if architectures.model_type(model.config) not in ("llama", "qwen2", "qwen3"):
        with pytest.raises(UserError, match=rf"no place for .*{next(iter(OPTIONS[name]))}"):
            gguf.write_file(stored, None, path, torch.float32)
        assert not path.exists()
        return
    gguf.write_file(stored, None, path, torch.float32)
    again, _ = gguf.open_file(path)
    assert again.config.norm_eps == pytest.approx(model.config.norm_eps)  # in float32 there
    assert dataclasses.replace(again.config, norm_eps=model.config.norm_eps) == model.config
    assert all(torch.equal(again.read(key, torch.float32), tensors[key]) for key in tensors)
