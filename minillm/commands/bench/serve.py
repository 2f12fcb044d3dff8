"""Many requests at once: the engine beside llama.cpp and transformers' continuous batching, with the same weights.

So many clients each send a request, wait for its last token, and send the next. Prompts and answers are of random
lengths, greedy, and no end token ends one. All sides are in this process and measured in turns, at each concurrency:

    requests and tokens a second; tokens a second of the processor's time, which other programs do not take away
    time to first token and between tokens, in ms: what half of them, 95 % and 99 % stay below

llama.cpp (`pip install xllamacpp`) reads the GGUF file that `export` writes; a token that is part of a character comes
with the next one there. transformers' `generate_batch` is so slow on a CPU that it gets one short request a client,
once, and tells no times of tokens.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minillm.base.device import pick_device, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import option
from minillm.checkpoint import gguf, huggingface
from minillm.commands.bench.measure import machine, random_model, transformers_twin
from minillm.commands.model_options import CompileOptions, prepare_steps
from minillm.generation.batching import Engine, EngineOptions
from minillm.generation.completion import generate
from minillm.generation.requests import End, Request, Token
from minillm.model.config import PRESETS
from minillm.model.quant import GENERATION_BITS, quantize_for_generation
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer
from minillm.tokenizer.train import train_tokenizer

SHORTEST = 8  # tokens of a prompt or an answer
N_CHECKED = 4  # tokens in which the sides must agree; later ones may differ by rounding, in float16
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Config(CompileOptions):
    preset: str = option("tiny", "the model's shape", tuple(PRESETS))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    requests: int = option(48, "requests of one measurement", at_least=1)
    concurrency: tuple[int, ...] = option((1, 4, 16), "clients: a part of the table each", at_least=1, at_most=1024)
    longest_prompt: int = option(64, "tokens of a prompt, at most", at_least=SHORTEST)
    longest_answer: int = option(96, "tokens of an answer, at most", at_least=SHORTEST)
    repeats: int = option(3, "measurements of each side", at_least=1)
    gguf: str = option(
        "float16", "how llama.cpp's file holds the weights; none: without it", ("none", "float32", "float16", "q8_0")
    )
    bits: int | None = option(None, "of our weights; none: those of float32", (None, *GENERATION_BITS))
    transformers: bool = option(True, "also measure transformers")


class Asked(NamedTuple):
    """A request of the measurement."""

    prompt: list[int]
    n_new: int


class Measured(NamedTuple):
    """What one side took for all requests, in seconds."""

    n_requests: int
    n_tokens: int
    wall: float
    processor: float
    to_first: list[float]  # of each request, from when it was sent
    between: list[float]  # from each token to the next


Side = Callable[[list[Asked], int], Measured]  # of requests and a number of clients


class Clock:
    """The times at which requests were sent and their tokens came."""

    def __init__(self, asked: list[Asked]):
        self.asked = asked
        self.sent = [0.0] * len(asked)
        self.came: list[list[float]] = [[] for _ in asked]  # of one or more tokens
        self.n_new = [0] * len(asked)  # tokens, once a request has ended
        self.begin = time.perf_counter()
        self.processor_begin = time.process_time()

    def measured(self) -> Measured:
        """All of it, now that the last request has ended. Raises `UserError` if a token is missing."""
        wall = time.perf_counter() - self.begin
        processor = time.process_time() - self.processor_begin
        for number, request in enumerate(self.asked):
            if self.n_new[number] != request.n_new:
                raise UserError(f"request {number}: {self.n_new[number]} tokens came in place of {request.n_new}")
        to_first = [came[0] - sent for came, sent in zip(self.came, self.sent, strict=True)]
        between = [late - early for came in self.came for early, late in itertools.pairwise(came)]
        return Measured(len(self.asked), sum(self.n_new), wall, processor, to_first, between)


# ---- the sides


def ours(model: Transformer) -> Side:
    """The engine, stepped by this thread; a client that has its last token sends the next request from its listener."""

    def measure(asked: list[Asked], n_clients: int) -> Measured:
        engine = Engine(model, EngineOptions(slots=n_clients, max_waiting=n_clients))
        clock = Clock(asked)
        numbers = iter(range(len(asked)))

        def send() -> None:
            """Send the next request, if there is one."""
            number = next(numbers, None)
            if number is None:
                return

            def listen() -> None:
                now = time.perf_counter()
                for event in ticket.take():
                    if isinstance(event, Token):
                        clock.came[number].append(now)
                        clock.n_new[number] += 1
                    elif isinstance(event, End):
                        send()

            clock.sent[number] = time.perf_counter()
            # texts are random and share no beginning; owners keep a repeated one from being found in the cache
            request = Request(asked[number].prompt, asked[number].n_new, owner=str(number))
            ticket = engine.submit(request, listen)

        for _ in range(n_clients):
            send()
        while engine.step():
            pass
        return clock.measured()

    return measure


class LlamaCpp:
    """llama.cpp's own server, called without HTTP; a server for each number of clients."""

    def __init__(self, model: Transformer, folder: Path, weights: str):
        """weights: float32, float16 or q8_0."""
        try:
            import xllamacpp
        except ImportError:
            raise UserError("llama.cpp is not there: pip install xllamacpp, or --gguf none") from None
        self.library = xllamacpp
        self.name = f"llama.cpp {weights}"
        self.context = model.config.max_seq_len
        self.path = folder / "model.gguf"
        self.servers: dict[int, object] = {}

        # a vocabulary of 380 pieces, which the file fills up to the model's; no text is ever made of ids here
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = train_tokenizer(["Who has the ball? Tom has it."] * 30, 380, folder / "tokenizer")
        tensors = huggingface.weights_of(model)
        stored = huggingface.StoredModel(model.config, torch.float32, lambda key, dtype: tensors[key].to(dtype))
        dtype = torch.float16 if weights == "float16" else torch.float32
        gguf.write_file(stored, tokenizer, self.path, dtype, "Q8_0" if weights == "q8_0" else None)

    def server(self, n_clients: int):
        """A server with a slot for each client, of one thread like ours."""
        if n_clients not in self.servers:
            options = self.library.CommonParams()
            options.model.path = str(self.path)
            options.n_parallel = n_clients
            options.n_ctx = n_clients * self.context
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
            options.verbosity = 0
            self.servers[n_clients] = self.library.Server(options)
        return self.servers[n_clients]

    def body(self, request: Asked) -> dict:
        """A request as the server reads it."""
        greedy = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return {"prompt": request.prompt, "n_predict": request.n_new, **greedy}

    def tokens(self, request: Asked) -> list[int]:
        """The ids of an answer."""
        answer = self.server(1).handle_completions(self.body(request) | {"logprobs": 1})
        return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]

    def measure(self, asked: list[Asked], n_clients: int) -> Measured:
        """A thread is a client."""
        server = self.server(n_clients)
        server.handle_completions(self.body(Asked(asked[0].prompt, 1)))  # the first one takes longer
        clock = Clock(asked)
        numbers = iter(range(len(asked)))

        def client() -> None:
            for number in numbers:  # a range's iterator hands each number out once

                def listen(chunk: dict, number: int = number) -> bool:
                    clock.came[number].append(time.perf_counter())
                    if chunk["choices"][0]["finish_reason"]:
                        clock.came[number].pop()  # no token
                        clock.n_new[number] = chunk["usage"]["completion_tokens"]
                    return False  # go on

                clock.sent[number] = time.perf_counter()
                server.handle_completions(self.body(asked[number]) | {"stream": True}, listen)

        threads = [threading.Thread(target=client) for _ in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clock.measured()


def transformers_side(model: Transformer) -> tuple[str, Side]:
    """transformers' name with its version, and its continuous batching: no times of single tokens."""
    import transformers

    twin, version = transformers_twin(model)
    twin = twin.to(model.norm.weight.device, model.norm.weight.dtype)

    def measure(asked: list[Asked], n_clients: int) -> Measured:
        n_new = max(request.n_new for request in asked)
        settings = transformers.GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        begin = time.perf_counter()
        processor_begin = time.process_time()
        answers = twin.generate_batch(
            [request.prompt for request in asked], generation_config=settings, progress_bar=False, warmup=False
        )
        n_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        wall = time.perf_counter() - begin
        processor = time.process_time() - processor_begin
        return Measured(len(asked), n_tokens, wall, processor, [], [])

    return version, measure


# ---- the table


def run(config: Config) -> None:
    # a model of random weights
    device = pick_device(config.device)
    dtype = pick_dtype("auto", device)
    model = random_model(config.preset).to(device, dtype)
    model.build_rotation()  # its tables stay in fp32
    room = model.config.max_seq_len
    if config.longest_prompt + config.longest_answer > room:
        raise UserError(f"--longest_prompt and --longest_answer: together at most {room}, the model's context")

    # requests of random lengths
    generator = np.random.default_rng(0)
    asked = []
    for _ in range(config.requests):
        n_prompt = generator.integers(SHORTEST, config.longest_prompt + 1)
        prompt = generator.integers(0, model.config.vocab_size, n_prompt).tolist()
        asked.append(Asked(prompt, int(generator.integers(SHORTEST, config.longest_answer + 1))))

    with tempfile.TemporaryDirectory() as folder:
        # the sides, which must say the same
        sides: dict[str, Side] = {"minillm": ours(model)}
        if config.gguf != "none":
            llama_cpp = LlamaCpp(model, Path(folder), config.gguf)
            if config.gguf != "q8_0":
                _check_alike(model, llama_cpp, asked[0])
            sides[llama_cpp.name] = llama_cpp.measure
        rare = dict([transformers_side(model)]) if config.transformers else {}
        if config.bits:
            quantize_for_generation(model, config.bits)
        prepare_steps(config, model)

        # the head of the table
        ours_is = f", ours in {config.bits} bits" if config.bits else ""
        ours_is += ", one row compiled" if config.compile else ""
        print(f"{config.preset}: {n_parameters(model.config):,} parameters, {dtype}{ours_is}, {machine(device)}")
        lengths = f"{SHORTEST} to {config.longest_prompt} tokens and answers of {SHORTEST} to {config.longest_answer}"
        print(f"{config.requests} requests, prompts of {lengths}, {torch.get_num_threads()} thread(s),", end=" ")
        print(f"medians of {config.repeats}; ms that {', '.join(f'{p} %' for p in PERCENTILES)} stay below")
        print(f"{'clients':>9}  {'':<20}{'req/s':>8}{'tok/s':>9}{'tok/CPU s':>11}{'x':>7}", end="")
        print(f"{'to first token':>26}{'between tokens':>26}", flush=True)

        # a part for each number of clients
        for n_clients in config.concurrency:
            measured: dict[str, list[Measured]] = {name: [] for name in sides}
            for _ in range(config.repeats):
                for name, side in sides.items():
                    measured[name].append(side(asked, n_clients))
            for name, side in rare.items():
                few = [Asked(request.prompt, SHORTEST) for request in asked[:n_clients]]
                measured[name] = [side(few, n_clients)]
            _print_part(n_clients, measured)


def _check_alike(model: Transformer, llama_cpp: LlamaCpp, request: Asked) -> None:
    """Raise `UserError` unless llama.cpp begins its answer as we do."""
    (answer,) = generate(model, [request.prompt], N_CHECKED)
    theirs = llama_cpp.tokens(Asked(request.prompt, N_CHECKED))
    if theirs != answer.tokens:
        raise UserError(f"llama.cpp answers {theirs}, minillm {answer.tokens}: their speed does not compare")


def _print_part(n_clients: int, measured: dict[str, list[Measured]]) -> None:
    """A line for each side at this concurrency; x: our tokens a second of the processor's time over its."""
    rates = {name: statistics.median(one.n_tokens / one.processor for one in runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        requests = statistics.median(one.n_requests / one.wall for one in runs)
        tokens = statistics.median(one.n_tokens / one.wall for one in runs)
        line = f"{n_clients:>9}  {name:<20}{requests:8.2f}{tokens:9.0f}{rates[name]:11.0f}"
        line += f"{rates['minillm'] / rates[name]:7.2f}"
        for times in ([t for one in runs for t in one.to_first], [t for one in runs for t in one.between]):
            shown = [f"{1000 * np.percentile(times, p):.1f}" for p in PERCENTILES] if times else ["-"]
            line += f"{' / '.join(shown):>26}"
        print(line, flush=True)
