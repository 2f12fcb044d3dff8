"""What the training scripts do around their loops: the run's folder, resuming, saving, logging.

The loops themselves are in the scripts.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minillm import UserError, checkpoint, config, distributed, files, huggingface, metrics, plot, run, tuning
from minillm.data import parse_mixture
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LIMITS = {  # (least, most) that makes sense: options
    (1, 1 << 40): ("steps", "seq_len", "eval_tokens", "max_bad_steps"),
    (0, (1 << 32) - 1): ("seed",),  # the order of the data uses 32 bits of it
    (0, 1 << 40): ("warmup_steps", "save_every", "eval_every", "keep_last"),
    (0.0, 1e38): ("lr", "weight_decay", "grad_clip"),
    (0.0, 1.0): ("min_lr_ratio", "decay_share"),
    (1.0, 1e6): ("timeout_s",),
    (0.001, 1e6): ("epochs",),
}


def check_options(cfg: config.TrainingConfig) -> None:
    """Raise one `UserError` listing all options whose values make no sense."""
    problems = [
        f"--{name} {value}: choose one from {least} to {most}"
        for (least, most), names in LIMITS.items()
        for name in names
        if (value := getattr(cfg, name, None)) is not None and not least <= value <= most  # NaN is never within
    ]
    problems += cfg.tuning_problems() if isinstance(cfg, tuning.TuningConfig) else []
    if problems:
        raise UserError("; ".join(problems))


class Run:
    """One training run: its folder, its lock, and where it stands."""

    def __init__(
        self, cfg: config.TrainingConfig, ranks: distributed.Ranks, fingerprints: dict[str, str], **facts: object
    ):
        """Take the folder and find the checkpoint to go on from, if any.

        fingerprints: of tokenizer, data, its order and architecture. facts: what else to record in checkpoints.
        Raises `UserError` if another run has locked the folder, if its checkpoint has other fingerprints, or if
        there are checkpoints despite `--resume none`.
        """
        self.cfg, self.ranks, self.fingerprints, self.facts = cfg, ranks, fingerprints, facts
        self.folder = Path(cfg.out)
        self.lock = run.RunLock(self.folder) if ranks.main else None
        self.signals = run.StopSignals()
        self.source: Path | None = None
        self.state: dict = {"step": 0, "time_s": 0.0}
        self.bad_steps = 0
        if ranks.main:
            run.clean_stale(self.folder)
            self.source = self._choose_source()
        found = ranks.max(0 if self.source is None else run.step_of(self.source))
        if found and self.source is None:
            at = run.resume_from(self.folder, cfg.resume)  # rank 0 has verified it
            self.source = at if at.name == run.step_name(found) else at / run.step_name(found)
        if self.source is not None:
            self.state = checkpoint.read_state(self.source)
            now = self._describe(0)
            for line in checkpoint.compare_fingerprints(self.state, now, cfg.allow_data_change, self.source):
                self.say(line)
        self.start_step: int = self.state["step"]
        if ranks.main:
            run.set_aside_later(self.folder, self.start_step, log=self.say)
        self.begun = time.monotonic()  # again when all is loaded (`restore`)
        self.first_ended: float | None = None  # the first step compiles and warms up, so it says little of the others
        if ranks.main:
            self.log = run.MetricsLog(self.folder / "metrics.jsonl", self.start_step)
        self.board = None
        if cfg.tensorboard and ranks.main:
            self.board = metrics.tensorboard_writer(self.folder / "tensorboard", self.start_step)
        self.progress = metrics.Progress(cfg.steps, self.start_step, ranks.main)
        self.watchdog = distributed.Watchdog(ranks, cfg.timeout_s)

    def _choose_source(self) -> Path | None:
        """The checkpoint that --resume means, verified; None for a new run."""
        if self.cfg.resume == "none":
            if run.step_folders(self.folder):
                raise UserError(
                    f"--resume none: {self.folder} already holds checkpoints; choose another --out, delete it, "
                    "or go on with --resume auto"
                )
            return None
        if self.cfg.resume == "auto":
            return run.newest_checkpoint(self.folder, log=self.say)
        named = run.resolve_checkpoint(self.cfg.resume, log=self.say)  # also if unused below: it may be mistyped
        if run.resume_from(self.folder, self.cfg.resume) != self.folder:
            return named
        self.say(f"--resume {named}: {self.folder} has checkpoints of its own by now, and goes on from them")
        return run.newest_checkpoint(self.folder, log=self.say)

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)

    @property
    def finished(self) -> bool:
        return self.start_step >= self.cfg.steps

    def seconds(self) -> float:
        """Training time so far, over restarts."""
        return self.state["time_s"] + time.monotonic() - self.begun

    def check_disk(self, model: Transformer) -> None:
        """Refuse, before the first step, a disk that cannot hold the checkpoints: weights and two moments in fp32 for
        each trained parameter."""
        if self.ranks.main:
            weights = 4 * tuning.n_trained(model)
            held = len(run.step_folders(self.folder))
            copies = max(1, (self.cfg.keep_last or 1) + 1 - held)
            files.check_writable(self.folder, copies * 3 * weights, largest_file=2 * weights)

    def _describe(self, step: int) -> dict:
        return {
            "step": step,
            "time_s": round(self.seconds(), 3) if step else 0.0,
            "fingerprints": self.fingerprints,
            "config": dataclasses.asdict(self.cfg),
            "threads": torch.get_num_threads(),
            "world": self.ranks.world,
            "torch": torch.__version__,
            **self.facts,
        }

    def restore(self, model: Transformer, optimizers: list, scaler: torch.amp.GradScaler) -> None:
        """Give optimizers and scaler their state from the checkpoint (the model has been loaded from it before)."""
        if self.source is not None:
            checkpoint.restore_optimizers(self.source, optimizers, dict(model.named_parameters()))
            if scaler.is_enabled() and self.state["scaler"]:  # empty if it was saved without --dtype float16
                scaler.load_state_dict(self.state["scaler"])
        if self.ranks.device.type == "cpu" and (busy := distributed.busy_cores()):
            self.say(busy)
        self.watchdog.tick(self.start_step)  # everything is loaded: from here on steps must come in time
        self.begun = time.monotonic()

    def save(self, step: int, model: Transformer, optimizers: list, scaler, tokenizer: Tokenizer | None) -> None:
        """Write `step-N/` whole or not at all, then delete all but the newest --keep_last, unless this step went wrong.

        Raises `UserError` on every rank if weights are not finite, since no later step could repair them.
        """
        if not torch.stack([torch.isfinite(p).all() for p in model.parameters()]).all():
            raise UserError(
                f"step {step}: weights are not finite any more, so they are not saved; go on from an earlier "
                f"checkpoint in {self.folder} (--resume PATH) with a lower --lr"
            )
        if self.ranks.main:
            state, adapter = self._describe(step) | {"scaler": scaler.state_dict()}, tuning.active_adapter(model)
            if adapter:
                write_model = partial(tuning.save_adapter, adapter)
            else:
                ids = tokenizer.special_ids if tokenizer else None
                write_model = partial(huggingface.save_model, model, special_ids=ids)
            checkpoint.save(
                self.folder,
                step,
                write_model=write_model,
                tokenizer=tokenizer,
                template=getattr(self.cfg, "template", None),
                state=state,
                optimizers=optimizers,
                named_parameters=dict(model.named_parameters()),
            )
            if not self.bad_steps:
                run.prune(self.folder, self.cfg.keep_last)
        self.ranks.barrier()

    def finish_step(self, row: dict, speed: float, peak: float | None, flops: int) -> None:
        """Log a step and move the bar. row: step, loss, lr, grad_norm; speed: tokens a second; flops: of one token."""
        mfu = None if peak is None else speed * flops / (peak * self.ranks.world)
        row |= {"tokens_per_s": speed, "mfu": mfu, "time_s": self.seconds()}
        self.record(row)
        now, done = time.monotonic(), row["step"] - self.start_step
        if self.first_ended is None:
            self.first_ended = now
        left_s = (now - self.first_ended) / (done - 1) * (self.cfg.steps - row["step"]) if done > 1 else None
        self.progress.show(row["step"], row, left_s)
        self.watchdog.tick(row["step"])

    def due(self, step: int, every: int) -> bool:
        """True every so many steps (0: never) and at the last."""
        return step == self.cfg.steps or (every > 0 and step % every == 0)

    def record(self, row: dict) -> None:
        """Append a row to metrics.jsonl (and TensorBoard)."""
        if not self.ranks.main:
            return
        self.log.write(row)
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, row["step"])

    def check_finite(self, step: int, loss: float, grad_norm: float) -> bool:
        """False if this step must not be applied; too many of those in a row end the run, its last checkpoint kept."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        self.progress.say(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: not applied ({self.bad_steps} in a row)"
        )
        if self.bad_steps >= self.cfg.max_bad_steps:
            before = run.step_folders(self.folder)
            again = f"go on from a checkpoint before that (--resume {before[0]})" if before else "begin again"
            raise UserError(
                f"step {step}: {self.bad_steps} steps in a row were not finite; lower --lr, raise --warmup_steps or "
                f"choose --dtype float32, and {again}"
            )
        return False

    def close(self) -> None:
        """The loop has ended: close the bar, stop clock and watchdog, and let Ctrl-C end what follows at once."""
        self.took = self.seconds()
        self.progress.close()
        self.watchdog.pause()
        self.signals.restore()

    def once(self, name: str, measure):
        """The result of `measure()` on rank 0 at the start of the run; a resumed run reads it from its folder."""
        file, value = self.folder / name, None
        if self.ranks.main:
            if self.source is None:  # a new run: do not use what an earlier one may have left
                files.write_json_atomically(file, measure())
            value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        self.ranks.barrier()
        return value

    def newest(self) -> Path:
        """The checkpoint saved last."""
        return run.step_folders(self.folder)[-1]

    def draw(self) -> str:
        """Draw the run's curves into its folder. Returns where, or why not."""
        if not self.ranks.main:
            return ""
        try:
            return f"curve {plot.draw([self.folder], self.folder / 'curve.png')}"
        except UserError as problem:  # matplotlib is optional: without it the run has still succeeded
            return f"no curve: {problem}"

    def stop_requested(self) -> int:
        """The signal that asked any rank to stop, or 0."""
        return self.ranks.max(self.signals.requested)


