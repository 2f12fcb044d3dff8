"""Memory, time, MFU and days of training on many GPUs, for every layout that fits, by formula.

The formulas, their assumptions, and what published runs say to them, are in docs/en/plan.md.
"""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from minillm.base.device import GPU_PEAKS
from minillm.base.errors import UserError
from minillm.base.json_door import read_object
from minillm.base.options import option, spelled
from minillm.commands.info import ShapeChoice
from minillm.distributed.layout import RowPart
from minillm.model.config import ModelConfig
from minillm.model.layouts import EFFICIENCY, OVERLAPPED, WAITED_FOR, Gpu, Layout, Work, step_seconds
from minillm.model.memory import gpu_memory
from minillm.model.size import flops_per_token, n_parameters

# Name → its name in `GPU_PEAKS`, GB of memory, GB/s in one direction to a GPU of its host (NVLink; else PCIe), and to
# another host. From NVIDIA's data sheets: half of what they give as the sum of both directions. The network is that of
# DGX systems, a network card for each GPU (400 Gbit/s; A100: 200); for cards of a PC 10 Gbit/s Ethernet.
GPUS = {
    "b200": ("B200", 180, 900, 50),
    "h200": ("H200", 141, 450, 50),
    "h100": ("H100", 80, 450, 50),
    "h800": ("H800", 80, 200, 50),
    "h20": ("H20", 96, 450, 50),
    "a100": ("A100", 80, 300, 25),
    "a800": ("A800", 80, 200, 25),
    "l40s": ("L40S", 48, 32, 25),
    "5090": ("RTX 5090", 32, 64, 1.25),
    "4090": ("RTX 4090", 24, 32, 1.25),
    "3090": ("RTX 3090", 24, 32, 1.25),
}
# Parameters at most → tokens of a step, unless --batch_size says otherwise. To 3 billion: GPT-3's (Brown et al. 2020,
# arXiv:2005.14165, table 2.1), beyond: Llama 2's (Touvron et al. 2023, arXiv:2307.09288, section 2.2).
USUAL_TOKENS = {1e9: 1 << 19, 3e9: 1 << 20, math.inf: 1 << 22}
TOKENS_PER_PARAMETER = 20  # of a whole run, unless --tokens says otherwise: Hoffmann et al. 2022, arXiv:2203.15556
MOST_ROWS = 64  # of a forward pass
MOST_GPUS = 1 << 20
MOST_DOUBLINGS = 12  # of the number of GPUs, to find one that is enough


@dataclass(frozen=True)
class Config(ShapeChoice):
    gpus: int = option(8, "how many GPUs", at_least=1, at_most=MOST_GPUS, group="machines")
    gpu: str = option("h100", "which", tuple(GPUS), group="machines")
    gpus_per_host: int = option(8, "GPUs of a machine", at_least=1, at_most=1024, group="machines")
    memory: float | None = option(None, "GB of a GPU; none: the usual", above=0, group="machines")
    usable: float = option(0.9, "share of the memory to be filled", above=0, at_most=1, group="machines")
    link: float | None = option(
        None, "GB/s of a GPU to others of its machine, one way; none: the usual", above=0, group="machines"
    )
    network: float | None = option(
        None,
        "GB/s of a GPU's share of the network between machines, one way; none: the usual",
        above=0,
        group="machines",
    )
    efficiency: float | None = option(
        None,
        f"share of the GPU's peak that arithmetic reaches; none: that of --measured, else {EFFICIENCY}",
        above=0,
        at_most=1,
        group="machines",
    )
    measured: str | None = option(
        None, "what `bench train --json FILE` wrote on such a GPU, for the efficiency", group="machines"
    )
    price: float | None = option(None, "dollars of a GPU for an hour; none: no cost is told", above=0, group="machines")
    batch_size: int | None = option(
        None, "sequences of a step, over all GPUs; none: 0.5 Mi tokens, large models 1 or 4", at_least=1, group="run"
    )
    tokens: int | None = option(
        None, f"of the whole run; none: {TOKENS_PER_PARAMETER} a parameter", at_least=1, at_most=10**18, group="run"
    )
    optimizer: str = option("adamw", "muon has one moment for the layers' matrices", ("adamw", "muon"), group="run")
    diloco_steps: int = option(
        0,
        "steps between two exchanges of GPUs that train alone in between; 0: gradients in each",
        at_least=0,
        group="run",
    )
    top: int = option(10, "layouts to print; 0: all", at_least=0, group="run")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.efficiency is not None and self.measured is not None:
            problems.append(f"--efficiency {self.efficiency}: --measured gives it already; leave one out")
        if self.gpus != in_hosts(self.gpus, self.gpus_per_host):
            problems.append(f"--gpus {self.gpus}: is no multiple of --gpus_per_host {self.gpus_per_host}")
        return problems


