"""The goals of the benchmark's rows, and how far what was measured is from them.

A goal is a multiple of what somebody else reaches in the same run on the same GPU ("1.12 × FlexAttention"), or of a
large copy in that run. Where the other was not measured, because it is not installed, an H100 is compared with what the
other reached on one: H100 SXM, 80 GB, 700 W, torch 2.11, triton 3.6, bf16. Other GPUs have no goal there.

The multiples are those of docs/en/kernels.md ("What has been measured, and what not"), the numbers of others are
medians of one run on that H100, of which the page shows a part.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PLAIN = ("ours (plain Triton)", "ours")  # where a GPU has one path only, it is called "ours"
HOPPER = ("ours (sm_90)",)
OURS = ("ours",)
MINILLM = ("minillm, compiled", "minillm")
COPY = "a copy"  # the ceiling of rows in GB/s


@dataclass(frozen=True)
class Row:
    """One side of one case as a line measured it. ceiling: 0 if unknown; extra_mib: None if unknown."""

    line: str
    op: str
    case: str
    part: str
    side: str
    rate: float
    unit: str
    ceiling: float = 0.0
    extra_mib: float | None = None


@dataclass(frozen=True)
class Goal:
    """`factor` times what `other` reaches. case: "" means every case of the op. sides: of ours, the first there counts.

    on_h100: the other's rate on an H100 SXM. most_mib: what we may hold beyond our inputs.
    """

    op: str
    case: str
    part: str
    sides: tuple[str, ...]
    factor: float
    other: str
    on_h100: float
    most_mib: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A measured row of ours beside its goal. share: measured / goal, for memory goal / measured: 1 is reached."""

    row: Row
    what: str
    measured: float
    goal: float
    unit: str
    share: float
    against: str


# Causal attention: case → TFLOP/s of FlexAttention and cuDNN forward, then backward
CAUSAL = {
    "32/32, D 64, T 1,024": (249, 339, 174, 231),
    "32/32, D 64, T 2,048": (310, 399, 222, 311),
    "32/32, D 64, T 4,096": (346, 423, 262, 376),
    "32/32, D 64, T 16,384": (378, 448, 300, 426),
    "16/16, D 128, T 1,024": (259, 429, 208, 285),
    "16/16, D 128, T 2,048": (319, 496, 279, 378),
    "16/16, D 128, T 4,096": (358, 534, 338, 455),
    "16/16, D 128, T 16,384": (395, 563, 383, 512),
    "32/8, D 128, T 1,024": (286, 451, 209, 273),
    "32/8, D 128, T 2,048": (342, 513, 271, 378),
    "32/8, D 128, T 4,096": (383, 543, 324, 444),
    "32/8, D 128, T 16,384": (423, 577, 384, 516),
}
# Packed documents: case → TFLOP/s of FlexAttention forward and backward
PACKED = {
    "32/32, D 64, 16 documents": (147, 183),
    "16/16, D 128, 16 documents": (256, 236),
    "32/8, D 128, 16 documents": (279, 233),
}
# Linear + cross-entropy: case → TFLOP/s of Liger; MiB that Liger's would hold with dW in fp32
LOSS = {
    "16,384 x 768, vocabulary 32,000": (322, 196),
    "16,384 x 2,048, vocabulary 32,000": (543, 502),
    "16,384 x 2,048, vocabulary 128,256": (530, 1692),
    "16,384 x 4,096, vocabulary 128,256": (571, 3294),
}


def attention_goals() -> Iterator[Goal]:
    for case, (flex_forward, cudnn_forward, flex_backward, cudnn_backward) in CAUSAL.items():
        yield Goal("attention", case, "forward", PLAIN, 1.12, "FlexAttention", flex_forward)
        yield Goal("attention", case, "backward", PLAIN, 1.1, "FlexAttention", flex_backward)
        yield Goal("attention", case, "forward", HOPPER, 0.95, "SDPA cuDNN", cudnn_forward)
        yield Goal("attention", case, "backward", HOPPER, 1.0, "SDPA cuDNN", cudnn_backward)
    for case, (flex_forward, flex_backward) in PACKED.items():
        yield Goal("attention", case, "forward", OURS, 1.3, "FlexAttention", flex_forward)
        yield Goal("attention", case, "backward", OURS, 1.1, "FlexAttention", flex_backward)


