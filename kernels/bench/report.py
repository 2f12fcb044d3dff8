"""What the benchmark found: a table in the terminal, a CSV file of everything, a PNG for each op."""

import csv
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kernels.bench.case import OURS

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008), after two for us
OURS_COLOURS = ("#0072B2", "#002F4A")
COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000")
CASES_A_ROW = 4


@dataclass(frozen=True)
class Measurement:
    """One side of one case. part: "forward", "backward", or "step", both in one or an optimizer's.

    milliseconds: median, and between which four fifths of the runs lie; rate and ceiling in `unit`; beside_best: how
    many times as fast as the best that is not ours; extra_bytes: held at the peak, None if unknown; error: the largest
    relative one.
    """

    op: str
    case: str
    part: str
    side: str
    milliseconds: float
    low_ms: float
    high_ms: float
    runs: int
    rate: float
    unit: str
    ceiling: float
    beside_best: float | None
    extra_bytes: int | None
    error: float

    @property
    def share(self) -> float:
        return self.rate / self.ceiling


def beside_best(group: Iterable[Measurement]) -> list[Measurement]:
    """Measurements of one case and part with `beside_best` filled in: ours first, then the fastest first."""
    group = list(group)
    others = [m.milliseconds for m in group if not m.side.startswith(OURS)]
    if others:
        group = [dataclasses.replace(m, beside_best=min(others) / m.milliseconds) for m in group]
    return sorted(group, key=lambda m: (not m.side.startswith(OURS), m.milliseconds))


def heading(machine: dict[str, str]) -> str:
    """What numbers were taken with, in two lines."""
    gpu = f"{machine['gpu']}, power limit {machine['power limit']}, clock {machine['clock now']} now, "
    gpu += f"at most {machine['highest clock']}"
    return f"{gpu}\n" + ", ".join(f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "python", "date"))


def table(group: list[Measurement]) -> str:
    """One case and part, a line for each side."""
    first = group[0]
    width = max(len("beside best other"), *(len(m.side) for m in group))
    title = f"{first.op} {first.case}, {first.part}"
    columns = f"{'ms':>9}{first.unit:>10}{'of ceiling':>12}{'beside best other':>19}{'extra memory':>14}"
    lines = [title, f"  {'':<{width}}{columns}"]
    for m in group:
        ratio = "" if m.beside_best is None else f"{m.beside_best:.2f} x"
        numbers = f"{m.milliseconds:9.3f}{m.rate:10,.0f}{m.share:12.0%}{ratio:>19}{size(m.extra_bytes):>14}"
        lines.append(f"  {m.side:<{width}}{numbers}")
    return "\n".join(lines)


def size(n: int | None) -> str:
    """Bytes for people: 4.6 GiB, 690 MiB; "" for None."""
    if n is None:
        return ""
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.0f} MiB"


def write_csv(path: Path, measurements: list[Measurement], machine: dict[str, str]) -> None:
    """All measurements, each with the machine it was taken on, so that files of several machines may be joined."""
    names = [field.name for field in dataclasses.fields(Measurement)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "share", *machine])
        for m in measurements:
            writer.writerow([*(getattr(m, name) for name in names), f"{m.share:.4f}", *machine.values()])


def draw(path: Path, measurements: list[Measurement], machine: dict[str, str]) -> None:
    """One op's measurements as bars, ours beside the others, the ceiling a dashed line.

    Raises ImportError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A column of axes for each part, a few cases in each row of them, a colour for each side.
    parts = list(dict.fromkeys(m.part for m in measurements))
    cases = list(dict.fromkeys(m.case for m in measurements))
    sides = list(dict.fromkeys(m.side for m in measurements))
    sides.sort(key=lambda side: not side.startswith(OURS))
    n_ours = sum(side.startswith(OURS) for side in sides)
    colours = dict(zip(sides, OURS_COLOURS[:n_ours] + 2 * COLOURS, strict=False))
    n_rows = -(-len(cases) // CASES_A_ROW)
    each = -(-len(cases) // n_rows)
    rows = [cases[i * each : (i + 1) * each] for i in range(n_rows)]
    figure, axes = pyplot.subplots(
        n_rows,
        len(parts),
        figsize=(7 * len(parts), 1.2 + 2.8 * n_rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, shown in zip(axes, rows, strict=True):
        for axis, part in zip(row, parts, strict=True):
            _bars(axis, [m for m in measurements if m.part == part and m.case in shown], shown, colours)
            axis.set_title(part, fontsize=9)
        row[0].set_ylabel(measurements[0].unit)
    versions = f"{machine['gpu']}, {machine['power limit']}, torch {machine['torch']}, triton {machine['triton']}"
    figure.suptitle(f"{measurements[0].op}, {versions}; dashed: the ceiling", fontsize=10)
    swatches = [pyplot.Rectangle((0, 0), 1, 1, color=colours[side]) for side in sides]
    figure.legend(swatches, sides, loc="outside lower center", ncols=min(5, len(sides)), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis, measurements: list[Measurement], cases: list[str], colours: dict[str, str]) -> None:
    """A group of bars for each case, as fast as they are high."""
    here = [[side for side in colours if any((m.case, m.side) == (case, side) for m in measurements)] for case in cases]
    bar = 0.84 / max(6, *map(len, here))
    for m in measurements:
        place, sides = cases.index(m.case), here[cases.index(m.case)]
        x = place + (sides.index(m.side) - (len(sides) - 1) / 2) * bar
        axis.bar(x, m.rate, 0.92 * bar, color=colours[m.side])
    axis.axhline(max((m.ceiling for m in measurements), default=0.0), color="#777777", linestyle="--", linewidth=1.2)
    axis.set_xlim(-0.5, len(cases) - 0.5)
    axis.set_xticks(range(len(cases)), ["\n".join(case.rsplit(", ", 1)) for case in cases], fontsize=8)
    axis.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