class Plan(NamedTuple):
    """One way to train, with what it takes."""

    work: Work
    memory: dict[str, int]  # bytes of a GPU
    seconds: dict[str, float]  # of a step

    @property
    def n_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def overlapped(self) -> float:
        """Seconds of what travels while layers compute."""
        return sum(self.seconds[name] for name in OVERLAPPED)

    @property
    def waited(self) -> float:
        """Seconds of what is waited for."""
        return sum(self.seconds[name] for name in WAITED_FOR)

    @property
    def order(self) -> tuple:
        """Less comes first: a step's time, then arithmetic, what is sent, and the number of forward passes."""
        sent = self.overlapped + self.waited
        return self.seconds["step"], self.seconds["compute"], sent, self.work.n_micro_batches


def run(config: Config) -> None:
    shape = config.shape()
    seq_len = config.seq_len or shape.max_seq_len
    usual_tokens = next(tokens for most, tokens in USUAL_TOKENS.items() if n_parameters(shape) <= most)
    batch_size = config.batch_size or max(config.gpus, usual_tokens // seq_len)
    gpu = gpu_of(config)
    efficiency = measured_efficiency(config, gpu) if config.measured else config.efficiency or EFFICIENCY

    # every layout, and those of them that fit
    step = Step(shape, seq_len, batch_size, config.optimizer == "muon", config.diloco_steps)
    plans = list(step.plans(config.gpus, gpu, efficiency))
    if not plans:
        raise UserError(
            f"--gpus {config.gpus}: {batch_size} sequences of {seq_len} tokens cannot be shared out among them; choose "
            f"--batch_size {config.gpus} or a multiple"
        )
    usable = config.usable * gpu.memory
    fitting = sorted((plan for plan in plans if plan.n_bytes <= usable), key=lambda plan: plan.order)
    if not fitting:
        raise UserError(_nothing_fits(config, step, plans, gpu))
    best: dict[Layout, Plan] = {}  # of each layout, best first
    for plan in fitting:
        best.setdefault(plan.work.layout, plan)

    # the question, and the answer
    n_layouts = len({plan.work.layout for plan in plans})
    print_question(config, step, gpu, efficiency)
    print(f"{len(best)} of {n_layouts} layouts fit {giga(usable)} GB; each with its best rows a forward pass\n")
    print_plans(list(best.values())[: config.top or None], config, step, gpu)
    first = fitting[0].seconds
    parts = [f"{name} {seconds:.2f}" for name, seconds in first.items() if name != "step"]
    print(f"\nseconds of the first: {', '.join(parts)}")
    print(f"the first begins by: {start_command(fitting[0].work, config, step)}")


def gpu_of(config: Config) -> Gpu:
    """The chosen GPU, with what the options say otherwise."""
    part, memory, link, network = GPUS[config.gpu]
    peaks = {name: half for name, half, _ in GPU_PEAKS}  # TFLOP/s
    return Gpu(
        peak=peaks[part] * 1e12,
        memory=(config.memory or memory) * 1e9,
        link=(config.link or link) * 1e9,
        network=(config.network or network) * 1e9,
        per_host=config.gpus_per_host,
    )


def measured_efficiency(config: Config, gpu: Gpu) -> float:
    """The share of the peak that `bench train` measured for our faster side.

    Raises `UserError` for a file of another device or dtype, of which nothing follows for this one.
    """
    file = read_object(config.measured)
    part = GPUS[config.gpu][0]
    device = file.need("device", str)
    dtype = file.need("dtype", str)
    remedy = "run `bench train --json FILE` on such a GPU"
    if not re.search(rf"\b{part}\b", device) or dtype != "bfloat16":
        raise UserError(
            f"--measured {config.measured}: is of {device} in {dtype}, which tells nothing of --gpu {config.gpu} in "
            f"bfloat16; {remedy}"
        )
    sides = file.part("tokens_per_s")
    ours = [sides.need(name, float, above=0) for name in sides.values if name.startswith("minillm")]
    if not ours:
        raise UserError(f"--measured {config.measured}: holds no speed of minillm; {remedy}")
    efficiency = max(ours) * file.need("flops_per_token", int, at_least=1) / gpu.peak
    if efficiency > 1:
        raise UserError(
            f"--measured {config.measured}: {max(ours):,.0f} tokens a second are {efficiency:.2f} times the peak of "
            f"--gpu {config.gpu}; {remedy}"
        )
    return efficiency


class Step(NamedTuple):
    """What is to be computed in a step, whatever the layout."""

    shape: ModelConfig
    seq_len: int
    batch_size: int  # sequences
    muon: bool
    diloco_steps: int = 0  # then every GPU has a copy of its own

    @property
    def n_tokens(self) -> int:
        return self.batch_size * self.seq_len

    def plans(self, n_gpus: int, gpu: Gpu, efficiency: float) -> Iterator[Plan]:
        """Every way to train on so many GPUs, whether it fits or not."""
        for work in self.works(n_gpus, gpu.per_host):
            memory = gpu_memory(self.shape, work)
            yield Plan(work, memory, step_seconds(self.shape, work, gpu, efficiency))

    def works(self, n_gpus: int, per_host: int) -> Iterator[Work]:
        """Every layout, with every number of rows in a forward pass, and with layers recomputed or not."""
        for layout in self.layouts(n_gpus, per_host):
            share = self.batch_size // (layout.replicate * layout.shard)  # sequences of a rank
            for rows in (1 << power for power in range(MOST_ROWS.bit_length())):
                if share % rows == 0:
                    work = Work(
                        layout, rows, self.seq_len, self.n_tokens, muon=self.muon, diloco_steps=self.diloco_steps
                    )
                    yield work
                    yield replace(work, recompute=True)

    def layouts(self, n_gpus: int, per_host: int) -> Iterator[Layout]:
        """The layouts that model and batch allow: tensor parallelism stays inside a host, and divides heads and MLP.

        Rows that would have to be padded are not divided, nor those of a model with learned positions.
        """
        shape = self.shape
        for tp in divisors(n_gpus):
            if tp > per_host or shape.n_kv_heads % tp or shape.ffn_dim % tp:
                continue
            for cp in divisors(n_gpus // tp):
                is_padded = RowPart(0, cp, tp).padded(self.seq_len) > self.seq_len
                if is_padded or (cp * tp > 1 and shape.positions == "learned"):
                    continue
                n_data = n_gpus // (tp * cp)  # ranks that read sequences of their own
                if self.batch_size % n_data == 0:
                    for shard in divisors(n_data):
                        layout = Layout(n_data // shard, shard, cp, tp)
                        if layout.n_holding == 1 or not self.diloco_steps:
                            yield layout


def in_hosts(n_gpus: int, per_host: int) -> int:
    """The least number of GPUs, n_gpus or more, that are of one host or of whole hosts."""
    return n_gpus if n_gpus <= per_host else math.ceil(n_gpus / per_host) * per_host


def divisors(number: int) -> list[int]:
    """All divisors of a number, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _nothing_fits(config: Config, step: Step, plans: list[Plan], gpu: Gpu) -> str:
    """What an error says: what the least layout takes, and how many GPUs would be enough."""
    usable = config.usable * gpu.memory
    least = min(plan.n_bytes for plan in plans)
    said = f"--gpus {config.gpus}: no layout fits {giga(usable)} GB of each {config.gpu}"
    said += f"; the least takes {giga(least)}"
    if step.diloco_steps:
        remedy = "leave it out to divide one, or take shorter sequences (--seq_len) or a smaller model"
        return f"{said}: with --diloco_steps each GPU holds a whole copy; {remedy}"
    for doublings in range(1, MOST_DOUBLINGS):
        n_gpus = in_hosts(config.gpus << doublings, gpu.per_host)
        works = step.works(n_gpus, gpu.per_host)
        if n_gpus <= MOST_GPUS and any(sum(gpu_memory(step.shape, work).values()) <= usable for work in works):
            return f"{said}: take {n_gpus}, or shorter sequences (--seq_len)"
    return f"{said}: take shorter sequences (--seq_len), a larger --batch_size or a smaller model"


# ---- what is printed


def giga(number: float) -> str:
    """A number in units of 10⁹, also where it is less than a tenth of one."""
    return f"{number / 1e9:,.1f}" if number >= 1e8 else f"{number / 1e9:.2g}"


def tokens_of(config: Config, step: Step) -> int:
    """Tokens of the whole run."""
    return config.tokens or TOKENS_PER_PARAMETER * n_parameters(step.shape)


def steps_of(config: Config, step: Step) -> int:
    """Steps of the whole run, the last one counted in full."""
    return math.ceil(tokens_of(config, step) / step.n_tokens)


def print_question(config: Config, step: Step, gpu: Gpu, efficiency: float) -> None:
    """What is planned, and on what assumptions."""
    n = n_parameters(step.shape)
    flops = flops_per_token(step.shape, step.seq_len)
    print(f"{n:,} parameters, {giga(flops)} GFLOP a token at {step.seq_len:,} tokens, {config.optimizer}")

    source = "measured" if config.measured else "given" if config.efficiency else "assumed"
    machines = f"{config.gpus:,} × {config.gpu} of {gpu.memory / 1e9:g} GB, {gpu.per_host} a host"
    speeds = f"{gpu.peak / 1e12:g} TFLOP/s, of which {efficiency:.1%} are reached ({source})"
    links = f"{gpu.link / 1e9:g} GB/s in a host, {gpu.network / 1e9:g} beyond"
    print(f"{machines}: {speeds}; {links}")

    a_step = f"{step.batch_size:,} × {step.seq_len:,} = {step.n_tokens:,} tokens a step"
    print(f"{a_step}; {giga(tokens_of(config, step))} G tokens are {steps_of(config, step):,} steps")


HEADINGS = {  # and the width of each column
    "replicate × shard × context × tensor": 36,
    "rows": 6,
    "recompute": 11,
    "state + gathered + gradients + activations = GB": 49,
    "compute": 9,
    "overlapped": 12,
    "waited": 8,
    "step s": 9,
    "MFU": 7,
    "tok/s/GPU": 11,
    "days": 9,
}


def start_command(work: Work, config: Config, step: Step) -> str:
    """The command that trains so; on several hosts each also needs the address of one (--rdzv_endpoint)."""
    layout = work.layout
    model = f"--preset {config.preset}" if config.preset else f"--init_from {shlex.quote(config.model)}"
    options = config.changes()  # of the shape
    if step.seq_len > step.shape.max_seq_len:
        options["max_seq_len"] = step.seq_len
    options |= {
        "seq_len": step.seq_len,
        "batch_size": step.batch_size,
        "micro_batch_size": work.rows,
        "steps": steps_of(config, step),
        "optimizer": config.optimizer,
        "shard": layout.shard,
        "context_parallel": layout.cp,
        "tensor_parallel": layout.tp,
        "checkpoint_activations": work.recompute,
        "diloco_steps": work.diloco_steps,
    }
    usual = {"context_parallel": 1, "tensor_parallel": 1, "checkpoint_activations": False, "diloco_steps": 0}
    given = " ".join(f"--{name} {spelled(value)}" for name, value in options.items() if usual.get(name) != value)
    launcher = "python"
    if layout.n_gpus > 1:
        launcher = f"torchrun --nproc_per_node {min(layout.n_gpus, config.gpus_per_host)}"
    if layout.n_gpus > config.gpus_per_host:
        launcher += f" --nnodes {layout.n_gpus // config.gpus_per_host} --rdzv_backend c10d --rdzv_endpoint HOST:29500"
    return f"{launcher} train_pretrain.py --data … {model} {given}"


def print_plans(plans: list[Plan], config: Config, step: Step, gpu: Gpu) -> None:
    """The table: a line for each plan."""
    columns = HEADINGS if config.price is None else {**HEADINGS, "dollars": 14}
    print("".join(f"{name:>{width}}" for name, width in columns.items()))
    for plan in plans:
        cells = cells_of(plan, config, step, gpu)
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values(), strict=True)))


def cells_of(plan: Plan, config: Config, step: Step, gpu: Gpu) -> list[str]:
    """A line of the table."""
    layout = plan.work.layout
    sizes = " + ".join(giga(n_bytes) for n_bytes in plan.memory.values())

    # speed, and what follows from it for the whole run
    speed = step.n_tokens / plan.seconds["step"] / config.gpus  # tokens a second and GPU
    mfu = speed * flops_per_token(step.shape, step.seq_len) / gpu.peak
    days = tokens_of(config, step) / (speed * config.gpus) / 86400
    cells = [
        f"{layout.replicate} × {layout.shard} × {layout.cp} × {layout.tp}",
        f"{plan.work.rows}",
        "yes" if plan.work.recompute else "no",
        f"{sizes} = {giga(plan.n_bytes)}",
        f"{plan.seconds['compute']:.2f}",
        f"{plan.overlapped:.2f}",
        f"{plan.waited:.2f}",
        f"{plan.seconds['step']:.2f}",
        f"{mfu:.1%}",
        f"{speed:,.0f}",
        f"{days:,.0f}" if days >= 100 else f"{days:.3g}",
    ]
    if config.price is not None:
        cells.append(f"{days * 24 * config.gpus * config.price:,.0f}")
    return cells
