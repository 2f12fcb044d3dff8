import dataclasses

import pytest

from minillm.checkpoint import huggingface
from minillm.model.config import preset
from minillm.model.size import n_parameters


def test_info_counts_parameters_and_memory(home, call):
    _, out, _ = call("info", "--preset", "124m")
    assert "123,551,232" in out and "1.98 GB of state" in out  # 16 bytes a parameter
    _, out, _ = call("info", "--model", "out/sft")
    assert f"{n_parameters(home.model.config):,}" in out


def test_info_and_plan_take_the_options_of_a_shape(home, call):
    _, out, _ = call("info", "--preset", "124m", "--n_layers", "6", "--qkv_bias", "true")
    shape = preset("124m", vocab_size=50257, n_layers=6, qkv_bias=True)
    assert "  n_layers        6" in out and f"parameters          {n_parameters(shape):,}" in out
    _, out, _ = call("info", "--model", "out/sft", "--n_layers", "5")
    assert f"{n_parameters(dataclasses.replace(home.model.config, n_layers=5)):,}" in out
    status, whole, _ = call("plan", "--preset", "124m")
    assert status == 0 and call("plan", "--preset", "124m", "--n_layers", "6")[1] != whole


@pytest.mark.parametrize("command", ["info", "plan"])
def test_what_would_be_ignored_or_cannot_be_trained_is_refused(home, call, command, tmp_path):
    status, _, err = call(command, "--model", "out/sft", "--vocab_size", "500")
    assert status == 2 and "--vocab_size 500: the model of --model has its own; leave it out" in err
    status, _, err = call(command, "--preset", "tiny", "--seq_len", str((1 << 21) + 1))
    assert status == 2 and "--seq_len 2097153" in err
    learned = dataclasses.replace(home.model.config, positions="learned")
    huggingface.write_config(learned, tmp_path, {}, home.model.norm.weight.dtype)
    status, _, err = call(command, "--model", str(tmp_path), "--seq_len", "65")
    assert status == 2 and "--seq_len 65: the model has learned 64 positions; lower it" in err
    assert call(command, "--model", "out/sft", "--seq_len", "128")[0] == 0
