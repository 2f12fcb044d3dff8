"""Tokens a second of greedy generation, batch 1, with cache, beside transformers' `generate`.

The time includes reading the prompt and, on a GPU, recording the step. A CPU computes in fp32, with one thread and with
all, and with weights in 8 and 4 bits; a GPU in bf16, and there transformers also runs compiled, on a static cache.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from minillm.base.device import pick_device, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.commands.bench.measure import REPEATS, machine, medians, random_model, transformers_twin
from minillm.generation import completion
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
    model = random_model(config.preset).to(device, dtype)
    room = model.config.max_seq_len - len(PROMPT)
    if new_tokens > room:
        raise UserError(f"--new_tokens {new_tokens}: choose 1 to {room}, to fit the context")
    model.build_rotation()  # its tables stay in fp32
    sides, version = _sides(model, new_tokens, dtype)
    print(f"{config.preset}: {n_parameters(model.config):,} parameters, {dtype}, {machine(device)}, {version}")
    print(f"greedy, batch 1, {len(PROMPT)} + {new_tokens} tokens, medians of {REPEATS}; {ops.describe(device)}")

    # time them, on a CPU with one thread and with all
    all_threads = torch.get_num_threads()
    thread_counts = sorted({1, all_threads}) if device.type == "cpu" else [all_threads]
    for n_threads in thread_counts:
        torch.set_num_threads(n_threads)
        for side in sides.values():  # compile, capture
            side()
        times = medians(sides)
        print(f"{n_threads} thread(s)" if device.type == "cpu" else device)
        for name, seconds in times.items():
            ratio = times["transformers"] / seconds
            print(f"  {name:<38}{new_tokens / seconds:10.1f} tok/s   {ratio:5.2f} x transformers", flush=True)
    torch.set_num_threads(all_threads)


def _sides(model, new_tokens: int, dtype: torch.dtype) -> tuple[dict[str, Callable], str]:
    """The sides to compare, each a function that returns the new ids, and transformers' version.

    Raises `UserError` on a CPU if they choose different tokens; in bf16 two right computations may do so.
    """
    device = next(model.parameters()).device
    twin, version = transformers_twin(model)
    twin = twin.to(device, dtype)
    prompt = torch.tensor([PROMPT], device=device)  # (1, T)
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }

    def ours(model: Transformer = model) -> list[int]:
        (answer,) = completion.generate(model, [PROMPT], new_tokens)
        return answer.tokens

    def theirs(**more) -> list[int]:
        ids = twin.generate(prompt, **arguments, **more)  # (1, prompt and new tokens)
        return ids[0, len(PROMPT) :].tolist()

    sides: dict[str, Callable] = {"minillm": ours, "transformers": theirs}
    if device.type == "cuda":
        sides["transformers, static cache, compiled"] = lambda: theirs(cache_implementation="static")
    elif ours() != theirs():
        raise UserError("the two sides do not choose the same tokens, so their speed does not compare")
    else:
        for bits in GENERATION_BITS:
            rounded = copy.deepcopy(model)
            quantize_for_generation(rounded, bits)
            sides[f"minillm, weights in {bits} bits"] = partial(ours, rounded)
    return sides, version
