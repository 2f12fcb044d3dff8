"""Seconds that benchmarks take, beside lm-evaluation-harness with transformers: the same requests, the same model.

Both sides turn texts into ids and ids into log-likelihoods, which must be equal. The harness reads a context anew for
every choice, but for choices of one id.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.base.device import pick_device
from minillm.base.errors import MissingError, UserError
from minillm.base.options import Options, option
from minillm.base.printing import log_line
from minillm.commands.bench.measure import import_transformers, machine
from minillm.commands.evaluate import ALL, benchmarks_named
from minillm.commands.model_options import load_folder
from minillm.evaluation.benchmark_files import read_tasks
from minillm.evaluation.benchmarks import BENCHMARKS
from minillm.evaluation.loglikelihood import Request, loglikelihoods
from minillm.generation import load
from minillm.tuning.folders import is_adapter
from minillm.tuning.virtual_tokens import context_of

LARGEST_DIFFERENCE = 1e-3  # nats
BATCH_SIZE = 8  # of the harness; on one CPU thread 1 to 32 take about as long


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    model: str | None = option(None, "a run, a step or a model folder; none: the newest of out/sft or out/pretrain")
    tasks: str = option(ALL, f"benchmarks, with commas between: {', '.join(BENCHMARKS)}; or {ALL}")
    task_data: str = option("data/eval", "where the folders of benchmarks are")
    shots: int = option(0, "examples before each question", at_least=0)
    limit: int = option(100, "questions of each task, the first", at_least=1)
    seq_len: int | None = option(None, "longest input; none: the model's context", at_least=1)
    repeats: int = option(3, "how often each side is timed", at_least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")


def run(config: Config) -> None:
    device = pick_device(config.device)
    requests = _requests(config)
    folder = load.find_model(config.model, log=log_line)
    if is_adapter(folder):
        raise UserError(f"--model {folder}: is an adapter; merge it into its base first (python -m minillm merge)")
    loaded = load_folder(folder, None, config.device, "float32")
    max_len = config.seq_len or context_of(loaded.model)
    harness, version = _harness(folder, device, max_len)
    print(f"{folder}, fp32, {device}, {torch.get_num_threads()} thread(s), {machine(device)}, {version}")
    clock = "seconds" if device.type == "cuda" else "CPU seconds"
    print(f"inputs of up to {max_len:,} ids, {config.shots} examples; {clock}, medians of {config.repeats} in turns")

    print(f"  {'task':<16} requests  minillm  lm-eval  ratio  largest difference")
    n_requests, all_ours, all_theirs = 0, 0.0, 0.0
    for name, of_task in requests.items():
        sides = {
            "minillm": lambda of_task=of_task: [
                score.nats for score in loglikelihoods(loaded.model, loaded.tokenizer, of_task, max_len)
            ],
            "lm-eval": lambda of_task=of_task: harness(of_task),
        }
        times, scores = _timed(sides, config.repeats, device)
        difference = max(abs(a - b) for a, b in zip(*scores.values(), strict=True))
        if difference > LARGEST_DIFFERENCE:
            raise UserError(f"{name}: the two sides differ by {difference:.2g} nats, so their speed does not compare")
        ours, theirs = times.values()
        print(f"{_line(name, len(of_task), ours, theirs)}  {difference:.1e} nats", flush=True)
        n_requests += len(of_task)
        all_ours += ours
        all_theirs += theirs
    if len(requests) > 1:
        print(_line("together", n_requests, all_ours, all_theirs))


def _line(name: str, n_requests: int, ours: float, theirs: float) -> str:
    """A line of the table. ours, theirs: seconds."""
    return f"  {name:<16} {n_requests:>8,} {ours:>8.2f} {theirs:>8.2f} {theirs / ours:>5.1f}x"


def _requests(config: Config) -> dict[str, list[Request]]:
    """The requests of each benchmark whose files are there and whose answers are choices or last words."""
    requests: dict[str, list[Request]] = {}
    for name in benchmarks_named(config.tasks):
        try:
            tasks = read_tasks(name, Path(config.task_data), config.shots, config.limit)
        except MissingError as problem:
            if config.tasks != ALL:
                raise
            print(problem)
            continue
        if not BENCHMARKS[name].in_words:
            requests[name] = [request for task in tasks for question in task.questions for request in question.requests]
    if not requests:
        raise UserError(f"--task_data {config.task_data}: holds no benchmark with choices; see docs/en/evaluation.md")
    return requests


def _harness(folder: Path, device: torch.device, max_len: int) -> tuple[Callable, str]:
    """A function from requests to the harness's log-likelihoods by transformers, and both versions."""
    transformers = import_transformers()
    try:
        import lm_eval
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError('the benchmark needs lm-evaluation-harness: pip install -e ".[harness]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(folder), device=str(device), dtype="float32", batch_size=BATCH_SIZE, max_length=max_len)

    def loglikelihood(requests: list[Request]) -> list[float]:
        instances = [Instance("loglikelihood", {}, tuple(request), number) for number, request in enumerate(requests)]
        return [nats for nats, _ in model.loglikelihood(instances, disable_tqdm=True)]

    return loglikelihood, f"lm_eval {lm_eval.__version__} with transformers {transformers.__version__}"


def _timed(sides: dict[str, Callable], repeats: int, device: torch.device) -> tuple[dict, dict]:
    """(median seconds, last result) of each side, called in turns: of CPU time on a CPU, which others share."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for _ in range(repeats + 1):  # the first is left out
        for name, side in sides.items():
            begin = clock()
            results[name] = side()
            times[name].append(clock() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}, results