def autocast(device: torch.device, dtype: torch.dtype):
    """Context for matrix products in `dtype` and sensitive ops in fp32; for float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 on CUDA, else float32."""
    if name != "auto":
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's dropout a function of (seed, step, rank), so that no random state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def schedule(cfg: config.TrainingConfig) -> dict:
    """The options of a configuration that `optim.lr_at` takes."""
    return dict(
        lr=cfg.lr,
        steps=cfg.steps,
        warmup=min(20, cfg.steps // 10) if cfg.warmup_steps is None else cfg.warmup_steps,
        schedule=cfg.schedule,
        min_ratio=cfg.min_lr_ratio,
        decay=cfg.decay_share,
    )


def fingerprint(*parts) -> str:
    """Short SHA-256 of any values that JSON can represent (others by `str`)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_memory(cfg, shape: config.ModelConfig, device: torch.device) -> None:
    """Refuse a model that this machine's memory cannot hold, since the system would end the run without a word.

    On a CPU, and without activations: weights alone for a frozen base, else gradients and the optimizer's state too.
    """
    full = cfg.tune == "full"
    each = 12.0 if full else (cfg.base_bits or 32) / 8  # bytes a parameter; AdamW's two moments in place of one: 16
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, there = each * shape.n_parameters() * ranks_here, files.memory_bytes()
    if device.type == "cpu" and needed > there:
        what = "weights, gradients and optimizer" if full else "the base's weights"
        fewer = ", or train few parameters over it (--tune lora --base_bits 4)" if full and cfg.init_from else ""
        raise UserError(
            f"{shape.n_parameters():,} parameters need at least {needed / 1e9:.1f} GB ({what}), but this machine has "
            f"{there / 1e9:.1f}, swap included: choose a smaller model{fewer}"
        )


def init_is_gone(cfg) -> bool:
    """Whether --init_from names a model that does not exist (any more)."""
    return bool(cfg.init_from) and not Path(cfg.init_from).exists()


def find_init(cfg) -> Path | None:
    """The model folder of --init_from, checked; None without one.

    If it is gone, a run that started from it and trains all weights takes shape and tokenizer from its own checkpoint.
    """
    if not cfg.init_from:
        return None
    begun = cfg.tune == "full" and cfg.resume != "none" and run.step_folders(cfg.out)
    if begun and init_is_gone(cfg):
        at = run.resume_from(cfg.out, cfg.resume)
        own = run.resolve_checkpoint(at, log=lambda line: None)  # `Run` reports the broken ones
        if checkpoint.read_state(own)["config"]["init_from"] == cfg.init_from:
            return own
    return run.resolve_checkpoint(cfg.init_from)


def check_tokenizer(model: Path, data: str) -> None:
    """Raise `UserError` unless the data was prepared with the model folder's tokenizer; a raw .bin is not checked."""
    first = parse_mixture(data)[0][0]
    if first.is_dir() and Tokenizer.load(first).sha256 != Tokenizer.load(model).sha256:
        raise UserError(
            f"--init_from {model} has another tokenizer than {data}; prepare the data with the model's own: "
            f"data/prepare.py --tokenizer {model}"
        )


def clip(model: torch.nn.Module, optimizers: list, scaler: torch.amp.GradScaler, limit: float) -> float:
    """Undo the loss scale, clip the gradient's norm to `limit` (0: no clipping), and return the norm before that."""
    if scaler.is_enabled():
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    known = float(norm)
    if 0 < limit < known + 1e-6:  # else torch's clip_grad_norm_ would multiply all gradients by 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return known
