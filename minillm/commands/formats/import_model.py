"""Convert a model in another format into a model folder, which every command here reads."""

from dataclasses import dataclass

from minillm.base.options import option
from minillm.commands.formats.convert import ConversionOptions, convert


@dataclass(frozen=True, kw_only=True)
class Config(ConversionOptions):
    model: str = option(help="Hugging Face folder or .gguf file")
    out: str = option(help="new model folder")


def run(config: Config) -> None:
    convert(config.model, config.out, "hf", config)
