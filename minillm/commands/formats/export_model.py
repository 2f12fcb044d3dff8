"""Write a model in another format."""

from dataclasses import dataclass

from minillm.base.options import option
from minillm.commands.formats.convert import BLOCK_TYPES, FORMATS, ConversionOptions, convert


@dataclass(frozen=True, kw_only=True)
class Config(ConversionOptions):
    model: str = option(help="run or model folder, or a .gguf file")
    out: str = option(help="new folder (hf) or file (gguf)")
    format: str = option(help="whose format to write", choices=FORMATS)
    type: str | None = option(None, "gguf: matrices in blocks of 8 or 4 bits; none: in --dtype", choices=BLOCK_TYPES)

    def problems(self) -> list[str]:
        problems = []
        if self.type is not None and self.format != "gguf":
            problems.append(f"--type {self.type}: is for --format gguf; leave it out")
        if self.type is not None and self.dtype is not None:
            problems.append(f"--dtype {self.dtype}: --type {self.type} says already how weights are written; give one")
        return problems


def run(config: Config) -> None:
    convert(config.model, config.out, config.format, config, config.type)
