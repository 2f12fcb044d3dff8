"""Curves of one or several runs, from their metrics.jsonl to one PNG: `python -m minillm plot RUN… --out FILE`."""

import json
import warnings
from itertools import cycle
from pathlib import Path

from minillm.base.errors import UserError

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FLOOR = "#777777"
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC", "SimHei")
PANELS = {
    "loss": "training loss (nats a token)",
    "val_bpb": "validation (bits per byte)",
    "val_loss": "validation (nats a token)",  # of runs that know no bits per byte
}
RAW_POINTS = 100  # runs with more logged steps than this are shown smoothed over a hundredth of them


def read_metrics(run: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl; `run` is its folder or the file. A torn last line is left out."""
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a run (out/pretrain) that has begun training")
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not a row of metrics; is this the file of a run?") from None
            del rows[number - 1 :]
    if not rows:
        raise UserError(f"{path}: holds no step yet; give a run that has finished one")
    return rows


def series(rows: list[dict], name: str) -> tuple[list[float], list[float], list[float]]:
    """(steps, seconds, values) of the rows that have `name`; a row without a time gets that of the row before.

    val_loss is left out of rows that have bits per byte.
    """
    steps, seconds, values, last = [], [], [], 0.0
    for row in rows:
        last = row.get("time_s") or last
        if row.get(name) is not None and not (name == "val_loss" and "val_bpb" in row):
            steps.append(row["step"])
            seconds.append(last)
            values.append(row[name])
    return steps, seconds, values


def smoothed(values: list[float], width: int) -> list[float]:
    """The mean over `width` values up to each one (fewer at the start)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def draw(runs: list[str | Path], out: str | Path) -> Path:
    """Draw training loss and validation score of each run against steps and against time, into `out` (.png).

    The validation score is in bits per byte, with the corpus's floor, where the run has them; else in nats a token, in
    a panel of its own. Raises UserError without matplotlib, for a run without metrics, or if `out` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    pyplot.rcParams["font.family"] = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)]
    loaded = {_label(run): read_metrics(run) for run in runs}
    if len(loaded) < len(runs):
        loaded = {str(run): read_metrics(run) for run in runs}
    drawn = {name: {label: series(rows, name) for label, rows in loaded.items()} for name in PANELS}
    lines = [name for name in PANELS if name == "loss" or any(steps for steps, _, _ in drawn[name].values())]
    longest = max((row.get("time_s") or 0.0) for rows in loaded.values() for row in rows)
    floors = _floors(loaded)
    unit, seconds = next(
        (u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest > 2 * s or s == 1
    )
    figure, axes = pyplot.subplots(
        len(lines), 2, figsize=(11, 3.6 * len(lines)), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for row_of_axes, name in zip(axes, lines, strict=True):
        for axis, by_time in zip(row_of_axes, (False, True), strict=True):
            for colour, (label, (steps, times, values)) in zip(cycle(COLOURS), drawn[name].items(), strict=False):
                if values:
                    x = [t / seconds for t in times] if by_time else steps
                    _line(axis, x, values, colour, label, points=name != "loss")
            if name == "val_bpb":
                _draw_floors(axis, floors)
            if name == lines[-1]:
                axis.set_xlabel(f"training time ({unit})" if by_time else "steps")
            _dress(axis)
        row_of_axes[0].set_ylabel(PANELS[name])
        shown = [*(v for _, _, values in drawn[name].values() for v in values), *(floors if name == "val_bpb" else ())]
        _limit(row_of_axes[0], sorted(shown), 0.98 if name == "loss" else 1.0)
        if row_of_axes[0].get_legend_handles_labels()[0]:
            row_of_axes[0].legend(frameon=False, loc="upper right")
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in letters that no font here has: boxes
            figure.savefig(out, dpi=150, format="png")
    except OSError as problem:
        raise UserError(f"{out}: cannot be written ({problem.strerror or problem})") from None
    finally:
        pyplot.close(figure)
    return out


def _label(run: str | Path) -> str:
    path = Path(run)
    return path.parent.name if path.is_file() else path.resolve().name


def _line(axis, x: list, values: list, colour: str, label: str, points: bool) -> None:
    if points:
        axis.plot(x, values, color=colour, label=label, linewidth=1.6, marker="o", markersize=3.5)
    elif len(values) <= RAW_POINTS:
        axis.plot(x, values, color=colour, label=label, linewidth=1.6)
    else:  # each step faintly, their running mean clearly
        axis.plot(x, values, color=colour, alpha=0.22, linewidth=0.7)
        axis.plot(x, smoothed(values, len(values) // RAW_POINTS + 1), color=colour, label=label, linewidth=1.6)


def _floors(loaded: dict[str, list[dict]]) -> dict[float, tuple[float, str]]:
    """Floor in bits per byte → its standard error, and the runs that it belongs to, "" if to all of them."""
    scored = {label: [row for row in rows if "val_bpb" in row] for label, rows in loaded.items()}
    last = {label: rows[-1] for label, rows in scored.items() if rows}
    floors = {}
    for row in last.values():
        if floor := row.get("floor_bpb"):
            runs = [label for label, other in last.items() if other.get("floor_bpb") == floor]
            floors[floor] = (row.get("floor_error") or 0.0, "" if len(runs) == len(last) else ", ".join(runs))
    return floors


def _draw_floors(axis, floors: dict[float, tuple[float, str]]) -> None:
    """A dashed line at each floor (one, if the runs share a corpus), with its standard error."""
    for floor, (error, whose) in floors.items():
        label = f"floor {floor:.3f}" + (f" of {whose}" if whose else "")
        axis.axhline(floor, color=FLOOR, linestyle="--", linewidth=1.2, label=label)
        axis.axhspan(floor - error, floor + error, color=FLOOR, alpha=0.2, linewidth=0)


def _limit(axis, ordered: list[float], share: float) -> None:
    """Show this share of the sorted values: without the steep fall at the start the part that matters has room."""
    if ordered:
        low, high = ordered[0], ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        margin = 0.06 * (high - low) or 0.1
        axis.set_ylim(low - margin, high + margin)


def _dress(axis) -> None:
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
