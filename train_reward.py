"""Train a reward model: a score for each answer, higher for the one that was preferred.

    python train_reward.py                                     newest checkpoint of out/sft, bundled preferences
    python train_reward.py --data pairs.jsonl --init_from out/mine-sft --out out/mine-reward
    python train_reward.py --tune lora --out out/reward-lora   few new parameters and the head over a frozen model
    python train_reward.py --label_noise 0.1                   a tenth of the labels wrong: the best loss is then known

Data: rows of prompt, chosen, rejected and the other forms of docs/en/datasets.md. The model starts from a language
model, whose head gives way to one number a text; it is read at the last token. Run the same command again to go on
where it stopped.
"""

import dataclasses
import shlex
import signal
import sys
from dataclasses import dataclass
from functools import partial

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

from data import bundled
from minillm.alignment.options import AlignmentConfig, read_preferences
from minillm.alignment.pair_scores import early_pair_loss, measures, noise_floor, pair_loss, score_pairs, summary_lines
from minillm.alignment.reward_model import all_scores, at_last, text_lengths
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import option, spelled, unused
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.preferences import PreferenceRows
from minillm.distributed.hosts import once_a_host
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.shards import is_sharded_model
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import summary, with_steps
from minillm.training.optim import optimizers_of
from minillm.training.run import Run, begin, run_training
from minillm.training.step import Ahead, TrainState

SCALED_ON = 250  # prompts of the training data by whose answers the scale of the scores is measured
WHILE_TRAINING = 400  # held-out prompts, at most, that are looked at between steps


