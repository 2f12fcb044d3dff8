"""Benchmarks against the usual tools, both sides in one process: `python -m minillm bench generate|train|data`.

Each subcommand is one function that first checks that both sides compute the same, then times them in turns
and prints medians with the versions and threads they were measured with. `bench tune` is in bench_tune.py.
"""

import contextlib
import gc
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.device import autocast, peak_flops, pick_device, pick_dtype
from minillm.base.errors import UserError
from minillm.checkpoint import huggingface
from minillm.datasets.token_bins import TokenBins
from minillm.datasets.windows import TokenWindows
from minillm.distributed import parallelize
from minillm.distributed.ranks import start
from minillm.generation.completion import generate
from minillm.model import config, ops
from minillm.model.size import flops_per_token, n_parameters
from minillm.model.transformer import Transformer
from minillm.training import optim
from minillm.training.step import clip

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


def _transformers():
    try:
        import transformers
    except ImportError:
        raise UserError('the benchmark needs transformers: pip install -e ".[bench]"') from None
    transformers.logging.set_verbosity_error()
    return transformers


def transformers_twin(model: Transformer):
    """The same weights in transformers' own implementation of the architecture."""
    transformers = _transformers()
    written = huggingface.to_hf(model.config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = transformers.AutoConfig.for_model(**written)
    twin = transformers.AutoModelForCausalLM.from_config(settings).eval()
    twin.load_state_dict(huggingface.weights_of(model), strict=False)
    twin.tie_weights()
    return twin, f"transformers {transformers.__version__}"


def bench_generate(
    preset: str = "tiny", device: str = "cpu", new_tokens: int | None = None, prompt_tokens: int = 32
) -> None:
    """Tokens a second of greedy generation, batch 1, with cache, beside transformers' `generate`.

    Reading the prompt and, on a GPU, recording the step are in the time. new_tokens: 64, on a GPU 256 if not given.

    On a CPU in fp32, with one thread and with all; on a GPU in bf16, and transformers also compiled, on a static cache.
    """
    place = pick_device(device)
    new_tokens = new_tokens or (256 if place.type == "cuda" else 64)
    dtype = pick_dtype("auto", place)
    model = random_model(preset).to(place, dtype)
    if new_tokens > model.config.max_seq_len - prompt_tokens:
        raise UserError(
            f"--new_tokens {new_tokens}: choose 1 to {model.config.max_seq_len - prompt_tokens}, to fit the context"
        )
    model.build_rotation()  # its tables stay in fp32
    twin, version = transformers_twin(model)
    twin = twin.to(place, dtype)
    prompt = list(range(1, prompt_tokens + 1))
    asked = {"attention_mask": torch.ones(1, prompt_tokens, dtype=torch.long, device=place), "do_sample": False}
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def ours() -> list[int]:
        return generate(model, [prompt], new_tokens)[0].tokens

    def theirs(**more) -> list[int]:
        rows = twin.generate(torch.tensor([prompt], device=place), **asked, **limits, **more)
        return rows[0, prompt_tokens:].tolist()

    sides: dict[str, Callable] = {"minillm": ours, "transformers": theirs}
    if place.type == "cuda":
        sides["transformers, static cache, compiled"] = lambda: theirs(cache_implementation="static")
    elif ours() != theirs():  # in bf16 two right computations may differ in a token
        raise UserError("the two sides do not choose the same tokens, so their speed does not compare")
    print(f"{preset}: {n_parameters(model.config):,} parameters, {dtype}, {machine(place)}, {version}")
    print(f"greedy, batch 1, {prompt_tokens} + {new_tokens} tokens, medians of {REPEATS}; {ops.describe(place)}")
    before = torch.get_num_threads()
    for threads in sorted({1, before}) if place.type == "cpu" else (before,):
        torch.set_num_threads(threads)
        for side in sides.values():  # compile, capture
            side()
        taken = medians(sides)
        print(f"{threads} thread(s)" if place.type == "cpu" else place)
        for name, seconds in taken.items():
            ratio = taken["transformers"] / seconds
            print(f"  {name:<38}{new_tokens / seconds:10.1f} tok/s   {ratio:5.2f} x transformers", flush=True)
    torch.set_num_threads(before)


def machine(device: torch.device) -> str:
    """What a number was taken with, in a few words: GPU and versions."""
    if device.type != "cuda":
        return f"torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, power limit {_power_limit()}, torch {torch.__version__}"


def _power_limit() -> str:
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


@contextlib.contextmanager
def torch_ops() -> Iterator[None]:
    """Context in which every op of the model is torch's own."""
    before = ops.selected()
    ops.select("torch")
    try:
        yield
    finally:
        ops.select(before)


def plain_loss(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """The summed loss in nats as one would first write it: the logits of all tokens at once, and torch's cross_entropy.

    By `torch_ops` it is what a training step is measured against: no kernels of our own, no chunks, no fusion by hand.
    """
    logits = model.logits(model.hidden(tokens))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def bench_train(
    preset: str = "tiny", device: str = "cpu", rows: int = 8, seq_len: int = 256, vocab_size: int | None = None
) -> None:
    """Tokens a second of a training step (forward, backward, clipping, AdamW) beside plain PyTorch and transformers.

    On a CPU in fp32, beside GPT-2 of the same size; on a GPU in bf16 autocast, each side alone on the device and
    each also compiled, with the share of the GPU's peak that it uses (MFU) and the memory it takes.
    """
    ranks = start(device)  # as the scripts do it
    place, dtype = ranks.device, pick_dtype("auto", ranks.device)
    vocab_size = vocab_size or VOCABULARY.get(preset, 50_257)
    model = Transformer(config.preset(preset, vocab_size=vocab_size, max_seq_len=seq_len))
    model.init_weights()
    model = model.to(place)
    tokens = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0)).to(place)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with autocast(place, dtype):
        ours = model(x, y).item()
        with torch_ops():
            plain = plain_loss(model, x, y).item()
    if abs(ours - plain) > (1e-5 if dtype == torch.float32 else 2e-3) * plain:
        raise UserError(f"the two sides compute other losses ({ours}, {plain}), so their speed does not compare")
    print(f"{preset}: {n_parameters(model.config):,} parameters, {dtype}, {machine(place)}")
    print(f"one step of {rows} x {seq_len} tokens, {torch.get_num_threads()} thread(s), medians of {REPEATS}")
    print(ops.describe(place), flush=True)

    def step_of(module: nn.Module, loss: Callable, ours: bool = False) -> Callable[[], None]:
        parameters, no_scaler = list(module.parameters()), torch.amp.GradScaler(place.type, enabled=False)
        if ours:
            optimizers = optim.build_optimizers(model, "adamw", lr=1e-4, weight_decay=0.1)
        else:
            optimizers = [torch.optim.AdamW(parameters, lr=1e-4, fused=True)]

        def run() -> None:
            with autocast(place, dtype):
                value = loss()
            (value / (rows * seq_len)).backward()
            if ours:
                clip(module, optimizers, no_scaler, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            module.zero_grad(set_to_none=True)
            if place.type == "cuda":
                torch.cuda.synchronize()

        return run

    builds: dict[str, Callable] = {
        "plain PyTorch": lambda: step_of(model, lambda: _by_torch(plain_loss, model, x, y)),
        "minillm": lambda: step_of(model, lambda: model(x, y), ours=True),
    }
    if place.type == "cuda":
        builds |= _gpu_sides(model, step_of, x, y)
    else:
        builds |= _cpu_sides(model, step_of, x)
    taken, memory = _time_steps(builds, together=place.type != "cuda")
    flops, peak = flops_per_token(model.config, seq_len), peak_flops(place, dtype)
    width = max(map(len, taken))
    for name, seconds in taken.items():
        speed, ratio = rows * seq_len / seconds, taken["plain PyTorch"] / seconds
        used = f"   MFU {speed * flops / peak:6.1%}" if peak else ""
        held = f"   {memory[name] / 2**30:6.1f} GiB" if name in memory else ""
        print(f"  {name:<{width}}{speed:12,.0f} tok/s   {ratio:5.2f} x plain{used}{held}", flush=True)


def _time_steps(builds: dict[str, Callable], together: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of each side's step, and on a GPU the peak bytes; one side at a time unless `together`."""
    if together:
        steps = {name: build() for name, build in builds.items()}
        for step in steps.values():
            step()
        return medians(steps), {}
    taken, memory = {}, {}
    for name, build in builds.items():
        gc.collect()  # what compiling left in cycles holds the other side's tensors
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = build()
        for _ in range(3):  # compile, fill the optimizer's state, warm up
            step()
        taken |= medians({name: step})
        memory[name] = torch.cuda.max_memory_allocated()
        del step
    return taken, memory


def _by_torch(loss: Callable, *inputs) -> Tensor:
    """loss(*inputs), with every op torch's own."""
    with torch_ops():
        return loss(*inputs)


def _gpu_sides(model: Transformer, step_of: Callable, x, y) -> dict[str, Callable]:
    """What people would take instead on a GPU: compiled PyTorch; transformers, also compiled, and with Liger."""
    our_fast, plain_fast = parallelize.compiled(model), torch.compile(plain_loss)
    sides = {
        "plain PyTorch, compiled": lambda: step_of(model, lambda: _by_torch(plain_fast, model, x, y)),
        "minillm, compiled": lambda: step_of(model, lambda: our_fast(x, y), ours=True),
    }
    try:
        twin, version = transformers_twin(model)
    except UserError as problem:
        print(f"  transformers: {problem}")
        return sides
    twin = twin.to(x.device).train()
    fast = torch.compile(twin)
    sides[version] = lambda: step_of(twin, lambda: twin(x, labels=x).loss * x.numel())
    sides[f"{version}, compiled"] = lambda: step_of(twin, lambda: fast(x, labels=x).loss * x.numel())
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        print("  Liger: not installed")
        return sides

    def with_liger() -> Callable[[], None]:  # last: it changes transformers' classes for good
        apply_liger_kernel_to_llama()
        other = transformers_twin(model)[0].to(x.device).train()
        return step_of(other, lambda: other(x, labels=x).loss * x.numel())

    return sides | {f"{version}, Liger": with_liger}


def _cpu_sides(model: Transformer, step_of: Callable, x) -> dict[str, Callable]:
    """What people would take instead on a CPU: transformers' GPT-2."""
    try:
        gpt2, version = _gpt2_like(model)
    except UserError as problem:
        print(f"  GPT-2: {problem}")
        return {}
    name = f"GPT-2, {sum(p.numel() for p in gpt2.parameters()):,} ({version})"
    return {name: lambda: step_of(gpt2, lambda: gpt2(x, labels=x).loss * x.numel())}


def _gpt2_like(model: Transformer):
    """transformers' GPT-2 of about the same number of parameters, and of the same width, heads and vocabulary."""
    transformers = _transformers()
    c = model.config
    layers = max(1, round((n_parameters(c) - c.vocab_size * c.dim) / (12 * c.dim**2)))
    sizes = dict(n_embd=c.dim, n_layer=layers, n_head=c.n_heads, vocab_size=c.vocab_size, n_positions=c.max_seq_len)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None)
    settings = transformers.GPT2Config(**sizes, **off, attn_implementation="sdpa")
    return transformers.GPT2LMHeadModel(settings), f"transformers {transformers.__version__}"


def bench_data(tokens: int = 100_000_000, seq_len: int = 1024, rows: int = 32) -> None:
    """Tokens a second that one core reads from token bins in training order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, tokens, dtype=np.uint16).tofile(path)
        bins = TokenBins(path, "train", dtype="uint16", vocab_size=50_000)
        windows = TokenWindows([(bins, 1.0)], seq_len, seed=0)
        position = 0

        def read() -> None:
            nonlocal position
            for _ in range(50):
                windows.batch(np.arange(position, position + rows))
                position += rows

        taken = medians({"read": read})["read"]
    torch.set_num_threads(threads)
    print(f"{tokens:,} tokens of uint16, batches of {rows} × {seq_len}, one core, median of {REPEATS}")
    print(f"  {50 * rows * seq_len / taken / 1e6:,.0f} million tokens/s, X and Y as int64")
