"""Do our kernels compute the same as torch on this GPU? Checked once, before a run relies on them.

There are more combinations of GPU, driver and compiler than anyone can test. So the first run on a GPU compares a small
model computed by our kernels with the same model computed by torch: loss, every gradient, an optimizer's step, and
generated tokens. This runs in another process, since a kernel that fails can break its process's CUDA context, or
hang; if the GPU accepts no second process, it runs in the training process. If anything differs, the run uses torch's
ops and says so. A success is remembered for this GPU, these versions, this source and the settings that `kernels.tune`
has found; `--impl triton` skips the check. It is made in bf16, and once more by the first run in another dtype.
Products with a quantized base are compared by the first run that has one.
"""

import atexit
import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from minillm.distributed.hosts import first_on_host
from minillm.distributed.ranks import Ranks
from minillm.generation.completion import prefill
from minillm.generation.recorded_step import RecordedStep
from minillm.model import ops, quant
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.training import optim

ROOT = Path(__file__).parents[2]
SECONDS = 300  # some 30 kernels are compiled, on a slow machine
# heads of both sizes that published models have, since each takes kernels of its own; a cap as small as the logits
# themselves: a kernel that ignores it is far off
MODELS = {"plain": {}, "QK-norm, window and cap": {"head_dim": 128, "qk_norm": True, "window": 40, "softcap": 0.5}}
LENGTHS = (130, 62)  # tokens of the documents in a row: block edges inside and outside
QUANTIZED = {8: quant.quantize_int8, 4: quant.quantize_nf4}  # bits → format
ROWS = (1, 16, 100, 300)  # multiplied by a quantized weight: smallest and largest tile, and W in a scratch buffer


