"""Who takes part in a run, whether all machines hold and compute the same, and how fast they talk.

    python -m minillm check_cluster
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        -m minillm check_cluster --data data/mine --out out/mine

Takes less than half a minute, or a little more where kernels are compiled for the first time. What would break a run,
or let machines train on different things, is said in one line, and the exit status is then 2.
"""

import hashlib
import math
import platform
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from minillm.base.device import autocast, pick_dtype
from minillm.base.errors import UserError
from minillm.base.files import check_writable
from minillm.base.options import Options, option
from minillm.distributed import ranks as distributed
from minillm.distributed.hosts import differing, first_on_host, named
from minillm.distributed.ranks import Ranks
from minillm.distributed.watchdog import Watchdog, listed
from minillm.model import ops
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

ROOT = Path(__file__).parents[2]
LIMIT_S = 90.0  # a rank that takes longer for one part of the check hangs; in one, kernels may have to be compiled
MEASURED_S = 0.2  # seconds that the calls of one measurement take together, or a single call
AT_MOST_S = 2.0  # seconds after which one line's larger tensors are left out
LONG_ENOUGH_S = 0.05  # a call this long measures the bandwidth, not the latency
LARGEST = {"cuda": 2**28, "cpu": 2**26}  # bytes of the largest tensor that is sent
SEEN_S = 10.0  # seconds in which every machine must see a new file; NFS remembers for 3 to 60 s what is not there
SAMPLED = 16  # pieces of a data file that are compared, of so many bytes:
PIECE = 2**16
TOLERANCE = 0.01  # nats: bf16 on unlike GPUs differs by less


@dataclass(frozen=True)
class Config(Options):
    device: str = option("auto", "auto, cpu or cuda")
    data: str | None = option(None, "file or folder that must hold the same bytes on all machines")
    out: str | None = option(None, "folder that all machines must share: a run's --out")


def run(config: Config) -> int:
    # join the others; from here on a rank that hangs is named
    begin = time.monotonic()
    ranks = distributed.start(config.device, LIMIT_S)
    watchdog = Watchdog(ranks.rank, ranks.world, LIMIT_S)
    watchdog.tick(0)

    # who is where, and what each is and holds
    facts = {**versions(ranks.device), "data": contents(config.data)}
    of_all = ranks.exchange([socket.gethostname(), first_on_host(), device_name(ranks.device), facts])
    hosts, firsts, devices, all_facts = zip(*of_all, strict=True)
    problems = differing(hosts, all_facts)
    if ranks.main:
        print("\n".join(who_is_where(hosts, devices)))
        print("\n".join(in_common(all_facts)), flush=True)
        n_names = len(set(hosts))
        if sum(firsts) > n_names:
            print(f"  {sum(firsts)} machines have {n_names} name(s): no message can tell them apart (hostname NAME)")
    if facts["data"] == MISSING and not problems:
        problems.append(f"--data {config.data}: is not there, on no machine")
    watchdog.tick(1)

    # do all compute the same, and do they see one folder?
    problems += check_losses(hosts, ranks.exchange(loss_of_small_model(ranks.device)))
    if config.out:
        problems += check_shared(Path(config.out), hosts, ranks)
    watchdog.tick(2)

    # how fast they talk
    if ranks.world > 1:
        problems += check_sum(ranks)
        for line in speeds(ranks, sum(firsts)):
            if ranks.main:
                print(line, flush=True)
        watchdog.tick(3)
    watchdog.pause()
    ranks.barrier()
    distributed.stop()
    if problems and ranks.main:
        raise UserError("; ".join(problems))
    if ranks.main:
        result = "the same on all ranks" if ranks.world > 1 else "one process alone: start it by torchrun to compare"
        print(f"{result}; checked in {time.monotonic() - begin:.1f} s")
    return 2 if problems else 0


# ---- who is where, with what

MISSING = "missing"


