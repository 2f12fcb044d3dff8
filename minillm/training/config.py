"""The options that all training scripts have, and what makes sense of their values."""

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minillm.base import bundled_files
from minillm.base.errors import UserError
from minillm.base.options import Options, differences, option
from minillm.checkpoint.train_state import fingerprint
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters
from minillm.training.optim import OPTIMIZERS


@dataclass(frozen=True)
class TrainingConfig(Options):
    """The options that every training script has; each script adds its own and changes defaults."""

    tune: ClassVar[str] = "full"  # all weights are trained; `TuningConfig` makes it an option
    rows_are_full: ClassVar[bool] = False  # whether each row has seq_len tokens, so that a step's memory is known

    # the run
    data: str = option("data/bundled", "what to train on", group="run")
    out: str = option("out/run", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    init_from: str | None = option(None, "start from the weights of this model folder or run", group="run")
    resume: str = option(
        "auto",
        "auto: go on from the newest whole checkpoint in --out; none: refuse to if there is one",
        group="run",
    )
    allow_data_change: bool = option(
        False, "resume although data, batch size, sequence length or seed changed", group="run"
    )
    seed: int = option(  # the order of the data uses 32 bits of it
        0, "of weights, data order and dropout", at_least=0, at_most=(1 << 32) - 1, group="run"
    )

    # what a step reads
    steps: int = option(1500, "optimizer steps of the whole run", at_least=1, group="length and batch")
    batch_size: int = option(16, "sequences per optimizer step, over all ranks", at_least=1, group="length and batch")
    micro_batch_size: int | None = option(
        None,
        "most sequences per forward pass and rank; none: 32; lower it when memory runs out",
        at_least=1,
        group="length and batch",
    )
    seq_len: int = option(128, "tokens per sequence", at_least=1, group="length and batch")

    # the optimizer
    optimizer: str | None = option(
        None,
        "muon (with AdamW for embeddings, head and norms) or adamw; none: muon, but adamw for an adapter",
        tuple(OPTIMIZERS),
        group="optimizer",
    )
    lr: float | None = option(
        None,
        "peak learning rate; none: "
        + ", ".join(f"{choice.lr}/√width for {kind}" for kind, choice in OPTIMIZERS.items() if choice.lr),
        at_least=0,
        group="optimizer",
    )
    warmup_steps: int | None = option(
        None, "steps of linear warm-up; none: 20, but at most a tenth of all steps", at_least=0, group="optimizer"
    )
    schedule: str = option("cosine", "shape of the learning rate", ("cosine", "wsd", "constant"), group="optimizer")
    min_lr_ratio: float = option(
        0.1,
        "final learning rate as a share of the peak",
        at_least=0,
        at_most=1,
        only_with=("schedule", ("cosine", "wsd")),
        group="optimizer",
    )
    decay_share: float = option(
        0.2,
        "share of all steps in which wsd decays",
        at_least=0,
        at_most=1,
        only_with=("schedule", ("wsd",)),
        group="optimizer",
    )
    weight_decay: float | None = option(
        None,
        "weight decay, on matrices only; none: 0.1, but 0 for ia3 and virtual tokens",
        at_least=0,
        group="optimizer",
    )
    grad_clip: float = option(1.0, "largest gradient norm; 0 switches clipping off", at_least=0, group="optimizer")
    dropout: float = option(
        0.0, "dropout on embeddings and both residual branches", at_least=0, below=1, group="optimizer"
    )

    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="machine")
    dtype: str = option(
        "auto",
        "of matrix products; auto: bfloat16 on GPUs that compute in it, else float32",
        ("auto", "float32", "bfloat16", "float16"),
        group="machine",
    )
    compile: bool = option(False, "compile the model with torch.compile", group="machine")
    checkpoint_activations: bool = option(
        False, "recompute each layer in the backward pass, to save memory", group="machine"
    )
    impl: str = option("auto", "implementation of the ops", ("auto", "triton", "torch", "reference"), group="machine")
    shard: str = option(
        "auto",
        "ranks that hold one copy of weights, gradients and optimizer together; auto: 1 if a rank has room for all, "
        "else the ranks of a machine, else as many as are needed",
        group="machine",
    )
    tensor_parallel: int = option(
        1, "ranks that divide each layer's heads and channels, and the tokens of a row", at_least=1, group="machine"
    )
    context_parallel: int = option(1, "ranks that divide the tokens of a row", at_least=1, group="machine")
    timeout_s: float = option(
        600.0,
        "of several ranks: seconds without a finished step after which a run that hangs is ended",
        at_least=1,
        at_most=1e6,
        group="machine",
    )

    # looking and saving
    eval_every: int = option(
        250, "steps between validations; 0: only at the end", at_least=0, group="validation and checkpoints"
    )
    eval_tokens: int = option(
        65536, "validation tokens, the first whole documents", at_least=1, group="validation and checkpoints"
    )
    save_every: int = option(
        500,
        "steps between checkpoints; the last step is always saved",
        at_least=0,
        group="validation and checkpoints",
    )
    save_in_background: bool = option(
        False,
        "train on while a checkpoint is written, from a copy in host memory",
        group="validation and checkpoints",
    )
    keep_last: int = option(2, "checkpoints to keep; 0: all", at_least=0, group="validation and checkpoints")
    max_bad_steps: int = option(
        20,
        "stop after so many steps in a row whose gradients are not finite",
        at_least=1,
        group="validation and checkpoints",
    )
    tensorboard: bool = option(False, "also write TensorBoard events", group="validation and checkpoints")
    profile: str | None = option(
        None,
        "record these steps, FIRST:LAST, by torch's profiler: a table of ops, and a trace in the run's folder",
        group="validation and checkpoints",
    )
    wandb: str | None = option(None, "also log to this project of Weights & Biases", group="validation and checkpoints")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.resume not in ("auto", "none"):
            step, out = Path(self.resume), Path(self.out)
            way = f"copy it there and begin with --resume auto: mkdir -p {out} && cp -r {step} {out}/"
            if step.parent.absolute() == out.absolute():  # it lies in --out already
                way = f"copy it there, with that folder as --out: mkdir -p {out}-2 && cp -r {step} {out}-2/"
            problems.append(
                f"--resume {step}: choose auto, which goes on from the newest checkpoint in --out, or none; to go on "
                f"from that step in another folder, {way}"
            )
        return problems

    @property
    def n_models(self) -> tuple[int, int]:
        """How many models of one size the run trains, and how many more it holds only to read them."""
        return 1, 0


