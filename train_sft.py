"""Teach a pretrained model to follow instructions.

    python train_sft.py                                        newest checkpoint of out/pretrain, bundled instructions
    python train_sft.py --data my.jsonl --init_from out/mine --out out/mine-sft --epochs 3
    torchrun --nproc_per_node 8 train_sft.py --data my.jsonl --init_from TinyLlama-1.1B --batch_size 64
    python train_sft.py --tune lora --out out/sft-lora         few new parameters over a frozen model

Data: .jsonl, .json, .parquet or .csv rows of instruction/input/output, messages, or conversations. Only answers (and
the end of an answer) are learned. Run the same command again to go on where it stopped.
"""

import dataclasses
import shlex
import signal
import sys
from dataclasses import dataclass

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from data import bundled
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import option, unused
from minillm.checkpoint.train_state import fingerprint
from minillm.datasets.instructions import InstructionRows
from minillm.datasets.questions import read_questions_of
from minillm.distributed import diloco
from minillm.distributed.hosts import once_a_host
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.evaluation import answers
from minillm.evaluation.task_scores import TaskOptions, TaskScores, tasks_to_ask
from minillm.evaluation.validation import answer_loss
from minillm.model.transformer import Transformer
from minillm.tokenizer.chat_template import TEMPLATES
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import starting_model
from minillm.training.config import NextTokenOptions, TrainingConfig, listed_files, summary, with_steps
from minillm.training.optim import optimizers_of
from minillm.training.run import Run, begin, run_training
from minillm.training.step import Ahead, TrainState
from minillm.tuning import options


