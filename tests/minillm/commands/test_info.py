import dataclasses

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
