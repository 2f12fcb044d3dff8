"""`python -m minillm import | export`: reading and writing models in other formats, tensor by tensor."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from minillm.base import files
from minillm.base.device import DTYPES
from minillm.base.errors import UserError
from minillm.checkpoint import gguf, huggingface
from minillm.checkpoint.any_format import open_model
from minillm.model.size import n_parameters

FORMATS = ("hf", "gguf")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parsers(command: Callable[[Callable, str], argparse.ArgumentParser]) -> None:
    """Add the two commands; command(function, name): makes a parser."""
    sub = command(run_import, "import")
    sub.add_argument("--model", required=True, help="Hugging Face folder or .gguf file")
    sub.add_argument("--tokenizer", help="a folder whose tokenizer to take, in place of the model's own")
    sub.add_argument("--out", required=True, help="new model folder")
    _options(sub)
    sub = command(run_export, "export")
    sub.add_argument("--model", required=True, help="run or model folder, or a .gguf file")
    sub.add_argument("--tokenizer", help="as for import")
    sub.add_argument("--out", required=True, help="new folder (hf) or file (gguf)")
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
    out = Path(args.out)
    max_shard_size = _bytes(args.max_shard_size)
    files.refuse_existing(out)
    try:
        model, tokenizer = open_model(args.model, args.tokenizer)
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read ({problem.strerror})") from None
    dtype = DTYPES[args.dtype] if args.dtype else model.dtype

    def fill(folder: Path) -> None:
        huggingface.write_folder(model, folder, dtype=dtype, max_shard_size=max_shard_size)
        if tokenizer:
            tokenizer.save(folder)

    if args.format == "hf":
        files.write_folder(out, fill)
        n_bytes = sum(file.stat().st_size for file in out.iterdir())
    else:
        files.write_file(out, lambda path: gguf.write_file(model, tokenizer, path, dtype))
        n_bytes = out.stat().st_size

    if tokenizer:
        vocabulary = f"{tokenizer.vocab_size:,} pieces" + (f" of {args.tokenizer}" if args.tokenizer else "")
    else:
        vocabulary = "no tokenizer (--tokenizer names one to take)"
    print(f"{out}: {n_parameters(model.config):,} parameters, {n_bytes:,} bytes, {vocabulary}")


def _bytes(text: str) -> int:
    """Bytes of a size such as 500MB."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text)
    if not match or int(match[1]) == 0:
        raise UserError(f"--max_shard_size {text}: a size is needed, such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2] or ""]