def versions(device: torch.device) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    if device.type == "cuda":
        nccl = torch.cuda.nccl.version() if dist.is_nccl_available() else ()
        facts |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, nccl))}
    facts["minillm"] = f"source {_source_hash()}"
    facts["ops"] = ops.describe(device).removeprefix("ops: ")
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _source_hash() -> str:
    """A short SHA-256 of every source file a run may execute, with its name; line ends do not count."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("minillm", "kernels", "data")]
    for path in sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]):
        source = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:12]


def contents(path: str | None) -> str:
    """A short SHA-256 of a file, or of all files of a folder: names, sizes, and pieces spread evenly over each.

    "" without a path; `MISSING` if nothing is there.
    """
    if path is None:
        return ""
    if not Path(path).exists():
        return MISSING
    digest, n_bytes = hashlib.sha256(), 0
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) or [Path(path)]
    for file in files:
        size = file.stat().st_size
        n_bytes += size
        digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            for number in range(SAMPLED):
                stream.seek(max(0, size - PIECE) * number // (SAMPLED - 1))
                digest.update(stream.read(PIECE))
    return f"{path}: {n_bytes:,} bytes, {digest.hexdigest()[:12]}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} with {torch.get_num_threads()} thread(s)"


def who_is_where(hosts: list[str], devices: list[str]) -> list[str]:
    """A table: each machine with its ranks and devices."""
    ranks_of = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks_of[host].append(rank)
    width = max(map(len, hosts))
    lines = [f"{len(hosts)} rank(s) on {len(ranks_of)} machine(s)"]
    for host, its_ranks in ranks_of.items():
        counts = defaultdict(int)
        for rank in its_ranks:
            counts[devices[rank]] += 1
        of_host = ", ".join(f"{count} × {device}" for device, count in counts.items())
        lines.append(f"  {host:<{width}}   {listed(its_ranks):<12} {of_host}")
    return lines


def in_common(facts: list[dict[str, str]]) -> list[str]:
    """A line for each fact that is the same on all ranks."""
    return [
        f"  {name:<10}{value}"
        for name, value in facts[0].items()
        if value and all(others.get(name) == value for others in facts)
    ]


# ---- the same results, the same folder


def loss_of_small_model(device: torch.device) -> float:
    """Mean loss in nats of a small model with fixed weights on fixed tokens, by the ops that training would take."""
    model = Transformer(ModelConfig(vocab_size=512, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128))
    model.init_weights(0)
    model = model.to(device)
    tokens = torch.randint(0, 512, (2, 129), generator=torch.Generator().manual_seed(0)).to(device)  # (B, T + 1)
    with torch.no_grad(), autocast(device, pick_dtype("auto", device)):
        return float(model(tokens[:, :-1], tokens[:, 1:])) / 256


def check_losses(hosts: list[str], losses: list[float]) -> list[str]:
    """A line if a rank computes another loss than most."""
    usual = sorted(losses)[(len(losses) - 1) // 2]
    odd = [rank for rank, loss in enumerate(losses) if not abs(loss - usual) <= TOLERANCE]  # NaN is never within
    if not odd:
        return []
    where = named(list(dict.fromkeys(hosts[rank] for rank in odd)))
    return [f"{listed(odd)} on {where}: the loss of a small model is {losses[odd[0]]:.4f}, elsewhere {usual:.4f}"]


def check_shared(folder: Path, hosts: list[str], ranks: Ranks) -> list[str]:
    """A line if a file that rank 0 writes into the folder is not seen by all machines in time."""
    problem, probe = "", folder / f"check_cluster-{secrets.token_hex(4)}"
    if ranks.main:
        try:
            check_writable(folder, 0)
            probe.touch(exist_ok=False)
        except UserError as refused:
            problem = str(refused)
    problem, probe = ranks.exchange([problem, str(probe)])[0]
    if problem:
        return [problem]
    begin = time.monotonic()
    while not Path(probe).exists() and time.monotonic() < begin + SEEN_S:
        time.sleep(0.1)
    seen = ranks.exchange(Path(probe).exists())
    if ranks.main:
        Path(probe).unlink()
    blind = list(dict.fromkeys(host for host, has_seen in zip(hosts, seen, strict=True) if not has_seen))
    if not blind:
        return []
    remedy = "give a folder on a disk that all machines share"
    return [f"--out {folder}: what rank 0 writes there is not seen on {named(blind)} within {SEEN_S:.0f} s; {remedy}"]


# ---- how fast they talk


def check_sum(ranks: Ranks) -> list[str]:
    """A line if numbers added up over all ranks are wrong, as they are where GPUs cannot read one another's memory."""
    n = 2**20
    numbers = torch.arange(n, device=ranks.device, dtype=torch.float32) % 1000  # whole, so that sums are exact
    summed = numbers + ranks.rank
    dist.all_reduce(summed)
    expected = ranks.world * numbers + ranks.world * (ranks.world - 1) / 2
    n_wrong = int((summed != expected).sum())
    if not ranks.max(n_wrong):
        return []
    return [f"sums over all ranks are wrong in {ranks.max(n_wrong):,} of {n:,} places; try NCCL_P2P_DISABLE=1"]


