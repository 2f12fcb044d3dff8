import pytest
import torch

from minillm.model.config import ModelConfig
from minillm.model.memory import activations, recomputed_activations
from minillm.model.transformer import Transformer


def test_info_counts_parameters_and_memory(home, call):
    _, out, _ = call("info", "--preset", "124m")
    assert "123,551,232" in out and "1.98 GB of state" in out  # 16 bytes a parameter
    _, out, _ = call("info", "--model", "out/sft")
    assert f"{home.model.config.n_parameters():,}" in out


def test_activations_are_what_the_backward_pass_keeps():
    """The formula against the bytes that autograd really keeps, for a shape where the loss hardly counts."""
    shape = ModelConfig(vocab_size=16, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256)
    model, kept = Transformer(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.zeros(2, 256, dtype=torch.long), torch.zeros(2, 256, dtype=torch.long))
    assert loss.requires_grad
    estimate = activations(shape, 2, 256, 4)["activations of all layers"]
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.1)
    assert sum(recomputed_activations(shape, 2, 256, 4).values()) < estimate / 2
