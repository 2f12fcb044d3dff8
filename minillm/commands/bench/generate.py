"""Tokens a second of greedy generation, batch 1, with cache, beside transformers' `generate`.

The time includes reading the prompt and, on a GPU, recording the step. A CPU computes in fp32, with one thread and with
all, and with weights in 16, 8 and 4 bits, in 8 also compiled; a GPU in bf16, one side after the other, ours first, and
there transformers also runs compiled, on a static cache.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from minillm.base.device import pick_device, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.commands.bench.measure import (
    REPEATS,
    alone_on_gpu,
    import_transformers,
    machine,
    medians,
    print_ratios,
    random_model,
    transformers_twin,
)
from minillm.generation import completion
from minillm.generation.compiled_step import CompiledStep
from minillm.model import ops
from minillm.model.config import PRESETS
from minillm.model.quant import GENERATION_BITS, quantize_for_generation
from minillm.model.size import n_parameters
from minillm.model.transformer import Transformer

PROMPT = list(range(1, 33))  # ids


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("tiny", "the model's shape", tuple(PRESETS))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    new_tokens: int | None = option(None, "tokens to write; none: 64, on a GPU 256", at_least=1)


def run(config: Config) -> None:
    # a model of random weights, on both sides
    device = pick_device(config.device)
    new_tokens = config.new_tokens or (256 if device.type == "cuda" else 64)
    dtype = pick_dtype("auto", device)
    model = random_model(config.preset, device).to(dtype)
    room = model.config.max_seq_len - len(PROMPT)
    if new_tokens > room:
        raise UserError(f"--new_tokens {new_tokens}: choose 1 to {room}, to fit the context")
    model.build_rotation()  # its tables stay in fp32
    print(f"{config.preset}: {n_parameters(model.config):,} parameters, {dtype}, {machine(device)}")
    print(f"greedy, batch 1, {len(PROMPT)} + {new_tokens} tokens, medians of {REPEATS}; {ops.describe(device)}")
    builders = _sides(model, new_tokens, dtype)

    # a GPU takes one side after the other
    if device.type == "cuda":
        times = ((name, seconds) for name, seconds, _ in alone_on_gpu(builders, warm_ups=1))  # compile, capture
        _print_speeds(times, new_tokens)
        return

    # a CPU takes them in turns, with one thread and with all; in bf16 two right computations may choose differently
    sides = {name: build() for name, build in builders}
    if "transformers" in sides and sides["minillm"]() != sides["transformers"]():
        raise UserError("the two sides do not choose the same tokens, so their speed does not compare")
    all_threads = torch.get_num_threads()
    for n_threads in sorted({1, all_threads}) if device.type == "cpu" else [all_threads]:
        torch.set_num_threads(n_threads)
        for side in sides.values():
            side()
        print(f"{n_threads} thread(s)")
        _print_speeds(medians(sides).items(), new_tokens)
    torch.set_num_threads(all_threads)


def _print_speeds(times: Iterable[tuple[str, float]], new_tokens: int) -> None:
    """A line for each side as it comes, from its name and seconds; then all beside transformers."""
    speeds = {}
    for name, seconds in times:
        speeds[name] = new_tokens / seconds
        print(f"  {name:<38}{speeds[name]:10.1f} tok/s", flush=True)
    print_ratios(speeds, "transformers")


def _sides(model: Transformer, new_tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Callable]]]:
    """Name of each side, ours first, and what makes its function, which returns the new ids."""
    device = model.norm.weight.device
    prompt = torch.tensor([PROMPT], device=device)  # (1, T)
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }

    def ours(model: Transformer) -> list[int]:
        (answer,) = completion.generate(model, [PROMPT], new_tokens)
        return answer.tokens

    @cache
    def twin():
        return transformers_twin(model)[0].to(dtype)

    def theirs(**more) -> list[int]:
        ids = twin().generate(prompt, **arguments, **more)  # (1, prompt and new tokens)
        return ids[0, len(PROMPT) :].tolist()

    def in_bits(bits: int, compiled: bool = False) -> Callable:
        rounded = copy.deepcopy(model)
        quantize_for_generation(rounded, bits)
        if compiled:
            rounded.compiled_step = CompiledStep(rounded)
        return partial(ours, rounded)

    yield "minillm", lambda: partial(ours, model)
    try:
        print(f"beside transformers {import_transformers().__version__}")
    except Exception as problem:  # not installed, or not made for this torch
        print(f"  transformers: {problem}")
    else:
        yield "transformers", lambda: theirs
        if device.type == "cuda":
            yield "transformers, static cache, compiled", lambda: partial(theirs, cache_implementation="static")
    if device.type != "cuda":
        for bits in GENERATION_BITS:
            yield f"minillm, weights in {bits} bits", partial(in_bits, bits)
        yield "minillm, weights in 8 bits, compiled", partial(in_bits, 8, compiled=True)
