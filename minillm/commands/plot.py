"""Draw loss and validation curves of one or several runs into a PNG."""

from dataclasses import dataclass
from pathlib import Path

from minillm.base.options import Options, option
from minillm.training import plot


@dataclass(frozen=True)
class Config(Options):
    runs: tuple[str, ...] = option(help="folder of a run, or its metrics.jsonl", positional=True)
    out: str | None = option(
        None, "PNG to write; none: curve.png in the run's folder, curves.png here for several runs"
    )
    language: str = option("en", "of the words in the picture; zh needs a Chinese font", tuple(plot.LANGUAGES))


def run(config: Config) -> None:
    print(plot.draw(config.runs, _where(config), config.language))


def _where(config: Config) -> Path:
    if config.out:
        return Path(config.out)
    if len(config.runs) > 1:
        return Path("curves.png")
    run = Path(config.runs[0])
    folder = run if run.is_dir() else run.parent
    return folder / "curve.png"
