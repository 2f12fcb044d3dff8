"""config.json: what is there is checked for its kind before anything is made of it."""

import json

import pytest

from minillm.base.errors import UserError
from minillm.checkpoint import config_json
from minillm.checkpoint.architectures import SHARED, to_hf
from minillm.model.config import ModelConfig

WRITTEN = to_hf(ModelConfig(vocab_size=96))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '{"a": ' * 100_000, "\x00\xff"])
def test_what_is_no_object_in_json_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        config_json.read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [*SHARED.values(), *config_json.KINDS])
def test_each_value_that_a_config_is_made_from_is_checked(key):
    config_json.check_kinds(json.loads(json.dumps(WRITTEN)), "config.json", SHARED)
    with pytest.raises(UserError, match=rf"^config.json: damaged: {key} is \[\[\]\], not "):
        config_json.check_kinds(WRITTEN | {key: [[]]}, "config.json", SHARED)


@pytest.mark.parametrize("key", config_json.ROPE_KINDS)
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
def test_each_value_of_the_positions_is_checked(key, style):
    with pytest.raises(UserError, match=rf"^config.json: {style}: damaged: {key} is \[\], not "):
        config_json.check_kinds(WRITTEN | {style: {key: []}}, "config.json", SHARED)


def test_a_scaling_needs_its_factor():
    with pytest.raises(UserError, match="factor is missing"):
        config_json.check_kinds(WRITTEN | {"rope_scaling": {"type": "linear"}}, "config.json", SHARED)
