"""Curves of one or several runs, from their metrics.jsonl to one PNG: `python -m minillm plot RUN… --out FILE`."""

import contextlib
import warnings
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import NamedTuple

from minillm.base import files
from minillm.base.contents import Contents
from minillm.base.errors import MissingError, UserError
from minillm.base.json_door import parse_json, read_file
from minillm.base.printing import clipped, visible

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FLOOR = "#777777"
# Linux's, Windows's and macOS's; the last holds all characters too, and is the only face of Noto's file of several that
# matplotlib below 3.11 knows
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Noto Sans CJK JP",
)
PANELS = {
    "loss": "training loss",
    "val_bpb": "validation (bits per byte)",
    "val_loss": "validation (nats a token)",  # of runs that know no bits per byte
    "heldout_nll": "held-out pairs (nats a pair)",
    "heldout_accuracy": "held-out pairs (share right)",
    "val_accuracy": "held-out pairs (share better than before)",
    "objective": "reward less β KL",  # of runs that learn from rewards
    "true_reward": "true reward",  # beside a learned one
    "tasks": "benchmarks (share right)",  # a curve for each of a run's benchmarks
}
# what a picture says, in Chinese
CHINESE = {
    "training loss": "训练损失",
    "training loss (nats a token)": "训练损失（每个 token 的奈特）",
    "validation (bits per byte)": "验证（比特/字节）",
    "validation (nats a token)": "验证（每个 token 的奈特）",
    "held-out pairs (nats a pair)": "留出对（每对的奈特）",
    "held-out pairs (share right)": "留出对（判对的比例）",
    "held-out pairs (share better than before)": "留出对（比之前好的比例）",
    "reward less β KL": "奖励 − β KL",
    "true reward": "真实奖励",
    "benchmarks (share right)": "基准测试（正确率）",
    "steps": "步数",
    "training time (hours)": "训练时间（小时）",
    "training time (minutes)": "训练时间（分钟）",
    "training time (seconds)": "训练时间（秒）",
    "floor": "下界",
    "optimum": "最优值",
}
LANGUAGES = {"en": {}, "zh": CHINESE}  # language → what stands in the place of English words
IN_NATS = {"val_bpb", "val_loss"}  # of runs whose training loss is in nats a token
EVERY_STEP = ("loss", "objective", "true_reward")  # panels whose values are too many to be marked
RISING = ("heldout_accuracy", "val_accuracy", "objective", "true_reward", "tasks")
TASKS = ("acc/", "exact_match,strict-match/")  # beginnings of the names of benchmarks' scores
NOISY = ("objective", "true_reward")  # each step has prompts of its own
# panel → what no model can be below, or above where the panel is rising, if it is known
FLOORS = {"val_bpb": "floor_bpb", "heldout_nll": "floor_nll", "objective": "optimum"}
LARGEST = 1e30  # of a number that is drawn
MOST_BYTES = 1 << 28  # of a metrics.jsonl: about a million rows
RAW_POINTS = 100  # runs with more logged steps than this are shown smoothed over a hundredth of them, or a tenth


