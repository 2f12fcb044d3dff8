"""What the benchmarks share: timing in turns, models of random weights, and the machine's name beside a number."""

import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from minillm.base.errors import UserError
from minillm.checkpoint import architectures, huggingface
from minillm.model import config
from minillm.model.transformer import Transformer

VOCABULARY = {"tiny": 2048, "5m": 2048, "26m": 4096}  # of the presets' random models
GPT2_VOCABULARY = 50_257  # of all others
REPEATS = 7


def vocab_size_of(preset: str) -> int:
    """The usual size of a preset's vocabulary."""
    return VOCABULARY.get(preset, GPT2_VOCABULARY)


def medians(
    sides: dict[str, Callable[[], object]], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each side, called in turns, so that a slow moment of the machine slows all of them.

    clock: `time.process_time` counts the processor's time, which other programs do not take away.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def random_model(preset: str) -> Transformer:
    """A model with weights from N(0, 0.1²): wide enough that a wrong computation shows in the chosen tokens."""
    model = Transformer(config.preset(preset, vocab_size=vocab_size_of(preset)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def import_transformers():
    """transformers, with errors as its only messages; raises `UserError` if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    transformers.logging.set_verbosity_error()
    return transformers


def transformers_twin(model: Transformer):
    """The same weights in transformers' implementation of the architecture, and the version of transformers."""
    transformers = import_transformers()
    no_special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = transformers.AutoConfig.for_model(**architectures.to_hf(model.config) | no_special_ids)
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
