"""Parameters, FLOPs a token, and memory for training and generation, by formula."""

import dataclasses
from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import declared, option, optional_copy
from minillm.checkpoint import huggingface, run_folder
from minillm.commands.bench.measure import vocab_size_of
from minillm.model import memory
from minillm.model.config import LARGEST_CONTEXT, PRESETS, ModelConfig, preset
from minillm.model.quant import BITS
from minillm.model.size import flops_per_token, n_parameters

SIZES = {"float32": 4, "bfloat16": 2}  # bytes of a number


# --dim, --n_layers and so on: ModelConfig's own fields, so that a field added there is an option here
ShapeOptions = optional_copy(
    ModelConfig,
    group="what of that shape differs",
    leave_out=("vocab_size", "dropout", "trained_seq_len"),
)


@dataclass(frozen=True)
class ShapeChoice(ShapeOptions):
    """Whose sums are to be done."""

    preset: str | None = option(None, "a preset's shape", tuple(PRESETS))
    model: str | None = option(None, "a run or model folder's shape, in place of a preset's")
    vocab_size: int | None = option(None, "ids; none: GPT-2's 50257, small presets less", at_least=1)
    seq_len: int | None = option(
        None, "tokens of a sequence; none: the model's context", at_least=1, at_most=LARGEST_CONTEXT
    )

    def problems(self) -> list[str]:
        if bool(self.preset) == bool(self.model):
            return ["give either --preset NAME or --model DIR"]
        if self.model and self.vocab_size:
            return [f"--vocab_size {self.vocab_size}: the model of --model has its own; leave it out"]
        return []

    def changes(self) -> dict[str, object]:
        """What was given of the shape by options of its own, such as --n_layers."""
        given = {name: getattr(self, name) for name in declared(ShapeOptions)}
        return {name: value for name, value in given.items() if value is not None}

    def shape(self) -> ModelConfig:
        """The shape that is chosen. Raises `UserError` for rows longer than its learned positions."""
        changes = self.changes()
        if not self.model:
            return preset(self.preset, vocab_size=self.vocab_size or vocab_size_of(self.preset), **changes)
        stored = huggingface.load_config(run_folder.resolve_checkpoint(self.model))
        shape = dataclasses.replace(stored, **changes)
        if shape.positions == "learned" and (self.seq_len or 0) > shape.max_seq_len:
            raise UserError(f"--seq_len {self.seq_len}: the model has learned {shape.max_seq_len} positions; lower it")
        return shape


@dataclass(frozen=True)
class Config(ShapeChoice):
    micro_batch_size: int = option(8, "sequences in one forward pass", at_least=1)
    lora_rank: int | None = option(
        None, "add the memory of training adapters of this rank on a frozen base", at_least=1
    )
    base_bits: int | None = option(None, "of that base; none: 32", BITS)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.base_bits is not None and self.lora_rank is None:
            problems.append(
                f"--base_bits {self.base_bits}: this is the base of adapters; give their rank too (--lora_rank)"
            )
        return problems


def run(config: Config) -> None:
    shape = config.shape()
    seq_len = config.seq_len or shape.max_seq_len
    for name, value in dataclasses.asdict(shape).items():
        if value is not None:
            print(f"  {name:<16}{value}")
    print(f"\nparameters          {n_parameters(shape):,}")
    flops = flops_per_token(shape, seq_len)
    print(f"FLOPs a token       {flops / 1e6:,.1f} M to train at {seq_len} tokens, {flops / 3e6:,.1f} M forward")
    _print_training(shape, config.micro_batch_size, seq_len)
    for name, size in SIZES.items():
        items = memory.generation(shape, seq_len, size)
        print(
            f"generation {name:<9}{_bytes(items['weights'])} of weights + {_bytes(items['cache'])} of cache "
            f"for {seq_len} tokens"
        )
    if config.lora_rank is not None:
        items = memory.adapter_training(shape, config.base_bits, config.lora_rank, config.micro_batch_size, seq_len)
        print(f"\nLoRA, {config.micro_batch_size} × {seq_len} tokens in bfloat16 with --checkpoint_activations")
        for name, n_bytes in {**items, "all": sum(items.values())}.items():
            print(f"  {name:<30}{_bytes(n_bytes):>10}")


def _print_training(shape: ModelConfig, rows: int, seq_len: int) -> None:
    """Memory for training all parameters with AdamW."""
    state = {**memory.weights(shape), **memory.optimizer_state(n_parameters(shape))}
    print(
        f"training            {_bytes(sum(state.values()))} of state: weights, gradients and AdamW's two moments, fp32"
    )
    for name, size in SIZES.items():
        whole = sum(memory.activations(shape, rows, seq_len, size).values())
        recomputed = sum(memory.recomputed_activations(shape, rows, seq_len, size).values())
        print(
            f"  + {name:<16}{_bytes(whole)} of activations at {rows} × {seq_len} tokens; "
            f"{_bytes(recomputed)} with --checkpoint_activations"
        )


def _bytes(n: float) -> str:
    """A size in GB, or in MB below a tenth of one."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
