"""The memory that formulas tell, beside what tensors really take. That of adapters is in test_quant.py."""

import pytest
import torch

from minillm.base import files
from minillm.base.device import autocast
from minillm.base.errors import UserError
from minillm.model.config import ModelConfig
from minillm.model.memory import activations, check_memory, generation, recomputed_activations, weights
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from train_pretrain import Config as Pretrain
from train_sft import Config as Instructions


@pytest.mark.parametrize("change", [{}, dict(positions="learned"), dict(qkv_bias=True, tie_embeddings=False)])
def test_weights_are_what_the_modules_hold(change):
    shape = ModelConfig(
        **{**dict(vocab_size=50, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=16), **change}
    )
    model = Transformer(shape)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sum(weights(shape).values()) == sum(tensors.values())
    assert generation(shape, 8, 4) == {"weights": 4 * n_parameters(shape), "cache": 2 * 3 * 2 * 8 * 8 * 4}


def test_a_model_beyond_the_machine_s_memory_is_refused(monkeypatch):
    shape = ModelConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, max_seq_len=8)
    n = n_parameters(shape)
    rotary = 4 * 8 * 4  # bytes: fp32, positions, head size
    in_4_bits = sum(weights(shape, 4).values())

    def check(memory: float, **options) -> None:
        monkeypatch.setattr(files, "memory_bytes", lambda: memory)
        check_memory(Instructions(**options), shape, torch.device("cpu"))  # whose rows may be short

    check(12 * n + rotary)
    check(in_4_bits, tune="lora", base_bits=4)
    with pytest.raises(UserError, match=f"{n:,} parameters need at least .* choose a smaller model"):
        check(12 * n + rotary - 1)
    with pytest.raises(UserError, match="choose a smaller model, or train few parameters"):
        check(12 * n + rotary - 1, init_from="x")
    with pytest.raises(UserError, match="the base's weights"):
        check(4 * n + rotary - 1, tune="lora")
    with pytest.raises(UserError, match="the base's weights"):
        check(in_4_bits - 1, tune="lora", base_bits=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="need at least"):
        check(12 * n + rotary)
    check_memory(Pretrain(), shape, torch.device("cuda"))  # a GPU says so itself


@pytest.mark.parametrize("recomputed", [False, True])
def test_rows_beyond_the_machine_s_memory_are_refused(monkeypatch, recomputed):
    """By one byte; those of instructions may be shorter than --seq_len, and are not."""
    shape = ModelConfig(vocab_size=50, dim=8, n_layers=2, n_heads=2, max_seq_len=10**6)
    options = dict(seq_len=10**5, micro_batch_size=2, checkpoint_activations=recomputed)
    model = sum(weights(shape).values()) + 8 * n_parameters(shape)
    kept = recomputed_activations if recomputed else activations
    rows = sum(kept(shape, 2, 10**5, 4).values())
    for more, allowed in ((0, True), (-1, False)):
        monkeypatch.setattr(files, "memory_bytes", lambda more=more: model + rows + more)
        check_memory(Instructions(**options), shape, torch.device("cpu"))
        if allowed:
            check_memory(Pretrain(**options), shape, torch.device("cpu"))
            continue
        remedy = "lower --micro_batch_size$" if recomputed else "or set --checkpoint_activations true"
        with pytest.raises(UserError, match=rf"a pass over 2 × 100,000 tokens needs at least .*{remedy}"):
            check_memory(Pretrain(**options), shape, torch.device("cpu"))
    check_memory(Pretrain(**options, context_parallel=2), shape, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [{}, dict(qk_norm=True), dict(qk_norm=True, head_dim=48, n_kv_heads=1), dict(qk_norm=True, positions="learned")],
    ids=["rope", "qk_norm", "qk_norm, wide heads", "qk_norm, learned"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.06), (torch.bfloat16, 0.35)])
def test_activations_are_what_the_backward_pass_keeps(dtype, tolerance, change):
    """The formula against the bytes that autograd really keeps, for a shape where the loss hardly counts."""
    shape = ModelConfig(
        **{**dict(vocab_size=16, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256), **change}
    )
    model, kept = Transformer(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(torch.device("cpu"), dtype):
        loss = model(torch.zeros(2, 256, dtype=torch.long), torch.zeros(2, 256, dtype=torch.long))
    assert loss.requires_grad
    items = activations(shape, 2, 256, dtype.itemsize)
    estimate = sum(items.values()) - items["loss"]
    assert sum(kept.values()) == pytest.approx(estimate, rel=tolerance)
    assert sum(recomputed_activations(shape, 2, 256, dtype.itemsize).values()) < estimate / 2
