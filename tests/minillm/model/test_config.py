import dataclasses
import math

import pytest

from minillm.base.errors import UserError
from minillm.model.config import PRESETS, ModelConfig, RopeScaling, parse_rope_scaling, preset
from minillm.model.size import flops_per_token, n_parameters
from minillm.model.transformer import Transformer


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(tie_embeddings=False),
        dict(qk_norm=True),
        dict(qkv_bias=True, n_kv_heads=2),
        dict(positions="learned", head_dim=24),
    ],
)
def test_the_parameter_count_is_that_of_the_module(change):
    config = ModelConfig(**{**dict(vocab_size=99, dim=48, n_layers=3, n_heads=4, max_seq_len=40), **change})
    model = Transformer(config)
    assert n_parameters(config) == sum(p.numel() for p in model.parameters())


def test_counting_neither_takes_memory_nor_builds_what_cannot_be():
    config = ModelConfig(vocab_size=99, dim=48, n_layers=1 << 24)
    with pytest.raises(UserError, match="n_layers is 16,777,216: choose at most 2,048"):
        n_parameters(config)
    assert n_parameters(preset("8b", vocab_size=1 << 24)) > 1 << 36


def test_flops_by_formula_are_those_that_torch_counts():
    """torch counts the matrix products of one forward and backward pass (attention in full, as ours)."""
    from torch.utils.flop_counter import FlopCounterMode

    from minillm.model import ops

    config = ModelConfig(vocab_size=512, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=64)
    model = Transformer(config)
    model.init_weights()
    import torch

    tokens = torch.zeros(2, 64, dtype=torch.long)
    ops.select("reference")  # plain products: fused attention recomputes, which is no work of the model's
    try:
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
    finally:
        ops.select("auto")
    norms = (2 * config.n_layers + 1) * config.dim * 6  # counted by 6 N, but no matrix product
    assert counter.get_total_flops() / 128 == flops_per_token(config, 64) - norms


def test_a_window_is_the_most_that_counts_of_attention():
    config = ModelConfig(vocab_size=512, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=4096)
    windowed = dataclasses.replace(config, window=32)
    assert flops_per_token(windowed, 4096) == flops_per_token(config, 32) < flops_per_token(config, 4096)
    assert flops_per_token(windowed, 16) == flops_per_token(config, 16)


def test_presets_have_the_sizes_of_their_names():
    sizes = {name: n_parameters(preset(name, vocab_size=32000)) / 1e6 for name in PRESETS}
    known = {"5m": 5, "26m": 26, "124m": 124, "350m": 350, "1b": 1100, "3b": 3000, "8b": 8000}
    known |= {"70b": 70_600, "405b": 405_900}
    vocab = {"5m": 2048, "26m": 6400, "124m": 50304, "350m": 50304, "1b": 32000}
    for name, millions in known.items():
        size = n_parameters(preset(name, vocab_size=vocab.get(name, 128256))) / 1e6
        assert abs(size / millions - 1) < 0.1, (name, size)
    assert set(sizes) == {"tiny", *known}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_heads=6, n_kv_heads=4), "no multiple"),
        (dict(head_dim=7), "even"),
        (dict(dropout=1.0), "dropout"),
        (dict(positions="none"), "positions"),
        (dict(dim=10**30), f"dim is {10**30}: must be 1 to 16,777,216; "),
        (dict(max_seq_len=1 << 25), "max_seq_len is 33554432"),
        (dict(window=0), "window is 0"),
        (dict(window=10**30), "window is 1000"),
        (dict(softcap=0.0), "softcap is 0"),
        (dict(softcap=math.inf), "softcap is inf: must be a finite number"),
        (dict(rope_theta=0.0), "rope_theta is 0"),
        (dict(rope_theta=math.nan), "rope_theta is nan"),
        (dict(norm_eps=math.inf), "norm_eps is inf"),
    ],
)
def test_impossible_shapes_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**{**dict(vocab_size=10, dim=48), **change})


@pytest.mark.parametrize("text", ["yarn:inf", "linear:nan", "llama3:0.5", "yarn:", "ntk:2"])
def test_what_stretches_no_positions_is_refused(text):
    with pytest.raises(UserError, match=f"--rope_scaling {text}: expected linear:F, yarn:F or llama3:F"):
        parse_rope_scaling(text, 64)
    assert parse_rope_scaling("yarn:1", 64) == RopeScaling("yarn", 1.0, 64)


def test_unknown_preset():
    with pytest.raises(UserError, match="tiny"):
        preset("huge", vocab_size=10)
