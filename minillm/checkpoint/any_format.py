"""A model in any format that is read here: a Hugging Face folder or a GGUF file."""

from pathlib import Path

from minillm.base.errors import UnsupportedError, UserError
from minillm.base.json_door import file_size
from minillm.checkpoint import gguf, gguf_file, gguf_tokenizer, huggingface, run_folder, tensor_files
from minillm.checkpoint.huggingface import StoredModel
from minillm.tokenizer.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def open_model(path: str, tokenizer_path: str | None = None) -> tuple[StoredModel, Tokenizer | None]:
    """A model in any known format, of which only headers have been read, and its tokenizer or None.

    path: a run or model folder, or a GGUF file. tokenizer_path: of the tokenizer, if it is not with the model. A
    tokenizer of an unsupported kind is left out with a printed line. Raises `UserError` for anything else, or if the
    tokenizer has more pieces than the model has rows.
    """
    if not Path(path).exists():
        raise UserError(f"--model {path}: no such file or folder")
    if Path(path).is_dir():
        folder = run_folder.resolve_checkpoint(path)
        model = huggingface.open_folder(folder)
        metadata = {}
    else:
        folder = None
        model, metadata = _open_file(Path(path))

    if tokenizer_path:
        tokenizer = Tokenizer.load(run_folder.tokenizer_folder(tokenizer_path))
    else:
        tokenizer = _tokenizer_with_the_model(path, folder, metadata)
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{path}: {model.config.vocab_size:,} rows for a tokenizer of {tokenizer.vocab_size:,} pieces")
    return model, tokenizer


def _open_file(path: Path) -> tuple[StoredModel, dict]:
    """The model of a GGUF file, and its metadata."""
    file_size(path)  # is it a file at all
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == gguf_file.MAGIC:
        return gguf.open_file(path)
    tensor_files.refuse_pickle(path, start)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: give the folder that it is in, with its config.json")
    raise UserError(f"{path}: no model in a known format; give a Hugging Face folder or a .gguf file")


def _tokenizer_with_the_model(path: str, folder: Path | None, metadata: dict) -> Tokenizer | None:
    """The tokenizer in the model's folder or in a GGUF file's metadata, if there is one of a supported kind."""
    try:
        if folder and any((folder / name).exists() for name in TOKENIZER_FILES):
            return Tokenizer.load(folder)
        if "tokenizer.ggml.model" in metadata:
            return gguf_tokenizer.read(metadata, path)
    except UnsupportedError as problem:
        print(f"the tokenizer is left out: {problem}")
    return None
