"""The options that all training scripts have, and what makes sense of their values."""

from dataclasses import dataclass

from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.training.optim import OPTIMIZERS
from minillm.tuning import options


@dataclass(frozen=True)
class TrainingConfig:
    """The options that every training script has; each script adds its own and changes defaults."""

    data: str = option("data/bundled", "what to train on")
    out: str = option("out/run", "the run's folder: checkpoints, metrics.jsonl, curve.png")
    init_from: str | None = option(None, "start from the weights of this model folder or run")
    resume: str = option(
        "auto", "auto: go on from the newest whole checkpoint in --out; none: refuse to if there is one"
    )
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
        tuple(OPTIMIZERS),
    )
    lr: float | None = option(
        None,
        "peak learning rate; none: "
        + ", ".join(f"{choice.lr}/√width for {kind}" for kind, choice in OPTIMIZERS.items() if choice.lr),
    )
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


LIMITS = {  # (least, most) that makes sense: options
    (1, 1 << 40): ("steps", "seq_len", "eval_tokens", "max_bad_steps"),
    (0, (1 << 32) - 1): ("seed",),  # the order of the data uses 32 bits of it
    (0, 1 << 40): ("warmup_steps", "save_every", "eval_every", "keep_last"),
    (0.0, 1e38): ("lr", "weight_decay", "grad_clip"),
    (0.0, 1.0): ("min_lr_ratio", "decay_share"),
    (1.0, 1e6): ("timeout_s",),
    (0.001, 1e6): ("epochs",),
}


def check_options(cfg: TrainingConfig) -> None:
    """Raise one `UserError` listing all options whose values make no sense."""
    problems = [
        f"--{name} {value}: choose one from {least} to {most}"
        for (least, most), names in LIMITS.items()
        for name in names
        if (value := getattr(cfg, name, None)) is not None and not least <= value <= most  # NaN is never within
    ]
    problems += cfg.tuning_problems() if isinstance(cfg, options.TuningConfig) else []
    if problems:
        raise UserError("; ".join(problems))
