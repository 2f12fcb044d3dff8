from minillm.model.size import n_parameters


def test_info_counts_parameters_and_memory(home, call):
    _, out, _ = call("info", "--preset", "124m")
    assert "123,551,232" in out and "1.98 GB of state" in out  # 16 bytes a parameter
    _, out, _ = call("info", "--model", "out/sft")
    assert f"{n_parameters(home.model.config):,}" in out