@dataclass(frozen=True)
class NextTokenOptions(Options):
    """What is added to the loss of next tokens, for the scripts that train on that alone."""

    z_loss: float = option(
        0.0,
        "weight of log² Z of each token, added to the loss so that logits do not drift; usually 1e-4; 0: none",
        at_least=0,
        group="optimizer",
    )

    @property
    def loss_fingerprints(self) -> dict[str, str]:
        """For a run's fingerprints: it goes on with the loss that it began with."""
        return {"loss": fingerprint(self.z_loss)} if self.z_loss else {}


# Options that a resumed run may change: all but those that go into a fingerprint, and scripts' own about looking.
BOUND = {"data", "init_from", "batch_size", "seq_len", "seed"}
LOOKING = {"epochs", "eval_data", "eval_rows", "eval_tasks", "eval_limit"}
FREE = {field.name for field in dataclasses.fields(TrainingConfig)} - BOUND | LOOKING


def listed_files(data: str, name: str = "data") -> list[str]:
    """The files that --data names, separated by commas; name: that of another option. Raises `UserError` for none."""
    if Path(data).exists():  # one file, perhaps with a comma in its name
        return [data]
    paths = [path.strip() for path in data.split(",") if path.strip()]
    if not paths:
        raise UserError(f"--{name} {data}: names no file; give .jsonl or .json files, separated by commas")
    return paths


