"""The shape and options of a model, and its presets."""

import math
from dataclasses import dataclass

from minillm.base.errors import UserError

ROPE_SCALINGS = ("linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length a model was trained on.

    type: "linear" (positions divided by `factor`; Chen et al. 2023, arXiv:2306.15595),
        "yarn" (Peng et al. 2023, arXiv:2309.00071) or "llama3" (Llama 3.1's rule).
    factor: new length / `original_max_seq_len`.
    """

    type: str
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0  # llama3: wavelengths over original/low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths under original/high are kept
    beta_fast: float = 32.0  # yarn: dimensions turning more often than this are kept
    beta_slow: float = 1.0  # yarn: dimensions turning less often than this are interpolated
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None = 0.1 ln(factor) + 1


COUNTS = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len")
LARGEST = 1 << 24  # larger than any model has; the product of two is still a valid size for torch


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder. Sizes are counts of elements; None means "derive it"."""

    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: dim / n_heads
    ffn_dim: int | None = None  # None: 8/3 dim rounded up to 64 (Shazeer 2020, arXiv:2002.05202)
    max_seq_len: int = 1024
    positions: str = "rope"  # or "learned": one trained vector a position, added to the embedding
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    window: int | None = None  # sliding window: a token sees itself and window - 1 before it
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    dropout: float = 0.0

    def __post_init__(self):
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.dim // max(1, self.n_heads),
            "ffn_dim": -(-8 * self.dim // (3 * 64)) * 64,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        problems = [
            f"{name} is {value}: it must lie from 1 to {LARGEST:,}"
            for name in COUNTS
            if not 1 <= (value := getattr(self, name)) <= LARGEST
        ]
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.positions not in ("rope", "learned"):
            problems.append(f"positions is {self.positions!r}: choose rope or learned")
        if self.positions == "rope" and self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}: rotary positions need an even size")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}: it must lie in [0, 1)")
        if self.window is not None and not 1 <= self.window <= LARGEST:
            problems.append(f"window is {self.window}: it must lie from 1, a token itself, to {LARGEST:,}")
        for name in ("softcap", "rope_theta", "norm_eps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                problems.append(f"{name} is {value}: it must be above 0 and finite")
        if self.rope_scaling and self.rope_scaling.type not in ROPE_SCALINGS:
            problems.append(f"rope scaling {self.rope_scaling.type!r}: choose linear, yarn or llama3")
        if problems:
            raise UserError("model: " + "; ".join(problems))


PRESETS: dict[str, dict] = {
    "tiny": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384, max_seq_len=512),
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
}


def preset(name: str, **overrides) -> ModelConfig:
    """The `ModelConfig` of a preset; overrides that are None keep the preset's value."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose {', '.join(PRESETS)}")
    chosen = {key: value for key, value in overrides.items() if value is not None}
    return ModelConfig(**{**PRESETS[name], **chosen})


def parse_rope_scaling(text: str, original_max_seq_len: int) -> RopeScaling:
    """`yarn:4` → a scaling by 4 of a model trained on `original_max_seq_len` tokens."""
    kind, _, factor = text.partition(":")
    try:
        scaling = RopeScaling(kind, float(factor), original_max_seq_len)
        if kind not in ROPE_SCALINGS or not 1 <= scaling.factor < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"--rope_scaling {text}: expected linear:F, yarn:F or llama3:F, F at least 1, finite") from None
    return scaling
