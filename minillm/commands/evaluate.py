"""Score a model: loss, perplexity and bits per byte on texts, exact match on instruction files, benchmarks."""

import contextlib
import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.alignment.pair_scores import score_pairs, summary_lines
from minillm.alignment.reward_model import is_reward_model
from minillm.base import bundled_files
from minillm.base.errors import MissingError, UnsupportedError, UserError, naming
from minillm.base.files import check_file, write_json_atomically
from minillm.base.options import option
from minillm.base.printing import log_line
from minillm.commands.model_options import (
    ModelOptions,
    TemplateOptions,
    load_model,
    load_reward_model,
    template_of,
    trained_with,
)
from minillm.datasets.files import encodings
from minillm.datasets.files.text_files import BOUNDARIES
from minillm.datasets.preferences import PreferenceRows
from minillm.datasets.questions import read_questions
from minillm.datasets.token_bins import TokenBins
from minillm.distributed.ranks import Ranks
from minillm.evaluation import answers, benchmark_scores
from minillm.evaluation.benchmark_files import read_tasks
from minillm.evaluation.benchmarks import BENCHMARKS
from minillm.evaluation.rolling import text_batches
from minillm.evaluation.validation import TextTokens, Validation, read_text, token_loss
from minillm.generation import load
from minillm.generation.load import Loaded
from minillm.model.quant import quantize_for_generation
from minillm.tokenizer.measure import check_round_trip
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import context_of

