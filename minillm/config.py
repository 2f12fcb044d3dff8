"""Configuration: the model's shape, its presets, and dataclasses as command lines.

A script has one frozen dataclass; each field has a help text and a default, and `parse` turns
`--name value` (or `--config file.toml`) into an instance.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from minillm import Parser, UserError

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

    def n_parameters(self) -> int:
        """Number of trainable parameters, by formula (a tied embedding counts once)."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        attention += 2 * self.head_dim if self.qk_norm else 0
        attention += self.head_dim * (self.n_heads + 2 * self.n_kv_heads) if self.qkv_bias else 0
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        embeddings += self.max_seq_len * self.dim if self.positions == "learned" else 0
        return embeddings + self.n_layers * layer + self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward for one trained token.

        6 N + 12 L H D T, where N counts every parameter that multiplies (not the input embedding,
        which is looked up) and attention is counted in full, as in PaLM's appendix B
        (Chowdhery et al. 2022, arXiv:2204.02311). `seq_len` is T in tokens.
        """
        lookups = self.max_seq_len * self.dim if self.positions == "learned" else 0
        lookups += 0 if self.tie_embeddings else self.vocab_size * self.dim
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return 6 * (self.n_parameters() - lookups) + attention


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


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field with help text (name the unit) and, if there are few, its choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainingConfig:
    """The options that every training script has; each script adds its own and changes defaults."""

    data: str = option("data/bundled", "what to train on")
    out: str = option("out/run", "the run's folder: checkpoints, metrics.jsonl, curve.png")
    init_from: str | None = option(None, "start from the weights of this model folder or run")
    resume: str = option("auto", "auto: go on from the newest whole checkpoint in --out; none: start over; or a folder")
    allow_data_change: bool = option(False, "resume although data, batch size, sequence length or seed changed")
    steps: int = option(1500, "optimizer steps of the whole run")
    batch_size: int = option(16, "sequences per optimizer step, over all ranks")
    micro_batch_size: int | None = option(
        None, "sequences per forward pass and rank; none: a rank's share, at most 32; lower it when memory runs out"
    )
    seq_len: int = option(128, "tokens per sequence")
    optimizer: str | None = option(
        None,
        "muon (with AdamW for embeddings, head and norms) or adamw; none: muon, but adamw for an adapter",
        ("muon", "adamw"),
    )
    lr: float | None = option(None, "peak learning rate; none: 0.09/√width for muon, 0.045/√width for adamw")
    warmup_steps: int | None = option(None, "steps of linear warm-up; none: 20, but at most a tenth of all steps")
    schedule: str = option("cosine", "shape of the learning rate", ("cosine", "wsd", "constant"))
    min_lr_ratio: float = option(0.1, "final learning rate as a share of the peak")
    decay_share: float = option(0.2, "share of all steps in which wsd decays")
    weight_decay: float | None = option(
        None, "weight decay, on matrices only; none: 0.1, but 0 for ia3 and virtual tokens"
    )
    grad_clip: float = option(1.0, "largest gradient norm; 0 switches clipping off")
    dropout: float = option(0.0, "dropout on embeddings and both residual branches")
    seed: int = option(0, "of weights, data order and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option(
        "auto",
        "of matrix products; auto: bfloat16 on GPUs that compute in it, else float32",
        ("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = option(False, "compile the model with torch.compile")
    checkpoint_activations: bool = option(False, "recompute each layer in the backward pass, to save memory")
    impl: str = option("auto", "implementation of the ops", ("auto", "triton", "torch", "reference"))
    eval_every: int = option(250, "steps between validations; 0: only at the end")
    eval_tokens: int = option(65536, "validation tokens, the first whole documents")
    save_every: int = option(500, "steps between checkpoints; the last step is always saved")
    keep_last: int = option(2, "checkpoints to keep")
    max_bad_steps: int = option(20, "stop after so many steps in a row whose gradients are not finite")
    timeout_s: float = option(600.0, "seconds without a finished step after which a hanging run is ended")
    tensorboard: bool = option(False, "also write TensorBoard events")


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


def parse(config_class: type, description: str, argv: list[str] | None = None):
    """An instance of `config_class` from the command line.

    Values come from the defaults, then `--config file.toml`, then `--name value`. An unknown name
    is a `UserError` that suggests the nearest; a value of the wrong type names what is expected.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="TOML file of the options below")
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    for name, f in fields.items():
        kind, _ = _value_type(hints[name])
        shown = "none" if f.default is None else str(f.default).lower() if kind is bool else f.default
        words = f"{f.metadata['help']} (default {shown})".replace("%", "%%")
        extra = dict(nargs="?", const="true", metavar="BOOL") if kind is bool else dict(metavar=kind.__name__.upper())
        if f.metadata.get("choices"):
            extra = dict(metavar="|".join(f.metadata["choices"]))
        parser.add_argument(f"--{name}", help=words, default=None, **extra)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        _refuse_unknown(word.split("=")[0].lstrip("-"), fields, f"argument {word}")
    given = {key: value for key, value in vars(known).items() if value is not None}
    source = _read_toml(given.pop("config"), fields) if "config" in given else {}
    values = {k: _convert(fields[k], hints[k], v, f"{known.config}: ") for k, v in source.items() if k not in given}
    return config_class(**values, **{k: _convert(fields[k], hints[k], v) for k, v in given.items()})


def show(config) -> str:
    """The effective configuration, one `name = value` a line, for the top of a run's output."""
    pairs = dataclasses.asdict(config).items()
    return "\n".join(f"  {name} = {value}" for name, value in pairs)


def _value_type(hint) -> tuple[type, bool]:
    """The type that a field's hint names, and whether None is allowed beside it."""
    if isinstance(hint, types.UnionType):  # "int | None"
        return next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    return hint, False


def _convert(f: dataclasses.Field, hint, value, where: str = ""):
    """`value`, text or what TOML gave, as the type that the field's hint names; where: begins an error's line."""
    name, choices = f.name, f.metadata.get("choices")
    kind, optional = _value_type(hint)
    if isinstance(value, str) and value.lower() == "none" and optional:
        return None
    if choices and value not in choices:
        raise UserError(f"{where}--{name} {value}: choose one of {', '.join(choices)}")
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if isinstance(value, bool | list | dict) or (kind is str and not str(value).strip()):
            raise ValueError  # a TOML file's true is no number, and its list no text, though Python could make it one
        if kind is int and not isinstance(value, int):
            number = float(value)  # so that 1e6 is a number of steps
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        expected += " (several go into one, with commas between)" * (kind is str and isinstance(value, list))
        raise UserError(f"{where}--{name} {value or repr(value)}: expected {expected}") from None


def _read_toml(path: str, fields) -> dict:
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows may put a BOM first
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or f"no TOML: {problem}"
        raise UserError(f"--config {path}: {reason}; give a file of lines NAME = VALUE") from None
    for name, value in values.items():
        if name in fields:
            continue
        if isinstance(value, dict):
            raise UserError(f"{path}: [{name}]: sections and dotted names are not used; give lines NAME = VALUE alone")
        _refuse_unknown(name, fields, f"{path}: {name}")
    return values


def _refuse_unknown(name: str, known, shown: str):
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean --{near[0]}?" if near else ""
    raise UserError(f"{shown}: no such option{hint} ({Path(sys.argv[0]).name} --help lists them)")
