"""Pretrain a language model, from scratch or starting from another.

    python train_pretrain.py                                        the bundled corpus, a tiny model, minutes
    python train_pretrain.py --data data/mine --preset 124m --seq_len 1024 --batch_size 512 --steps 4700 --out out/mine
    torchrun --nproc_per_node 8 train_pretrain.py --data data/mine --preset 1b --seq_len 2048 --batch_size 512 \\
        --micro_batch_size 8 --steps 21000 --out out/1b
    python train_pretrain.py --data data/mine --init_from DIR --tune freeze --train_layers embed,head --out out/stage1

Rows, batch and steps do not follow the preset: `python -m minillm plan --preset 124m --gpus 1` proposes them. Run the
same command again to go on where it stopped. Read from top to bottom: configuration, data, model, optimizer, the loop.
"""

import dataclasses
import math
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # while the imports below take their time, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from data import bundled
from minillm.base import bundled_files
from minillm.base.command_line import parse
from minillm.base.errors import UserError
from minillm.base.options import option, optional_copy, unused
from minillm.checkpoint import architectures, huggingface
from minillm.checkpoint.train_state import CONTENT, ORDER, fingerprint
from minillm.datasets.token_bins import TokenBins, parse_mixture
from minillm.datasets.windows import TokenWindows
from minillm.distributed import diloco
from minillm.distributed.hosts import once_a_host
from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.evaluation.task_scores import TaskOptions, TaskScores, tasks_to_ask
from minillm.evaluation.validation import Validation
from minillm.generation.completion import generate
from minillm.generation.sampling import Sampling
from minillm.model import config
from minillm.model.transformer import Transformer
from minillm.tokenizer.sentencepiece_model import SentencePieceModel
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.training import resuming, sharding, starting_model
from minillm.training.config import NextTokenOptions, TrainingConfig, summary, too_little
from minillm.training.optim import optimizers_of
from minillm.training.run import Run, begin, run_training
from minillm.training.schedule import Schedule
from minillm.training.step import Ahead, TrainState
from minillm.tuning import options

SHAPE = "shape of the model (what is not given is the preset's, or that of --init_from)"  # heading in --help
# --dim, --n_layers and so on: ModelConfig's own fields, so that a field added there is an option here
ShapeOptions = optional_copy(config.ModelConfig, group=SHAPE, leave_out=("vocab_size", "dropout", "trained_seq_len"))


@dataclass(frozen=True)
class Config(ShapeOptions, options.TuningConfig, diloco.DilocoOptions, TaskOptions, NextTokenOptions, TrainingConfig):
    data: str = option("data/bundled", "folder of token bins, or a mixture FOLDER:WEIGHT,FOLDER:WEIGHT,…", group="run")
    decay_data: str | None = option(
        None, "folder or mixture to read instead of --data while the rate of --schedule wsd falls", group="run"
    )
    out: str = option("out/pretrain", "the run's folder: checkpoints, metrics.jsonl, curve.png", group="run")
    data_dtype: str | None = option(None, "dtype of a raw .bin made elsewhere", ("uint16", "uint32"), group="data")
    data_vocab_size: int | None = option(None, "vocabulary size of a raw .bin made elsewhere", at_least=1, group="data")
    document_attention: bool | None = option(
        None,
        "attention stays inside documents; none: if they are shorter than half a sequence on average, but never with "
        "virtual tokens, which come before a whole row",
        group="data",
    )
    pack: str = option(
        "windows",
        "rows of a batch; windows: cut every seq_len tokens; best_fit: whole documents, of which only longer ones are "
        "cut, with attention inside each",
        ("windows", "best_fit"),
        group="data",
    )
    preset: str = option("tiny", "shape of a new model", tuple(config.PRESETS), group=SHAPE)
    rope_scaling: str | None = option(
        None,
        "stretch rotary positions: linear:FACTOR, yarn:FACTOR or llama3:FACTOR",
        group=SHAPE,
    )

    rows_are_full = True

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.decay_data and Schedule.of(self).decay_begins >= self.steps:
            problems.append(
                "--decay_data: no step reads it; give --schedule wsd, with a --decay_share of one step or more"
            )
        if self.pack == "best_fit" and self.document_attention is False:
            problems.append("--pack best_fit: attention stays inside its documents; leave out --document_attention")
        if self.pack == "best_fit" and self.tune in options.VIRTUAL:
            problems.append(f"--pack best_fit: the virtual tokens of --tune {self.tune} stand before one text a row")
        return problems