class KernelCheck:
    """Where `auto` means our kernels: a check, once, that they are right, else torch's ops are selected.

    Making it starts the comparison in another process, and `settle` waits for the answer. In between the caller can
    prepare data and model, but must not run a kernel. All ranks do both. No process is started where the answer is
    known, or no kernel is used.
    """

    def __init__(
        self,
        ranks: Ranks,
        log: Callable[[str], None] = print,
        base_bits: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """log: prints a line, on the first rank of a machine. base_bits: of the frozen base of the run, if it has one.
        dtype: of the run's matrix products.
        """
        self.ranks = ranks
        self.log = log
        self.dtype = dtype
        self.quantized = base_bits in QUANTIZED
        self.process: subprocess.Popen | None = None
        # the same on all ranks, unlike whether a machine has what the kernels need
        self.is_automatic = ops.selected() == "auto" and ranks.device.type == "cuda"
        self.are_there = self.is_automatic and ops.fused(torch.empty(0, device=ranks.device))
        if self.are_there and first_on_host() and not self._right_before().exists():
            self._start()

    def settle(self) -> None:
        """Wait for the answers of all machines, and on all ranks select torch's ops if any has no right kernels."""
        if not self.is_automatic:
            return
        problem = self._problem() if self.process else ""
        answers = self.ranks.exchange([socket.gethostname(), self.are_there, problem])
        if not any(are_there for _, are_there, _ in answers):
            return  # torch's are used as it is, and `ops.describe` says why
        for host, are_there, problem in answers:
            if are_there and not problem:
                continue
            ops.select("torch")
            where = f" on {host}" if self.ranks.world > 1 else ""
            what = f"{problem}; using torch's. Please report it."
            if not are_there:
                what = "cannot be used, so torch's are, on all machines; python -m minillm check_cluster says why"
            if self.ranks.main:
                self.log(f"ops: the kernels{where} {what}")
            return

    def _right_before(self) -> Path:
        """The file that exists if an earlier check found these kernels right on this GPU."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = _identity(self.ranks.device)
        if self.quantized:
            name += "-quantized"
        if self.dtype != torch.bfloat16:
            name += f"-{name_of(self.dtype)}"
        return cache / "minillm" / "checked" / name

    def _start(self) -> None:
        """Start the process that compares; see the end of this file."""
        self.log("ops: compiling the kernels and comparing them with torch on this GPU, once")
        command = [sys.executable, "-m", "minillm.training.kernel_check", str(self.ranks.device.index or 0)]
        command.append(name_of(self.dtype))
        if self.quantized:
            command.append("quantized")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,  # here `-m` finds the package, and ours before another
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.kill)  # should this process end before it asks for the answer

    def _problem(self) -> str:
        """What is wrong with the kernels, in words that follow "the kernels"; "" if nothing is."""
        try:
            out, err = self.process.communicate(timeout=SECONDS)
            problem = ""
            if self.process.returncode:
                lines = err.strip().splitlines() or ["no words"]
                errors = [line for line in lines if "Error: " in line]
                problem = (errors or lines)[-1]

            # it got no CUDA context (compute mode EXCLUSIVE_PROCESS: this process has the GPU), or no memory
            if problem and (not out or "out of memory" in problem):
                self.log(f"ops: no second process can compare them ({problem}); comparing in this one")
                problems = compare(self.ranks.device, quantized=self.quantized, dtype=self.dtype)
                problem = (problems or [""])[0]
        except Exception as raised:
            self.process.kill()
            return f"could not be compared ({' '.join(str(raised).split())[:200]})"
        if problem:
            return f"are not right on this GPU ({problem})"
        with contextlib.suppress(OSError):  # then the next run checks again
            self._right_before().parent.mkdir(parents=True, exist_ok=True)
            self._right_before().touch()
        return ""


def _identity(device: torch.device) -> str:
    """A hash of what the result depends on: GPU, versions, the source of kernels and model, and tuned settings."""
    import triton

    gpu_and_versions = [torch.cuda.get_device_name(device), torch.__version__, triton.__version__, torch.version.cuda]
    digest = hashlib.sha256(repr(gpu_and_versions).encode())
    for file in sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "minillm").rglob("*.py")]):
        digest.update(file.read_bytes())
    with contextlib.suppress(OSError):  # other settings make other kernels
        digest.update(ops.tuned_file().read_bytes())
    return digest.hexdigest()[:24]


def name_of(dtype: torch.dtype) -> str:
    """float16, as --dtype has it."""
    return str(dtype).removeprefix("torch.")


def compare(
    device: torch.device, ours: str = "auto", quantized: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """The differences, one line each, between implementation `ours` and torch's ops, in dtype; [] if there are none.

    quantized: products with a quantized base, too. A result may differ from fp32's by twice torch's error plus 0.01 of
    its norm; an optimizer's step by 0.03, since Newton–Schulz iterates in bf16.
    """
    # (name, function that computes the results, what it computes them of)
    cases = [(name, _model_results, _small(device, **options)) for name, options in MODELS.items()]
    if quantized:
        cases += [(f"{bits} bits", _product_results, _weight(device, make)) for bits, make in QUANTIZED.items()]
    selected_before = ops.selected()
    rounded = None if dtype == torch.float32 else dtype  # what products are rounded to
    problems = []
    try:
        for name, results_of, subject in cases:
            exact = results_of(subject, "torch", None)
            by_torch = results_of(subject, "torch", rounded)
            by_us = results_of(subject, ours, rounded)
            for result, value in exact.items():
                tolerance = 0.03 if result.startswith("update") else 0.01
                allowed = 2 * _error(by_torch[result], value) + tolerance
                error = _error(by_us[result], value)
                if not error <= allowed:  # NaN is never within
                    problems.append(f"{name}: {result} is off by {error:.1e} of its norm, allowed {allowed:.1e}")
        return problems
    finally:
        ops.select(selected_before)


def _small(device: torch.device, **options) -> Transformer:
    """A small model with these options."""
    shape = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, max_seq_len=256)
    model = Transformer(ModelConfig(vocab_size=1000, tie_embeddings=False, **(shape | options)))
    model.init_weights(0)
    return model.to(device)


def _error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def _model_results(model: Transformer, implementation: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Loss, gradients, an update by each optimizer, and the logits of three tokens one by one."""
    ops.select(implementation)
    device = model.norm.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (2, sum(LENGTHS) + 1), generator=generator).to(device)
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS)).expand(2, -1).to(device)  # (2, T)
    results = {}

    # forward and backward, with one text a row, then with two documents in each
    for row_documents in (None, documents):
        model.zero_grad()
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(tokens[:, :-1], tokens[:, 1:], documents=row_documents)
        loss.backward()
        kind = "" if row_documents is None else ", packed"
        results[f"loss{kind}"] = loss.detach()
        for name, parameter in model.named_parameters():
            results[f"gradient of {name}{kind}"] = parameter.grad.clone()

    # a step of each optimizer, from the same gradients for all implementations: AdamW's first step is little more than
    # the gradient's sign
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    for optimizer in optim.build_optimizers(copy, "muon", lr=0.02, weight_decay=0.1):
        optimizer.step()
    for name, parameter in copy.named_parameters():
        results[f"update of {name}"] = (parameter - model.get_parameter(name)).detach()

    results["logits of generated tokens"] = _generated(model, dtype, tokens[:, : LENGTHS[0]])
    return results


