"""Write a model in another format."""

from dataclasses import dataclass

from minillm.base.options import option
from minillm.commands.convert import FORMATS, ConversionOptions, convert


@dataclass(frozen=True, kw_only=True)
class Config(ConversionOptions):
    model: str = option(help="run or model folder, or a .gguf file")
    out: str = option(help="new folder (hf) or file (gguf)")
    format: str = option(help="whose format to write", choices=FORMATS)


def run(config: Config) -> None:
    convert(config.model, config.out, config.format, config)
