"""How long a training step takes on many GPUs, by formula: arithmetic, and what each layout sends over which link.

Rates are bytes a second in one direction, sizes bytes, times seconds. The memory of a layout is in memory.py. The
formulas, their sources and what published runs say to them are in docs/en/plan.md.
"""

from dataclasses import dataclass

from minillm.model.config import ModelConfig
from minillm.model.size import flops_per_token, linear_shapes, n_parameters

EFFICIENCY = 0.45  # of a GPU's peak that a step's arithmetic reaches; measure your own by `bench train`
LINK_SHARE = 0.8  # of a link's rate that collectives reach
HOP_S = 10e-6  # seconds that a message takes from one rank of a ring to the next
WEIGHT = 2  # bytes of a weight that is gathered, in bfloat16
GRADIENT = 4  # bytes of a number of a gradient that is added up, in float32
MUON_STEPS = 5  # of the Newton–Schulz iteration
OVERLAPPED = ("gather", "reduce", "hops", "replicas")  # what travels while layers compute
WAITED_FOR = ("tensor parallel", "context parallel", "diloco", "muon")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, and how it reaches others.

    peak: operations a second in bfloat16, without sparsity. memory: bytes. link: rate to the GPUs of its host.
    network: its share of what its host sends to other hosts. per_host: GPUs of a host.
    """

    peak: float
    memory: float
    link: float
    network: float
    per_host: int = 8


@dataclass(frozen=True)
class Layout:
    """How the GPUs share a model: replicate × shard × context parallel × tensor parallel, the last innermost.

    replicate: copies of the training state. shard: data-parallel ranks that hold one copy together (FSDP). cp: ranks
    that hold a part of each row. tp: ranks that hold a part of each matrix of the layers.
    """

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def n_gpus(self) -> int:
        return self.replicate * self.n_holding

    @property
    def n_holding(self) -> int:
        """GPUs that hold one copy of weights, gradients and optimizer together."""
        return self.shard * self.cp * self.tp


@dataclass(frozen=True)
class Work:
    """What the GPUs do in a step.

    rows: sequences in a forward pass. seq_len: tokens of each. n_tokens: of a step, over all GPUs. recompute: whether
    layers are computed again in the backward pass. reduce_once: whether sharded gradients are added up in the last
    micro-batch alone, which would keep whole ones until then; training adds them up in each. diloco_steps: steps
    between two exchanges of copies that train alone in between; 0: they add up their gradients in every step.
    """

    layout: Layout
    rows: int
    seq_len: int
    n_tokens: int
    recompute: bool = False
    muon: bool = False
    reduce_once: bool = False
    diloco_steps: int = 0

    @property
    def n_micro_batches(self) -> float:
        """Forward passes of a rank in a step."""
        return self.n_tokens / (self.layout.replicate * self.layout.shard * self.rows * self.seq_len)

    @property
    def n_passes(self) -> int:
        """How often a layer's weights are used in a micro-batch: forward, backward, and to compute it again."""
        return 3 if self.recompute else 2


def step_seconds(shape: ModelConfig, work: Work, gpu: Gpu, efficiency: float = EFFICIENCY) -> dict[str, float]:
    """Seconds that a step takes on each link and in arithmetic, and "step", of the whole.

    Weights and gradients travel while layers compute; what tensor and context parallelism exchange is waited for.
    """
    parts = {
        "compute": compute_seconds(shape, work, gpu, efficiency),
        "tensor parallel": tensor_parallel_seconds(shape, work, gpu),
        "context parallel": context_parallel_seconds(shape, work, gpu),
        **sharding_seconds(shape, work, gpu),
        "replicas": 0.0 if work.diloco_steps else replica_seconds(shape, work, gpu),
        "diloco": replica_seconds(shape, work, gpu) / work.diloco_steps if work.diloco_steps else 0.0,
        "muon": muon_seconds(shape, work, gpu, efficiency) if work.muon else 0.0,
    }
    overlapped = sum(parts[name] for name in OVERLAPPED)
    waited_for = sum(parts[name] for name in WAITED_FOR)
    return {**parts, "step": max(parts["compute"], overlapped) + waited_for}


def compute_seconds(shape: ModelConfig, work: Work, gpu: Gpu, efficiency: float) -> float:
    """Forward and backward pass; computing the layers again adds a forward pass, a third."""
    operations = work.n_tokens * flops_per_token(shape, work.seq_len) * (4 / 3 if work.recompute else 1)
    return operations / (work.layout.n_gpus * gpu.peak * efficiency)