@dataclass(frozen=True)
class Config(options.TuningConfig, diloco.DilocoOptions, TaskOptions, NextTokenOptions, TrainingConfig):
    data: str = option(
        f"{bundled_files.FOLDER}/sft_train.jsonl",
        "instruction file(s), separated by commas: .jsonl .json (.gz) .parquet .csv",
        group="run",
    )
    out: str = option("out/sft", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    init_from: str = option("out/pretrain", "model folder or run to start from", group="run")
    steps: int | None = option(
        None, "optimizer steps; none: as many as --epochs need", at_least=1, group="length and batch"
    )
    epochs: float = option(
        2.5, "passes over the data, if --steps is not given", at_least=0.001, at_most=1e6, group="length and batch"
    )
    seq_len: int = option(
        256, "tokens per row, virtual ones included; longer examples are cut", at_least=1, group="length and batch"
    )
    batch_size: int = option(8, "rows per optimizer step, over all ranks", at_least=1, group="length and batch")
    lr: float | None = option(
        None,
        "peak learning rate; none: a quarter of what pretraining takes, or what suits the adapter",
        at_least=0,
        group="optimizer",
    )
    template: str = option(
        "auto",
        "prompt format; auto: the model folder's own, else chat if there are role pieces",
        TEMPLATES,
        group="instructions",
    )
    packing: bool | None = option(
        None,
        "several examples in a row, attention kept inside each; none: yes, but not with virtual tokens",
        group="instructions",
    )
    encoding: str = option("utf-8", "of the files: gb18030, big5, utf-16 …", group="instructions")
    allow_lossy: bool = option(
        False, "take a tokenizer that loses more than 0.1 % of the characters of the texts", group="instructions"
    )
    on_bad_line: str = option(
        "error", "what to do with a line that cannot be read", ("error", "skip"), group="instructions"
    )
    eval_data: str | None = option(
        None,
        "held-out instructions to answer before and after, file(s) as of --data; none: the bundled ones, if used",
        group="instructions",
    )
    eval_rows: int = option(800, "how many of them to answer", at_least=1, group="instructions")

    @property
    def held_out(self) -> str | None:
        """The file(s) of held-out instructions, if there are any."""
        is_bundled = bundled_files.is_file(self.data, "sft_train.jsonl")
        return self.eval_data or (f"{bundled_files.FOLDER}/sft_heldout.jsonl" if is_bundled else None)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.held_out is None:
            problems += unused(self, ("eval_rows", "eval_tokens"), "--eval_data")
            if self.eval_tasks is None:
                problems += unused(self, ("eval_every",), "--eval_data or --eval_tasks")
        return problems


def main() -> int:
    training_config, ranks, finish_kernel_check = begin(choose_packing(parse(Config, __doc__)))

    # the model to start from, and its tokenizer
    training_config, start = starting_model.find_start(training_config, ranks, lr_scale=1 / 4)
    tokenizer = start.tokenizer

    # data: rows of instructions, packed, with a mask on the targets that are learned
    if bundled_files.is_used(training_config.data):
        once_a_host(ranks, bundled.build)
    rows = read_rows(training_config, listed_files(training_config.data), tokenizer)
    training_config, end, length_option = with_steps(training_config, rows.total_rows(training_config.epochs))

    # held-out questions: their answers' loss while training, and how many are answered exactly before and after
    held_out = listed_files(training_config.held_out, "eval_data") if training_config.held_out else []
    always_the_same = dataclasses.replace(training_config, seed=0)  # which rows val_loss reads, whatever --seed
    held_out_rows = read_rows(always_the_same, held_out, tokenizer) if held_out else None
    how = dict(on_bad_line=training_config.on_bad_line, encoding=training_config.encoding)
    questions = read_questions_of(held_out, training_config.eval_rows, **how)
    tasks = tasks_to_ask(training_config, tokenizer, start.model_config, ranks)

    # the run: its folder, and the checkpoint to go on from
    fingerprints = start.fingerprints(training_config, rows, training_config.packing)
    what_next = next_command(training_config.out)
    turns = rows.counts["turns"]  # so that `chat` knows how many were trained
    run = Run(training_config, ranks, fingerprints, tokenizer=tokenizer, next_command=what_next, turns=turns)
    if run.finished:
        return run.print_finished(length_option)
    run.print(f"{summary(training_config)}\n{rows.summary()}")
    if held_out_rows:
        run.print(f"held out, {len(questions):,} of them asked: {held_out_rows.summary()}")
    else:
        run.print("held out: nothing, so only the loss on what it learns from is known; see --eval_data")

    # the model: resumed, or started from another
    finish_kernel_check()
    model = run.make_model(start.model_config, start.init)

    # answer the held-out questions, train, answer them again
    def count_exact() -> dict[str, tuple[int, int]]:
        return answers.exact_match(model, tokenizer, questions, template=training_config.template, log=run.print)

    before = run.baseline("before.json", lambda: {"exact": count_exact()}, {"exact": fingerprint(questions)})
    status = train(training_config, run, model, rows, end, held_out_rows, tasks)
    if status == 0:
        conclude(run, before.get("exact", {}), count_exact())
    return status


def choose_packing(training_config: Config) -> Config:
    """The options with `packing` filled in. Virtual tokens come before one text a row, and take room in it."""
    training_config.check_one_text_a_row("packing")
    n_virtual = training_config.virtual_positions
    if training_config.seq_len <= n_virtual:
        raise UserError(
            f"--seq_len {training_config.seq_len}: a row needs at least 1 position beside the virtual tokens of "
            f"--n_virtual {n_virtual}; raise it"
        )
    if training_config.packing is not None:
        return training_config
    return dataclasses.replace(training_config, packing=n_virtual == 0)


def read_rows(training_config: Config, paths: list[str], tokenizer: Tokenizer) -> InstructionRows:
    """Instruction files as rows of a batch."""
    rows = InstructionRows(
        paths,
        tokenizer,
        training_config.seq_len - training_config.virtual_positions,
        seed=training_config.seed,
        template=training_config.template,
        packing=training_config.packing,
        on_bad_line=training_config.on_bad_line,
        encoding=training_config.encoding,
    )
    check_round_trip(tokenizer, rows.first_texts, ", ".join(paths), training_config.allow_lossy)
    return rows


def next_command(out: str) -> str:
    """The command to try after this run."""
    if out == Config.out:
        return "python -m minillm chat"
    return f"python -m minillm chat --model {shlex.quote(out)}"


def train(
    training_config: Config,
    run: Run,
    model: Transformer,
    rows: InstructionRows,
    end: int,
    held_out_rows: InstructionRows | None,
    tasks: TaskScores,
) -> int:
    """Train to the last step, or to a signal; returns the script's exit status. end: how many rows the run has."""
    # the optimizers, their state if the run goes on, and the model on all ranks
    optimizers = optimizers_of(training_config, model)
    step_ranks = run.rounds.step_ranks  # the ranks that take a step together; with --diloco_steps each is alone
    outer = diloco.workers(training_config, model, optimizers, run.ranks)
    state = run.start(TrainState(model, optimizers, step_ranks, run.dtype, outer=outer))
    parallel_model = parallelize(model, step_ranks, training_config.compile)

    def read(step: int) -> list:
        """This rank's micro-batches of a step."""
        return [rows.batch(positions, end).part(run.ranks.row_part) for positions in run.micro_batches(step)]

    def held_out_loss() -> dict[str, float]:
        return answer_loss(model, held_out_rows, training_config.eval_tokens, run.ranks, run.autocast())

    ahead = Ahead(read, training_config.steps)
    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        batches = ahead.take(step)
        # how many targets a step has differs: count those of all ranks before the first backward pass
        n_targets, n_tokens = step_ranks.sum(
            sum(batch.n_targets() for batch in batches), sum(batch.x.numel() for batch in batches)
        )
        for batch, last in marked_last(batches):
            batch = batch.to(run.device)
            with gradients_synced(parallel_model, last):
                with run.autocast():
                    how = dict(mask=batch.mask, documents=batch.documents, z_loss=training_config.z_loss)
                    loss, z_loss = parallel_model(batch.x, batch.y, **how)  # sum of nats, and what of it is z-loss
                state.backward(loss, n_targets, z_loss)  # of the mean over all targets, of all micro-batches and ranks
        ahead.prepare(step + 1)  # while the GPU computes what was queued, for which the next line waits
        state.update(training_config.grad_clip)  # clips, then steps, unless loss or gradient is not finite
        run.exchange(state)  # with --diloco_steps, when it is due
        run.log_step(state, n_tokens * run.rounds.n_workers, batches)
        if held_out_rows and run.due(step, training_config.eval_every):
            run.report(step, held_out_loss, of="held-out answers")
        tasks.watch(run, model, step)
    return run.status


def conclude(run: Run, before: dict, after: dict) -> None:
    """Print the result; before, after: family → (exact answers, questions)."""
    if after:
        n_right, n_questions = answers.total(after)
        run.record(run.training_config.steps, exact_match=n_right / n_questions)
        for line in answers.exact_lines(before, after):
            run.print(line)
    run.print_result()


if __name__ == "__main__":
    sys.exit(run_training(main))
