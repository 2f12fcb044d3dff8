"""Tokens a second of a training step beside plain PyTorch and transformers.

A step is forward, backward, clipping and AdamW. On a CPU in fp32, beside GPT-2 of the same size, all sides in turns; on
a GPU in bf16 autocast, each side alone on the device and each also compiled, with the share of the GPU's peak that it
uses (MFU) and the memory it takes. There ours come first, and a side's line is printed when it is measured.

Under torchrun our side alone, on all ranks: its speed, each rank's memory, and the share of time in communication
(`on_ranks.py`).

    torchrun --nproc_per_node 8 -m minillm bench train --preset 1b --rows 4 --seq_len 2048 --shard 8
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base import files
from minillm.base.device import autocast, peak_flops, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import Options, option, spelled
from minillm.commands.bench import on_ranks
from minillm.commands.bench.measure import (
    REPEATS,
    alone_on_gpu,
    drawn,
    import_transformers,
    machine,
    medians,
    print_ratios,
    transformers_twin,
    vocab_size_of,
)
from minillm.distributed import parallelize
from minillm.distributed.ranks import start, world_size
from minillm.model import config as shapes
from minillm.model import ops
from minillm.model.size import flops_per_token, n_parameters
from minillm.model.transformer import Transformer
from minillm.training import optim
from minillm.training.step import clip


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("tiny", "the model's shape", tuple(shapes.PRESETS))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    rows: int = option(8, "sequences of a step", at_least=1)
    seq_len: int = option(256, "tokens of a sequence", at_least=1)
    vocab_size: int | None = option(None, "entries of the vocabulary; none: the preset's usual", at_least=1)
    shard: str = option("auto", "under torchrun: ranks that hold one copy of the state together, as in training")
    tensor_parallel: int = option(1, "under torchrun: ranks that divide each layer and row", at_least=1)
    context_parallel: int = option(1, "under torchrun: ranks that divide the tokens of a row", at_least=1)
    compile: bool = option(False, "under torchrun: compile the model; one process measures both")
    json: str | None = option(None, "also write the speeds into this file, which `plan --measured` reads")


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

    With `torch_ops` a training step is compared with it: no kernels of our own, no chunks, no fusion by hand.
    """
    logits = model.logits(model.hidden(tokens))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Step:
    """A training step of one side: forward and backward, clipping and AdamW, ours or torch's own."""

    def __init__(
        self, module: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, *, n_targets: int, ours: bool
    ):
        """loss: the sum over `n_targets` targets, under autocast to dtype. ours: clip and step as the scripts do."""
        self.module = module
        self.loss = loss
        self.dtype = dtype
        self.n_targets = n_targets
        self.ours = ours
        self.parameters = list(module.parameters())
        self.device = self.parameters[0].device
        if ours:
            self.optimizers = optim.build_optimizers(module, "adamw", lr=1e-4, weight_decay=0.1)
        else:
            self.optimizers = [torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)]

    def __call__(self) -> None:
        with autocast(self.device, self.dtype):
            loss = self.loss()
        (loss / self.n_targets).backward()
        if self.ours:
            clip(self.module, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.module.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Sides:
    """The sides to compare, on the same tokens x and targets y, (B, T): our model and what people use instead."""

    def __init__(self, model: Transformer, x: Tensor, y: Tensor, dtype: torch.dtype):
        self.model = model
        self.x = x
        self.y = y
        self.dtype = dtype

    @torch.no_grad()
    def losses(self) -> list[float]:
        """The sums of our loss and of plain PyTorch's."""
        with autocast(self.x.device, self.dtype):
            return [self.model(self.x, self.y).item(), self._plain(plain_loss).item()]

    def builders(self) -> Iterator[tuple[str, Callable[[], Step]]]:
        """Name of each side and what makes its step, ours first. Importing, compiling and copying happen only then."""

        def ours(called: Callable) -> Step:
            return self._step(self.model, lambda: called(self.x, self.y), ours=True)

        def plain(loss: Callable) -> Step:
            return self._step(self.model, lambda: self._plain(loss))

        yield "minillm", lambda: ours(self.model)
        if self.x.is_cuda:
            yield "minillm, compiled", lambda: ours(parallelize.compiled(self.model))
        yield "plain PyTorch", lambda: plain(plain_loss)
        if self.x.is_cuda:
            yield "plain PyTorch, compiled", lambda: plain(torch.compile(plain_loss))
            yield from self._on_gpu()
        else:
            yield from self._on_cpu()

    def _plain(self, loss: Callable) -> Tensor:
        """`plain_loss`, or what compiling made of it, with every op torch's own."""
        with torch_ops():
            return loss(self.model, self.x, self.y)

    def _step(self, module: nn.Module, loss: Callable[[], Tensor], ours: bool = False) -> Step:
        return Step(module, loss, self.dtype, n_targets=self.x.numel(), ours=ours)

    def _theirs(self, module: nn.Module, called: Callable) -> Step:
        """A step of a model of transformers'; called: it, or what compiling made of it."""
        return self._step(module, lambda: called(self.x, labels=self.x).loss * self.x.numel())

    def _on_gpu(self) -> Iterator[tuple[str, Callable[[], Step]]]:
        """transformers, also compiled, and with Liger's kernels."""
        try:
            version = f"transformers {import_transformers().__version__}"
        except Exception as problem:  # not installed, or not made for this torch
            print(f"  transformers: {problem}")
            return

        def twin(compile: Callable = lambda module: module) -> Step:
            module = transformers_twin(self.model)[0].train()
            return self._theirs(module, compile(module))

        def with_liger() -> Step:  # last: it changes transformers' classes for good
            import liger_kernel.transformers as liger

            liger.apply_liger_kernel_to_llama()
            return twin()

        yield version, twin
        yield f"{version}, compiled", lambda: twin(torch.compile)
        yield f"{version}, Liger", with_liger

    def _on_cpu(self) -> Iterator[tuple[str, Callable[[], Step]]]:
        """transformers' GPT-2."""
        try:
            gpt2, version = gpt2_like(self.model)
        except UserError as problem:
            print(f"  GPT-2: {problem}")
            return
        size = sum(p.numel() for p in gpt2.parameters())
        yield f"GPT-2, {size:,} ({version})", lambda: self._theirs(gpt2, gpt2)


def gpt2_like(model: Transformer):
    """transformers' GPT-2 of about the same number of parameters, and of the same width, heads and vocabulary."""
    transformers = import_transformers()
    ours = model.config
    n_in_layers = n_parameters(ours) - ours.vocab_size * ours.dim
    n_layers = max(1, round(n_in_layers / (12 * ours.dim**2)))  # GPT-2 has 12 C² in a layer
    settings = transformers.GPT2Config(
        n_embd=ours.dim,
        n_layer=n_layers,
        n_head=ours.n_heads,
        vocab_size=ours.vocab_size,
        n_positions=ours.max_seq_len,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(settings), f"transformers {transformers.__version__}"


def run(config: Config) -> None:
    if world_size() > 1:
        on_ranks.run(config)
        return
    of_ranks = ("shard", "tensor_parallel", "context_parallel", "compile")
    given = [name for name in of_ranks if getattr(config, name) != getattr(Config, name)]
    if given:
        options = " ".join(f"--{name} {spelled(getattr(config, name))}" for name in given)
        raise UserError(f"{options}: for several ranks; start them by torchrun")

    # a model and tokens, both random
    device = start(config.device).device  # as the scripts do it
    dtype = pick_dtype("auto", device)
    rows = config.rows
    seq_len = config.seq_len
    vocab_size = config.vocab_size or vocab_size_of(config.preset)
    shape = shapes.preset(config.preset, vocab_size=vocab_size, max_seq_len=seq_len)
    model = drawn(shape, device, 0.02)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=generator).to(device)
    x = tokens[:, :-1].contiguous()  # (B, T)
    y = tokens[:, 1:].contiguous()
    sides = Sides(model, x, y, dtype)

    # do both compute the same?
    losses = sides.losses()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    if abs(losses[0] - losses[1]) > tolerance * losses[1]:
        raise UserError(f"the two sides compute other losses ({losses}), so their speed does not compare")

    # time each side
    print(f"{config.preset}: {n_parameters(model.config):,} parameters, {dtype}, {machine(device)}")
    print(f"one step of {rows} x {seq_len} tokens, {torch.get_num_threads()} thread(s), medians of {REPEATS}")
    print(ops.describe(device), flush=True)
    builders = sides.builders()
    # three steps compile, fill the optimizer's state and warm up
    measured = alone_on_gpu(builders, warm_ups=3) if device.type == "cuda" else in_turns(builders)

    # the table, and what it is for other commands
    flops = flops_per_token(shape, seq_len)
    speeds = print_speeds(measured, rows * seq_len, flops, peak_flops(device, dtype))
    print_ratios(speeds, "plain PyTorch")
    if config.json:
        described = {
            "device": machine(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": n_parameters(shape),
            "flops_per_token": flops,
            "rows": rows,
            "seq_len": seq_len,
            "tokens_per_s": speeds,
        }
        files.write_json_atomically(config.json, described)


def in_turns(builders: Iterable[tuple[str, Callable[[], Step]]]) -> Iterator[tuple[str, float, int]]:
    """Name and median seconds of each side's step, all of them in turns; no peak of memory."""
    steps = {name: build() for name, build in builders}
    for step in steps.values():  # fill the optimizer's state
        step()
    for name, seconds in medians(steps).items():
        yield name, seconds, 0


def print_speeds(
    measured: Iterable[tuple[str, float, int]], n_tokens: int, flops: float, peak: float | None
) -> dict[str, float]:
    """Print a line for each side as it comes, and return all tokens a second.

    measured: name, seconds and peak bytes of a step of `n_tokens`. flops: of a token. peak: FLOP/s of the device.
    """
    speeds = {}
    for name, seconds, peak_bytes in measured:
        speed = n_tokens / seconds
        line = f"  {name:<38}{speed:12,.0f} tok/s"
        if peak:
            line += f"   MFU {speed * flops / peak:6.1%}"
        if peak_bytes:
            line += f"   {peak_bytes / 2**30:6.1f} GiB"
        print(line, flush=True)
        speeds[name] = speed
    return speeds