def tensor_parallel_seconds(shape: ModelConfig, work: Work, gpu: Gpu) -> float:
    """The residual stream, gathered before attention and MLP and scattered after them, in each pass of each layer."""
    tp = work.layout.tp
    stream = work.rows * work.seq_len / work.layout.cp * WEIGHT * shape.dim  # bytes
    n_exchanges = 4 * work.n_micro_batches * shape.n_layers * work.n_passes
    return n_exchanges * stream * (tp - 1) / tp / (LINK_SHARE * gpu.link)


def context_parallel_seconds(shape: ModelConfig, work: Work, gpu: Gpu) -> float:
    """Keys and values of the other parts of the row, gathered in each forward pass; in the backward their gradients."""
    cp = work.layout.cp
    heads = shape.n_kv_heads / min(work.layout.tp, shape.n_kv_heads)  # of a rank
    part = work.rows * work.seq_len / cp * WEIGHT * heads * shape.head_dim  # bytes of keys, and of values
    n_exchanges = 2 * work.n_micro_batches * shape.n_layers * work.n_passes
    rate = gpu.link if cp * work.layout.tp <= gpu.per_host else gpu.network
    return n_exchanges * part * (cp - 1) / (LINK_SHARE * rate)


def sharding_seconds(shape: ModelConfig, work: Work, gpu: Gpu) -> dict[str, float]:
    """Weights gathered for the forward and the backward pass of each micro-batch, gradients summed and scattered.

    "hops": a ring's messages, one after the other; "gather" and "reduce": their bytes.
    """
    layout = work.layout
    n_ranks = layout.shard * layout.cp
    n_reductions = 1 if work.reduce_once else work.n_micro_batches

    # within a host each GPU takes in the others' parts; beyond, each host takes in all but its own part, once
    if n_ranks * layout.tp <= gpu.per_host:
        numbers = n_parameters(shape) / layout.tp * (n_ranks - 1) / n_ranks
        rate = LINK_SHARE * gpu.link
    else:
        numbers = n_parameters(shape) * (1 - gpu.per_host / (n_ranks * layout.tp))
        rate = LINK_SHARE * gpu.network * gpu.per_host
    n_rings = (2 * work.n_micro_batches + n_reductions) * shape.n_layers
    return {
        "gather": 2 * work.n_micro_batches * WEIGHT * numbers / rate,
        "reduce": n_reductions * GRADIENT * numbers / rate,
        "hops": n_rings * (n_ranks - 1) * HOP_S,
    }


def replica_seconds(shape: ModelConfig, work: Work, gpu: Gpu) -> float:
    """Gradients summed over the copies of the state, once: a ring sends and takes in each number once.

    Copies on one host first add up among themselves, so that the network carries each number once for a host.
    """
    layout = work.layout
    if layout.replicate == 1:
        return 0.0
    n_sharing = layout.n_holding
    rate = gpu.link
    if layout.n_gpus > gpu.per_host:
        n_sharing = max(n_sharing, gpu.per_host)
        rate = gpu.network
    n_copies = layout.n_gpus / n_sharing
    return 2 * GRADIENT * n_parameters(shape) / n_sharing * (1 - 1 / n_copies) / (LINK_SHARE * rate)


def orthogonalizing(rows: int, columns: int) -> int:
    """Operations that Muon takes for a matrix: 4 m² n + 2 m³ an iteration, m ≤ n."""
    m, n = sorted((rows, columns))
    return MUON_STEPS * (4 * m * m * n + 2 * m**3)


def muon_seconds(shape: ModelConfig, work: Work, gpu: Gpu, efficiency: float) -> float:
    """Muon's matrices: each is sent to an owner among the GPUs that hold a copy, orthogonalized, and sent back.

    Where each GPU holds a copy, those of a host share the work, and only results are sent, to all of them.
    """
    n_owners = work.layout.n_holding
    ways = 2 / n_owners  # of each number, for a GPU
    if n_owners == 1 and not work.diloco_steps:
        n_owners, ways = min(work.layout.n_gpus, gpu.per_host), 1
    operations = 0
    numbers = 0
    for n_in, n_out in linear_shapes(shape).values():
        operations += shape.n_layers * orthogonalizing(n_in, n_out)
        numbers += shape.n_layers * n_in * n_out
    sent = ways * WEIGHT * numbers * (n_owners - 1) / n_owners
    rate = gpu.link if n_owners <= gpu.per_host else gpu.network
    return operations / (n_owners * gpu.peak * efficiency) + sent / (LINK_SHARE * rate)
