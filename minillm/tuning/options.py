"""The options of training few parameters, for a command line or for Python."""

import math
from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.model.quant import BITS

# Peak learning rates of AdamW for an adapter, times the width: near the best of those tried at 128 (docs/tuning.md).
# By 1/width LoRA's is 1.6e-4 and IA3's 3e-3 at 4096, about what others take there (Chinese-LLaMA; arXiv:2205.05638).
TUNING_LR = {"lora": 0.64, "dora": 0.64, "ia3": 12.8, "adapter": 1.9, "prefix": 12.8, "prompt": 12.8, "ptuning": 1.9}

VIRTUAL = ("prefix", "prompt", "ptuning")  # methods that train virtual tokens
METHODS = ("full", "freeze", "lora", "dora", "ia3", "adapter", *VIRTUAL)


@dataclass(frozen=True)
class TuningConfig:
    """The options of training few parameters (docs/tuning.md); training scripts have them beside `TrainingConfig`'s."""

    tune: str = option("full", "what is trained: everything, some layers, or few new parameters", METHODS)
    lora_rank: int = option(8, "lora, dora: columns of A and B")
    lora_alpha: float | None = option(None, "lora, dora: the update is scaled by alpha/rank; none: 2 · rank")
    lora_dropout: float = option(0.0, "lora, dora: dropout before A")
    rslora: bool = option(False, "lora, dora: scale by alpha/√rank instead")
    target_modules: str | None = option(
        None, "modules to adapt, by commas; none: all seven linears of a layer (ia3: k_proj,v_proj,down_proj)"
    )
    modules_to_save: str | None = option(
        None, "lora, dora, ia3: modules trained in full besides, e.g. embed_tokens,lm_head"
    )
    ensure_weight_tying: bool | None = option(
        None, "a tied embedding and head, trained in full, stay one weight; none: if modules_to_save names both"
    )
    train_layers: str | None = option(
        None, "freeze: what is trained, by commas: last:2, first:1, numbers of layers, embed, head, norms"
    )
    bottleneck_dim: int = option(16, "adapter: width of the bottleneck")
    n_virtual: int = option(16, "prefix, prompt, ptuning: number of virtual tokens")
    encoder: str = option(
        "auto", "prefix, ptuning: what makes the virtual tokens in training", ("auto", "mlp", "lstm", "none")
    )
    encoder_dim: int | None = option(None, "prefix, ptuning: width of the encoder; none: the model's")
    base_bits: int | None = option(None, "lora, dora: the frozen base in 16 bits, or quantized to 8 or 4; none: fp32")

    @property
    def lora_scaling(self) -> float:
        """What BA is multiplied by."""
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)

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

    def tuning_problems(self) -> list[str]:
        """What is wrong with these options for any model; one line each."""
        low_rank = ("lora", "dora")
        known = {  # option: the methods that use it
            **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "rslora", "base_bits"), low_rank),
            **dict.fromkeys(("target_modules", "modules_to_save", "ensure_weight_tying"), (*low_rank, "ia3")),
            "train_layers": ("freeze",),
            "bottleneck_dim": ("adapter",),
            "n_virtual": VIRTUAL,
            **dict.fromkeys(("encoder", "encoder_dim"), ("prefix", "ptuning")),
        }
        problems = [
            f"--{name} {value}: means nothing with --tune {self.tune}; leave it out, or choose {' or '.join(methods)}"
            for name, methods in known.items()
            if (value := getattr(self, name)) != getattr(TuningConfig, name) and self.tune not in methods
        ]
        sizes = {name: getattr(self, name) for name in ("lora_rank", "bottleneck_dim", "n_virtual", "encoder_dim")}
        problems += [f"--{name} {size}: at least 1" for name, size in sizes.items() if size is not None and size < 1]
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"--lora_dropout {self.lora_dropout}: choose one from 0 to below 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            problems.append(f"--lora_alpha {self.lora_alpha}: choose one above 0")
        if self.base_bits not in (None, *BITS):
            problems.append(f"--base_bits {self.base_bits}: choose one of {', '.join(map(str, BITS))}")
        if self.tune == "freeze" and not self.train_layers:
            problems.append("--tune freeze: say by --train_layers what is trained, e.g. last:2")
        if self.lora_dropout and "lm_head" in (self.target_modules or ""):
            problems.append("--target_modules lm_head: cannot have dropout; set --lora_dropout 0")
        return problems
