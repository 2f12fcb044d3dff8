"""Benchmarks against the usual tools, both sides in one process: `python -m minillm bench generate`.

Each subcommand is one function that first checks that both sides compute the same, then times them in turns
and prints medians with the versions and threads they were taken with.
"""

import statistics
import time
from collections.abc import Callable

import torch

from minillm import UserError, config, generate, huggingface
from minillm.model import Transformer

VOCABULARY = {"tiny": 2048, "26m": 4096}  # of the presets' random models; all others GPT-2's 50,257
REPEATS = 7


def medians(sides: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each side, called in turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def random_model(preset: str) -> Transformer:
    """A model with weights from N(0, 0.1²): wide enough that a wrong computation shows in the chosen tokens."""
    model = Transformer(config.preset(preset, vocab_size=VOCABULARY.get(preset, 50_257)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformers_twin(model: Transformer):
    """The same weights in transformers' own implementation of the architecture."""
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    written = huggingface.to_hf(model.config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = transformers.AutoConfig.for_model(**written)
    twin = transformers.AutoModelForCausalLM.from_config(settings).eval()
    twin.load_state_dict(huggingface.weights_of(model), strict=False)
    twin.tie_weights()
    return twin, f"transformers {transformers.__version__}"


def bench_generate(preset: str = "tiny", new_tokens: int = 64, prompt_tokens: int = 32) -> None:
    """Tokens a second of greedy generation, batch 1, with cache, beside transformers' `generate`."""
    model = random_model(preset)
    twin, version = transformers_twin(model)
    prompt = list(range(1, prompt_tokens + 1))
    asked = {"attention_mask": torch.ones(1, prompt_tokens, dtype=torch.long), "do_sample": False}
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def ours() -> list[int]:
        return generate.generate(model, [prompt], new_tokens)[0].tokens

    def theirs() -> list[int]:
        return twin.generate(torch.tensor([prompt]), **asked, **limits)[0, prompt_tokens:].tolist()

    if ours() != theirs():
        raise UserError("the two sides do not choose the same tokens, so their speed does not compare")
    print(f"{preset}: {model.config.n_parameters():,} parameters, float32, torch {torch.__version__}, {version}")
    print(f"greedy, batch 1, {prompt_tokens} + {new_tokens} tokens; the same {new_tokens} chosen by both")
    print("threads   minillm tok/s   transformers tok/s   ratio")
    before = torch.get_num_threads()
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        taken = medians({"ours": ours, "theirs": theirs})
        speed = {name: new_tokens / seconds for name, seconds in taken.items()}
        ratio = taken["theirs"] / taken["ours"]
        print(f"{threads:7d}   {speed['ours']:13.1f}   {speed['theirs']:18.1f}   {ratio:5.2f}", flush=True)
    torch.set_num_threads(before)