def main() -> int:
    training_config = parse(Config, __doc__)
    training_config.check_one_text_a_row("document_attention")
    training_config, ranks, finish_kernel_check = begin(training_config)

    # data: token bins, and the tokenizer beside them
    mixtures = filter(None, (training_config.data, training_config.decay_data))
    if any(bundled_files.is_used(path) for mixture in mixtures for path, _ in parse_mixture(mixture)):
        once_a_host(ranks, bundled.build)
    training_config, windows, decay_windows = open_windows(training_config)
    first = windows.sources[0]
    tokenizer = Tokenizer.load(first.path) if first.meta else None
    if tokenizer is not None:
        first.check_tokenizer(tokenizer)
    held_out = TokenBins(first.path, "val", **raw_bin_options(training_config))
    seq_len, documents = training_config.seq_len, training_config.document_attention
    validation = Validation(held_out, tokenizer, seq_len, training_config.eval_tokens, documents)

    # the model's shape, and what follows from it
    init = starting_model.find_init(training_config, ranks)
    context_before = starting_model.context_before(training_config, ranks)
    model_config = shape(training_config, first.vocab_size, init, context_before)
    training_config = sharding.choose_layout(training_config, model_config, ranks)
    lr_is_usual = training_config.lr is None and training_config.tune == "full"
    training_config = starting_model.choose_optimizer(training_config, model_config.dim)
    tasks = tasks_to_ask(training_config, tokenizer, model_config, ranks)

    # the run: its folder, and the checkpoint to go on from
    order_of_data = (training_config.batch_size, seq_len, training_config.seed)
    order_of_data += (training_config.pack,) if windows.packed else ()
    fingerprints = {
        **data_fingerprints("data", windows, held_out),
        **(data_fingerprints(resuming.DECAY_DATA, decay_windows) if decay_windows else {}),
        ORDER: fingerprint(*order_of_data),
        "tokenizer": first.meta.get("tokenizer_sha256", ""),
        **starting_model.fingerprints(training_config, model_config, init),
    }
    what_next = next_command(training_config, tokenizer)
    run = Run(training_config, ranks, fingerprints, tokenizer=tokenizer, next_command=what_next)
    if run.finished:
        return run.print_finished()

    run.print("\n".join([summary(training_config), *too_little(training_config, model_config)]))
    if init is not None and run.source is None and lr_is_usual:
        usual = f"{training_config.lr:.2g}, as for a new model"
        run.print(f"--lr: {usual}; a lower one keeps more of what {init} has learnt")
    if decay_windows is not None:
        begins = Schedule.of(training_config).decay_begins
        run.print(f"{training_config.decay_data}: read from step {begins + 1:,} on, while the learning rate falls")
    if tokenizer is not None and run.source is None:
        for note in notes(tokenizer, model_config, first.path):
            run.print(note)
    if validation.no_bytes:
        run.print(f"no bits per byte: {validation.no_bytes}")

    # the model: resumed, started from another, or new
    finish_kernel_check()
    model = run.make_model(model_config, init)
    return train(training_config, run, model, (windows, decay_windows), validation, tasks)


def raw_bin_options(training_config: Config) -> dict:
    """The options that say how to read a raw .bin made elsewhere, as `TokenBins` takes them."""
    return dict(dtype=training_config.data_dtype, vocab_size=training_config.data_vocab_size)


def open_bins(training_config: Config, mixture: str) -> list[tuple[TokenBins, float]]:
    """The training split of the folders that a mixture names, with their shares."""
    how = raw_bin_options(training_config)
    return [(TokenBins(path, "train", **how), share) for path, share in parse_mixture(mixture)]


def open_windows(training_config: Config) -> tuple[Config, TokenWindows, TokenWindows | None]:
    """The options with --document_attention decided, the windows of --data, and those of --decay_data if given."""
    bins = open_bins(training_config, training_config.data)
    decay_bins = open_bins(training_config, training_config.decay_data) if training_config.decay_data else []
    needs = "a raw .bin (meta.json says it of a folder)"
    pointless_options = unused(training_config, ("data_dtype", "data_vocab_size"), needs)
    if pointless_options and all(part.meta for part, _ in bins + decay_bins):
        raise UserError("; ".join(pointless_options))
    is_packed = training_config.pack == "best_fit"
    documents = True if is_packed else training_config.document_attention
    if documents is None:
        are_short = all(0 < part.mean_document < training_config.seq_len / 2 for part, _ in bins + decay_bins)
        documents = are_short and training_config.virtual_positions == 0  # virtual tokens come before a whole row
    training_config = dataclasses.replace(training_config, document_attention=documents)

    # windows, and those that follow them from the first step of the decay on
    how = dict(seq_len=training_config.seq_len, seed=training_config.seed, documents=documents, best_fit=is_packed)
    windows = TokenWindows(bins, **how)
    if not decay_bins:
        return training_config, windows, None
    n_before = Schedule.of(training_config).decay_begins * training_config.batch_size
    return training_config, windows, TokenWindows(decay_bins, **how, after=(windows, n_before))


