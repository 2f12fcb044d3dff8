"""Reading and writing models in other formats, tensor by tensor: what the commands import and export share."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.device import DTYPES
from minillm.base.errors import UnsupportedError, UserError
from minillm.base.options import Options, option
from minillm.checkpoint import gguf, huggingface, llama2c
from minillm.checkpoint.any_format import open_model
from minillm.checkpoint.huggingface import StoredModel
from minillm.tokenizer.tokenizer import Tokenizer

FORMATS = ("hf", "llama2c", "gguf")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ConversionOptions(Options):
    """The options that import and export share."""

    tokenizer: str | None = option(
        None, "llama2.c's tokenizer.bin, or a folder whose tokenizer to take; none: the model's own"
    )
    dtype: str | None = option(None, "of the weights written; none: as they are stored", tuple(DTYPES))
    max_shard_size: str = option("5GB", "hf: largest file of weights")


def convert(model_path: str, out: str | Path, format: str, options: ConversionOptions) -> None:
    """Write the model at `model_path` as one of `FORMATS` to `out`, which must not be there yet, and say so."""
    out, max_shard_size = Path(out), _bytes(options.max_shard_size)
    files.refuse_existing(out)
    try:
        model, tokenizer, origin = open_model(model_path, options.tokenizer)
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror})") from None
    dtype = DTYPES[options.dtype] if options.dtype else model.dtype

    def fill(folder: Path) -> None:
        huggingface.write_folder(model, folder, dtype=dtype, max_shard_size=max_shard_size)
        if tokenizer:
            tokenizer.save(folder)

    if format == "hf":
        files.write_folder(out, fill)
    elif format == "gguf":
        files.write_file(out, lambda path: gguf.write_file(model, tokenizer, path, dtype))
    else:
        if dtype != torch.float32 and options.dtype:
            raise UserError(f"--dtype {options.dtype}: llama2.c's format has float32 only")
        tokenizer, origin = _write_llama2c(model, tokenizer, out)

    n_bytes = sum(file.stat().st_size for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
    vocabulary = "no tokenizer (--tokenizer names one to take)"
    if tokenizer:
        vocabulary = f"{tokenizer.vocab_size:,} pieces{origin}"
    print(f"{out}: {model.config.n_parameters():,} parameters, {n_bytes:,} bytes, {vocabulary}")


def _write_llama2c(model: StoredModel, tokenizer: Tokenizer | None, out: Path) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer, None if the format cannot hold it, and where it was written."""
    beside = out.with_name(f"{out.stem}_tokenizer.bin")
    if beside.exists():
        raise UserError(f"{beside}: is there already; choose another --out or delete it")
    files.write_file(out, lambda path: llama2c.write_file(model, path))
    try:
        if tokenizer:
            files.write_file(beside, lambda path: llama2c.write_tokenizer(tokenizer, path, model.config.vocab_size))
    except UnsupportedError as problem:
        print(f"{beside} not written: {problem}")
        tokenizer = None
    return tokenizer, f" in {beside}"


def _bytes(text: str) -> int:
    """Bytes of a size such as 500MB."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text)
    if not match or int(match[1]) == 0:
        raise UserError(f"--max_shard_size {text}: a size is needed, such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2] or ""]
