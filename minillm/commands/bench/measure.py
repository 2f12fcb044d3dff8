"""What the benchmarks share: timing in turns, models of random weights, and the machine's name beside a number."""

import gc
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from minillm.base.errors import UserError
from minillm.base.huge_pages import use_huge_pages
from minillm.checkpoint import architectures, huggingface
from minillm.model import config
from minillm.model.transformer import Transformer

VOCABULARY = {"tiny": 2048, "5m": 2048, "26m": 4096}  # of the presets' random models
GPT2_VOCABULARY = 50_257  # of all others
REPEATS = 7
CPU = torch.device("cpu")


def vocab_size_of(preset: str) -> int:
    """The usual size of a preset's vocabulary."""
    return VOCABULARY.get(preset, GPT2_VOCABULARY)


def medians(sides: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median seconds of each side, called in turns, so that a slow moment of the machine slows all of them.

    clock: `time.process_time` counts the processor's time, which other programs do not take away.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, run in sides.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def alone_on_gpu(
    sides: Iterable[tuple[str, Callable[[], Callable[[], object]]]], warm_ups: int
) -> Iterator[tuple[str, float, int]]:
    """Name, median seconds and peak bytes of each side: alone on the GPU, and given as soon as it is measured.

    sides: name, and what makes the function to be timed; ours first, for a time limit may come before the others. A
    side that fails is a line, and the others go on. Raises `UserError` at the end if one of ours has failed.
    """
    failed = []
    for name, build in sides:
        try:
            seconds, peak_bytes = _alone(build, warm_ups)
        except Exception as problem:  # whatever a side raises
            print(f"  {name}: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}", flush=True)
            if name.startswith("minillm"):
                traceback.print_exc()
                failed.append(name)
            continue
        yield name, seconds, peak_bytes
    if failed:
        raise UserError(f"{' and '.join(failed)}: failed, see above")


def _alone(build: Callable[[], Callable[[], object]], warm_ups: int) -> tuple[float, int]:
    """Median seconds and peak bytes of what `build` makes. A function of its own: at its end all of that is free."""
    gc.collect()  # what compiling left in cycles holds the other side's tensors
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = build()
    for _ in range(warm_ups):
        run()
    (seconds,) = medians({"": run}).values()
    return seconds, torch.cuda.max_memory_allocated()


def print_ratios(speeds: dict[str, float], beside: str) -> None:
    """How many times as fast each side is as one of them, if that one was measured."""
    for name in speeds if beside in speeds else ():
        print(f"  {name:<38}{speeds[name] / speeds[beside]:10.2f} x {beside}", flush=True)


def random_model(preset: str, device: torch.device = CPU) -> Transformer:
    """A model with weights from N(0, 0.1²): wide enough that a wrong computation shows in the chosen tokens."""
    model = drawn(config.preset(preset, vocab_size=vocab_size_of(preset)), device, 0.1)
    if device.type == "cpu":
        use_huge_pages()  # as where a model is loaded
    return model.eval()


@torch.no_grad()
def drawn(model_config: config.ModelConfig, device: torch.device, std: float) -> Transformer:
    """A model with matrices from N(0, std²), drawn on the device: a billion take a CPU ten seconds."""
    with device:
        model = Transformer(model_config)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std, generator=generator)
    return model


def import_transformers():
    """transformers, with errors as its only messages; raises `UserError` if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    transformers.logging.set_verbosity_error()
    return transformers


def transformers_twin(model: Transformer):
    """The same weights, on the same device, in transformers' implementation of the architecture, and its version."""
    transformers = import_transformers()
    no_special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = transformers.AutoConfig.for_model(**architectures.to_hf(model.config) | no_special_ids)
    with model.norm.weight.device:  # it draws all weights first
        twin = transformers.AutoModelForCausalLM.from_config(settings).eval()
    twin.load_state_dict(huggingface.weights_of(model), strict=False)
    twin.tie_weights()
    return twin, f"transformers {transformers.__version__}"


def machine(device: torch.device) -> str:
    """What a number was measured with, in a few words: GPU and versions."""
    if device.type != "cuda":
        return f"torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, power limit {_power_limit()}, torch {torch.__version__}"


def _power_limit() -> str:
    """The first GPU's, as nvidia-smi gives it."""
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
        return answer.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