def data_fingerprints(name: str, windows: TokenWindows, *others: TokenBins) -> dict[str, str]:
    """Which data a run reads, and what stands in their files; others: bins that it reads beside."""
    samples = [bins.sample() for bins in (*windows.sources, *others)]
    return {name: fingerprint(*windows.identity()), f"{CONTENT}{name}": fingerprint(*samples)}


def next_command(training_config: Config, tokenizer: Tokenizer | None) -> str:
    """The command to try after this run. A model of a raw .bin has no tokenizer, so it can neither read nor write."""
    out = shlex.quote(training_config.out)
    if tokenizer is None:
        return f"python -m minillm plot {out}"
    if training_config.tune == "full" and training_config.out == Config.out:
        return "python train_sft.py"
    if training_config.tune == "full":
        return f"python train_sft.py --init_from {out}"
    if training_config.mergeable:
        base = shlex.quote(training_config.init_from)
        merged = shlex.quote(f"{training_config.out}-merged")
        return f"python -m minillm merge --model {base} --adapter {out} --out {merged}"
    return f"python -m minillm eval --model {out} --data {shlex.quote(training_config.data)}"


def shape(training_config: Config, vocab_size: int, init: Path | None, context_before: int) -> config.ModelConfig:
    """The model's shape: the preset's, or that of --init_from, with this run's shape options on top.

    context_before: of the checkpoint that the run goes on from, which it keeps when --seq_len is lowered.
    """
    overrides = {}  # the shape options that have a value
    for field in dataclasses.fields(config.ModelConfig):
        value = getattr(training_config, field.name, None)
        if value is not None:
            overrides[field.name] = value
    check_shape_options(training_config, sorted(overrides.keys() - {"dropout"}), init)

    # the shape to begin with, and the longest context it was made for
    if init is None:
        base = None
        context = config.PRESETS[training_config.preset]["max_seq_len"]
    else:
        base = huggingface.load_config(init)
        context = base.max_seq_len
    if training_config.rope_scaling:
        # where --init_from is gone, `init` is the run's own checkpoint, whose context is stretched already
        if starting_model.init_is_gone(training_config) and base.rope_scaling:
            context = base.rope_scaling.original_max_seq_len
        overrides["rope_scaling"] = config.parse_rope_scaling(training_config.rope_scaling, context)

    # the shape itself, and whether data and rows fit it
    if base is None:
        overrides.setdefault("max_seq_len", max(context, training_config.seq_len, context_before))
        overrides["trained_seq_len"] = training_config.seq_len
        model_config = config.preset(training_config.preset, vocab_size=vocab_size, **overrides)
    else:
        if base.trained_seq_len:
            overrides["trained_seq_len"] = max(base.trained_seq_len, training_config.seq_len)
        model_config = dataclasses.replace(base, **overrides)
        huggingface.check_parameters(model_config, init)
        starting_model.check_tokenizer(init, training_config.data)
    if model_config.vocab_size < vocab_size:
        raise UserError(
            f"--init_from {init}: its embedding has {model_config.vocab_size} ids, fewer than {training_config.data} "
            f"({vocab_size}); give data made with the model's own tokenizer"
        )
    starting_model.check_row_fits(training_config, model_config, init)
    return model_config


def notes(tokenizer: Tokenizer, model_config: config.ModelConfig, data: Path) -> list[str]:
    """Where other tools would read the texts of this run otherwise, a line each."""
    lines = []
    if tokenizer.begins_after_eos:
        lines.append(
            f"{data}: documents begin after eos, which other tools put before no prompt; prepared again with "
            "--wrap bos_eos (the bundled corpus: once its folder is deleted) they begin with bos"
        )
    if architectures.model_type(model_config) == "qwen2" and isinstance(tokenizer.pieces, SentencePieceModel):
        lines.append(
            "--qkv_bias true: the checkpoints are Qwen2's for others, and transformers' AutoTokenizer cuts texts as "
            "Qwen2 does, whatever the folder says; load the tokenizer by PreTrainedTokenizerFast"
        )
    return lines


