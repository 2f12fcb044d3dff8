"""The files beside a vocabulary: transformers' settings, special tokens and chat template, read with care.

They come from anywhere, so each value is checked where it is read; what is wrong is a `UserError` that names the file.
"""

import json
import os
from pathlib import Path

from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.base.json_door import parse_json, read_file

MOST_BYTES = 1 << 27  # of one file; the largest tokenizer.json in use has 33 MB

# What transformers reads beside the model file; a folder made elsewhere keeps its own when it is loaded and saved.
COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def read_companions(folder: Path) -> dict[str, bytes]:
    """Contents of those of these files that a folder holds, by name. Raises `UserError` for what is no file."""
    paths = [folder / name for name in COMPANIONS]
    return {path.name: read_file(path, MOST_BYTES) for path in paths if os.path.lexists(path)}


def read_object(data: bytes, source: str) -> dict:
    """The JSON object in a file. Raises `UserError` naming `source` if it holds something else."""
    return Contents(parse_json(data, source), source).values


def to_json(value: dict) -> bytes:
    """A JSON file's contents, as this project writes them."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def special_pieces(files: dict[str, bytes], source: str) -> dict[str, str]:
    """The text of bos_token, eos_token, pad_token and unk_token, as far as the folder's files name them.

    files: as `read_companions` gives them; tokenizer_config.json counts more than special_tokens_map.json.
    """
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            named |= read_object(files[name], f"{source}: {name} beside it")
    pieces = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = named.get(key)
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


def added_pieces(files: dict[str, bytes], config: dict) -> dict[str, int]:
    """Pieces that the folder's settings add to the vocabulary, with their ids."""
    pieces = {}
    if "added_tokens.json" in files:
        pieces |= read_object(files["added_tokens.json"], "added_tokens.json beside the tokenizer")
    decoder = config.get("added_tokens_decoder", {})
    entries = decoder.items() if isinstance(decoder, dict) else ()
    for number, entry in entries:
        if isinstance(entry, dict) and str(number).isdecimal():
            pieces[entry.get("content")] = int(number)
    return {piece: i for piece, i in pieces.items() if isinstance(piece, str) and isinstance(i, int)}
