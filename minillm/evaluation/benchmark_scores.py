"""Asking a model the questions of benchmarks, and the shares that it gets right, each with its standard error.

A choice is taken for its log-likelihood: acc takes the largest, acc_norm the largest per character of the choice. For
LAMBADA's last words acc counts those of likeliest ids, and perplexity is e to the mean of −ln p. Where the model writes
its answer, exact_match compares the number in it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from minillm.base.files import open_own
from minillm.evaluation.benchmark_files import Task
from minillm.evaluation.benchmarks import BENCHMARKS, Question
from minillm.evaluation.loglikelihood import Request, Score, fitted, loglikelihoods, pairs_of
from minillm.evaluation.worked_answers import (
    continued,
    ids_of,
    last_number,
    marked_number,
    room_for_prompt,
    same_number,
)
from minillm.model.quant import QuantLinear
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.adapter import active_adapter

QUESTIONS_AT_ONCE = 256  # between two lines of the file of what is done
Values = dict[str, tuple[float, float]]  # metric → (value, its standard error)
HARNESS_NAMES = {"ceval": "ceval-valid"}  # of benchmarks that lm-evaluation-harness calls otherwise


class Done:
    """Scores that are known already: a file with a line for each question, by which a stopped evaluation goes on.

    Each line has the digest of everything that the scores depend on: the model, the longest input, and the texts. So
    lines of another model or of other questions are never taken.
    """

    def __init__(self, path: Path | None, model: str):
        """path: None keeps nothing. model: a text that names the model and how it is read."""
        self.model = model
        self.known: dict[str, list] = {}  # by digest: the scores of all requests, or a single text
        self.file = None
        if path is None:
            return
        self.file = open_own(path)
        self.file.seek(0)
        for line in self.file.read().split(b"\n"):
            try:
                row = json.loads(line)
                self.known[row["digest"]] = [_outcome(value) for value in row["outcomes"]]
            except (ValueError, TypeError, KeyError):  # the last line of one that was killed
                continue

    def digest(self, question: Question) -> str:
        return hashlib.sha256(json.dumps([self.model, question.requests]).encode()).hexdigest()

    def add(self, questions: Sequence[Question], outcomes: Sequence[list]) -> None:
        """outcomes: for each question its scores, or its text."""
        lines = ""
        for question, of_it in zip(questions, outcomes, strict=True):
            digest = self.digest(question)
            self.known[digest] = of_it
            lines += json.dumps({"digest": digest, "outcomes": of_it}) + "\n"
        if self.file is not None:
            self.file.write(f"\n{lines}".encode())  # a new line, since the last one may be cut


def _outcome(value: object) -> Score | str:
    """What a line of the file says of one request. Raises ValueError or TypeError if it is damaged."""
    if isinstance(value, str):
        return value
    nats, is_greedy = value
    return Score(float(nats), bool(is_greedy))


def digest_of(model: Transformer, tokenizer: Tokenizer) -> str:
    """SHA-256 of all that a model's scores depend on: its shape, its weights, its adapter, and its tokenizer.

    A model whose layers are packed has none: what is packed shows no numbers.
    """
    digest = hashlib.sha256(repr((model.config, tokenizer.sha256, tokenizer.begins_with_bos)).encode())
    adapter = active_adapter(model)
    if adapter is not None:  # beside its weights alpha counts, for example
        digest.update(repr((adapter.options, adapter.merged)).encode())

    # of buffers outside the state dict those of a quantized base are weights; the others are worked out from these
    tensors = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            tensors |= {f"{path}.{name}": tensor for name, tensor in module.named_buffers()}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def ask(
    model: Transformer, tokenizer: Tokenizer, task: Task, max_len: int, done: Done
) -> list[list[Score]] | list[list[str]]:
    """The scores of each question's requests, or the text that the model wrote, alone in a list.

    max_len: see `loglikelihoods` and `continued`. done: what need not be asked again.
    """
    todo = [question for question in task.questions if done.digest(question) not in done.known]
    todo.sort(key=lambda question: len(question.requests[0].context))
    for begin in range(0, len(todo), QUESTIONS_AT_ONCE):
        part = todo[begin : begin + QUESTIONS_AT_ONCE]
        if task.benchmark.in_words:
            prompts = [question.requests[0].context for question in part]
            done.add(part, [[text] for text in continued(model, tokenizer, prompts, max_len)])
        else:
            requests: list[Request] = [request for question in part for request in question.requests]
            scores = iter(loglikelihoods(model, tokenizer, requests, max_len))
            done.add(part, [[next(scores) for _ in question.requests] for question in part])
    return [done.known[done.digest(question)] for question in task.questions]


def n_cut(tokenizer: Tokenizer, task: Task, max_len: int) -> int:
    """How many questions are longer than what the model reads, so that they lose their beginning.

    Raises `UserError` if not even an answer fits.
    """
    if task.benchmark.in_words:
        prompts = ids_of(tokenizer, [question.requests[0].context for question in task.questions])
        return sum(len(ids) > room_for_prompt(max_len) for ids in prompts)
    requests: list[Request] = [request for question in task.questions for request in question.requests]
    is_cut = iter([fitted(pair, max_len) != pair for pair in pairs_of(tokenizer, requests)])
    return sum(True in [next(is_cut) for _ in question.requests] for question in task.questions)


# ---- shares


def values_of(questions: Sequence[Question], scores: Sequence[list[Score]], metrics: Sequence[str]) -> Values:
    """Each of these metrics with its standard error. scores: those of each question's requests."""
    return {metric: _METRICS[metric](questions, scores) for metric in metrics}