def speeds(ranks: Ranks, n_machines: int) -> list[str]:
    """The table of latency and bandwidth: within a machine, between machines, and of all ranks.

    Bandwidth is what a rank sends a second, by the least that an all-reduce (2 (R−1)/R of the tensor) or an all-gather
    ((R−1)/R) of R ranks must send. Where there are several groups they talk all at once, and the slowest counts.
    """
    groups = {f"all {ranks.world} ranks": (dist.group.WORLD, ranks.world)}
    per_machine, left = divmod(ranks.world, n_machines)
    if n_machines > 1 and per_machine > 1 and not left:
        mesh = init_device_mesh(ranks.device.type, (n_machines, per_machine), mesh_dim_names=("machine", "rank"))
        within = {"within a machine": (mesh.get_group("rank"), per_machine)}
        groups = {**within, "between machines": (mesh.get_group("machine"), n_machines), **groups}
    lines = [f"  {'':<20}{'all-reduce':>22}{'all-gather':>24}", f"  {'':<20}" + 2 * f"{'latency':>12}{'GB/s':>12}"]
    for name, (group, size) in groups.items():
        cells = ""
        for collective, share in ((all_reduce, 2 * (size - 1) / size), (all_gather, (size - 1) / size)):
            latency, (n_bytes, seconds) = measure(ranks, collective, group, size)
            cells += f"{1e3 * latency:>9.3f} ms{share * n_bytes / seconds / 1e9:>12.3f}"
        lines.append(f"  {name:<20}{cells}")
    return lines


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    """What sums the whole tensor over the `size` ranks of the group."""
    return lambda: dist.all_reduce(tensor, group=group)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    """What fills the whole tensor with the parts that the `size` ranks of the group hold."""
    mine = tensor[: len(tensor) // size].clone()
    whole = tensor[: len(mine) * size]
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.13
    return lambda: gather(whole, mine, group=group)


def measure(ranks: Ranks, collective: Callable, group: dist.ProcessGroup, size: int) -> tuple[float, tuple[int, float]]:
    """Seconds of the smallest call, and bytes and seconds of one that is long enough, or the largest."""
    begin = time.monotonic()
    latency = seconds_of(ranks, collective(torch.zeros(size, device=ranks.device), group, size))
    n_bytes = PIECE
    while True:
        numbers = torch.zeros(n_bytes // 4, device=ranks.device)  # fp32
        seconds = seconds_of(ranks, collective(numbers, group, size))
        is_late = ranks.max(int(time.monotonic() - begin > AT_MOST_S))  # on all or none
        if seconds >= LONG_ENOUGH_S or n_bytes >= LARGEST[ranks.device.type] or is_late:
            return latency, (n_bytes, seconds)
        n_bytes *= 8


def seconds_of(ranks: Ranks, call: Callable[[], object]) -> float:
    """Seconds of one call on the slowest rank, of as many as take `MEASURED_S` together. All ranks make as many."""
    call()  # sets up what the first call needs
    n_calls = 1
    while True:
        ranks.barrier()
        begin = time.perf_counter()
        for _ in range(n_calls):
            call()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = ranks.max(math.ceil(1e6 * (time.perf_counter() - begin))) / 1e6
        if seconds >= MEASURED_S:
            return seconds / n_calls
        n_calls = max(2 * n_calls, math.ceil(n_calls * MEASURED_S / seconds))
