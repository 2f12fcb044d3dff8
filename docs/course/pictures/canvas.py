"""What all pictures of the course share: languages, colours, the numbers of a page, and writing a small PNG."""

import hashlib
import inspect
import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin  # matplotlib needs it, too

from minillm.base.errors import UserError
from minillm.training.plot import CHINESE_FONTS, chinese_fonts

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "docs" / "en" / "course"
IMAGES = ROOT / "docs" / "images" / "course"

# Colours that stay apart for colour-blind readers (Okabe & Ito 2008); on white, so that dark pages show them too
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, LIGHT = "#777777", "#dddddd"
N_COLOURS = 96  # of a PNG, which makes it a third as large

Say = Callable[[str, str], str]  # English, Chinese → the one that is drawn
Draw = Callable[[Figure, Say], None]


def printed(name: str) -> list[str]:
    """The lines that a lesson's page shows as printed by its experiment."""
    (page,) = PAGES.glob(f"*-{name}.md")
    text = page.read_text(encoding="utf-8")
    after_the_command = text.partition(f"```\npython docs/course/{name}.py\n```\n")[2]
    return after_the_command.split("```\n")[1].splitlines()


def numbers(line: str) -> list[float]:
    """The numbers of a printed line that stand for themselves: 1.2e+00, +0.315, 1,024, 36.7%, not the 1 of step1."""
    found = re.findall(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", line)
    return [float(number.replace(",", "")) for number in found]


def axes(figure: Figure, n_columns: int, **how) -> list[Axes]:
    """Axes beside one another, with a grid behind and no frame around."""
    beside = figure.subplots(1, n_columns, **how)
    for one in beside if n_columns > 1 else [beside]:
        one.grid(True, color=LIGHT, linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return list(beside) if n_columns > 1 else [beside]


def only(axis: Axes, direction: str) -> None:
    """Grid lines of one direction: "x" or "y"."""
    axis.grid(False)
    axis.grid(True, axis=direction, color=LIGHT, linewidth=0.6)


def blank(axis: Axes) -> None:
    """No axes at all: for a diagram."""
    axis.set_axis_off()
    axis.grid(False)


def bars(axis: Axes, names: list[str], values: list[float], colours: list[str], form: str = "{:.3f}") -> None:
    """Horizontal bars from the top down, each with its value behind it."""
    places = range(len(names))
    axis.barh(places, values, color=colours, height=0.62)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, " " + form.format(value), va="center", fontsize=8.5)
    axis.set_xlim(0, max(values) * 1.22)
    only(axis, "x")


def state_of(draw: Draw, name: str) -> str:
    """Changes when the drawing function or the numbers on the page do: a picture tells by it whether it is stale."""
    known = inspect.getsource(draw) + "\n".join(printed(name))
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def draw(function: Draw, language: str, folder: Path) -> Path:
    """Write one picture; returns where. function: named as the lesson."""
    name = function.__name__
    chinese = chinese_fonts()
    if language == "zh" and not chinese:
        raise UserError(f"no Chinese font is there; install one of {', '.join(CHINESE_FONTS)}")
    style = {"font.family": ["DejaVu Sans", *chinese], "font.size": 9, "axes.titlesize": 10, "axes.edgecolor": GREY}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
        function(figure, lambda english, chinese: chinese if language == "zh" else english)
        raw = io.BytesIO()
        figure.savefig(raw, dpi=130, format="png")

    # few colours, and by which state it was drawn
    text = PngImagePlugin.PngInfo()
    text.add_text("state", state_of(function, name))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}.png" if language == "en" else f"{name}-zh.png")
    picture = Image.open(raw).convert("RGB").quantize(N_COLOURS, dither=Image.Dither.NONE)
    picture.save(path, pnginfo=text, optimize=True)
    return path
