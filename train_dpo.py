"""Let a model prefer what people prefer: direct preference optimization (DPO) and its family.

    python train_dpo.py                                        newest checkpoint of out/sft, bundled preferences
    python train_dpo.py --data pairs.jsonl --init_from out/my-sft --out out/my-dpo --beta 0.3
    python train_dpo.py --loss simpo --out out/simpo           without a reference policy
    python train_dpo.py --loss kto --data labels.jsonl         single answers, each good or bad
    torchrun --nproc_per_node 8 train_dpo.py --data pairs.jsonl --init_from Qwen2.5-0.5B-Instruct --batch_size 64

Data: rows of prompt, chosen and rejected, as texts or messages; ranked answers, scores and hh-rlhf's conversations too
(docs/en/dpo.md). Each loss compares how likely the policy makes both answers, most of them beside how likely the model
it started from, the reference, makes them. Run the same command again to go on where it stopped.
"""

import dataclasses
import shlex
import signal
import sys
from dataclasses import dataclass
from typing import NamedTuple

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch import Tensor

from data import bundled
from data.world.reader import reward
from minillm.alignment import reference as reference_policy
from minillm.alignment.log_probs import Policy
from minillm.alignment.options import ReplayConfig, read_preferences
from minillm.alignment.preferences.held_out import HeldOut
from minillm.alignment.preferences.losses import DIVERGENCES, LOSSES, losses_knowing
from minillm.alignment.preferences.step import (
    Measured,
    Objective,
    Totals,
    counts,
    loss_of,
    summed_u_of_mismatched,
    z_of,
)
from minillm.alignment.reference import Reference
from minillm.alignment.replay import Replay
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import option, unused
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.preferences import Answers, PreferenceRows, unpaired
from minillm.distributed.hosts import once_a_host
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.evaluation.task_scores import TaskScores, tasks_to_ask
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import summary, with_steps
from minillm.training.optim import optimizers_of
from minillm.training.run import Run, begin, run_training
from minillm.training.step import Ahead, TrainState


def _loss_option(name: str, default, help: str, **rules):
    """An option that only some losses know."""
    return option(default, help, only_with=("loss", losses_knowing(name)), group="preferences", **rules)


