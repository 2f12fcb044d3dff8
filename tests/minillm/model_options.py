"""The one list of model options that the tests of behaviour run through.

An option added to `ModelConfig` needs a line in OPTIONS (a test says so), and then has its tests: it sees no future,
gives the same logits with a cache, with padding and beside other documents, agrees with the reference, is counted,
quantized, adapted, generated from, saved and loaded, and exported right or not at all.
"""

import dataclasses

import torch

from minillm.model.config import ModelConfig, RopeScaling
from minillm.model.transformer import Transformer

BASE = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=64)
OPTIONS = {
    "plain": {},
    "qk_norm": dict(qk_norm=True),
    "bias": dict(qkv_bias=True),
    "window": dict(window=5),
    "learned": dict(positions="learned"),
    "softcap": dict(softcap=2.0),
    "untied": dict(tie_embeddings=False),
    "theta": dict(rope_theta=500.0),
    "scaled": dict(rope_scaling=RopeScaling("yarn", 4.0, 16)),
    "eps": dict(norm_eps=0.1),
}
SIZES = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len"}
TRAINING_ONLY = {"dropout", "trained_seq_len"}


def build(seed: int = 1, **change) -> Transformer:
    """BASE with these options changed, and weights of N(0, 0.2²), around 1 for norms: at 0.02 faults would hide."""
    model = Transformer(dataclasses.replace(BASE, **change))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + center)
    return model.eval()


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids of BASE's vocabulary, int64."""
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))