@dataclass(frozen=True)
class Config(AlignmentConfig):
    data: str = option(
        f"{bundled_files.FOLDER}/preferences_train.jsonl",
        "preference file(s), separated by commas: .jsonl .json (.gz) .parquet .csv",
        group="run",
    )
    out: str = option("out/reward", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    steps: int | None = option(
        None, "optimizer steps; none: as many as --epochs need", at_least=1, group="length and batch"
    )
    epochs: float = option(
        2.0, "passes over the data, if --steps is not given", at_least=0.001, at_most=1e6, group="length and batch"
    )
    batch_size: int = option(
        16,
        "prompts per optimizer step, over all ranks, each with all its answers",
        at_least=1,
        group="length and batch",
    )
    micro_batch_size: int | None = option(
        4,
        "most prompts per forward pass and rank, those of like length together; none: 32",
        at_least=1,
        group="length and batch",
    )
    lr: float | None = option(
        None,
        "peak learning rate; none: an eighth of what pretraining takes, or what suits the adapter",
        at_least=0,
        group="optimizer",
    )
    center: float = option(
        0.01, "weight of (r_chosen + r_rejected)², which keeps the scores around 0", at_least=0, group="reward"
    )
    early_share: float = option(
        0.5,
        "share of the loss that asks for the better score at every token from where two answers differ",
        at_least=0,
        at_most=1,
        group="reward",
    )
    label_noise: float = option(
        0.0,
        "probability with which chosen and rejected change places, held-out ones too",
        at_least=0,
        at_most=0.5,
        group="reward",
    )
    eval_data: str | None = option(
        None, "held-out preferences; none: the bundled ones, if bundled data is used", group="data"
    )
    eval_rows: int = option(2000, "of how many held-out prompts to score the answers", at_least=1, group="data")

    @property
    def held_out(self) -> str | None:
        is_bundled = bundled_files.is_file(self.data, "preferences_train.jsonl")
        return self.eval_data or (f"{bundled_files.FOLDER}/preferences_heldout.jsonl" if is_bundled else None)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.held_out is None:
            problems += unused(self, ("eval_every",), "--eval_data")
        return problems


def main() -> int:
    training_config, ranks, finish_kernel_check = begin(parse(Config, __doc__))

    # the model to start from, with a score head in place of its own, and its tokenizer
    training_config, start = starting_model.find_start(training_config, ranks, lr_scale=1 / 8, score_head=True)

    # data: answers to the same prompts, and which of two is better
    if bundled_files.is_used(training_config.data):
        once_a_host(ranks, bundled.build)
    rows = read_pairs(training_config, training_config.data, start.tokenizer)
    held_out_rows = None
    if training_config.held_out:
        always_the_same = dataclasses.replace(training_config, seed=0)  # which pairs are scored, whatever --seed
        held_out_rows = read_pairs(always_the_same, training_config.held_out, start.tokenizer)
    training_config, end, length_option = with_steps(training_config, rows.total_rows(training_config.epochs))

    # the run: its folder, and the checkpoint to go on from
    fingerprints = start.fingerprints(training_config, rows)
    what_next = next_command(training_config)
    run = Run(training_config, ranks, fingerprints, tokenizer=start.tokenizer, next_command=what_next)
    if run.finished:
        return run.print_finished(length_option)
    run.print(f"{summary(training_config)}\n{rows.summary()}")
    if held_out_rows:
        run.print(f"held out: {held_out_rows.summary()}")
    else:
        run.print("held out: nothing, so only the pairs that it learns from are compared; see --eval_data")

    # the model: resumed, or started from another
    finish_kernel_check()
    model = run.make_model(start.model_config, start.init)

    # train, and look at held-out pairs before and after
    before = {}
    if held_out_rows:
        asked = fingerprint(held_out_rows.fingerprint, len(watched_positions(training_config, held_out_rows)))
        before = run.baseline(
            "before.json",
            lambda: shared_measures(training_config, run, model, held_out_rows),
            {"heldout_accuracy": asked, "heldout_nll": asked},
        )
    status = train(training_config, run, model, rows, end, held_out_rows)
    if status == 0:
        conclude(training_config, run, model, held_out_rows, before)
    return status


def read_pairs(training_config: Config, data: str, tokenizer: Tokenizer) -> PreferenceRows:
    """Preference files as pairs of answers, of which a row with its last token holds at most --seq_len tokens."""
    noise = training_config.label_noise
    rows = read_preferences(training_config, data, tokenizer, room=training_config.room - 1, label_noise=noise)
    if rows.has_labels:
        raise UserError(
            f"{data}: holds single answers with labels; a reward model compares answers to one prompt: give pairs, or "
            "learn from labels by train_dpo.py --loss kto"
        )
    return rows


def next_command(training_config: Config) -> str:
    """The command to try after this run: PPO of the policy that it began with, on the prompts of its pairs."""
    command = ["python", "train_ppo.py"]
    as_here = ("init_from", "data", "template", "encoding", "allow_lossy", "on_bad_line")
    for ppo_option, name in (("reward_model", "out"), *zip(as_here, as_here, strict=True)):
        value = getattr(training_config, name)
        if value != getattr(Config, name):
            command += [f"--{ppo_option}", spelled(value)]
    return shlex.join(command)


def train(
    training_config: Config,
    run: Run,
    model: Transformer,
    rows: PreferenceRows,
    end: int,
    held_out_rows: PreferenceRows | None,
) -> int:
    """Train to the last step, or to a signal; returns the script's exit status. end: how many samples the run has."""
    # the optimizers, their state if the run goes on, and the model on all ranks
    optimizers = optimizers_of(training_config, model)
    state = run.start(TrainState(model, optimizers, run.ranks, run.dtype))
    run.facts["score_scale"] = lambda: score_scale(run, model, rows)  # of the model that is saved
    parallel_model = parallelize(model, run.ranks, training_config.compile)

    def read(step: int) -> list:
        """This rank's micro-batches of a step."""
        return [rows.batch(positions, end) for positions in by_length(run.micro_batches(step), rows)]

    ahead = Ahead(read, training_config.steps)
    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        batches = ahead.take(step)
        # the pairs of a prompt weigh 1 together, so the mean is over prompts: count those of all ranks
        n_prompts, n_pairs, n_tokens = run.ranks.sum(
            sum(float(answers.weight.sum()) for answers in batches),
            sum(len(answers.chosen) for answers in batches),
            sum(answers.batch.x.numel() for answers in batches),
        )
        rights, differences = [], []  # of each micro-batch, on the device: nothing reads them before the step's end
        for answers, last in marked_last(batches):
            answers = answers.to(run.device)
            with gradients_synced(parallel_model, last):
                with run.autocast():
                    # one number a token; that of the last is the answer's
                    scores_of_tokens = all_scores(parallel_model, answers.batch)  # (N, T + 1)
                    scores = at_last(scores_of_tokens, text_lengths(answers.batch))  # (N,)
                    # −log of the probability that the chosen one wins, at the last token and at those before
                    loss = pair_loss(scores, answers, training_config.center)
                    loss = torch.lerp(loss, early_pair_loss(scores_of_tokens, answers), training_config.early_share)
                state.backward(loss, round(n_prompts))
            difference = (scores[answers.chosen] - scores[answers.rejected]).detach()  # (P,)
            rights.append((difference > 0).sum())
            differences.append(difference.sum())
        ahead.prepare(step + 1)  # while the GPU computes what was queued, for which the next line waits
        state.update(training_config.grad_clip)  # clips, then steps, unless loss or gradient is not finite
        found = torch.stack(rights).tolist(), torch.stack(differences).tolist()
        n_right, total_difference = run.ranks.sum(*map(sum, found))
        facts = {"accuracy": n_right / n_pairs, "difference": total_difference / n_pairs}
        run.log_step(state, n_tokens / run.ranks.row_ranks, **facts)

        if held_out_rows and run.due(step, training_config.eval_every):
            measure = partial(shared_measures, training_config, run, model, held_out_rows)
            run.report(step, measure, of="held-out pairs")
    return run.status


def by_length(micro_batches: list[np.ndarray], rows: PreferenceRows) -> list[np.ndarray]:
    """A step's data positions with those of like length in one micro-batch, so that rows need less padding.

    The mean over the step, and so its gradient, does not depend on how it is cut.
    """
    positions = np.concatenate(micro_batches)
    order = np.argsort(rows.longest(positions), kind="stable")
    return np.array_split(positions[order], len(micro_batches))  # the last ones may hold one less


def shared_measures(
    training_config: Config, run: Run, model: Transformer, held_out_rows: PreferenceRows
) -> dict[str, float]:
    """Accuracy and NLL on the first held-out pairs, which the ranks share; under label noise the NLL's floor."""
    positions = watched_positions(training_config, held_out_rows)
    if not is_sharded_model(model):  # whose passes need every rank: then each scores all, and the means are the same
        positions = positions[run.ranks.rank :: run.ranks.world]
    sums = [0.0, 0.0, 0.0]
    if len(positions):
        pairs = score_pairs(model, held_out_rows, positions, run.autocast())
        found, n_pairs = measures(pairs), len(pairs.chosen)
        sums = [found["heldout_accuracy"] * n_pairs, found["heldout_nll"] * n_pairs, n_pairs]
    accuracy, nll, n_pairs = run.ranks.sum(*sums)
    scores = {"heldout_accuracy": accuracy / n_pairs, "heldout_nll": nll / n_pairs}
    if training_config.label_noise:
        scores["floor_nll"] = noise_floor(training_config.label_noise)
    return scores


def watched_positions(training_config: Config, held_out_rows: PreferenceRows) -> np.ndarray:
    """Those of `held_out_positions` that are looked at before the first step and between steps."""
    return held_out_positions(training_config, held_out_rows)[:WHILE_TRAINING]


def held_out_positions(training_config: Config, held_out_rows: PreferenceRows) -> np.ndarray:
    """The data positions of the first --eval_rows held-out prompts, (n,) int64."""
    return np.arange(min(held_out_rows.rows_per_epoch, training_config.eval_rows))


def score_scale(run: Run, model: Transformer, rows: PreferenceRows) -> dict[str, float]:
    """Mean score of chosen answers of the training data, and the standard deviation of all: see `reward_model`."""
    positions = np.arange(min(rows.rows_per_epoch, SCALED_ON))
    pairs = score_pairs(model, rows, positions, run.autocast())
    return {"mean": float(pairs.chosen.mean()), "std": float(pairs.scores.std())}


def conclude(
    training_config: Config, run: Run, model: Transformer, held_out_rows: PreferenceRows | None, before: dict
) -> None:
    """Print how well held-out pairs are told apart, by kind of fault. Every rank scores them, and rank 0 prints.

    before: what the first of them said of the model that the run began with; {} if that is lost.
    """
    if held_out_rows:
        pairs = score_pairs(model, held_out_rows, held_out_positions(training_config, held_out_rows), run.autocast())
        found = measures(pairs)
        ends = {"heldout_before": before.get("heldout_accuracy"), "heldout_after": found["heldout_accuracy"]}
        run.record(
            run.training_config.steps, **found, **{name: value for name, value in ends.items() if value is not None}
        )
        run.print(f"held-out pairs in which the chosen answer has the higher score ({training_config.held_out}):")
        for line in summary_lines(pairs, training_config.label_noise):
            run.print(line)
    run.print_result()


if __name__ == "__main__":
    sys.exit(run_training(main))