def read_metrics(run: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl; `run` is its folder or the file. A torn last line is left out."""
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        data = read_file(path, MOST_BYTES)
    except MissingError as problem:
        raise UserError(f"{problem}; give the folder of a run (out/pretrain) that has begun training") from None
    rows = []
    lines = data.decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a row of metrics; is this the file of a run?")
    if not rows:
        raise UserError(f"{path}: holds no step yet; give a run that has finished one")
    return rows


def _row(line: str) -> dict | None:
    """A row that names its step; None for anything else, or if what is drawn of it is no number."""
    try:
        row = Contents(parse_json(line.encode(), "row"), "row")
        row.need("step", float, at_least=0)
        task_names = (name for name in row.values if name.startswith(TASKS))
        for name in (*PANELS, *FLOORS.values(), *task_names, "time_s", "floor_error"):
            row.get(name, float, at_least=-LARGEST, at_most=LARGEST)
    except UserError:
        return None
    return row.values


class Series(NamedTuple):
    """One column of a run's metrics, and where its values belong."""

    steps: list[float]
    seconds: list[float]
    values: list[float]


def series(rows: list[dict], name: str) -> Series:
    """The rows that have `name`; a row without a time gets that of the row before.

    val_loss is left out of rows that have bits per byte. Of several rows of one step the last counts.
    """
    column, last_time = Series([], [], []), 0.0
    for row in rows:
        last_time = row.get("time_s") or last_time
        has_better = name == "val_loss" and "val_bpb" in row
        if row.get(name) is not None and not has_better:
            if column.steps and column.steps[-1] == row["step"]:
                for values in column:
                    values.pop()
            column.steps.append(row["step"])
            column.seconds.append(last_time)
            column.values.append(row[name])
    return column


def task_series(metrics: dict[str, list[dict]]) -> dict[str, Series]:
    """The shares of benchmarks that each run got right, by run and benchmark. metrics: label → rows."""
    columns = {}
    for label, rows in metrics.items():
        for name in dict.fromkeys(name for row in rows for name in row if name.startswith(TASKS)):
            benchmark = _plain(name.partition("/")[2])
            columns[f"{label}, {benchmark}" if len(metrics) > 1 else benchmark] = series(rows, name)
    return columns


def smoothed(values: list[float], width: int) -> list[float]:
    """The mean over `width` values up to each one (fewer at the start)."""
    sums = [0.0, *accumulate(values)]  # sums[n]: of the first n
    means = []
    for end in range(1, len(sums)):
        begin = max(0, end - width)
        means.append((sums[end] - sums[begin]) / (end - begin))
    return means


def drawn(run: Path) -> str:
    """Draw a run's curves into its folder; says where, or why not: that this fails does not make the run fail."""
    try:
        return f"curve {draw([run], run / 'curve.png')}"
    except UserError as problem:  # matplotlib is optional
        return f"no curve: {problem}"
    except Exception as problem:  # or it fails, in a way that only it knows
        return f"no curve: {type(problem).__name__}: {clipped(str(problem))}"


def draw(runs: list[str | Path], out: str | Path, language: str = "en") -> Path:
    """Draw training loss and validation score of each run against steps and against time, into `out` (.png).

    The validation score is in bits per byte, with the corpus's floor, where the run has them; else in nats a token, in
    a panel of its own. So are the scores of held-out pairs, with the floor of noisy labels, the objective of runs that
    learn from rewards, with its optimum, and the shares of benchmarks that were right. language: of `LANGUAGES`. Raises
    UserError without matplotlib or a font for the language, for a run without metrics, or if `out` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["font.family"] = _fonts(language)
    words = LANGUAGES[language]

    # the runs by label, and of each panel that any run has values for, the column of each run
    metrics = {_label(run): read_metrics(run) for run in runs}
    if len(metrics) < len(runs):  # two folders of one name
        metrics = {_plain(str(run)): read_metrics(run) for run in runs}
    columns = {panel: {label: series(rows, panel) for label, rows in metrics.items()} for panel in PANELS}
    columns["tasks"] = task_series(metrics)
    panels = [panel for panel in PANELS if any(column.steps for column in columns[panel].values())]
    if all(column.steps for column in columns["objective"].values()):  # the loss of fresh answers is near 0 anyway
        panels = [panel for panel in panels if panel != "loss"]
    floors = {panel: _floors(metrics, panel, floor) for panel, floor in FLOORS.items()}
    unit, seconds = _unit(metrics)

    # a row of two axes for each panel: by steps, by time
    figure, axes = pyplot.subplots(
        len(panels),
        2,
        figsize=(11, 3.6 * len(panels)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for pair_of_axes, panel in zip(axes, panels, strict=True):
        name = PANELS[panel] + (" (nats a token)" if panel == "loss" and IN_NATS & {*panels} else "")
        pair_of_axes[0].set_ylabel(words.get(name, name))
        _draw_panel(pair_of_axes, panel, columns[panel], floors.get(panel, {}), seconds, words)
    time = f"training time ({unit})"
    axes[-1][0].set_xlabel(words.get("steps", "steps"))
    axes[-1][1].set_xlabel(words.get(time, time))

    out = Path(out)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in letters that no font here has: boxes
            files.write_file(out, partial(figure.savefig, dpi=150, format="png"))
    finally:
        pyplot.close(figure)
    return out


def _draw_panel(
    axes, panel: str, columns: dict[str, Series], floors: dict[float, tuple[float, str]], seconds: int, words: dict
) -> None:
    """One score of all runs on two axes, by steps and by time. seconds: of the unit of time. words: of the language."""
    from matplotlib.ticker import MaxNLocator

    by_steps, by_time = axes
    for colour, (label, column) in zip(cycle(COLOURS), columns.items(), strict=False):
        times = [time / seconds for time in column.seconds]
        width = len(column.values) // (10 if panel in NOISY else RAW_POINTS) + 1  # of what is averaged
        width = 0 if panel not in EVERY_STEP else width
        _line(by_steps, column.steps, column.values, colour, label, width)
        _line(by_time, times, column.values, colour, label, width)
    floor_name = "optimum" if panel in RISING else "floor"
    for axis in axes:
        _draw_floors(axis, floors, words.get(floor_name, floor_name))
        _dress(axis)
    by_steps.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 1.25
    values = [value for column in columns.values() for value in column.values]
    _limit(by_steps, sorted([*values, *floors]), share=0.98 if panel == "loss" else 1.0)
    if by_steps.get_legend_handles_labels()[0]:
        corner = "lower right" if panel in RISING else "upper right"
        by_steps.legend(frameon=False, loc="upper left" if panel == "tasks" else corner)


def _fonts(language: str) -> list[str]:
    """Fonts by preference; the Chinese ones of this machine are for names of runs, too."""
    chinese = chinese_fonts()
    if language == "zh" and not chinese:
        raise UserError(
            f"--language zh needs one of these fonts: {', '.join(CHINESE_FONTS)}; install one, or draw in en"
        )
    return ["DejaVu Sans", *chinese]


def chinese_fonts() -> list[str]:
    """The names of this machine's Chinese fonts, by preference.

    matplotlib looks for fonts when it is used for the first time, and keeps the list. Where no Chinese one is on it,
    the fonts that were installed since then are added.
    """
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    if not {font.name for font in fonts.ttflist}.intersection(CHINESE_FONTS):
        known = {font.fname for font in fonts.ttflist}
        for path in sorted(set(font_manager.findSystemFonts()) - known):
            with contextlib.suppress(OSError, RuntimeError):  # a damaged file
                fonts.addfont(path)
    installed = {font.name for font in fonts.ttflist}
    return [name for name in CHINESE_FONTS if name in installed]


def _unit(metrics: dict[str, list[dict]]) -> tuple[str, int]:
    """The largest unit of which the longest run takes more than two, and its seconds."""
    longest = max(row.get("time_s") or 0.0 for rows in metrics.values() for row in rows)
    for unit, seconds in (("hours", 3600), ("minutes", 60)):
        if longest > 2 * seconds:
            return unit, seconds
    return "seconds", 1


def _label(run: str | Path) -> str:
    path = Path(run)
    return _plain(path.parent.name if path.is_file() else path.resolve().name)


def _plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: $ would begin a formula, _ would keep it out of the legend."""
    name = visible(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _line(axis, x: list, values: list, colour: str, label: str, width: int) -> None:
    """A run's curve; width: how many values are averaged, 0: each is marked."""
    if not values:
        return
    if width == 0:
        axis.plot(x, values, color=colour, label=label, linewidth=1.6, marker="o", markersize=3.5)
    elif width == 1:
        axis.plot(x, values, color=colour, label=label, linewidth=1.6)
    else:  # each step faintly, their running mean clearly
        axis.plot(x, values, color=colour, alpha=0.22, linewidth=0.7)
        axis.plot(x, smoothed(values, width), color=colour, label=label, linewidth=1.6)


def _floors(metrics: dict[str, list[dict]], panel: str, name: str) -> dict[float, tuple[float, str]]:
    """A panel's floor → its standard error, and the runs that it belongs to, "" if to all of them.

    name: of the floor in the rows that have the panel's score.
    """
    last_scores = {}  # label → the last row with a score
    for label, rows in metrics.items():
        for row in rows:
            if panel in row and (name in row or label not in last_scores):
                last_scores[label] = row
    floors = {}
    for row in last_scores.values():
        floor = row.get(name)
        if not floor:
            continue
        labels = [label for label, other in last_scores.items() if other.get(name) == floor]
        whose = "" if len(labels) == len(last_scores) else ", ".join(labels)
        floors[floor] = (row.get("floor_error") or 0.0, whose)
    return floors


def _draw_floors(axis, floors: dict[float, tuple[float, str]], name: str) -> None:
    """A dashed line at each floor (one, if the runs share a corpus), with its standard error, called `name`."""
    for floor, (error, whose) in floors.items():
        label = f"{name} {floor:.3f}" + (f" ({whose})" if whose else "")
        axis.axhline(floor, color=FLOOR, linestyle="--", linewidth=1.2, label=label)
        axis.axhspan(floor - error, floor + error, color=FLOOR, alpha=0.2, linewidth=0)


def _limit(axis, ordered: list[float], share: float) -> None:
    """Show this share of the sorted values: without the steep fall at the start the part that matters has room."""
    if not ordered:
        return
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    margin = 0.06 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)


def _dress(axis) -> None:
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
