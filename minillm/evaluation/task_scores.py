"""Benchmarks that a model is asked again and again while it is trained: `--eval_tasks` of the training scripts.

The numbers are those of `python -m minillm eval --tasks` on the same first questions. They go to metrics.jsonl by names
such as `acc/arc_easy` and `acc_stderr/arc_easy`; several subjects (MMLU) count together.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minillm.base.errors import UserError, naming
from minillm.base.options import Options, option
from minillm.distributed.ranks import Ranks
from minillm.evaluation.benchmark_files import Task, read_tasks
from minillm.evaluation.benchmark_scores import n_cut, pooled, values_of
from minillm.evaluation.benchmarks import BENCHMARKS
from minillm.evaluation.loglikelihood import Pair, Request, fitted, pairs_of, scores_of
from minillm.evaluation.worked_answers import continued, room_for_prompt
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer

USUAL_FOLDER = Path("data/eval")  # of a benchmark that is given by its name alone
USUAL_LIMIT = 200  # questions


@dataclass(frozen=True)
class TaskOptions(Options):
    """The options of a script that asks benchmarks at --eval_every."""

    eval_tasks: str | None = option(
        None,
        f"benchmarks to ask at --eval_every, with commas between: folders of their files, such as "
        f"{USUAL_FOLDER}/arc_easy, whose names say which they are, or these names alone",
        group="validation and checkpoints",
    )
    eval_limit: int | None = option(
        None,
        f"questions of each task, the first; none: {USUAL_LIMIT}",
        at_least=1,
        group="validation and checkpoints",
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.eval_limit is not None and self.eval_tasks is None:
            problems.append(f"--eval_limit {self.eval_limit}: is about benchmarks; give --eval_tasks")
        return problems


class TaskScores:
    """Benchmarks, with their questions as ids already, so that what does not fit is refused before training."""

    def __init__(self, tasks: dict[str, list[Task]], tokenizer: Tokenizer | None, max_len: int):
        """tasks: of each benchmark. max_len: most ids of one input; what does not fit into it raises `UserError`."""
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.pairs: dict[str, list[Pair]] = {}  # of each task, for all choices of all questions
        for name, its_tasks in tasks.items():
            for task in its_tasks:
                with naming(f"--eval_tasks {name}"):
                    if task.benchmark.in_words:
                        room_for_prompt(max_len)
                        continue
                    requests: list[Request] = [request for question in task.questions for request in question.requests]
                    self.pairs[task.name] = [fitted(pair, max_len) for pair in pairs_of(tokenizer, requests)]

    def scores(self, model: Transformer, ranks: Ranks) -> dict[str, float]:
        """Each metric and its standard error by names such as acc/arc_easy; the ranks share the choices."""
        scores = {}
        for name, tasks in self.tasks.items():
            values = []
            for task in tasks:
                outcomes = self._outcomes(model, task, ranks)
                values.append(values_of(task.questions, outcomes, task.benchmark.metrics))
            together = pooled(values, [len(task.questions) for task in tasks]) if len(tasks) > 1 else values[0]
            for metric, (value, error) in together.items():
                scores[f"{metric}/{name}"] = value
                if not math.isnan(error):
                    scores[f"{metric}_stderr/{name}"] = error
        return scores

    def watch(self, run, model: Transformer, step: int) -> None:
        """Report what the model scores when it is due: at --eval_every, and after the last step. run: a `Run`."""
        if not self.tasks or not run.due(step, run.training_config.eval_every):
            return
        run.report(step, lambda: self.scores(model, run.ranks), of="benchmarks")

    def _outcomes(self, model: Transformer, task: Task, ranks: Ranks) -> list[list]:
        """For each question the scores of its choices, or the text that the model wrote."""
        if task.benchmark.in_words:  # on every rank, since each may hold a part of the model
            prompts = [question.requests[0].context for question in task.questions]
            return [[text] for text in continued(model, self.tokenizer, prompts, self.max_len)]
        scores = iter(scores_of(model, self.pairs[task.name], ranks))
        return [[next(scores) for _ in question.requests] for question in task.questions]


def tasks_to_ask(training_config, tokenizer: Tokenizer | None, model_config: ModelConfig, ranks: Ranks) -> TaskScores:
    """The benchmarks of --eval_tasks; none without the option.

    The longest input is that of `eval` on the run's checkpoints: as long as training, but at most the context.
    Raises `UserError` for files that are missing or wrong, and if the ranks have read different ones.
    """
    if training_config.eval_tasks is None:
        return TaskScores({}, tokenizer, 0)
    if tokenizer is None:
        raise UserError("--eval_tasks: needs a tokenizer, and there is none beside a raw .bin; leave it out")
    context = model_config.max_seq_len - training_config.virtual_positions
    max_len = min(model_config.trained_seq_len or training_config.seq_len, context)
    limit = training_config.eval_limit or USUAL_LIMIT
    tasks = {}
    for place in training_config.eval_tasks.split(","):
        folder = USUAL_FOLDER / place.strip()
        if "/" in place:
            folder = Path(place.strip())
        if folder.name not in BENCHMARKS:
            raise UserError(
                f"--eval_tasks {place}: {folder.name!r} is no benchmark; give a folder by one of the names "
                f"{', '.join(BENCHMARKS)}"
            )
        if folder.name in tasks:
            raise UserError(f"--eval_tasks {place}: {folder.name} is given twice; its curve can be of one folder alone")
        tasks[folder.name] = read_tasks(folder.name, folder.parent, None, limit)
    asked = TaskScores(tasks, tokenizer, max_len)
    questions = [task.questions for its_tasks in tasks.values() for task in its_tasks]
    if not ranks.agree([questions, asked.pairs]):
        raise UserError("--eval_tasks: the machines hold different files; start again with the same everywhere")
    for name, its_tasks in tasks.items():
        n_questions = sum(len(task.questions) for task in its_tasks)
        n_too_long = sum(n_cut(tokenizer, task, max_len) for task in its_tasks)
        if n_too_long and ranks.main:
            print(f"--eval_tasks {name}: {n_too_long} of {n_questions} are longer than {max_len} tokens: cut in front")
    return asked
