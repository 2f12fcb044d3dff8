"""What the training scripts do around their loops: the run's folder, resuming, saving, logging.

The loops themselves are in the scripts.
"""

import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.device import busy_cores
from minillm.base.errors import UserError
from minillm.base.options import write_toml
from minillm.base.process import RunLock, StopSignals
from minillm.checkpoint import huggingface, run_folder, train_state
from minillm.distributed.ranks import Ranks
from minillm.distributed.watchdog import Watchdog
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import plot, progress, starting_model
from minillm.training.config import TrainingConfig
from minillm.tuning import peft_format
from minillm.tuning.adapter import active_adapter

BOUND = {"data", "init_from", "batch_size", "seq_len", "seed"}  # options that go into a fingerprint
FREE = {f.name for f in dataclasses.fields(TrainingConfig)} - BOUND | {"epochs", "eval_data", "eval_rows"}


class Run:
    """One training run: its folder, its lock, and where it stands."""

    def __init__(self, cfg: TrainingConfig, ranks: Ranks, fingerprints: dict[str, str], **facts: object):
        """Take the folder and find the checkpoint to go on from, if any.

        fingerprints: of tokenizer, data, its order and architecture. facts: what else to record in checkpoints.
        Raises `UserError` if another run has locked the folder, if its checkpoint has other fingerprints, or if
        there are checkpoints despite `--resume none`.
        """
        self.cfg, self.ranks, self.fingerprints, self.facts = cfg, ranks, fingerprints, facts
        self.folder = Path(cfg.out)
        self.lock = RunLock(self.folder) if ranks.main else None
        self.signals = StopSignals()
        self.source: Path | None = None
        self.state: dict = {"step": 0, "time_s": 0.0}
        self.bad_steps = 0
        if ranks.main:
            run_folder.clean_stale(self.folder)
            self.source = self._choose_source()
        found = ranks.max(0 if self.source is None else run_folder.step_of(self.source))
        if found and self.source is None:
            at = run_folder.resume_from(self.folder, cfg.resume)  # rank 0 has verified it
            self.source = at if at.name == run_folder.step_name(found) else at / run_folder.step_name(found)
        if self.source is not None:
            self.state = train_state.read_state(self.source)
            now = self._describe(0)
            for line in train_state.compare_fingerprints(self.state, now, cfg.allow_data_change, self.source, FREE):
                self.say(line)
        self.start_step: int = self.state["step"]
        if ranks.main:
            run_folder.set_aside_later(self.folder, self.start_step, log=self.say)
            if not self.finished:
                files.write_file(self.folder / "options.toml", partial(write_toml, cfg))
        self.begun = time.monotonic()  # again when all is loaded (`restore`)
        self.first_ended: float | None = None  # the first step compiles and warms up, so it says little of the others
        if ranks.main:
            self.log = progress.MetricsLog(self.folder / "metrics.jsonl", self.start_step)
        self.board = None
        if cfg.tensorboard and ranks.main:
            self.board = progress.tensorboard_writer(self.folder / "tensorboard", self.start_step)
        self.progress = progress.Progress(cfg.steps, self.start_step, ranks.main)
        self.watchdog = Watchdog(ranks.rank, ranks.world, cfg.timeout_s)

    def _choose_source(self) -> Path | None:
        """The checkpoint that --resume means, verified; None for a new run."""
        if self.cfg.resume == "none":
            if run_folder.step_folders(self.folder):
                raise UserError(
                    f"--resume none: {self.folder} already holds checkpoints; choose another --out, delete it, "
                    "or go on with --resume auto"
                )
            return None
        if self.cfg.resume == "auto":
            return run_folder.newest_checkpoint(self.folder, log=self.say)
        named = run_folder.resolve_checkpoint(self.cfg.resume, log=self.say)  # also if unused below: it may be mistyped
        if run_folder.resume_from(self.folder, self.cfg.resume) != self.folder:
            return named
        self.say(f"--resume {named}: {self.folder} has checkpoints of its own by now, and goes on from them")
        return run_folder.newest_checkpoint(self.folder, log=self.say)

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
            weights = 4 * starting_model.n_trained(model)
            held = len(run_folder.step_folders(self.folder))
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
            train_state.restore_optimizers(self.source, optimizers, dict(model.named_parameters()))
            if scaler.is_enabled() and self.state["scaler"]:  # empty if it was saved without --dtype float16
                scaler.load_state_dict(self.state["scaler"])
        if self.ranks.device.type == "cpu" and (busy := busy_cores()):
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
            state, adapter = self._describe(step) | {"scaler": scaler.state_dict()}, active_adapter(model)
            if adapter:
                write_model = partial(peft_format.save_adapter, adapter)
            else:
                ids = tokenizer.special_ids if tokenizer else None
                write_model = partial(huggingface.save_model, model, special_ids=ids)

            def write_model_and_options(folder: Path) -> None:
                write_model(folder)
                write_toml(self.cfg, folder / "resume" / "options.toml")

            train_state.save(
                self.folder,
                step,
                write_model=write_model_and_options,
                tokenizer=tokenizer,
                template=getattr(self.cfg, "template", None),
                state=state,
                optimizers=optimizers,
                named_parameters=dict(model.named_parameters()),
            )
            if not self.bad_steps:
                run_folder.prune(self.folder, self.cfg.keep_last)
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
            before = run_folder.step_folders(self.folder)
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
        return run_folder.step_folders(self.folder)[-1]

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
