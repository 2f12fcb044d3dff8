"""Tokens a second and memory of a training step of each tuning method, beside PEFT's.

Both use the same base and adapter: PEFT runs on transformers' version of our model, with our adapter's numbers. First
the two losses must agree, then steps (forward, backward, torch's fused AdamW) are timed in turns. Nothing is compiled.
A CPU computes in fp32, a GPU under bf16 autocast. For "full" the other side is transformers alone.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.base.device import autocast, pick_device, pick_dtype
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.commands.bench.measure import (
    REPEATS,
    machine,
    medians,
    random_model,
    transformers_twin,
    vocab_size_of,
)
from minillm.model import config, ops, quant
from minillm.model.loss import IGNORED
from minillm.model.size import n_parameters
from minillm.training import starting_model
from minillm.tuning import peft_format
from minillm.tuning.adapter import Adapter, attach
from minillm.tuning.options import TuningConfig

METHODS = {
    "full": TuningConfig(),
    "freeze last:2": TuningConfig("freeze", train_layers="last:2"),
    **{tune: TuningConfig(tune) for tune in ("lora", "dora", "ia3", "adapter", "prefix", "prompt", "ptuning")},
    "lora on 8 bits": TuningConfig("lora", base_bits=8),
    "lora on 4 bits": TuningConfig("lora", base_bits=4),
}


class Side(NamedTuple):
    """A model, its mean loss in nats, and the optimizer of its trained parameters."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> "Side":
        """dtype: of autocast, float32 for none."""
        trained = [p for p in model.parameters() if p.requires_grad]
        device = trained[0].device

        def cast() -> Tensor:
            with autocast(device, dtype):
                return loss()

        return cls(model, cast, torch.optim.AdamW(trained, lr=1e-4, fused=True))

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes of weights and moments, and of what a step takes besides: on a GPU at its peak; on a CPU gradients
        and the tensors that autograd keeps for the backward pass. Call it after a step.
        """
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        lasting = _bytes([*self.model.parameters(), *self.model.buffers(), *moments])
        if next(self.model.parameters()).is_cuda:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return sum(lasting.values()) + torch.cuda.max_memory_allocated() - before

        saved: list[Tensor] = []  # alive to the end, so that no two of them have one address

        def save(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            self.loss()
        all_bytes = lasting | _bytes(saved)
        gradients = 4 * starting_model.n_trained(self.model)
        return sum(all_bytes.values()) + gradients


def _bytes(tensors: list[Tensor]) -> dict[int, int]:
    """The memory of tensors: address → bytes, so that none counts twice."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("tiny", "the model's shape", tuple(config.PRESETS))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    rows: int = option(8, "sequences of a step", at_least=1)
    seq_len: int = option(256, "tokens of a sequence", at_least=1)


def run(options: Config) -> None:
    try:
        import peft
        import transformers
    except ImportError:
        raise UserError('bench tune needs transformers and peft: pip install -e ".[bench]"') from None

    # random tokens
    device = pick_device(options.device)
    dtype = pick_dtype("auto", device)
    preset = options.preset
    rows = options.rows
    seq_len = options.seq_len
    shape = config.preset(preset, vocab_size=vocab_size_of(preset))
    longest = shape.max_seq_len - TuningConfig.n_virtual
    if not 2 <= seq_len <= longest:
        raise UserError(f"--seq_len {seq_len}: choose 2 to {longest}, for virtual tokens come before them")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, shape.vocab_size, (rows, seq_len), generator=generator).to(device)  # (B, T)

    # the head of the table
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{preset}: {n_parameters(shape):,} parameters, {dtype}, {machine(device)}, {versions}")
    print(f"one step of {rows} x {seq_len} tokens, {torch.get_num_threads()} thread(s), medians of {REPEATS}")
    beyond = "a step's peak" if device.type == "cuda" else "gradients and what autograd keeps"
    print(f"MiB: weights, moments, and {beyond}; {ops.describe(device)}")
    print(f"  {'':<16}{'':>11}{'minillm':>12}{'':>9}{'peft':>12}{'':>9}{'minillm':>10}")
    print(f"  {'method':<16}{'trained':>11}{'tok/s':>12}{'MiB':>9}{'tok/s':>12}{'MiB':>9}{'/ peft':>10}", flush=True)

    # a row for each method
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers means to remove
        for name, method in METHODS.items():
            sides = _sides(preset, method, x, dtype)
            _check(name, sides, tolerance)
            print(_row(name, sides, rows * seq_len), flush=True)


def _row(name: str, sides: dict[str, "Side"], n_tokens: int) -> str:
    """A line of the table: both sides timed and weighed. n_tokens: of a step."""
    for side in sides.values():
        side.step()
    seconds = medians({who: side.step for who, side in sides.items()})
    row = f"  {name:<16}{starting_model.n_trained(sides['minillm'].model):11,}"
    for who, side in sides.items():
        row += f"{n_tokens / seconds[who]:12,.0f}{side.memory() / 2**20:9.1f}"
    if "peft" in seconds:
        row += f"{seconds['peft'] / seconds['minillm']:10.2f}"
    return row


def _sides(preset: str, options: TuningConfig, x: Tensor, dtype: torch.dtype) -> dict[str, Side]:
    """Ours, and PEFT's if it has the method, on tokens x (B, T)."""
    # both models, with the same weights and adapter
    model = random_model(preset).to(x.device).train()
    twin = None
    if options.tune not in peft_format.OWN and not options.base_bits:
        twin, _ = transformers_twin(model)
        twin = twin.to(x.device).train()
    if options.base_bits:
        quant.quantize_base(model, options.base_bits)
    if options.tune != "full":
        adapter = attach(model, options, keep_base=False)
        _shake(adapter)
        if twin is not None:
            twin = _with_peft(twin, adapter)

    # their losses, over the same targets
    labels = x.clone()
    labels[:, 0] = IGNORED  # PEFT would also learn the first token from the last virtual one
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    sides = {"minillm": Side.of(model, lambda: model(x, targets) / labels[:, 1:].numel(), dtype)}
    if twin is not None:
        twin.config.use_cache = False  # of no use in training
        sides["peft"] = Side.of(twin, lambda: twin(input_ids=x, labels=labels).loss, dtype)
    return sides


@torch.no_grad()
def _shake(adapter: Adapter) -> None:
    """Move an adapter away from its first values, with which the base alone counts and any two methods agree."""
    generator = torch.Generator().manual_seed(1)
    for parameter in dict.fromkeys(adapter.parameters().values()):
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


@torch.no_grad()
def _with_peft(twin: nn.Module, adapter: Adapter) -> nn.Module:
    """transformers' model with PEFT's adapter of the same kind and the same numbers."""
    import peft

    settings = peft_format.describe(adapter) | {"inference_mode": False}
    adapted = peft.get_peft_model(twin, peft.PeftConfig.from_peft_type(**settings))
    ours = sorted(adapter.parameters().items())
    theirs = sorted((name, p) for name, p in adapted.named_parameters() if p.requires_grad)
    for (_, source), (_, target) in zip(ours, theirs, strict=True):  # names differ, but not in their order
        target.copy_(source)
    return adapted


def _check(name: str, sides: dict[str, Side], tolerance: float) -> None:
    """Raise `UserError` unless both sides compute the same and train as many numbers."""
    losses = [side.loss().item() for side in sides.values()]
    trained = [starting_model.n_trained(side.model) for side in sides.values()]
    if abs(losses[0] / losses[-1] - 1) > tolerance or trained[0] != trained[-1]:
        raise UserError(f"{name}: losses {losses}, numbers trained {trained}: not the same, so speeds do not compare")