def _acc(questions: Sequence[Question], scores: Sequence[list[Score]]) -> tuple[float, float]:
    return _mean([float(_is_right(question, of_it)) for question, of_it in zip(questions, scores, strict=True)])


def _is_right(question: Question, scores: list[Score]) -> bool:
    """Whether the right choice is the likeliest (the first of equals), or a single continuation is greedy."""
    if len(scores) == 1:
        return scores[0].is_greedy
    return int(np.argmax([score.nats for score in scores])) == question.right


def _acc_norm(questions: Sequence[Question], scores: Sequence[list[Score]]) -> tuple[float, float]:
    rights = []
    for question, of_it in zip(questions, scores, strict=True):
        per_character = [score.nats / size for score, size in zip(of_it, question.sizes, strict=True)]
        rights.append(float(int(np.argmax(per_character)) == question.right))
    return _mean(rights)


def _perplexity(questions: Sequence[Question], scores: Sequence[list[Score]]) -> tuple[float, float]:
    """e to the mean loss; its error to first order is that of the mean times the perplexity."""
    mean, error = _mean([-score.nats for (score,) in scores])
    perplexity = math.exp(min(mean, 700))
    return perplexity, perplexity * error


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: the values' deviation (n − 1 below) over √n; NaN of a single value."""
    n = len(values)
    deviation = float(np.std(values, ddof=1)) if n > 1 else math.nan
    return float(np.mean(values)), deviation / math.sqrt(n)


def _exact_match(extract: Callable[[str], str]) -> Callable[..., tuple[float, float]]:
    """The share of texts of which `extract` takes the right number."""

    def share(questions: Sequence[Question], texts: Sequence[list[str]]) -> tuple[float, float]:
        rights = [question.requests[0].continuation for question in questions]
        pairs = zip(texts, rights, strict=True)
        return _mean([float(same_number(extract(text), right)) for (text,), right in pairs])

    return share


_METRICS: dict[str, Callable[..., tuple[float, float]]] = {
    "acc": _acc,
    "acc_norm": _acc_norm,
    "perplexity": _perplexity,
    "exact_match,strict-match": _exact_match(marked_number),
    "exact_match,flexible-extract": _exact_match(last_number),
}


