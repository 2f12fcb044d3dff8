"""Text to token ids and back: special ids, and the files of a folder, for both kinds of vocabularies.

A tokenizer is one file, `tokenizer.model`, in SentencePiece's format (`sentencepiece_model`), or for some models of
others a `tokenizer.json` (`byte_bpe`). Ours are trained so that nothing is lost: no normalization, spaces kept, digits
split, and byte pieces for characters without a piece of their own. So `decode(encode(text)) == text` for any text. Our
ids: unk 0, bos 1, eos 2, pad 3, the chat roles 4–6, the 256 bytes, and the learnt pieces from 263 on.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.base.errors import UserError, naming_damage
from minillm.tokenizer import byte_bpe
from minillm.tokenizer import chat_template as chat_templates
from minillm.tokenizer.chat_template import JINJA, ROLES, TEMPLATES
from minillm.tokenizer.sentencepiece_model import SentencePieceModel

# What transformers reads beside the model file; a folder made elsewhere keeps its own when it is loaded and saved.
COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class Tokenizer:
    """A vocabulary with its special ids and the files beside it; this class: one of SentencePiece's.

    vocab_size, bos_id, eos_id, pad_id: int (a model without pad or bos uses eos for it).
    model: the SentencePieceModel. control: id of each control piece, which text is never encoded as.
    data: the model file. sha256: its hex digest, by which token bins and checkpoints identify their tokenizer.
    """

    def __init__(self, model_bytes: bytes, source: str, companions: dict[str, bytes] | None = None):
        self.model, self._companions = SentencePieceModel(model_bytes, source), companions or {}
        self._own_file, self.data = {"tokenizer.model": model_bytes}, model_bytes
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.vocab_size = len(self.model.proto.pieces)
        self._dummy_prefix = self.model.dummy_prefix
        processor = self.model.processor
        self.eos_id = processor.eos_id()
        if self.eos_id < 0:
            raise UserError(
                f"{source}: the model has no end-of-text piece; choose another, or train one (--train_tokenizer)"
            )
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else self.eos_id
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self.control, self._table = self.model.control, self.model.table

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a SentencePiece `.model` file, or a folder's `tokenizer.model`, else its `tokenizer.json`.

        A path to a tokenizer.json means its folder. Raises UserError if there is no
        tokenizer, or if it has another format or is damaged.
        """
        folder = Path(path).parent if Path(path).name == "tokenizer.json" else Path(path)
        file = folder / "tokenizer.model" if folder.is_dir() else folder
        if folder.is_dir() and not file.exists():
            if (folder / "tokenizer.json").exists():
                return _load_byte_level(folder)
            _refuse_folder(folder)
        try:
            model_bytes = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{file}: cannot read the tokenizer ({error.strerror}); give a .model file or its folder"
            ) from None
        beside = [file.parent / name for name in COMPANIONS] if file.name == "tokenizer.model" else []
        return cls(model_bytes, str(file), {path.name: path.read_bytes() for path in beside if path.is_file()})

    # ---------------------------------------------------------------- text → ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; raises UserError on a lone surrogate."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text; `threads` of SentencePiece's own share the work."""
        try:
            return self.model.encode_many(texts, threads)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            for text in texts:
                _refuse_surrogates(text)
            raise

    def encode_chat(
        self, messages: list[dict], *, template: str = "auto", add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them are to be learned.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]
        template: "chat" or "simple" (see `chat_templates`); "auto" takes "chat" if the model has the role pieces.
        add_generation_prompt: end with what precedes an answer: the assistant piece, or `<s>`.

        Returns (ids, learn), of equal length: learn[i] is True where ids[i] belongs to an answer or is its eos.
        """
        return chat_templates.encode(self, messages, self.resolve_template(template), add_generation_prompt)

    @cached_property
    def roles(self) -> dict[str, int]:
        """Id of the piece that opens a message of each role, as far as the model has them."""
        return {role: self.control[piece] for role, piece in ROLES.items() if piece in self.control}

    def resolve_template(self, template: str) -> str:
        """What `template` ("auto", "chat" or "simple") means for this model: "chat" or "simple"."""
        if template not in TEMPLATES:
            raise UserError(f"template {template!r}: choose auto, chat or simple")
        has_roles = len(self.roles) == len(ROLES)
        if template == "chat" and not has_roles:
            raise UserError("template 'chat': this tokenizer lacks the role pieces; choose simple or auto")
        return "chat" if template != "simple" and has_roles else "simple"

    # ---------------------------------------------------------------- ids → text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control pieces left out; bytes that are not UTF-8 become U+FFFD.

        For a model that puts a dummy space before each text (Llama's), one leading space is removed, as in
        SentencePiece, so that `decode(encode(text)) == text`. StreamDecoder keeps that space. A model that
        normalizes its text (T5's) gives back the normalized text.
        """
        data = b"".join(self._bytes_of(ids))
        if self._dummy_prefix and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def _bytes_of(self, ids: Iterable[int]) -> list[bytes]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(f"token id {wrong}: this tokenizer has ids 0 to {self.vocab_size - 1}")
        return [self._table[i] for i in ids]

    @property
    def id_dtype(self) -> np.dtype:
        """What token bins store ids in: the smaller of uint16 and uint32, little-endian, that holds them all."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def special_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, as config.json records them."""
        return {f"{name}_token_id": getattr(self, f"{name}_id") for name in ("bos", "eos", "pad")}

    def byte_lengths(self) -> np.ndarray:
        """Number of UTF-8 bytes that each id stands for: (vocab_size,) int64, 0 for control pieces."""
        return np.array([len(piece) for piece in self._table], dtype=np.int64)

    # ---------------------------------------------------------------- files

    def save(self, folder: str | Path, *, template: str | None = None) -> None:
        """Write tokenizer.model and what transformers' AutoTokenizer needs beside it.

        template: the chat template to record, "auto", "chat" or "simple"; None keeps a loaded folder's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self._own_file | (self._companions or self._own_companions)
        if template:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            config["chat_template"] = JINJA[self.resolve_template(template)]
            files["tokenizer_config.json"] = _json(config)
            files.pop("chat_template.jinja", None)
        if "tokenizer.model" not in files:  # an old one of the other kind would be loaded instead
            (folder / "tokenizer.model").unlink(missing_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    @property
    def config(self) -> dict:
        """What tokenizer_config.json says, as `save` writes it."""
        with naming_damage("tokenizer_config.json beside the tokenizer"):
            return dict(json.loads((self._companions or self._own_companions).get("tokenizer_config.json", b"{}")))

    @property
    def start_id(self) -> int:
        """The id before a text's first token: bos if the model was trained so, else eos, which ends the text before."""
        config = self.config
        llama = str(config.get("tokenizer_class")).startswith("Llama")  # this class adds bos unless told not to
        return self.bos_id if config.get("add_bos_token", llama) else self.eos_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that transformers uses, if there is one."""
        beside = self._companions.get("chat_template.jinja")
        return beside.decode() if beside else self.config.get("chat_template")

    def with_settings(self, *, add_bos: bool, chat_template: str | None = None) -> "Tokenizer":
        """A copy whose files say whether bos comes before each text, and name another chat template if one is given."""
        files = dict(self._companions or self._own_companions)
        config = self.config | {"add_bos_token": add_bos} | ({"chat_template": chat_template} if chat_template else {})
        files["tokenizer_config.json"] = _json(config)
        if "tokenizer.json" in files:
            first = byte_bpe.begin_with(self.model.proto.pieces[self.bos_id].piece, self.bos_id) if add_bos else None
            files["tokenizer.json"] = _json(json.loads(files["tokenizer.json"]) | {"post_processor": first})
        return Tokenizer(self.model.data, "the new vocabulary", files)

    def with_chat_template_of(self, other: "Tokenizer") -> "Tokenizer":
        """A copy whose files have `other`'s chat template and its rule about bos."""
        config = json.loads(self._own_companions["tokenizer_config.json"])
        config |= {key: value for key, value in other.config.items() if key == "chat_template"}
        config["add_bos_token"] = other.start_id != other.eos_id
        own = self._own_companions | {"tokenizer_config.json": _json(config)}
        kept = {name: data for name, data in other._companions.items() if name == "chat_template.jinja"}
        return Tokenizer(self.model.data, "the new vocabulary", own | kept)

    @cached_property
    def _own_companions(self) -> dict[str, bytes]:
        """The files that transformers needs; no `tokenizer.json` for a model that is not BPE, such as T5's."""
        config = self.model.transformers_config({"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id})
        config["chat_template"] = JINJA[self.resolve_template("auto")]
        files = {"tokenizer_config.json": _json(config)}
        spec = self.model.proto.trainer_spec
        if spec.model_type == spec.BPE:
            files["tokenizer.json"] = _json(self.model.tokenizers_file())
        return files


class ByteLevelTokenizer(Tokenizer):
    """A byte-level BPE in a `tokenizer.json`, in place of a SentencePiece model (see `byte_bpe`).

    companions: the files of its folder. bpe: the `ByteBPE`. Raises UserError for a kind that is not supported, or one
    without an end-of-text piece.
    """

    def __init__(self, companions: dict[str, bytes], source: str):
        self._own_file, self._companions, self._source = {}, companions, source
        self.bpe, self.control = byte_bpe.read(companions["tokenizer.json"], source)
        self.data, self.sha256 = companions["tokenizer.json"], hashlib.sha256(companions["tokenizer.json"]).hexdigest()
        ids = self.bpe.ids | self.bpe.whole | self.control
        with naming_damage(source):
            config = json.loads(companions.get("special_tokens_map.json", b"{}")) | self.config
            named = {role: config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
            pieces = {role: name["content"] if isinstance(name, dict) else name for role, name in named.items()}
        if pieces["eos"] not in ids:
            raise UserError(f"{source}: the tokenizer_config.json beside it names no end-of-text piece (eos_token)")
        self.eos_id = ids[pieces["eos"]]
        self.bos_id, self.pad_id = (ids.get(pieces[role], self.eos_id) for role in ("bos", "pad"))
        self.vocab_size = max(ids.values()) + 1
        self._dummy_prefix = False
        table = self.bpe.bytes_of() | dict.fromkeys(self.control.values(), b"")
        self._table = [table.get(i, b"") for i in range(self.vocab_size)]

    @property
    def model(self):
        raise UserError(f"{self._source}: a byte-level BPE; this needs a SentencePiece model, a tokenizer.model")

    def with_settings(self, *, add_bos: bool, chat_template: str | None = None) -> "Tokenizer":
        """Refused: the settings are part of tokenizer.json, which is this tokenizer's identity."""
        own, wrap = ("eos", "eos") if add_bos else ("bos", "bos_eos")
        raise UserError(f"{self._source}: a byte-level BPE stays as it is; its texts begin after {own}: --wrap {wrap}")

    def encode_many(self, texts: list[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text; `threads` has no effect."""
        for text in texts:
            _refuse_surrogates(text)
        return [self.bpe.encode(text) for text in texts]


class StreamDecoder:
    """Turns ids into text one by one, never showing part of a character.

    It decodes the continuation of a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is still short of bytes."""
        return self._utf8.decode(self._tokenizer._bytes_of([token_id])[0])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got all its bytes."""
        return self._utf8.decode(b"", final=True)


def _load_byte_level(folder: Path) -> "ByteLevelTokenizer":
    beside = [folder / name for name in COMPANIONS]
    try:
        return ByteLevelTokenizer({f.name: f.read_bytes() for f in beside if f.is_file()}, f"{folder}/tokenizer.json")
    except UserError as problem:
        raise type(problem)(f"{problem}; {_elsewhere(folder)}") from None


def _refuse_folder(folder: Path) -> None:
    other = [name for name in ("vocab.json", "tekken.json") if (folder / name).exists()]
    if other:
        raise UserError(
            f"{folder}: its tokenizer is a {other[0]}, but only tokenizer.model (SentencePiece) and tokenizer.json "
            f"(byte-level BPE) are read; {_elsewhere(folder)}"
        )
    raise UserError(f"{folder}: holds no tokenizer.model; copy the one there that its model was trained with")


def _elsewhere(folder: Path) -> str:
    return (
        "such a model can only be pretrained on, with ids made elsewhere: train_pretrain.py "
        f"--init_from {folder} --data FILE.bin --data_dtype uint32 --data_vocab_size N"
    )


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text, character {error.start}: the lone surrogate U+{ord(text[error.start]):04X} "
            "has no UTF-8 form; remove it or replace it by U+FFFD"
        ) from None
