"""The options of training few parameters, for a command line or for Python."""

import math
from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.model.quant import BITS

DEFAULT_RANK = 8  # of low-rank matrices

# Peak learning rates of AdamW for an adapter, times the width: near the best of those tried at 128 (docs/en/tuning.md).
# By 1/width LoRA's is 1.6e-4 and IA3's 3e-3 at 4096, about what others take there (Chinese-LLaMA; arXiv:2205.05638).
TUNING_LR = {"lora": 0.64, "dora": 0.64, "ia3": 12.8, "adapter": 1.9, "prefix": 12.8, "prompt": 12.8, "ptuning": 1.9}

LOW_RANK = ("lora", "dora")
VIRTUAL = ("prefix", "prompt", "ptuning")  # methods that train virtual tokens
METHODS = ("full", "freeze", *LOW_RANK, "ia3", "adapter", *VIRTUAL)
GROUP = "training few parameters (docs/en/tuning.md)"


def _tuning_option(default, help: str, methods: tuple[str, ...], **rules):
    """An option that only some methods use."""
    return option(default, help, only_with=("tune", methods), group=GROUP, **rules)


@dataclass(frozen=True)
class TuningConfig(Options):
    """Options of training few parameters (docs/en/tuning.md); training scripts have them beside `TrainingConfig`'s."""

    tune: str = option("full", "what is trained: everything, some layers, or few new parameters", METHODS, group=GROUP)
    lora_rank: int = _tuning_option(DEFAULT_RANK, "columns of A and B", LOW_RANK, at_least=1)
    lora_alpha: float | None = _tuning_option(
        None, "the update is scaled by alpha/rank; none: 2 · rank, 2√8 with rslora", LOW_RANK, above=0
    )
    lora_dropout: float = _tuning_option(0.0, "dropout before A", LOW_RANK, at_least=0, below=1)
    rslora: bool = _tuning_option(False, "scale by alpha/√rank instead", LOW_RANK)
    target_modules: str | None = _tuning_option(
        None,
        "modules to adapt, by commas; none: every linear layer inside the layers (ia3: k_proj,v_proj,down_proj)",
        (*LOW_RANK, "ia3"),
    )
    modules_to_save: str | None = _tuning_option(
        None, "modules trained in full besides, e.g. embed_tokens,lm_head", (*LOW_RANK, "ia3")
    )
    ensure_weight_tying: bool | None = _tuning_option(
        None,
        "a tied embedding and head, trained in full, stay one weight; none: if modules_to_save names both",
        (*LOW_RANK, "ia3"),
    )
    train_layers: str | None = _tuning_option(
        None,
        "what is trained, by commas: last:2, first:1, numbers of layers, embed, head, norms",
        ("freeze",),
    )
    bottleneck_dim: int = _tuning_option(16, "width of the bottleneck", ("adapter",), at_least=1)
    n_virtual: int = _tuning_option(16, "number of virtual tokens", VIRTUAL, at_least=1)
    encoder: str = _tuning_option(
        "auto",
        "what makes the virtual tokens in training",
        ("prefix", "ptuning"),
        choices=("auto", "mlp", "lstm", "none"),
    )
    encoder_dim: int | None = _tuning_option(
        None, "width of the encoder; none: the model's", ("prefix", "ptuning"), at_least=1
    )
    base_bits: int | None = _tuning_option(
        None, "bits of a number of the frozen base; none: 32", LOW_RANK, choices=BITS
    )

    @property
    def alpha(self) -> float:
        """α as given; else what makes the scaling 2, of every rank or with `rslora` of the default one.

        There α stays as the rank grows, and the scaling falls by √rank (Kalajdzievski 2023, arXiv:2312.03732).
        """
        if self.lora_alpha is not None:
            return self.lora_alpha
        return 2 * math.sqrt(DEFAULT_RANK) if self.rslora else 2 * self.lora_rank

    @property
    def lora_scaling(self) -> float:
        """What BA is multiplied by."""
        return self.alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)

    @property
    def mergeable(self) -> bool:
        """Whether the method's effect can be merged into plain weights."""
        return self.tune not in ("adapter", *VIRTUAL)

    @property
    def virtual_positions(self) -> int:
        """How many positions virtual tokens take before each row."""
        return self.n_virtual if self.tune in VIRTUAL else 0

    def check_one_text_a_row(self, option: str) -> None:
        """Raise `UserError` if a script's option is true by which virtual tokens would stand before several texts."""
        if self.tune in VIRTUAL and getattr(self, option):
            raise UserError(
                f"--{option} true: the virtual tokens of --tune {self.tune} stand before one text a row; leave it out"
            )

    def problems(self) -> list[str]:
        """What is wrong with these options for any model, beyond ranges; one line each."""
        problems = super().problems()
        if self.tune == "freeze" and not self.train_layers:
            problems.append("--tune freeze: say by --train_layers what is trained, e.g. last:2")
        if self.lora_dropout and "lm_head" in (self.target_modules or ""):
            problems.append("--target_modules lm_head: cannot have dropout; set --lora_dropout 0")
        return problems