def goals() -> list[Goal]:
    """All goals: one op after another, in the order of docs/en/kernels.md."""
    copied = 3020.0  # GB/s, read and written
    return [
        *attention_goals(),
        Goal("decode", "32/8, D 128, cache 32,768, batch 1", "forward", OURS, 1.0, "SDPA cuDNN", 2074),
        Goal("decode", "32/8, D 128, cache 32,768, batch 16", "forward", OURS, 1.0, "SDPA cuDNN", 3066),
        Goal("rms_norm", "", "forward", OURS, 0.95, COPY, copied),
        Goal("rms_norm", "", "backward", OURS, 0.80, COPY, copied),
        Goal("swiglu", "", "forward", OURS, 0.97, COPY, copied),
        Goal("swiglu", "", "backward", OURS, 0.97, COPY, copied),
        Goal("rope", "", "forward", OURS, 0.82, COPY, copied),
        Goal("rope", "", "backward", OURS, 0.82, COPY, copied),
        *(Goal("loss", case, "step", OURS, 1.0, "Liger", rate, mib) for case, (rate, mib) in LOSS.items()),
        Goal("adamw", "", "step", OURS, 1.0, "torch, fused", 2619),
        Goal("muon", "", "step", OURS, 108 / 75, "torch.optim.Muon", 437),  # 75 ms where torch takes 108
        Goal("step 124m", "", "step", MINILLM, 556_000 / 505_700, "plain PyTorch, compiled", 505_700),
        Goal("step 1b", "", "step", MINILLM, 75_000 / 68_000, "plain PyTorch, compiled", 68_000),
        Goal("generate 1b", "", "step", MINILLM, 600 / 314, "transformers, static cache, compiled", 314),
    ]


def compare(rows: list[Row], gpu: str) -> list[Comparison]:
    """Each measured row of ours that has a goal, beside it; a line of the proof is compared with itself only."""
    cases: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.line, row.op, row.case, row.part), {})[row.side] = row
    comparisons = []
    for (_, op, case, part), sides in cases.items():
        for goal in goals():
            if (goal.op, goal.part) == (op, part) and goal.case in ("", case):
                comparisons += compare_case(goal, sides, gpu)
    return comparisons


def compare_case(goal: Goal, sides: dict[str, Row], gpu: str) -> Iterator[Comparison]:
    """A case's speed beside its goal, and its memory if that has one."""
    ours = next((sides[side] for side in goal.sides if side in sides), None)
    if ours is None:
        return
    rate, against = others_rate(goal, ours, sides, gpu)
    if rate:
        aim = goal.factor * rate
        yield Comparison(ours, goal.part, ours.rate, aim, ours.unit, ours.rate / aim, against)
    if goal.most_mib and ours.extra_mib:
        share = goal.most_mib / ours.extra_mib
        yield Comparison(ours, "extra memory", ours.extra_mib, goal.most_mib, "MiB", share, "reckoned")


def others_rate(goal: Goal, ours: Row, sides: dict[str, Row], gpu: str) -> tuple[float, str]:
    """What the goal is a multiple of, and whose it is; 0 if nobody has measured it on such a GPU."""
    times = f"{goal.factor:.2f} × {goal.other}"
    if goal.other == COPY and ours.ceiling:
        return ours.ceiling, f"{times}, this run"
    if goal.other in sides:
        return sides[goal.other].rate, f"{times}, this run"
    if "H100" in gpu:
        return goal.on_h100, f"{times}, {goal.on_h100:,.0f} on an H100 SXM"
    return 0.0, ""


def read_rows(line: str, path: Path) -> Iterator[Row]:
    """The rows of a benchmark's kernels.csv; a torn one, of a benchmark ended while it wrote, is left out."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for fields in csv.DictReader(file):
            names = (fields.get(name) or "" for name in ("op", "case", "part", "side"))
            try:
                rate, ceiling = float(fields["rate"]), float(fields["ceiling"])
                extra_mib = None if fields["extra_bytes"] == "" else float(fields["extra_bytes"]) / 2**20
            except (KeyError, TypeError, ValueError):
                continue
            yield Row(line, *names, rate, fields["unit"], ceiling, extra_mib)


def printed_rows(line: str, op: str, output: Iterable[str]) -> Iterator[Row]:
    """What `python -m minillm bench` prints: "  minillm        123,456 tok/s   MFU  39.4%"."""
    for text in output:
        match = re.match(r" {2}(\S.*?) {2,}([\d,]+(?:\.\d+)?) tok/s", text)
        if match:
            yield Row(line, op, "", "step", match[1], float(match[2].replace(",", "")), "tokens/s")
