"""Fold an adapter into its base: a plain model folder, for programs that know no adapters."""

from dataclasses import dataclass

from minillm.base.options import Options, option
from minillm.tuning import folders


@dataclass(frozen=True)
class Config(Options):
    model: str = option(help="the adapter's base: run or model folder")
    adapter: str = option(help="run or folder that holds the adapter, of minillm or PEFT")
    out: str = option(help="new model folder")


def run(config: Config) -> None:
    print(folders.merge_folder(config.model, config.adapter, config.out))