def pooled(parts: Sequence[Values], sizes: Sequence[int]) -> Values:
    """The values of several subjects together, each weighted by its number of questions n.

    The variance of all is Σ (n − 1) · n · SE² / (Σ n − their number), and its error √(variance / Σ n).
    """
    total = sum(sizes)
    values = {}
    for metric in parts[0]:
        mean = sum(part[metric][0] * n for part, n in zip(parts, sizes, strict=True)) / total
        squares = sum((n - 1) * n * part[metric][1] ** 2 for part, n in zip(parts, sizes, strict=True) if n > 1)
        freedom = total - len(parts)
        values[metric] = (mean, math.sqrt(squares / freedom / total) if freedom else math.nan)
    return values


# ---- shown


def results_of(asked: dict[str, list[tuple[Task, Values, int]]], model: str, limit: int | None, max_len: int) -> dict:
    """The results as lm-evaluation-harness writes them: {"results": {task: {"acc,none": …, "acc_stderr,none": …}}, …}.

    asked: for each benchmark its tasks, with their values and how many questions were cut, of which the harness writes
    nothing ("n-cut"). A benchmark of several subjects is a group.
    """
    parts = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "n-cut", "higher_is_better")
    results = {part: {} for part in parts}
    for benchmark, tasks in asked.items():
        for task, values, n_cut_of_it in tasks:
            name = _harness_name(benchmark, task.name)
            results["results"][name] = _entry(name, values)
            results["n-shot"][name] = task.shots
            results["n-samples"][name] = {"original": task.n_all, "effective": len(task.questions)}
            results["n-cut"][name] = n_cut_of_it
            results["higher_is_better"][name] = {metric.partition(",")[0]: metric != "perplexity" for metric in values}
        if BENCHMARKS[benchmark].subjects:
            name = _harness_name(benchmark, benchmark)
            of_all = pooled([values for _, values, _ in tasks], [len(task.questions) for task, *_ in tasks])
            results["groups"][name] = results["results"][name] = _entry(name, of_all)
            results["group_subtasks"][name] = [_harness_name(benchmark, task.name) for task, *_ in tasks]
    results["config"] = {"model": "minillm", "model_args": model, "limit": limit, "max_length": max_len}
    return results


def _harness_name(benchmark: str, name: str) -> str:
    return HARNESS_NAMES.get(benchmark, benchmark) + name.removeprefix(benchmark)


def _entry(name: str, values: Values) -> dict:
    entry: dict[str, object] = {"alias": name}
    for metric, (value, error) in values.items():
        plain_name, _, how = metric.partition(",")
        entry[f"{plain_name},{how or 'none'}"] = value
        entry[f"{plain_name}_stderr,{how or 'none'}"] = "N/A" if math.isnan(error) else error
    return entry


def table(results: dict) -> str:
    """The results as lines for the terminal, a line a metric; groups after their subjects."""
    width = max(len(name) for name in results["results"])
    lines = [f"  {'task':<{width}}  shots  questions       cut  metric"]
    for name, entry in results["results"].items():
        subjects = results["group_subtasks"].get(name, [name])
        shots = results["n-shot"][subjects[0]]
        n_questions = sum(results["n-samples"][subject]["effective"] for subject in subjects)
        n_cut_of_it = sum(results["n-cut"][subject] for subject in subjects)
        for key, value in entry.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = entry[f"{metric}_stderr,{kind}"]
                shown = metric if kind == "none" else key
                shown_error = "" if error == "N/A" else f" ± {error:.2g}"
                counts = f"{shots:>5}  {n_questions:>9,}  {n_cut_of_it:>8,}"
                lines.append(f"  {name:<{width}}  {counts}  {shown:<28} {value:.5g}{shown_error}")
    if any(results["n-cut"].values()):
        longest = results["config"]["max_length"]
        lines.append(f"  cut: longer than {longest:,} tokens (--seq_len), so they lost their beginning, examples first")
    return "\n".join(lines)
