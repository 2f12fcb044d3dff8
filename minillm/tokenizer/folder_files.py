"""The files beside a vocabulary: transformers' settings, special tokens and chat template, read with care.

They come from anywhere, so each value is checked where it is read; what is wrong is a `UserError` that names the file.
"""

import contextlib
import functools
import json
import os
from pathlib import Path

from minillm.base.contents import Contents, is_of_kind
from minillm.base.errors import UserError
from minillm.base.json_door import parse_json, read_file

MOST_BYTES = 1 << 27  # of one file; the largest tokenizer.json in use has 33 MB
LARGE = 1 << 16  # bytes from which on a file is parsed once
LARGEST_ID = 1 << 24  # no vocabulary is as large, so that a damaged file cannot name any number

# What transformers reads beside the model file; a folder made elsewhere keeps its own when it is loaded and saved.
MODEL_CONFIG = "config.json"  # the model's, of which only the ids that end a text are read here
GENERATION_CONFIG = "generation_config.json"
COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPECIAL = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")  # of transformers, with rules of their own about spaces
PLAIN_CLASS = "PreTrainedTokenizerFast"  # without any


def read_companions(folder: Path) -> dict[str, bytes]:
    """Contents of those of these files that a folder holds, and of its config.json, by name.

    A Mistral model's tokenizer has the plain class, whatever its settings say: so transformers takes it, by the model's
    config.json, which does not go everywhere with the tokenizer. Raises `UserError` for what is no file.
    """
    paths = [folder / name for name in (*COMPANIONS, MODEL_CONFIG)]
    files = {path.name: read_file(path, MOST_BYTES) for path in paths if os.path.lexists(path)}
    if "tokenizer_config.json" in files and MODEL_CONFIG in files:
        settings = read_object(files["tokenizer_config.json"], f"{folder}/tokenizer_config.json")
        model = read_object(files[MODEL_CONFIG], f"{folder}/{MODEL_CONFIG}") if is_llama_class(settings) else {}
        if model.get("model_type") == "mistral":
            files["tokenizer_config.json"] = to_json(settings | {"tokenizer_class": PLAIN_CLASS})
    return files


def is_llama_class(settings: dict) -> bool:
    """Whether a tokenizer_config.json names transformers' class for Llama's or Code Llama's tokenizers."""
    return str(settings.get("tokenizer_class")).startswith(LLAMA_CLASSES)


def end_ids(files: dict[str, bytes], source: str) -> set[int]:
    """The ids that config.json and generation_config.json say a text ends with: eos_token_id, an id or a list of them.

    Raises `UserError` if one is no id.
    """
    ids: set[int] = set()
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        named = read_beside(files, name, source).get("eos_token_id")
        listed = named if isinstance(named, list) else [] if named is None else [named]
        wrong = [i for i in listed if not is_of_kind(i, int) or not 0 <= i < LARGEST_ID]
        if wrong:
            raise UserError(f"{source}: {name} beside it: damaged, eos_token_id holds {wrong[0]!r:.80}, which is no id")
        ids.update(listed)
    return ids


def read_object(data: bytes, source: str) -> dict:
    """The JSON object in a file. Raises `UserError` naming `source` if it holds something else.

    A large one, a tokenizer.json, is asked for several times while a folder is loaded, and parsed once. Names may be
    set in what is returned, but not what lies deeper.
    """
    if len(data) >= LARGE:
        with contextlib.suppress(UserError):  # said below, with its source
            return dict(_large_object(data))
    return Contents(parse_json(data, source), source).values


def read_beside(files: dict[str, bytes], name: str, source: str) -> dict:
    """The JSON object in one of the files beside a vocabulary, empty if there is none. source: the vocabulary's file.

    Raises as `read_object` does.
    """
    return read_object(files.get(name, b"{}"), f"{source}: {name} beside it")


@functools.lru_cache(maxsize=1)
def _large_object(data: bytes) -> dict:
    return Contents(parse_json(data, ""), "").values


def to_json(value: dict) -> bytes:
    """A JSON file's contents, as this project writes them."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def special_pieces(files: dict[str, bytes], source: str) -> dict[str, str]:
    """The text of bos_token, eos_token and the like, as far as the folder's files name them; also of those that it has
    names of its own for (`extra_special_tokens`), such as image_token.

    files: as `read_companions` gives them; tokenizer_config.json counts more than special_tokens_map.json.
    """
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        named |= read_beside(files, name, source)
    own = named.get("extra_special_tokens")  # else a list of pieces
    values = (own if isinstance(own, dict) else {}) | {key: named.get(key) for key in SPECIAL}
    pieces = {}
    for key, value in values.items():
        if isinstance(value, dict):  # {"content": "<s>", "lstrip": false, …}
            value = value.get("content", value)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{source}: tokenizer_config.json beside it: damaged, {key} is no text but {value!r:.80}")
        pieces[key] = value
    return pieces


def chat_template(files: dict[str, bytes], config: dict) -> str | None:
    """The Jinja text of a folder's chat template, None if it has none.

    It is the file chat_template.jinja, or `chat_template` in tokenizer_config.json: a text, or a list of named ones,
    of which the one named "default" is meant. Raises `UserError` if there are several and none has that name.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        if "default" not in named:
            names = ", ".join(map(str, named))
            raise UserError(f"tokenizer_config.json: of its chat templates ({names:.200}) none is named default")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"tokenizer_config.json: damaged, chat_template is no text but {template!r:.80}")
    return template or None


def refuse(folder: Path) -> None:
    """Raise `UserError` for a folder without a tokenizer that is read."""
    other = [name for name in ("vocab.json", "tekken.json") if (folder / name).exists()]
    if other:
        raise UserError(
            f"{folder}: its tokenizer is a {other[0]}, but only tokenizer.model (SentencePiece) and tokenizer.json "
            f"are read; {elsewhere(folder)}"
        )
    raise UserError(f"{folder}: holds no tokenizer.model; copy the one there that its model was trained with")


def elsewhere(folder: Path) -> str:
    """What can be done with a folder whose tokenizer is not read, in words."""
    return (
        "such a model can only be pretrained on, with ids made elsewhere: train_pretrain.py "
        f"--init_from {folder} --data FILE.bin --data_dtype uint32 --data_vocab_size N"
    )