def check_shape_options(training_config: Config, shape_options: list[str], init: Path | None) -> None:
    """Raise `UserError` for shape options of a model that has its shape; shape_options: names of those with a value."""
    tune = training_config.tune
    if tune != "full" and init is None:
        raise UserError(f"--tune {tune}: trains a part of an existing model; give it by --init_from")
    if tune != "full" and shape_options:
        raise UserError(f"--tune {tune}: its base keeps its shape, so leave out --{', --'.join(shape_options)}")
    if init is not None and training_config.preset != Config.preset:
        raise UserError(
            f"--preset {training_config.preset}: the model of --init_from has its shape already; leave it out"
        )


def describe_data(training_config: Config, windows: TokenWindows, decay_windows: TokenWindows | None) -> Iterator[str]:
    """How much there is to read and how much of it a run reads, in lines."""
    for packed in windows.packed + (decay_windows.packed if decay_windows else []):
        yield packed.describe()
    kind, seq_len = "rows" if windows.packed else "windows", training_config.seq_len
    n_all = training_config.steps * training_config.batch_size * seq_len
    line = f"{windows.n_windows:,} {kind} of {seq_len} tokens; {n_all:,} tokens to train on"
    if len(windows.sources) == 1 and decay_windows is None:
        line += f", {n_all / (windows.n_windows * seq_len):.3g} passes over them"
    yield line


def train(
    training_config: Config,
    run: Run,
    model: Transformer,
    data: tuple[TokenWindows, TokenWindows | None],
    validation: Validation,
    tasks: TaskScores,
) -> int:
    """Train to the last step, or to a signal; returns the script's exit status.

    data: the windows of --data, and those of --decay_data if given.
    """
    # the optimizers, their state if the run goes on, and the model on all ranks
    optimizers = optimizers_of(training_config, model)
    step_ranks = run.rounds.step_ranks  # the ranks that take a step together; with --diloco_steps each is alone
    outer = diloco.workers(training_config, model, optimizers, run.ranks)
    state = run.start(TrainState(model, optimizers, step_ranks, run.dtype, outer=outer))
    parallel_model = parallelize(model, step_ranks, training_config.compile)

    # what steps read: the windows of --data, and after so many steps those of --decay_data
    windows, decay_windows = data
    decay_begins = Schedule.of(training_config).decay_begins

    def read(step: int) -> list:
        """This rank's micro-batches of a step."""
        source = decay_windows if decay_windows and step > decay_begins else windows
        return [source.batch(positions).part(run.ranks.row_part) for positions in run.micro_batches(step)]

    run.print("\n".join(describe_data(training_config, windows, decay_windows)))
    n_tokens = training_config.batch_size * training_config.seq_len  # of a step, over all ranks

    scores = {}
    ahead = Ahead(read, training_config.steps)
    for step in run.steps(state):  # sets the learning rate; after the step saves what is due, stops at a signal
        batches = ahead.take(step)
        # all tokens but the bos that documents begin with; of all ranks, before the first backward pass
        (n_targets,) = step_ranks.sum(sum(batch.n_targets() for batch in batches))
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
        run.log_step(state, n_tokens, batches)
        if run.due(step, training_config.eval_every):
            scores = run.report(step, lambda: validation.scores(model, run.ranks, run.autocast()))
        tasks.watch(run, model, step)

    if run.status == 0:
        conclude(run, model, scores or validation.scores(model, run.ranks, run.autocast()))
    return run.status


def conclude(run: Run, model: Transformer, scores: dict[str, float]) -> None:
    """Print the result: validation, a sample, where things are, and what to do next.

    Every rank writes the sample, since each may hold a part of the model, and rank 0 prints.
    """
    perplexity = math.exp(min(scores["val_loss"], 700))
    summary = f"validation: {scores['val_loss']:.4f} nats a token, perplexity {perplexity:.2f}"
    if "val_bpb" in scores:
        summary += f", {scores['val_bpb']:.3f} bits per byte"
    if "floor_bpb" in scores:
        summary += f"; floor {scores['floor_bpb']:.3f} ± {scores['floor_error']:.3f}"
    run.print(summary)
    if run.tokenizer is not None:
        text = sample(model, run.tokenizer) or "(nothing: the first token already ended the text)"
        run.print(f"a sample:\n{textwrap.indent(text, '  ')}")
    run.print_result()


def sample(model: Transformer, tokenizer: Tokenizer) -> str:
    """A text of up to 100 tokens."""
    model.eval()
    length = min(100, model.config.max_seq_len - 1)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    (completion,) = generate(model, [tokenizer.prompt_ids("")], length, sampling=sampling, stop_ids=tokenizer.end_ids)
    return tokenizer.decode(completion.tokens)


if __name__ == "__main__":
    sys.exit(run_training(main))