@dataclass(frozen=True)
class Config(ReplayConfig):
    USUAL_REPLAY_WEIGHT = 0.5
    USUAL_REPLAY_ROWS = 16

    data: str = option(
        f"{bundled_files.FOLDER}/preferences_train.jsonl",
        "preference file(s), separated by commas: .jsonl .json (.gz) .parquet .csv",
        group="run",
    )
    out: str = option("out/dpo", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    steps: int | None = option(
        None, "optimizer steps; none: as many as --epochs need", at_least=1, group="length and batch"
    )
    epochs: float | None = option(
        None,
        "passes over the data, if --steps is not given; none: 1, over the bundled pairs 0.25",
        at_least=0.001,
        at_most=1e6,
        group="length and batch",
    )
    batch_size: int = option(16, "prompts per optimizer step, over all ranks", at_least=1, group="length and batch")
    optimizer: str | None = option("adamw", "adamw, or muon for matrices", ("adamw", "muon"), group="optimizer")
    lr: float | None = option(
        None,
        "peak learning rate; none: 1/80 of what pretraining takes, or 1/10 of what suits the adapter",
        at_least=0,
        group="optimizer",
    )
    weight_decay: float | None = option(0.0, "weight decay, on matrices only", at_least=0, group="optimizer")
    eval_every: int = option(
        100, "steps between looks at held-out pairs; 0: only at the end", at_least=0, group="validation and checkpoints"
    )
    label_noise: float = option(
        0.0, "share of pairs whose answers change places, to see what noise does", at_least=0, at_most=0.5, group="data"
    )
    eval_pairs: str | None = option(
        None, "held-out preferences to look at; none: the bundled ones, if bundled data is used", group="data"
    )

    # the loss
    loss: str = option("sigmoid", "what is minimized (docs/en/dpo.md)", tuple(LOSSES), group="preferences")
    beta: float | None = _loss_option(
        "beta",
        None,
        "how closely the policy keeps to the reference; orpo: weight of the odds; none: 0.1, simpo 2",
        above=0,
    )
    sft_weight: float | None = option(
        None, "weight of the chosen answers' loss; none: 1, but 0 for simpo and kto", at_least=0, group="preferences"
    )
    label_smoothing: float | None = _loss_option(
        "label_smoothing",
        None,
        "share of pairs whose labels are thought wrong; none: 0.1, exo_pair 0.001, cpo 0",
        at_least=0,
        below=0.5,
    )
    gamma: float | None = _loss_option("gamma", None, "margin that the chosen answer must have; none: 1", at_least=0)
    tau: float | None = _loss_option("tau", None, "temperature of the mixture; none: 0.05", above=0)
    divergence: str | None = _loss_option(
        "divergence", None, "what keeps the policy near the reference; none: reverse_kl", choices=DIVERGENCES
    )
    good_weight: float = _loss_option("good_weight", 1.0, "weight of good answers", at_least=0)
    bad_weight: float = _loss_option("bad_weight", 1.0, "weight of bad answers", at_least=0)

    @property
    def is_bundled(self) -> bool:
        return bundled_files.is_file(self.data, "preferences_train.jsonl")

    @property
    def passes(self) -> float:
        """--epochs, decided."""
        return self.epochs or (0.25 if self.is_bundled else 1.0)

    @property
    def held_out_pairs(self) -> str | None:
        """The file(s) of held-out preferences, if there are any."""
        return self.eval_pairs or (f"{bundled_files.FOLDER}/preferences_heldout.jsonl" if self.is_bundled else None)

    @property
    def n_models(self) -> tuple[int, int]:
        """The policy, and a reference for a loss that has one."""
        return 1, int(self.has_own_reference and LOSSES[self.loss].has_reference)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            problems.append("--label_smoothing 0: exo_pair compares with smoothed labels; give a number above 0")
        if self.loss == "sft" and self.sft_weight == 0:
            problems.append("--sft_weight 0: with --loss sft nothing would be learned")
        if self.loss == "kto" and self.batch_size < 2:
            problems.append("--batch_size 1: kto compares with answers to other prompts of a step; give at least 2")
        if LOSSES[self.loss].has_reference and (self.dropout or self.lora_dropout):
            name = "dropout" if self.dropout else "lora_dropout"
            problems.append(f"--{name}: must be 0 with --loss {self.loss}, whose reference has none to compare with")
        if self.held_out_pairs is None and self.eval_tasks is None:
            problems += unused(self, ("eval_every",), "--eval_pairs or --eval_tasks")
        return problems

    @property
    def objective(self) -> Objective:
        """The loss with its numbers: the given ones, else those of its authors."""
        loss = LOSSES[self.loss]
        names = [name for name in loss.knows if name not in ("good_weight", "bad_weight")]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        sft_weight = loss.sft_weight if self.sft_weight is None else self.sft_weight
        options = dataclasses.replace(loss.defaults, **given)
        return Objective(loss, options, sft_weight, (self.good_weight, self.bad_weight))


def main() -> int:
    training_config, ranks, finish_kernel_check = begin(parse(Config, __doc__))
    check_cut(training_config, ranks)

    # the model to start from, and its tokenizer
    training_config, start = starting_model.find_start(training_config, ranks, lr_scale=1 / 80, adapter_lr_scale=1 / 10)

    # data: answers to prompts, and which is better
    if bundled_files.is_used(training_config.data):
        once_a_host(ranks, bundled.build)
    rows = read_rows(training_config, training_config.data, start.tokenizer, training_config.label_noise)
    check_kind(training_config, rows)
    training_config, end, length_option = with_steps(training_config, rows.total_rows(training_config.passes))
    replay = Replay(training_config, start.tokenizer, rows.families)
    pairs = None
    if training_config.held_out_pairs:
        pairs = read_rows(training_config, training_config.held_out_pairs, start.tokenizer)
    held_out = HeldOut(training_config, start.tokenizer, pairs, reward)
    tasks = tasks_to_ask(training_config, start.tokenizer, start.model_config, ranks)

    # the run: its folder, and the checkpoint to go on from
    fingerprints = {
        **start.fingerprints(training_config, rows),
        "loss": fingerprint(training_config.loss, training_config.objective[1:]),
        **replay.fingerprints,
        **reference_policy.fingerprints(training_config, start),
    }
    command = next_command(training_config.out)
    turns = start.turns(rows.counts["turns"])  # so that `chat` knows how many it may show
    run = Run(training_config, ranks, fingerprints, tokenizer=start.tokenizer, next_command=command, **turns)
    if run.finished:
        return run.print_finished(length_option)
    run.print("\n".join([summary(training_config), rows.summary(), *held_out.summary()]))

    # the model: resumed, or started from another; what it can do now; training; what it can do then
    finish_kernel_check()
    model = run.make_model(start.model_config, start.init)
    before = run.baseline("before.json", lambda: held_out.examine(model, run), held_out.asked)
    before = held_out.recall(run, before)
    reference = Sums(run, model, start, rows, end)
    status = train(run, model, rows, end, Tools(reference, replay, held_out, before, tasks))
    if status == 0:
        held_out.conclude(run, before, held_out.examine(model, run))
        run.print_result()
    return status


def check_cut(training_config: Config, ranks: Ranks) -> None:
    """Raise `UserError` for a loss that sorts all pairs of a step, if the step is cut."""
    if LOSSES[training_config.loss].sorts and training_config.batch_size != training_config.micro_batch_size:
        raise UserError(
            f"--loss {training_config.loss}: sorts all pairs of a step, so they must be in one forward pass; give "
            f"--micro_batch_size {training_config.batch_size}, on one process (there are {ranks.world})"
        )


def check_kind(training_config: Config, rows: PreferenceRows) -> None:
    """Raise `UserError` for labels where the loss needs pairs. Pairs are also labels: see `unpaired`."""
    if rows.has_labels and training_config.objective.of_pairs:
        raise UserError(
            f"--loss {training_config.loss}: compares two answers to one prompt, and {training_config.data} holds "
            "single answers with a label; choose --loss kto"
        )


def read_rows(training_config: Config, data: str, tokenizer: Tokenizer, label_noise: float = 0.0) -> PreferenceRows:
    """Preference files as batches."""
    return read_preferences(training_config, data, tokenizer, room=training_config.room, label_noise=label_noise)


def next_command(out: str) -> str:
    """The command to try after this run."""
    return f"python -m minillm chat --model {shlex.quote(out)}"


class Tools(NamedTuple):
    """What a run needs besides its pairs."""

    reference: "Sums"  # s_r of their answers
    replay: Replay  # instructions that are learned beside
    held_out: HeldOut
    before: dict  # what `held_out` found when the run began
    tasks: TaskScores  # benchmarks that are asked now and then


def train(run: Run, model: Transformer, rows: PreferenceRows, end: int, tools: Tools) -> int:
    """Train to the last step, or to a signal; returns the script's exit status. end: how many samples the run has."""
    training_config, objective = run.training_config, run.training_config.objective

    # the optimizers, their state if the run goes on, and the policy on all ranks
    optimizers = optimizers_of(training_config, model)
    state = run.start(TrainState(model, optimizers, run.ranks, run.dtype))
    policy = parallelize(Policy(model, training_config.compile), run.ranks, compile=False)

    def read(step: int) -> tuple:
        """This rank's micro-batches of a step, and instructions that are learned beside, if there are any."""
        batches = [rows.batch(positions, end) for positions in run.micro_batches(step)]
        if not objective.of_pairs:
            batches = [unpaired(answers) for answers in batches]
        return [answers.with_places() for answers in batches], tools.replay.batch(step, run)

    ahead = Ahead(read, training_config.steps)
    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        batches, instructions = ahead.take(step)

        # what the step's means are over, and KTO's reference point, of all micro-batches and ranks
        n_losses, n_chosen_tokens, n_tokens = run.ranks.sum(*counts(batches, objective.of_pairs))
        totals = Totals(n_losses, n_chosen_tokens)
        z = tools.reference.point_of_kto(step)
        measured = Measured(objective)
        tools.replay.learn(run, policy, state, instructions, totals.n_losses)
        for answers, last in marked_last(batches):
            answers = answers.to(run.device)
            loss_function = loss_of(objective, answers, tools.reference.of(answers), totals, z, measured)
            with gradients_synced(policy, last):
                with run.autocast():
                    loss = policy(answers.batch, loss_function)  # summed over pairs
                state.backward(loss, totals.n_losses)  # of the mean over all pairs, of all micro-batches and ranks
        ahead.prepare(step + 1)  # while the GPU computes what was queued, for which the next line waits
        state.update(training_config.grad_clip)  # clips, then steps, unless loss or gradient is not finite

        facts = measured.means(run.ranks.sum)
        run.log_step(state, n_tokens / run.ranks.row_ranks, **facts)
        if objective.loss.has_reference and "rewards_chosen" in facts:
            tools.held_out.follow(run, facts["rewards_chosen"] / objective.options.beta)
        tools.held_out.watch(run, model, step, tools.before)
        tools.tasks.watch(run, model, step)
    return run.status


class Sums:
    """s_r of the answers of a run, from the file that is written once, and the reference itself where it is needed."""

    def __init__(self, run: Run, model: Transformer, start: starting_model.Start, rows: PreferenceRows, end: int):
        self.run, self.rows, self.end, self.model = run, rows, end, model
        self.loss_name = run.training_config.loss
        self.sums: Tensor | None = None  # (n answers,)
        self.reference: Reference | None = None
        if not run.training_config.objective.loss.has_reference:
            return

        def make() -> Reference:
            self.reference = reference_policy.make_reference(run.training_config, start, model, run.ranks)
            return self.reference

        facts = run.fingerprints.get("reference")
        self.sums = torch.from_numpy(reference_policy.precomputed_sums(run, rows, end, make, facts)).to(run.device)
        if self.loss_name != "kto":
            self.reference = None  # its memory is free again
        elif self.reference is None:
            make()

    def of(self, answers: Answers) -> Tensor:
        """(N,) fp32; zeros for a loss without a reference."""
        if self.sums is None:
            return torch.zeros(len(answers.number), device=self.run.device)
        is_real = answers.number.ge(0)  # else a row of padding
        return torch.where(is_real, self.sums[answers.number.clamp(min=0)], 0.0)

    def point_of_kto(self, step: int) -> Tensor:
        """z of a step, (), over all its micro-batches and ranks; 0 for other losses."""
        if self.loss_name != "kto":
            return torch.zeros((), device=self.run.device)
        size = self.run.training_config.batch_size
        positions = np.concatenate(self.run.micro_batches(step))
        step_positions = range((step - 1) * size, min(step * size, self.end))
        with self.run.autocast():
            found = summed_u_of_mismatched(self.model, self.reference, self.rows, positions, step_positions)
        return z_of(*self.run.ranks.sum(*found), self.run.device)


if __name__ == "__main__":
    sys.exit(run_training(main))
