"""A model in any format that is read here: Hugging Face folders, GGUF, llama2.c."""

from pathlib import Path

from minillm.base.errors import UnsupportedError, UserError
from minillm.checkpoint import gguf, gguf_format, huggingface, llama2c, run_folder, tensor_files
from minillm.checkpoint.huggingface import StoredModel
from minillm.tokenizer.tokenizer import Tokenizer


def open_model(path: str, tokenizer: str | None = None) -> tuple[StoredModel, Tokenizer | None, str]:
    """A model in any known format (only headers have been read), its tokenizer or None, and a phrase about its origin.

    tokenizer: its path, if it is not with the model; for x.bin the default is x_tokenizer.bin beside it, if it exists.
    A tokenizer of an unsupported kind is left out with a printed line.
    """
    place, metadata = Path(path), {}
    if not place.exists():
        raise UserError(f"--model {path}: no such file or folder")
    if place.is_dir():
        place = run_folder.resolve_checkpoint(path)
        model = huggingface.open_folder(place)
    else:
        model, metadata = _open_file(place)
    found, beside = None, place.with_name(f"{place.stem}_tokenizer.bin")
    if not (tokenizer or metadata or place.is_dir()) and beside.exists():
        tokenizer = str(beside)
    if tokenizer and Path(tokenizer).suffix == ".bin":
        found = llama2c.read_tokenizer(tokenizer, model.config.vocab_size)
    elif tokenizer:
        found = Tokenizer.load(run_folder.tokenizer_folder(tokenizer))
    else:
        try:
            if place.is_dir() and any((place / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
                found = Tokenizer.load(place)
            elif "tokenizer.ggml.model" in metadata:
                found = gguf.read_tokenizer(metadata, path)
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
        return gguf.open_file(path)
    tensor_files.refuse_pickle(path, start)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: give the folder it lies in, with its config.json")
    return llama2c.open_file(path), {}