def _generated(model: Transformer, dtype: torch.dtype | None, tokens: Tensor) -> Tensor:
    """Logits (B, 3, V) after each of the last three tokens of rows that differ in length, read one by one."""
    copy = deepcopy(model).to(dtype or torch.float32).eval()
    copy.build_rotation()  # its tables stay in fp32
    prompts = [row[: len(row) - 3 - 5 * number].tolist() for number, row in enumerate(tokens)]
    with torch.no_grad():
        cache, _ = prefill(copy, prompts, tokens.shape[1])
        recorded_step = RecordedStep(copy, cache)
        logits = []
        for column in tokens[:, -3:].unbind(1):  # on a GPU: computed, recorded, replayed
            logits.append(recorded_step.step(column).clone())  # (B, V)
        return torch.stack(logits, 1)


def _weight(device: torch.device, make: Callable) -> list[Tensor]:
    """A quantized weight; sizes that fill no tile exactly."""
    numbers = torch.randn(272, 320, generator=torch.Generator().manual_seed(0))
    quantized = make(numbers**3)  # cubed, so that some are large enough for int8 to keep their columns
    return [tensor.to(device) for tensor in quantized]


def _product_results(weight: list[Tensor], implementation: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Products of rows with a quantized weight, and their gradients; also in fp32, in which such a model generates."""
    ops.select(implementation)
    generator = torch.Generator().manual_seed(1)
    device = weight[0].device
    results = {}
    for n_rows, is_fp32 in itertools.product(ROWS, (False, True)):
        x_dtype = None if is_fp32 else dtype
        x = torch.randn(n_rows, 320, generator=generator).to(device, x_dtype).requires_grad_()
        dy = torch.randn(n_rows, 272, generator=generator).to(device, x_dtype)
        y = ops.quant_matmul(x, weight)
        kind = ", fp32" if is_fp32 else ""
        results[f"product of {n_rows} rows{kind}"] = y.detach()
        results[f"gradient of {n_rows} rows{kind}"] = torch.autograd.grad(y, x, dy)[0]
    return results


if __name__ == "__main__":  # the process that `KernelCheck` starts: the GPU's number, a dtype, and perhaps "quantized"
    device = torch.device("cuda", int(sys.argv[1]))
    print("comparing on", torch.empty(1, device=device).device, flush=True)
    dtype = getattr(torch, sys.argv[2])
    problems = compare(device, quantized="quantized" in sys.argv, dtype=dtype)
    sys.exit("\n".join(reversed(problems)) or 0)  # the first one last, which the caller reads
