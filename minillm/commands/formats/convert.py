"""Reading and writing models in other formats, tensor by tensor: what the commands import and export share."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.device import DTYPES
from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.checkpoint import gguf, gguf_blocks, huggingface
from minillm.checkpoint.any_format import open_model
from minillm.model.config import ModelConfig
from minillm.model.size import n_parameters

FORMATS = ("hf", "gguf")
BLOCK_TYPES = tuple(kind.lower() for kind in gguf_blocks.PACK)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ConversionOptions(Options):
    """The options that import and export share."""

    tokenizer: str | None = option(None, "a folder whose tokenizer to take; none: the model's own")
    dtype: str | None = option(None, "of the weights written; none: as they are stored", tuple(DTYPES))
    max_shard_size: str = option("5GB", "hf: largest file of weights")


def convert(
    model_path: str, out: str | Path, format: str, options: ConversionOptions, block_type: str | None = None
) -> None:
    """Write the model at `model_path` as one of `FORMATS` to `out`, which must not exist yet, and print a line.

    block_type: one of `BLOCK_TYPES`, for the matrices in a GGUF file.
    """
    out = Path(out)
    max_shard_size = _bytes(options.max_shard_size)
    files.refuse_existing(out)

    # read: the model's tensors stay on the disk until each is written
    try:
        model, tokenizer = open_model(model_path, options.tokenizer)
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror})") from None
    dtype = DTYPES[options.dtype] if options.dtype else model.dtype
    blocks = None
    if block_type:
        blocks = block_type.upper()
        dtype = torch.float16  # of matrices whose rows are not whole blocks
        _tell_what_stays(model.config, block_type)

    # write
    def fill(folder: Path) -> None:
        huggingface.write_folder(model, folder, dtype=dtype, max_shard_size=max_shard_size)
        if tokenizer:
            tokenizer.save(folder)

    if format == "hf":
        files.write_folder(out, fill)
        n_bytes = sum(file.stat().st_size for file in out.iterdir())
    else:
        files.write_file(out, lambda path: gguf.write_file(model, tokenizer, path, dtype, blocks))
        n_bytes = out.stat().st_size

    # the result in a line
    vocabulary = "no tokenizer (--tokenizer names one to take)"
    if tokenizer:
        vocabulary = f"{tokenizer.vocab_size:,} pieces"
        if options.tokenizer:
            vocabulary += f" of {options.tokenizer}"
    print(f"{out}: {n_parameters(model.config):,} parameters, {n_bytes:,} bytes, {vocabulary}")


def _tell_what_stays(config: ModelConfig, block_type: str) -> None:
    """Print which matrices are not written in blocks, if any."""
    shapes = huggingface.shapes_of(config)
    uneven = [key for key, shape in shapes.items() if len(shape) > 1 and shape[-1] % gguf_blocks.BLOCK]
    if uneven:
        print(
            f"{len(uneven)} matrices stay in float16, as {uneven[0]}: {block_type} has blocks of {gguf_blocks.BLOCK}, "
            f"and their rows have {shapes[uneven[0]][-1]} numbers"
        )


def _bytes(text: str) -> int:
    """Bytes of a size such as 500MB."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text)
    if not match or int(match[1]) == 0:
        raise UserError(f"--max_shard_size {text}: a size is needed, such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2] or ""]
