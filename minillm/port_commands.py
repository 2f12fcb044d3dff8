"""`python -m minillm import | export`: reading and writing models in other formats, tensor by tensor."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

from minillm import UnsupportedError, UserError, checkpoint, files, gguf_format, gguf_model, huggingface, llama2c, run
from minillm.huggingface import StoredModel
from minillm.tokenizer import Tokenizer
from minillm.training import DTYPES

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
        files.write_file(out, lambda path: gguf_model.write_file(model, tokenizer, path, dtype))
    else:
        if dtype != torch.float32 and args.dtype:
            raise UserError(f"--dtype {args.dtype}: llama2.c's format has float32 only")
        tokenizer, found = _write_llama2c(model, tokenizer, out)
    size = sum(f.stat().st_size for f in out.rglob("*")) if out.is_dir() else out.stat().st_size
    words = f"{tokenizer.vocab_size:,} pieces{found}" if tokenizer else "no tokenizer (--tokenizer names one to take)"
    print(f"{out}: {model.config.n_parameters():,} parameters, {size:,} bytes, {words}")


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


def open_model(path: str, tokenizer: str | None = None) -> tuple[StoredModel, Tokenizer | None, str]:
    """A model in any known format (only headers have been read), its tokenizer or None, and a phrase about its origin.

    tokenizer: its path, if it is not with the model; for x.bin the default is x_tokenizer.bin beside it, if it exists.
    A tokenizer of an unsupported kind is left out with a printed line.
    """
    place, metadata = Path(path), {}
    if not place.exists():
        raise UserError(f"--model {path}: no such file or folder")
    if place.is_dir():
        place = run.resolve_checkpoint(path)
        model = huggingface.open_folder(place)
    else:
        model, metadata = _open_file(place)
    found, beside = None, place.with_name(f"{place.stem}_tokenizer.bin")
    if not (tokenizer or metadata or place.is_dir()) and beside.exists():
        tokenizer = str(beside)
    if tokenizer and Path(tokenizer).suffix == ".bin":
        found = llama2c.read_tokenizer(tokenizer, model.config.vocab_size)
    elif tokenizer:
        found = Tokenizer.load(tokenizer)
    else:
        try:
            if place.is_dir() and any((place / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
                found = Tokenizer.load(place)
            elif "tokenizer.ggml.model" in metadata:
                found = gguf_model.read_tokenizer(metadata, path)
        except UnsupportedError as problem:
            print(f"the tokenizer is left out: {problem}")
    if found and found.vocab_size > model.config.vocab_size:
        raise UserError(f"{path}: {model.config.vocab_size:,} rows for a tokenizer of {found.vocab_size:,} pieces")
    return model, found, f" of {tokenizer}" if tokenizer else ""


def _open_file(path: Path) -> tuple[StoredModel, dict]:
    """The model in a file, and its metadata, which only a GGUF file has."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == gguf_format.MAGIC:
        return gguf_model.open_file(path)
    checkpoint.refuse_pickle(path, start)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: give the folder it lies in, with its config.json")
    return llama2c.open_file(path), {}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)?", text)
    if not found or not int(found[1]):
        raise UserError(f"--max_shard_size {text}: a size is needed, such as 500MB or 5GB")
    return int(found[1]) * UNITS[found[2] or ""]
