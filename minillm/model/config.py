"""The shape and options of a model, and its presets."""

import math
from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import option, out_of_range

ROPE_SCALINGS = ("linear", "yarn", "llama3")
LARGEST = 1 << 24  # of a size: larger than any model has; the product of two is still a valid size for torch
LARGEST_CONTEXT = 1 << 21  # tokens; the rotary tables of so many take 1 GB at 64 numbers a position
LARGEST_RATIO = 1 << 20  # of two lengths or frequencies


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length a model was trained on.

    type: "linear" (positions divided by `factor`; Chen et al. 2023, arXiv:2306.15595),
        "yarn" (Peng et al. 2023, arXiv:2309.00071) or "llama3" (Llama 3.1's rule).
    factor: new length / `original_max_seq_len`.
    """

    type: str = option(help="which rule", choices=ROPE_SCALINGS)
    factor: float = option(help="new length / original_max_seq_len", at_least=1, at_most=LARGEST_RATIO)
    original_max_seq_len: int = option(help="context in tokens before", at_least=1, at_most=LARGEST_CONTEXT)
    low_freq_factor: float = option(
        1.0, "llama3: wavelengths over original/low are divided by factor", above=0, at_most=LARGEST_RATIO
    )
    high_freq_factor: float = option(
        4.0, "llama3: wavelengths under original/high are kept", above=0, at_most=LARGEST_RATIO
    )
    beta_fast: float = option(
        32.0, "yarn: dimensions turning more often than this are kept", above=0, at_most=LARGEST_RATIO
    )
    beta_slow: float = option(
        1.0, "yarn: dimensions turning less often than this are interpolated", above=0, at_most=LARGEST_RATIO
    )
    attention_factor: float | None = option(
        None, "yarn: multiplies cos and sin; None: 0.1 ln(factor) + 1", above=0, at_most=1000
    )

    def __post_init__(self):
        problems = out_of_range(self, "{name} is {value}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not problems and getattr(self, low) >= getattr(self, high):
                problems.append(f"{low} is {getattr(self, low)}: must be below {high}, {getattr(self, high)}")
        if problems:
            raise UserError("rope scaling: " + "; ".join(problems))


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder. Sizes are counts of elements; None means "derive it".

    Each field declared by `option` is an option of train_pretrain.py, `info` and `plan`, with the same help and range.
    """

    vocab_size: int = option(help="ids of the vocabulary", at_least=1, at_most=LARGEST)
    dim: int = option(128, "model width", at_least=1, at_most=LARGEST)
    n_layers: int = option(4, "layers", at_least=1, at_most=LARGEST)
    n_heads: int = option(4, "query heads", at_least=1, at_most=LARGEST)
    n_kv_heads: int | None = option(
        None, "key/value heads, usually as many as query heads, or a divisor of that", at_least=1, at_most=LARGEST
    )
    head_dim: int | None = option(None, "size of a head, usually dim / n_heads", at_least=1, at_most=LARGEST)
    ffn_dim: int | None = option(  # Shazeer 2020, arXiv:2002.05202
        None, "feed-forward width, usually 8/3 dim rounded up to 64", at_least=1, at_most=LARGEST
    )
    max_seq_len: int = option(
        1024,
        "longest context in tokens; with rotary positions also extends a model given by --init_from",
        at_least=1,
        at_most=LARGEST_CONTEXT,
    )
    positions: str = option(
        "rope", "rope, or learned: one trained vector a position, added to the embedding", ("rope", "learned")
    )
    rope_theta: float = option(10_000.0, "base of the rotary frequencies", above=1, at_most=1e15)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm", above=0, at_most=1)
    tie_embeddings: bool = option(True, "output layer shares the embedding's weights")
    qk_norm: bool = option(False, "norm queries and keys per head")
    qkv_bias: bool = option(False, "biases on query, key and value projections")
    window: int | None = option(
        None, "sliding attention window: a token sees itself and window - 1 before it", at_least=1, at_most=LARGEST
    )
    softcap: float | None = option(None, "logits become softcap * tanh(logits / softcap)", above=0)
    trained_seq_len: int | None = option(  # set by pretraining
        None, "tokens of a window in pretraining, often fewer than max_seq_len", at_least=1, at_most=LARGEST
    )
    dropout: float = option(0.0, "dropout on embeddings and both residual branches", at_least=0, below=1)
    score_head: bool = False  # one score a position in place of logits: a reward or value model

    def __post_init__(self):
        if self.score_head:  # there is no head that could share the embedding's weight
            object.__setattr__(self, "tie_embeddings", False)

        # sizes that were left to be derived
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.dim // max(1, self.n_heads),
            "ffn_dim": -(-8 * self.dim // (3 * 64)) * 64,  # 8/3 dim, rounded up to 64
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        # each value within its own range, then those that depend on one another
        problems = out_of_range(self, "{name} is {value}")
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}: rotary positions need an even size")
        if problems:
            raise UserError("model: " + "; ".join(problems))


PRESETS: dict[str, dict] = {
    "tiny": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384, max_seq_len=512),
    "5m": dict(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=704, max_seq_len=512),
    "26m": dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1408, max_seq_len=1024),
    "124m": dict(dim=768, n_layers=12, n_heads=12, ffn_dim=2048, max_seq_len=1024),
    "350m": dict(dim=1024, n_layers=24, n_heads=16, ffn_dim=2816, max_seq_len=2048),
    "1b": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632, max_seq_len=2048, tie_embeddings=False),
    "3b": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, max_seq_len=4096, rope_theta=5e5),
    "8b": dict(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim=14336,
        max_seq_len=8192,
        rope_theta=5e5,
        tie_embeddings=False,
    ),
    "70b": dict(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        ffn_dim=28672,
        max_seq_len=8192,
        rope_theta=5e5,
        tie_embeddings=False,
    ),
    "405b": dict(
        dim=16384,
        n_layers=126,
        n_heads=128,
        n_kv_heads=8,
        ffn_dim=53248,
        max_seq_len=8192,
        rope_theta=5e5,
        tie_embeddings=False,
    ),
}


def preset(name: str, **overrides) -> ModelConfig:
    """The `ModelConfig` of a preset; overrides that are None keep the preset's value."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose {', '.join(PRESETS)}")
    changes = {key: value for key, value in overrides.items() if value is not None}
    return ModelConfig(**{**PRESETS[name], **changes})


def parse_rope_scaling(text: str, original_max_seq_len: int) -> RopeScaling:
    """`yarn:4` → a scaling by 4 of a model trained on `original_max_seq_len` tokens."""
    kind, _, factor_text = text.partition(":")
    try:
        factor = float(factor_text)
    except ValueError:
        factor = math.nan
    if kind not in ROPE_SCALINGS or not 1 <= factor < math.inf:  # false of NaN, too
        raise UserError(f"--rope_scaling {text}: expected linear:F, yarn:F or llama3:F, F at least 1, finite")
    return RopeScaling(kind, factor, original_max_seq_len)
