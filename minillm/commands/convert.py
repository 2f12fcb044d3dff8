"""`python -m minillm import | export`: reading and writing models in other formats, tensor by tensor."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

from minillm.base import files
from minillm.base.device import DTYPES
from minillm.base.errors import UnsupportedError, UserError
from minillm.checkpoint import gguf, huggingface, llama2c
from minillm.checkpoint.any_format import open_model
from minillm.checkpoint.huggingface import StoredModel
from minillm.model.size import n_parameters
from minillm.tokenizer.tokenizer import Tokenizer

FORMATS = ("hf", "llama2c", "gguf")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parsers(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """Add the two commands; command(function, name): makes a parser."""
    sub = command(run_import, "import")
    sub.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or llama2.c's .bin")
    sub.add_argument("--tokenizer", help="llama2.c's tokenizer.bin, or a folder whose tokenizer to take")
    sub.add_argument("--out", required=True, help="new model folder")
    _options(sub)
    sub = command(run_export, "export")
    sub.add_argument("--model", required=True, help="run or model folder, or any file that import reads")
    sub.add_argument("--tokenizer", help="as for import")
    sub.add_argument("--out", required=True, help="new folder (hf) or file (llama2c, gguf)")
    sub.add_argument("--format", required=True, choices=FORMATS, help="whose format to write")
    _options(sub)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights written; default: as they are stored")
    parser.add_argument("--max_shard_size", default="5GB", help="hf: largest file of weights (default 5GB)")


def run_import(args) -> None:
    """Convert a model in another format into a model folder, which every command here reads."""
    args.format = "hf"
    run_export(args)


def run_export(args) -> None:
    """Write a model in another format."""
    out, shard = Path(args.out), _bytes(args.max_shard_size)
    files.refuse_existing(out)
    try:
        model, tokenizer, found = open_model(args.model, args.tokenizer)
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror})") from None
    dtype = DTYPES[args.dtype] if args.dtype else model.dtype
    if args.format == "hf":

        def fill(folder: Path) -> None:
            huggingface.write_folder(model, folder, dtype=dtype, max_shard_size=shard)
            if tokenizer:
                tokenizer.save(folder)

        files.write_folder(out, fill)
    elif args.format == "gguf":
        files.write_file(out, lambda path: gguf.write_file(model, tokenizer, path, dtype))
    else:
        if dtype != torch.float32 and args.dtype:
            raise UserError(f"--dtype {args.dtype}: llama2.c's format has float32 only")
        tokenizer, found = _write_llama2c(model, tokenizer, out)
    size = sum(f.stat().st_size for f in out.rglob("*")) if out.is_dir() else out.stat().st_size
    words = f"{tokenizer.vocab_size:,} pieces{found}" if tokenizer else "no tokenizer (--tokenizer names one to take)"
    print(f"{out}: {n_parameters(model.config):,} parameters, {size:,} bytes, {words}")


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
    found = re.fullmatch(r"(\d+)\s*([KMG]B)?", text)
    if not found or not int(found[1]):
        raise UserError(f"--max_shard_size {text}: a size is needed, such as 500MB or 5GB")
    return int(found[1]) * UNITS[found[2] or ""]