UNKNOWN_LENGTH = 1024  # tokens of a window, at most, for a model that does not say at which length it was trained
USUAL_TOKENS = 1 << 20  # of texts that are scored
ALL = "all"  # the benchmarks whose files are there
OF_DATA = ("max_tokens", "split", "field", "encoding", "allow_lossy", "max_new_tokens", "template")  # no benchmark's
# What an option is about, and which options say nothing of a kind of data.
ABOUT = dict.fromkeys(("max_tokens", "seq_len", "split", "field"), "texts")
ABOUT |= dict.fromkeys(("limit", "max_new_tokens", "template"), "questions")
ABOUT |= dict.fromkeys(("encoding", "allow_lossy"), "files of text")
USELESS = {
    "texts": ("limit", "max_new_tokens", "template"),
    "token bins": ("limit", "max_new_tokens", "template", "split", "field", "encoding", "allow_lossy"),
    "questions": ("max_tokens", "seq_len", "split", "field"),
    "preferences": ("max_tokens", "seq_len", "split", "field", "max_new_tokens"),
}
INSTEAD = {"max_tokens": "say --limit", "limit": "say --max_tokens"}
QUESTION_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, TemplateOptions):
    data: str | None = option(
        None,
        "folder of bins, text (.txt .jsonl .json .parquet), questions (.jsonl .json .csv …) or, for a reward model, "
        "preferences; none: a reward model's, the bundled ones",
        group="data",
    )
    split: str = option("blank", "where texts in a .txt end", BOUNDARIES, group="texts")
    field: str = option("text", "the key that holds a text in .jsonl, .json or .parquet", group="texts")
    encoding: str = option("utf-8", "of .txt and JSON: gb18030, big5, utf-16 …", group="data")
    allow_lossy: bool = option(
        False, "take a tokenizer that loses more than 0.1 % of the characters of the texts", group="data"
    )
    seq_len: int | None = option(None, "tokens of a window; none: as the model was trained", at_least=1, group="texts")
    max_tokens: int | None = option(
        None, "evaluate the first documents up to this many tokens; none: 2^20", at_least=1, group="texts"
    )
    limit: int | None = option(
        None, "ask only this many questions, the first; of preferences: prompts", at_least=1, group="questions"
    )
    max_new_tokens: int | None = option(
        None,
        f"longest answer in tokens; none: as the longest right answer, {answers.LONGEST_ANSWER} to "
        f"{answers.LONGEST_OF_ALL}",
        at_least=1,
        group="questions",
    )
    tasks: str | None = option(
        None, f"benchmarks, with commas between: {', '.join(BENCHMARKS)}; or {ALL}", group="benchmarks"
    )
    task_data: str = option("data/eval", "where the folders of benchmarks are", group="benchmarks")
    shots: int | None = option(
        None, "examples before each question; none: as is usual for the benchmark", at_least=0, group="benchmarks"
    )
    out: str | None = option(
        None, "a .json for the results; what is known already, OUT.done.jsonl beside it remembers", group="benchmarks"
    )

    def problems(self) -> list[str]:
        problems = [*super().problems(), *encodings.problems(self.encoding)]
        given = self.given()
        if self.tasks is None:
            useless = dict.fromkeys(("shots", "out", "task_data"), "is about benchmarks; give --tasks")
        else:
            useless = dict.fromkeys(OF_DATA, "is about texts or questions in --data; leave it out")
            useless["data"] = "is for texts and questions; the files of --tasks are in --task_data"
            useless["max_tokens"] = "is about texts; say --limit"
        problems += [f"--{name} {given[name]}: {why}" for name, why in useless.items() if name in given]
        return problems

    def given(self) -> dict:
        """The options that differ from their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}

    def refuse_useless(self, path: Path | str, kind: str) -> None:
        """Raise `UserError` for an option that says nothing of a file or folder of this kind of data."""
        given = self.given()
        for name in USELESS[kind]:
            if name in given:
                instead = INSTEAD.get(name, "leave it out")
                raise UserError(f"--{name} {given[name]}: is about {ABOUT[name]}, and {path} holds {kind}; {instead}")


def run(config: Config) -> None:
    if config.data is not None and not Path(config.data).exists():
        raise UserError(f"--data {config.data}: no such file or folder")
    folder = load.find_model(config.model, log=log_line)
    if config.tasks is not None:
        _evaluate_tasks(config, folder)
        return
    if is_reward_model(folder):
        _evaluate_pairs(config, load_reward_model(config, folder))
        return
    if config.data is None:
        raise UserError("--data is needed: a folder of token bins, texts or questions; see --help")
    path = Path(config.data)
    loaded = load_model(config)
    print(f"{loaded.folder} on {path}")
    if _is_questions(path, config.encoding):
        _evaluate_answers(config, loaded, path)
    else:
        _evaluate_texts(config, loaded, path)


def _is_questions(path: Path, encoding: str) -> bool:
    """Whether a file holds conversations rather than texts, by its first row."""
    if path.is_dir() or not path.name.lower().removesuffix(".gz").endswith(QUESTION_FILES):
        return False
    try:
        return bool(read_questions(path, 1, encoding=encoding))
    except UnsupportedError:  # a row without the keys of a conversation
        return False


def _evaluate_answers(config: Config, loaded: Loaded, path: Path) -> None:
    """Print the share of questions that are answered exactly, family by family."""
    config.refuse_useless(path, "questions")
    questions = read_questions(path, config.limit, encoding=config.encoding)
    texts = [message["content"] for question in questions for message in question["messages"]]
    check_round_trip(loaded.tokenizer, texts, str(path), config.allow_lossy)
    scores = answers.exact_match(
        loaded.model,
        loaded.tokenizer,
        questions,
        template=template_of(config, loaded.folder),
        max_new_tokens=config.max_new_tokens,
    )
    print(f"exact match, greedy answers:\n{answers.table(scores)}")


def _evaluate_pairs(config: Config, loaded: Loaded) -> None:
    """Print the share of pairs whose chosen answer has the higher score, by kind of fault, and what goes with it."""
    model, tokenizer, folder = loaded
    data = config.data or f"{bundled_files.FOLDER}/preferences_heldout.jsonl"
    config.refuse_useless(data, "preferences")
    if config.data is None and not Path(data).exists():
        raise UserError(f"{data}: is not written yet; run python data/bundled.py, or give other pairs by --data")
    print(f"{folder} on {data}")
    rows = PreferenceRows(
        [data],
        tokenizer,
        context_of(model) - 1,
        template=template_of(config, folder),
        encoding=config.encoding,
    )
    if rows.has_labels:
        raise UserError(f"--data {data}: holds single answers with labels; a reward model is judged by pairs")
    check_round_trip(tokenizer, rows.first_texts, data, config.allow_lossy)
    print(rows.summary())
    n_rows = min(rows.rows_per_epoch, config.limit or rows.rows_per_epoch)
    print("pairs in which the chosen answer has the higher score:")
    for line in summary_lines(score_pairs(model, rows, np.arange(n_rows))):
        print(line)


def _evaluate_texts(config: Config, loaded: Loaded, path: Path) -> None:
    """Print the loss on texts or token bins, in nats a token and, if the texts are known, in bits a byte."""
    config.refuse_useless(path, "token bins" if _holds_bins(path) else "texts")
    model, tokenizer, folder = loaded

    max_tokens = config.max_tokens or USUAL_TOKENS
    texts = _read_texts(config, tokenizer, path, max_tokens)

    # windows as in training: as long, and each document on its own unless trained otherwise
    options = trained_with(folder).get("config", {})
    seq_len, is_as_trained = _length(config, loaded, UNKNOWN_LENGTH)
    context = context_of(model)
    documents_alone = options.get("document_attention", True)
    validation = Validation(texts, tokenizer, seq_len, max_tokens, documents_alone)
    ranks = Ranks(0, 1, next(model.parameters()).device)
    scores = validation.scores(model, ranks, contextlib.nullcontext())
    if not math.isfinite(scores["val_loss"]):
        raise UserError(f"{folder}: its loss is {scores['val_loss']}: its weights are damaged or its dtype too narrow")

    as_trained = ", as it was trained" if is_as_trained else ""
    print(f"  windows         {seq_len:,} tokens{as_trained}; the context is {context:,} (--seq_len)")
    n_targets = int(validation.part.mask.sum())
    perplexity = math.exp(min(scores["val_loss"], 700))
    of_more = "" if validation.part.n_documents == texts.n_documents else ", the first of more (--max_tokens)"
    print(f"  documents       {validation.part.n_documents:,} ({n_targets:,} tokens){of_more}")
    if config.bits is not None:
        print(f"  weights         of linear layers in {config.bits} bits")
    print(f"  loss            {scores['val_loss']:.4f} nats a token")
    print(f"  perplexity      {perplexity:.3f} a token")
    if "val_bpb" in scores:
        print(f"  bits per byte   {scores['val_bpb']:.4f}")
    elif validation.no_bytes:
        print(f"  bits per byte   not known: {validation.no_bytes}")
    if "floor_bpb" in scores:
        print(f"  floor           {scores['floor_bpb']:.4f} ± {scores['floor_error']:.4f} (of these very documents)")
    if isinstance(texts, TextTokens):
        batches = text_batches(validation.part, texts.start_id, texts.eos_id, seq_len)
        nats, _ = token_loss(model, batches, ranks.device)
        bits = f", {nats / math.log(2) / validation.n_bytes:.4f} bits per byte" if validation.n_bytes else ""
        print(f"  text alone      {nats:.4f} nats{bits}: each text by itself, without its end")


def _length(config: Config, loaded: Loaded, unknown: int) -> tuple[int, bool]:
    """The tokens of a window, and whether that is the length of training; `unknown`, at most, if that is not known."""
    context = context_of(loaded.model)
    trained_at = loaded.model.config.trained_seq_len or trained_with(loaded.folder).get("config", {}).get("seq_len")
    seq_len = config.seq_len or min(trained_at or unknown, context)
    if seq_len > context:
        raise UserError(f"--seq_len {seq_len}: must be 1 to the model's context, {context}")
    return seq_len, seq_len == trained_at


def _holds_bins(path: Path) -> bool:
    """Whether a folder is one of token bins."""
    return path.is_dir() and (path / "meta.json").is_file()


def _read_texts(config: Config, tokenizer: Tokenizer, path: Path, max_tokens: int) -> TokenBins | TextTokens:
    """The validation split of a folder of token bins, or the texts of a file, tokenized as far as they are scored."""
    if not _holds_bins(path):
        how = {name: getattr(config, name) for name in ("split", "field", "encoding", "allow_lossy")}
        # beside each target there may be a bos; one token more tells that not all is scored
        return read_text(path, tokenizer, **how, max_tokens=2 * max_tokens + 1)
    bins = TokenBins(path, "val")
    if bins.meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(f"--data {path}: prepared with another tokenizer than the model's; evaluate the text itself")
    bins.check_tokenizer(tokenizer)
    if bins.start_id != tokenizer.start_id:
        wrap = "eos" if tokenizer.start_id == tokenizer.eos_id else "bos_eos"
        raise UserError(
            f"--data {path}: its documents begin otherwise than the model's; prepare it with --wrap {wrap}, or "
            "evaluate the text itself"
        )
    return bins


# ---- benchmarks


def _evaluate_tasks(config: Config, folder: Path) -> None:
    """Print the shares of right answers to benchmarks, and write them down."""
    # the questions and the place of the results, before anything is computed
    if config.out is not None:
        check_file(Path(config.out))
    if is_reward_model(folder):
        raise UserError(f"--tasks {config.tasks}: needs a language model, and {folder} is a reward model")
    benchmarks = {}
    for name in benchmarks_named(config.tasks):
        try:
            benchmarks[name] = read_tasks(name, Path(config.task_data), config.shots, config.limit)
        except MissingError as problem:
            if config.tasks != ALL:
                raise
            print(problem)
    if not benchmarks:
        raise UserError(f"--task_data {config.task_data}: holds no benchmark; see docs/en/evaluation.md")

    # the model, and the longest input that it is given
    loaded = load_model(dataclasses.replace(config, bits=None))
    model, tokenizer, folder = loaded
    weights = "" if config.out is None else benchmark_scores.digest_of(model, tokenizer)
    if config.bits is not None:  # only now: packed weights have no digest
        quantize_for_generation(model, config.bits)
    max_len, is_as_trained = _length(config, loaded, context_of(model))
    as_trained = ", as it was trained" if is_as_trained else ""
    print(f"{folder} on benchmarks in {config.task_data}")
    print(f"  longest input   {max_len:,} tokens{as_trained}; the context is {context_of(model):,} (--seq_len)")

    # a model may be too short for answers in words, or for the longest choice
    n_cut = {}  # of each task's questions
    for name in list(benchmarks):
        try:
            n_cut |= {task.name: benchmark_scores.n_cut(tokenizer, task, max_len) for task in benchmarks[name]}
        except UserError as problem:
            if config.tasks != ALL:
                raise UserError(f"{name}: {problem}") from None
            print(f"{name}: left out: {problem}")
            del benchmarks[name]
    if not benchmarks:
        raise UserError(
            f"--tasks {ALL}: none is left: {config.task_data} holds only benchmarks for which {max_len} tokens are too "
            "few; add others, or take a model with a longer context"
        )

    # each task, remembered as soon as it is scored
    out = None if config.out is None else Path(config.out)
    done = benchmark_scores.Done(None, "")
    if out is not None:
        identity = f"{weights} at {max_len}"
        if config.bits is not None:
            identity += f" in {config.bits} bits"
        done = benchmark_scores.Done(out.with_name(f"{out.name}.done.jsonl"), identity)
    asked = {}
    for name, tasks in benchmarks.items():
        asked[name] = []
        for task in tasks:
            with naming(task.name):
                scores = benchmark_scores.ask(model, tokenizer, task, max_len, done)
            values = benchmark_scores.values_of(task.questions, scores, task.benchmark.metrics)
            asked[name].append((task, values, n_cut[task.name]))
    results = benchmark_scores.results_of(asked, str(folder), config.limit, max_len)
    print(benchmark_scores.table(results))
    if out is not None:
        write_json_atomically(out, results)


def benchmarks_named(tasks: str) -> list[str]:
    """The names in --tasks, each once. Raises `UserError` for one that is no benchmark."""
    if tasks == ALL:
        return list(BENCHMARKS)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(BENCHMARKS)}"
            raise UserError(f"--tasks {tasks}: {name!r} is no benchmark; {hint}")
    return names