def check_files(training_config) -> None:
    """Raise `UserError` for files beside --data that do not exist, before --data is read, which takes long."""
    for name in ("eval_data", "eval_pairs", "eval_prompts", "replay_data"):
        named = getattr(training_config, name, None)
        for path in listed_files(named, name) if named is not None else ():
            if Path(path).exists():
                continue
            if not bundled_files.is_used(path):
                raise UserError(f"--{name} {path}: no such file")
            if not bundled_files.is_used(training_config.data):  # else it is written before it is read
                raise UserError(f"--{name} {path}: is not written yet; run python data/bundled.py")


def with_steps(training_config, n_of_epochs: int):
    """(the options with --steps filled in, how many samples the run reads, the option that sets its length).

    n_of_epochs: samples in --epochs passes. By --epochs a run reads just these, so that its last batch may be short; so
    too where --steps is the number that follows from --epochs, as in a run's options.toml. By any other --steps it
    reads whole batches. Raises `UserError` if both are given and do not agree.
    """
    length_option = "epochs" if training_config.steps is None else "steps"
    steps_of_epochs = math.ceil(n_of_epochs / training_config.batch_size)
    if training_config.steps in (None, steps_of_epochs):
        return dataclasses.replace(training_config, steps=steps_of_epochs), n_of_epochs, length_option
    if training_config.epochs != type(training_config).epochs:
        raise UserError(
            f"--epochs {training_config.epochs:g}: are {steps_of_epochs:,} steps, and --steps says "
            f"{training_config.steps:,}; leave one of them out"
        )
    return training_config, training_config.steps * training_config.batch_size, length_option


def for_later(training_config):
    """The options as a later run is to read them by --config: what was allowed once is not allowed for good."""
    return dataclasses.replace(training_config, allow_data_change=False)


def summary(cfg: TrainingConfig) -> str:
    """What a run will do, in one line, and below it what of its options is not the default."""
    start = f" from {cfg.init_from}" if cfg.init_from else ""
    size = f"{cfg.steps:,} steps of {cfg.batch_size} × {cfg.seq_len} tokens"
    line = f"{cfg.data} → {cfg.out}{start}: {size}; all options in {cfg.out}/options.toml"
    differing = f"not the defaults: {differences(cfg)}"
    wrapped = textwrap.fill(differing, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([line, wrapped, *_parts_that_never_come(cfg)])


def _parts_that_never_come(cfg: TrainingConfig) -> list[str]:
    """A line for a warm-up or a decay that the run is too short for; no refusal, since a trial may have few steps."""
    lines = []
    warmup, steps = cfg.warmup_steps, cfg.steps
    if warmup and warmup >= steps:
        reached = f"{100 * steps / warmup:.3g} % of the peak"
        lines.append(f"--warmup_steps {warmup}: all {steps} steps are warm-up; the learning rate ends at {reached}")
    if cfg.schedule == "wsd" and cfg.decay_share and round(cfg.decay_share * steps) == 0:
        lines.append(
            f"--decay_share {cfg.decay_share:g}: rounds to none of {steps} steps; the learning rate never falls"
        )
    return lines


def too_little(cfg: TrainingConfig, model_config: ModelConfig) -> list[str]:
    """A line for each default of pretraining, made for the smallest preset, that is far too little for this model.

    A length that was given is taken as it is meant.
    """
    lines = []
    seq_len, steps = cfg.seq_len, cfg.steps
    shortest = model_config.max_seq_len / 8
    if seq_len == TrainingConfig.seq_len and seq_len <= shortest:
        lines.append(f"rows of {seq_len} tokens teach little of a context of {model_config.max_seq_len:,}: --seq_len")
    a_parameter = steps * cfg.batch_size * seq_len / n_parameters(model_config)
    if steps == TrainingConfig.steps and cfg.init_from is None and a_parameter < 1:
        lines.append(
            f"{a_parameter:.2g} tokens a parameter, where 20 are usual (Hoffmann et al. 2022): see "
            f"--steps and --batch_size; python -m minillm plan --preset {cfg.preset} proposes both"
        )
    return lines
