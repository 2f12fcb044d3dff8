"""What every training script does around its loop: ranks and kernels, a run's folder, resuming, logging, saving, ends.

What is learned, and how, is in the scripts: data, model, optimizer, forward, loss, backward, clip, step, evaluation.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minillm.base import waiting
from minillm.base.device import autocast, peak_flops, pick_dtype
from minillm.base.errors import UserError
from minillm.base.json_door import read_json
from minillm.base.options import write_toml
from minillm.base.process import StopSignals, advise_on_memory, run_script
from minillm.checkpoint import run_folder
from minillm.datasets.batch import Batch, mean_span
from minillm.distributed import ranks as distributed
from minillm.distributed.diloco import Rounds
from minillm.distributed.hosts import check_options, differences
from minillm.distributed.ranks import Ranks
from minillm.distributed.watchdog import Watchdog
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import jinja_template
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import kernel_check, plot, resuming, saving, sharding, starting_model
from minillm.training.bad_steps import BadSteps
from minillm.training.config import TrainingConfig, check_files, for_later
from minillm.training.metrics import Log
from minillm.training.out_folder import OutFolder, check_out
from minillm.training.progress import Progress, StepProfiler, duration
from minillm.training.schedule import Schedule, lr_at, set_lr
from minillm.training.step import TrainState, seed_step
from minillm.tuning.options import TuningConfig

SIGPIPE = 13  # also where the system has no such signal


def run_training(main: Callable[[], int]) -> int:
    """`run_script` for a training script, whose ranks leave their group at an orderly end."""

    def main_and_end() -> int:
        status = main()
        distributed.stop()
        return status

    return run_script(main_and_end)


def begin(training_config: TrainingConfig) -> tuple[TrainingConfig, Ranks, Callable[[], None]]:
    """How every script begins: ranks joined, ops chosen, the check of our kernels started.

    Returns the options with the micro-batch filled in, the ranks, and a function that waits for the kernels' check and
    must be called before the first of them runs. Raises `UserError` on every rank if their options differ, and on rank
    0 for an --out in which no run can be, and for files to look at that are not there.
    """
    row_ranks = sharding.row_ranks(training_config)
    data_world = distributed.world_size() // row_ranks
    size = distributed.micro_batch(training_config.batch_size, training_config.micro_batch_size, data_world)
    ranks = distributed.start(training_config.device, training_config.timeout_s)
    ranks = dataclasses.replace(ranks, layout=sharding.asked_layout(training_config))
    if ranks.main:
        check_out(Path(training_config.out))
        check_files(training_config)
    dtype = pick_dtype(training_config.dtype, ranks.device)  # what auto means is up to the GPU
    check_options(ranks, dataclasses.asdict(training_config) | {"dtype": dtype})
    day = resuming.first_day(Path(training_config.out)) if ranks.main else 0
    jinja_template.tell_day(ranks.max(day))  # the same tokens on all ranks, and when the run goes on another day
    ops.select(training_config.impl)
    base_bits = training_config.base_bits if isinstance(training_config, TuningConfig) else None
    check = kernel_check.KernelCheck(ranks, base_bits=base_bits, dtype=dtype)
    return dataclasses.replace(training_config, micro_batch_size=size), ranks, check.settle


class Run:
    """One training run: its folder and lock, the checkpoint it goes on from, its clock, log and end."""

    def __init__(
        self,
        training_config: TrainingConfig,
        ranks: Ranks,
        fingerprints: dict[str, str],
        *,
        tokenizer: Tokenizer | None = None,
        next_command: str = "",
        logs: Sequence[Log] = (),
        **facts: object,
    ):
        """Take the folder and find the checkpoint to go on from, if any.

        fingerprints: of tokenizer, data, its order and architecture. tokenizer: is saved with the model. next_command:
        what to try after this run. logs: your own, whose `write` gets each row of metrics.jsonl on rank 0. facts: what
        else to record in checkpoints; a function is asked when one is saved.
        Raises `UserError` if another run has locked the folder, if its checkpoint has other fingerprints, or if there
        are any despite `--resume none`.
        """
        self.training_config = training_config
        self.ranks, self.device = ranks, ranks.device
        self.dtype = pick_dtype(training_config.dtype, ranks.device)
        self.fingerprints, self.facts = fingerprints, facts
        self.tokenizer, self.next_command = tokenizer, next_command
        self.folder = Path(training_config.out)
        self.rounds = Rounds(training_config, ranks, self.dtype)
        self.profiler = StepProfiler(training_config, ranks, self.print)
        self.progress: Progress | None = None
        self.out = OutFolder(self.folder) if ranks.main else None
        self.signals = StopSignals()
        self.stop_signal = 0

        if not ranks.agree(fingerprints):
            raise UserError(
                f"the processes have opened different data or models ({'; '.join(differences(ranks, fingerprints))}): "
                "were they changed or prepared again meanwhile, or do machines hold different copies? Start once more "
                "with the same files everywhere"
            )

        # the checkpoint to go on from
        self.saved: dict = {"step": 0, "time_s": 0.0}
        self.source = resuming.find_source(training_config, ranks, self.print)
        if self.source is not None:
            self.saved |= resuming.read_saved(self.source, training_config, ranks)
            resuming.take_recorded_threads(self.saved, ranks, self.print)
            for line in resuming.changes(self.source, self.saved, self._describe(0), training_config):
                self.print(line)
        self.start_step: int = self.saved["step"]
        (self.is_concluded, *_) = ranks.exchange(ranks.main and self.out.was_concluded(self.start_step))

        # what it logs and shows
        self.step, self.lr = self.start_step, math.nan
        self.bad_steps = BadSteps(training_config.max_bad_steps, ranks, self.rounds, self.print)
        self.begun = self.step_begun = time.monotonic()  # again when all is loaded (`start`)
        self.first_ended: float | None = None  # the first step compiles and warms up, so it says little of the others
        self.flops, self.peak = 0, None
        if self.out:
            run_folder.set_aside_later(self.folder, self.start_step, log=self.print)
            self.out.open_logs(self.start_step, training_config.tensorboard)
            if not self.finished:
                self.out.write("options.toml", partial(write_toml, for_later(training_config)))
                self.out.add_logs(training_config, logs, is_resumed=self.source is not None, log=self.print)
        self.saver = saving.Saver(ranks, training_config, tokenizer)
        self.progress = Progress(training_config.steps, self.start_step, ranks.main)
        self.watchdog = Watchdog(ranks.rank, ranks.world, training_config.timeout_s)

    # ---- before the loop

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: no step, nor what follows the last one (see `print_result`)."""
        steps_left = self.training_config.steps - self.start_step
        return steps_left < 0 or (steps_left == 0 and self.is_concluded)

    def print_finished(self, length: str = "steps") -> int:
        """What to print instead of training; length: the option that would make the run longer; returns 0, a status."""
        self.print(f"{self.folder} has finished its {self.start_step} steps; to go on, raise --{length}\n{self.draw()}")
        self.print(f"next: {self.next_command}")
        return 0

    def make_model(self, model_config: ModelConfig, init: Path | None = None) -> Transformer:
        """The model to train: resumed, started from `init`, or new. See `starting_model.make_model`."""
        model = starting_model.make_model(self.training_config, model_config, init, self.source, self.ranks)
        if init is not None:
            self._note_init(init)
        weights = self.source or init
        if weights is not None:
            self.print(f"weights from {weights}")
        return model

    def _note_init(self, init: Path) -> None:
        """Let checkpoints say with which model the run began, and an adapter's base be kept."""
        self.facts["started_from"] = self.saved.get("started_from") or os.path.relpath(init, self.folder)
        if self.training_config.tune == "full" or not self.ranks.main:
            return
        if not run_folder.note_user(init, self.folder):
            self.print(f"base: {init}; keep it: its run may delete old checkpoints, and the adapter needs this one")

    def baseline(self, name: str, measure: Callable[[], dict], asked: dict[str, str] | None = None) -> dict:
        """What `measure()` found before the first step of the run, on every rank; {} if that is lost.

        asked: of a value's name a fingerprint of what the model was asked for it. A resumed run reads the values from
        its folder, less those for which it was asked something else. Every rank measures, since a forward pass of a
        sharded model needs all of them; what rank 0 has found counts.
        """
        file, value, asked = self.folder / name, {}, asked or {}
        if self.source is None:  # a new run: do not use what an earlier one may have left
            text = json.dumps({**measure(), "asked": asked}, indent=2, ensure_ascii=False) + "\n"
            if self.out:
                self.out.write(name, lambda scratch: scratch.write_text(text, encoding="utf-8"))
        if self.out:
            value = read_json(file) if file.exists() else {}
        value = self.ranks.exchange(value)[0]
        before = value.pop("asked", {})
        others = [key for key in value if before.get(key) != asked.get(key)]
        if others:
            self.print(f"{file}: of other questions than now, and so not compared: {', '.join(others)}")
        return {key: found for key, found in value.items() if key not in others}

    def start(self, state: TrainState) -> TrainState:
        """Give `state` what the checkpoint holds (its model has been loaded before), and start clock and watchdog.

        Prints the size of the run. Raises `UserError` for what a save would fail by.
        """
        if self.source is not None:
            state.restore(self.source, self.saved)
        if self.device.type == "cpu":
            waiting.report(self.print)
        if self.out:
            saving.check(state, self.folder, self.training_config, self.tokenizer, self._describe(0))
        advise_on_memory(saving.memory_remedy(self.training_config))
        self.begun = time.monotonic()
        self.flops = starting_model.flops_per_token(state.model, self.training_config.seq_len)
        self.peak = peak_flops(self.device, self.dtype)
        size = f"{starting_model.describe_parameters(state.model)}, {self.flops / 1e6:.1f} MFLOP a token"
        self.print(f"{size}; {self.training_config.steps:,} steps; {ops.describe(self.device)}")
        self.watchdog.tick(self.start_step)  # everything is loaded: from here on steps must come in time
        return state

    # ---- the loop

    def steps(self, state: TrainState) -> Iterator[int]:
        """The numbers of the steps to do, the first being 1.

        Before each the learning rate and the seed of its dropout are set. After each the checkpoint is saved if it is
        due, and if a signal has asked any rank to stop, it is saved and no other step follows: see `status`. Raises
        `UserError` after --max_bad_steps steps in a row that were not applied; the last checkpoint is kept.
        """
        schedule = Schedule.of(self.training_config)
        for step in range(self.start_step + 1, self.training_config.steps + 1):
            self.step, self.step_begun = step, time.monotonic()
            self.lr = lr_at(step - 1, schedule)
            set_lr(state.optimizers, self.lr)
            seed_step(self.training_config.seed, step, self.ranks.rank)

            self.profiler.before(step)
            yield step
            self.profiler.after(step)

            if self.rounds.end_at(step):
                self._meet(state, step)
            if self.stop_signal:
                self.profiler.after(step, is_end=True)
                stopped = f"stopped by signal {self.stop_signal} after step {step}"
                self.print(f"{stopped}; the same command goes on from there")
                if self.out:
                    self.out.finish_logs()
                return
        self.close()

    def _meet(self, state: TrainState, step: int) -> None:
        """What all ranks do together after a step: agree on whether to end, and save."""
        # of any rank: a signal's number, whether the folder had to be made again, whether a save is under way, and
        # whether too many steps were not finite
        lost, writing, too_bad = self._folder_was_lost(step), self.saver.is_writing, bool(self.bad_steps.problem)
        self.stop_signal, lost, writing, too_bad = self.ranks.maxima(self.signals.requested, lost, writing, too_bad)
        with self.watchdog.patient():
            if lost:
                self.saver.abandon()
            elif too_bad:
                self.saver.rescue()
            elif not writing:
                self.saver.finish()
            if too_bad:
                self.bad_steps.end_run(self.folder)
            if self.stop_signal or lost or self.due(step, self.training_config.save_every):
                self.save(state)
            if self.stop_signal or step == self.training_config.steps:
                self.saver.finish()

    def _folder_was_lost(self, step: int) -> bool:
        if self.out is None or not self.out.make_again_if_lost(step):
            return False
        made_again = "was deleted or moved, so it is made again, with the metrics and a checkpoint of now"
        self.print(f"{self.folder}: {made_again}")
        return True

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Data positions of this rank's micro-batches in a step."""
        size = self.training_config.micro_batch_size
        return self.ranks.micro_batches(step - 1, self.training_config.batch_size, size)

    def autocast(self):
        """Context in which matrix products are computed in --dtype."""
        return autocast(self.device, self.dtype)

    def due(self, step: int, every: int) -> bool:
        """True every so many steps (0: never) and at the last; where ranks train alone, at their next exchange."""
        return self.rounds.due(step, every)

    def exchange(self, state: TrainState) -> None:
        """With --diloco_steps: the outer step, once the workers have taken so many steps alone."""
        if state.outer is not None and self.rounds.end_at(self.step):
            with self.watchdog.patient():  # a fast worker waits for the slow ones
                state.outer.exchange()

    def log_step(self, state: TrainState, n_tokens: float, batches: Sequence[Batch] = (), **values: float | None):
        """Log the step that `state` has taken, move the bar, tell the watchdog. n_tokens: computed by all ranks.

        batches: this rank's, on the host, if they may have documents, by which attention is counted; else it is counted
        over --seq_len tokens. values: what else the step's row of metrics.jsonl holds.
        """
        now = time.monotonic()
        self.bad_steps.count(self.step, state)
        speed = n_tokens / (now - self.step_begun)
        mfu, flops = None, self.flops  # of a token
        if self.peak is not None:
            if batches and batches[0].documents is not None:
                flops = starting_model.flops_per_token(state.model, mean_span(batches))
            mfu = speed * flops / (self.peak * self.ranks.world)
        row = {"step": self.step, "loss": state.loss, "lr": self.lr, "grad_norm": state.grad_norm}
        row |= {"z_loss": state.z_loss} if state.z_loss else {}
        row |= {"tokens_per_s": speed, "mfu": mfu, "time_s": self.seconds(), **values}
        self.record(**row)

        done, left_s = self.step - self.start_step, None
        if self.first_ended is None:
            self.first_ended = now
        if done > 1:
            left_s = (now - self.first_ended) / (done - 1) * (self.training_config.steps - self.step)
        with self._printing():
            self.progress.show(self.step, row, left_s)
        self.watchdog.tick(self.step)

    def record(self, step: int, **values: float | None) -> None:
        """Append a row to metrics.jsonl, and give it to all other logs."""
        for log in self.out.logs if self.out else ():
            log.write({"step": step, **values})

    def report(self, step: int, measure: Callable[[], dict[str, float]], of: str = "") -> dict[str, float]:
        """Record the scores that `measure` finds, print and return them; of: what they are scores of."""
        with self.watchdog.patient():  # it may take longer than a step
            scores = measure()
        self.record(step, **scores)
        listed = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        self.print(f"step {step}: {of}{' ' if of else ''}{listed}")
        return scores

    def save(self, state: TrainState) -> None:
        """Write `step-N/` whole or not at all, then delete all but the newest --keep_last, unless this step went wrong.

        With --save_in_background it is begun, and ends after a later step. Raises `UserError` on every rank if weights
        are not finite, since no later step could repair them.
        """
        asked = {name: fact() for name, fact in self.facts.items() if callable(fact)}
        described = self._describe(self.step) | asked | state.scales()
        self.saver.save(state, self.step, described, keeps_older=self.bad_steps.in_a_row > 0)

    def _describe(self, step: int) -> dict:
        """What a checkpoint records of the run."""
        return {
            "step": step,
            "time_s": round(self.seconds(), 3) if step else 0.0,
            "fingerprints": self.fingerprints,
            "config": dataclasses.asdict(self.training_config),
            "day": jinja_template.STARTED.toordinal(),
            "threads": torch.get_num_threads(),
            "world": self.ranks.world,
            "torch": torch.__version__,
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            **{name: fact for name, fact in self.facts.items() if not callable(fact)},
        }

    # ---- after the loop

    def close(self) -> None:
        """The loop has ended: close the bar, stop clock and watchdog, and let Ctrl-C end what follows at once."""
        self.took = self.seconds()
        advise_on_memory()
        self.progress.close()
        self.watchdog.pause()
        self.signals.restore()

    @property
    def status(self) -> int:
        """The script's exit status: 0, or 128 + the signal that stopped it."""
        return 128 + self.stop_signal if self.stop_signal else 0

    def print_result(self) -> None:
        """The last lines of a run: how long it took, where things are, what to do next.

        Whatever a script does after its steps it does before this: a run that is ended sooner does it when it is
        started again.
        """
        if self.out:
            self.out.conclude(self.step)
        checkpoint = self.folder / run_folder.step_name(self.step)
        self.print(f"trained for {duration(self.took)}; checkpoint {checkpoint}; {self.draw()}")
        self.print(f"next: {self.next_command}")

    def draw(self) -> str:
        """Draw the run's curves into its folder. Returns where, or why not."""
        return plot.drawn(self.folder) if self.ranks.main else ""

    # ---- at any time

    def print(self, text: str) -> None:
        """Print on rank 0, without tearing the bar."""
        with self._printing():
            if self.progress is not None:
                self.progress.print(text)
            elif self.ranks.main:
                print(text, flush=True)

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        """Output on a full disk, or that nobody reads, asks the run to stop as a signal does: it saves first."""
        try:
            yield
        except OSError:
            self.signals.requested = self.signals.requested or SIGPIPE

    def seconds(self) -> float:
        """Training time so far, over restarts."""
        return self.saved["time_s"] + time.monotonic() - self.begun
