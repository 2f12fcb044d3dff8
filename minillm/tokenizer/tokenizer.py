"""Text to token ids and back: special ids, and the files of a folder, for both kinds of vocabularies.

A tokenizer is one file: `tokenizer.model`, in SentencePiece's format (`sentencepiece_model`), or for many models of
others a `tokenizer.json` (`tokenizers_model`). Ours are trained so that nothing is lost: no normalization, spaces kept,
digits split, and byte pieces for characters without a piece of their own. So `decode(encode(text)) == text` for any
text. Our ids: unk 0, bos 1, eos 2, pad 3, the chat roles 4–6, the 256 bytes, and the learnt pieces from 263 on.
"""

import hashlib
import importlib.util
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from minillm.base.errors import UserError
from minillm.base.files import write_file
from minillm.base.json_door import read_file
from minillm.tokenizer import added_tokens, around_text, byte_bpe, chat_template, folder_files, jinja_template
from minillm.tokenizer.chat_template import JINJA, ROLES
from minillm.tokenizer.folder_files import read_beside, read_object, to_json
from minillm.tokenizer.sentencepiece_model import SPACE_MARK, SentencePieceModel, either_of
from minillm.tokenizer.tokenizers_model import TokenizersModel

AFTER_EOS = "documents_begin_after_eos"  # our key in tokenizer_config.json: see `Tokenizer.begins_after_eos`
PROBES = ("The cat sat on 42 mats.", "a  b\n\n c\t", "x = f(y)[0]; # é", "你好，世界", "Ｆ①ﬁ e\u0301 😀", " the")


class Tokenizer:
    """A vocabulary with its special ids and the files beside it; this class: one of SentencePiece's.

    vocab_size, bos_id, eos_id, pad_id: int (a model without pad or bos uses eos for it). Tokens that the folder adds
    to its vocabulary are pieces like all others. begins_with_bos: whether transformers puts bos before each text.
    model: the SentencePieceModel; pieces: the model of either kind. control: id of each control piece, which no text is
    encoded as. files: the folder's, by name.
    data: the model file. sha256: its hex digest, by which token bins and checkpoints identify their tokenizer.
    """

    def __init__(self, model_bytes: bytes, source: str, companions: dict[str, bytes] | None = None):
        self.model = added_tokens.open_model(model_bytes, companions or {}, source)
        self._own_file = {"tokenizer.model": self.model.data}
        self._hold(self.model, source, companions or {})
        processor = self.model.processor
        self._name_special({"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()})

    def _hold(self, pieces: SentencePieceModel | TokenizersModel, source: str, companions: dict[str, bytes]) -> None:
        """Take over what both kinds of vocabularies have in common."""
        self.pieces = pieces
        self._source = source
        self._companions = {name: data for name, data in companions.items() if name in folder_files.COMPANIONS}
        self.files = companions  # with the model's config.json
        self._settings = read_beside(companions, "tokenizer_config.json", source)
        self.data = pieces.data
        self.sha256 = hashlib.sha256(pieces.data).hexdigest()
        self.vocab_size = pieces.vocab_size
        self.control = pieces.control

    def _name_special(self, of_model: dict[str, int]) -> None:
        """Set bos_id, eos_id and pad_id to what the folder names, else to what the model does (negative: none), and see
        what texts begin with. Raises UserError where a text has no end.
        """
        named = folder_files.special_pieces(self._companions, self._source)
        ids: dict[str, int | None] = {}
        for role in ("bos", "eos", "pad"):
            if (piece := named.get(f"{role}_token")) is not None:
                ids[role] = self.pieces.id_of(piece)
            else:
                ids[role] = of_model[role] if of_model.get(role, -1) >= 0 else None
        if ids["eos"] is None:
            piece = named.get("eos_token")
            what = f"its end-of-text piece {piece!r:.80} is no piece of it" if piece else "no end-of-text piece"
            raise UserError(f"{self._source}: {what} (eos_token); choose another tokenizer, or train one")
        self.eos_id = ids["eos"]
        self.pad_id = self.eos_id if ids["pad"] is None else ids["pad"]
        self.bos_id = self.eos_id if ids["bos"] is None else ids["bos"]

        first = ids["bos"]  # of a new vocabulary, beside which there are no files yet
        if self._companions:
            first = around_text.first_id(self.files, self._settings, ids["bos"], self._source)
        self.begins_with_bos = first is not None
        if self.begins_with_bos:
            self.bos_id = first
            if first not in self.control.values():
                raise UserError(f"{self._source}: it puts the id {first} before each text, which is no control piece")

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
                return _load_json(folder)
            folder_files.refuse(folder)
        try:
            model_bytes = read_file(file, folder_files.MOST_BYTES)
        except UserError as problem:
            raise UserError(f"cannot read the tokenizer ({problem}); give a .model file or its folder") from None
        companions = {}
        if file.name == "tokenizer.model":  # without settings beside it, it is what transformers then makes of it
            companions = {"tokenizer_config.json": b"{}"} | folder_files.read_companions(file.parent)
        tokenizer = cls(model_bytes, str(file), companions)
        _compare_with_json(tokenizer, companions, str(file))
        return tokenizer

    # ---------------------------------------------------------------- text → ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; raises UserError on a lone surrogate."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text; `threads` share the work (see the models of the two kinds)."""
        try:
            return self.pieces.encode_many(texts, threads)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            for text in texts:
                _refuse_surrogates(text)
            raise

    def encode_rendered(self, text: str, marks: dict[int, str]) -> list[int]:
        """Ids of a filled-in chat template, in which control pieces count, as in transformers.

        marks: what undoes the marks in what looks like a control piece and came from a message (`mark_control`).
        """
        pieces = self.control | self.model.whole
        parts = either_of(pieces).split(text)
        return self.model.encode_parts([part if part in pieces else part.translate(marks) for part in parts], pieces)

    @cached_property
    def control_pattern(self) -> re.Pattern:
        """Matches any control piece; `split` keeps what it matched."""
        return either_of(self.control)

    # ---------------------------------------------------------------- conversations

    def encode_chat(
        self, messages: list[dict], *, template: str = "auto", add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them are to be learned.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]; "learn": False in an answer that is
        only read.
        template: a name in `chat_template.TEMPLATES`; "auto" takes the folder's own chat template if it has one, else
        "chat" if the model has the role pieces, else "simple".
        add_generation_prompt: end with what precedes an answer: the assistant piece, or `<s>`.

        Returns (ids, learn), of equal length: learn[i] is True where ids[i] belongs to an answer or is the piece that
        ends it. A prompt by a rendered template (`jinja_template`) has nothing to learn.
        Raises UserError if the template cannot write this conversation.
        """
        return chat_template.encode(self, messages, template, add_generation_prompt)

    def stop_ids(self, template: str = "auto") -> list[int]:
        """Ids at which an answer ends: `end_ids`, and what the template writes after an answer."""
        return chat_template.stop_ids(self, template)

    def resolve_template(self, template: str) -> str:
        """What `template` means for this folder (see `chat_template.resolve`): the name that a run records."""
        return chat_template.resolve(self, template)

    @cached_property
    def roles(self) -> dict[str, int]:
        """Id of the piece that opens a message of each role, as far as the model has them."""
        return {role: self.control[piece] for role, piece in ROLES.items() if piece in self.control}

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids at which any text ends: eos, and what config.json and generation_config.json name beside it."""
        return [self.eos_id, *sorted(folder_files.end_ids(self.files, self._source) - {self.eos_id})]

    @cached_property
    def special_pieces(self) -> dict[str, str]:
        """The text of bos_token, eos_token, pad_token and unk_token, by which a chat template writes them."""
        model = self.model.processor
        ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
        of_model = {f"{role}_token": self.model.piece_of(i) for role, i in ids.items() if i >= 0}
        said = {name for name in of_model if name in self._settings}  # perhaps that there is none
        named = folder_files.special_pieces(self._companions, self._source)
        return {name: piece for name, piece in of_model.items() if name not in said} | named

    @property
    def identity(self) -> str:
        """Hex digest of all that `encode_chat` depends on: the files, and the day if a template may tell it."""
        digest = hashlib.sha256(repr([self.data, sorted(self.files.items())]).encode())
        if any(b"strftime_now" in data for data in self.files.values()):
            digest.update(jinja_template.strftime_now("%Y-%m-%d").encode())
        return digest.hexdigest()

    @property
    def parts_are_independent(self) -> bool:
        """Whether text beside a control piece is encoded as it is alone, so that templates can be written in ids."""
        return self.pieces.parts_are_independent

    # ---------------------------------------------------------------- ids → text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control pieces left out; bytes that are not UTF-8 become U+FFFD.

        An id beyond the vocabulary, which a model with more rows may draw, is shown as `<id 777>`.

        For a model that puts a dummy space before each text (Llama's), one leading space is removed, as in
        SentencePiece, so that `decode(encode(text)) == text`. StreamDecoder keeps that space. A model that
        normalizes its text (T5's) gives back the normalized text.
        """
        data = b"".join(self.bytes_of(ids))
        if self.pieces.dummy_prefix and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id's piece, where the vocabulary has a table of them."""
        table = self.pieces.table
        return [table[i] if i < self.vocab_size else beyond(i).encode() for i in _checked(ids)]

    @property
    def id_dtype(self) -> np.dtype:
        """What token bins store ids in: the smaller of uint16 and uint32, little-endian, that holds them all."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def special_ids(self) -> dict[str, int | list[int]]:
        """bos_token_id, eos_token_id (a list if there are several) and pad_token_id, as config.json records them."""
        ends = self.end_ids if len(self.end_ids) > 1 else self.eos_id
        return {"bos_token_id": self.bos_id, "eos_token_id": ends, "pad_token_id": self.pad_id}

    def byte_lengths(self) -> np.ndarray:
        """Number of UTF-8 bytes that each id stands for: (vocab_size,) int64, 0 for control pieces.

        Raises UserError if the bytes of a text's ids are not those of the text, so that no sum of them is right.
        """
        reason = self.pieces.unfaithful
        if self.pieces.dummy_prefix and not reason:
            reason = "it puts a space before a text"
        if reason:
            raise UserError(f"{self._source}: its ids stand for no fixed number of bytes ({reason})")
        return np.array([len(piece) for piece in self.pieces.table], dtype=np.int64)

    # ---------------------------------------------------------------- files

    def save(self, folder: str | Path, *, template: str | None = None) -> None:
        """Write tokenizer.model and what transformers' AutoTokenizer needs beside it.

        template: the chat template to record, a name in `chat_template.TEMPLATES`; None and a folder's own keep it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self._own_file | self._beside
        name = self.resolve_template(template) if template else None
        if name in JINJA:
            template_text = chat_template.text_of(self, name)
            files["tokenizer_config.json"] = to_json(self.config | {"chat_template": template_text})
            files.pop("chat_template.jinja", None)
        if len(self.end_ids) > 1 and folder_files.end_ids(self._companions, self._source) != set(self.end_ids):
            files[folder_files.GENERATION_CONFIG] = to_json(self.generation_config | {"eos_token_id": self.end_ids})
        if "tokenizer.model" not in files:  # an old one of the other kind would be loaded instead
            (folder / "tokenizer.model").unlink(missing_ok=True)
        for file_name, data in files.items():  # never through a link that lies in the folder
            write_file(folder / file_name, partial(_write_bytes, data))

    @property
    def _beside(self) -> dict[str, bytes]:
        """The files beside the vocabulary, as `save` writes them."""
        is_described = self._companions.keys() - {folder_files.GENERATION_CONFIG}
        return self._companions if is_described else self.own_companions | self._companions

    @cached_property
    def config(self) -> dict:
        """What tokenizer_config.json says, as `save` writes it."""
        return read_beside(self._beside, "tokenizer_config.json", self._source)

    @cached_property
    def begins_after_eos(self) -> bool:
        """Whether the model was trained here on documents without bos (`--wrap eos`), which begin after eos.

        tokenizer_config.json says so.
        """
        return self.config.get(AFTER_EOS) is True

    @property
    def start_id(self) -> int:
        """The id before a document's first token: bos if texts begin with it, else eos, which ends the text before."""
        return self.bos_id if self.begins_with_bos else self.eos_id

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a text to be continued: those of transformers' `tokenizer(text)`.

        Where documents begin after eos (`begins_after_eos`), that eos comes first; transformers puts none there.
        An empty text gives the id that a new text begins after.
        """
        ids = self.encode(text)
        if self.begins_with_bos or self.begins_after_eos or not ids:
            return [self.start_id, *ids]
        return ids

    @property
    def generation_config(self) -> dict:
        """What generation_config.json says; empty if there is none."""
        return read_beside(self._companions, folder_files.GENERATION_CONFIG, self._source)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that transformers uses, if there is one."""
        return folder_files.chat_template(self._beside, self.config)

    def with_settings(
        self,
        *,
        add_bos: bool,
        after_eos: bool = False,
        chat_template: str | None = None,
        named: dict[str, str] | None = None,
        ends: list[int] | None = None,
    ) -> "Tokenizer":
        """A copy whose files say how texts begin and end, and name another chat template if one is given.

        add_bos: with bos, also for transformers. after_eos: see `begins_after_eos`. named: pieces such as eos_token.
        ends: the ids that end a text.
        """
        files = self.files | self._beside
        config = self.config | {"add_bos_token": add_bos, AFTER_EOS: after_eos} | (named or {})
        if chat_template:
            config["chat_template"] = chat_template
        files["tokenizer_config.json"] = to_json(config)
        if ends and len(ends) > 1:
            files[folder_files.GENERATION_CONFIG] = to_json(self.generation_config | {"eos_token_id": ends})
        if "tokenizer.json" in files:
            described = read_beside(files, "tokenizer.json", self._source)
            files["tokenizer.json"] = to_json(self._beginning(described, add_bos))
        return Tokenizer(self.model.data, "the new vocabulary", files)

    def _beginning(self, described: dict, add_bos: bool) -> dict:
        """A tokenizer.json whose texts begin with bos, or with nothing."""
        first = byte_bpe.begin_with(self.model.piece_of(self.bos_id), self.bos_id) if add_bos else None
        return described | {"post_processor": first}

    @cached_property
    def own_companions(self) -> dict[str, bytes]:
        """The files that transformers needs; no `tokenizer.json` for a model that is not BPE, such as T5's."""
        config = self.model.transformers_config({"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id})
        config |= {AFTER_EOS: False, "chat_template": chat_template.text_of(self, chat_template.usual(self))}
        files = {"tokenizer_config.json": to_json(config)}
        spec = self.model.proto.trainer_spec
        if spec.model_type == spec.BPE:
            described = self.model.tokenizers_file()
            files["tokenizer.json"] = to_json(self._beginning(described, config["add_bos_token"]))
        return files


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` in place of a SentencePiece model, of any kind that the `tokenizers` library reads.

    companions: the files of its folder. Raises UserError for a file that the library does
    not read, or one without an end-of-text piece.
    """

    def __init__(self, companions: dict[str, bytes], source: str):
        self._own_file = {}
        pieces = added_tokens.open_json(companions, source)
        self._hold(pieces, source, companions | {"tokenizer.json": pieces.data})
        self._name_special({})

    @cached_property
    def special_pieces(self) -> dict[str, str]:
        """The text of bos_token, eos_token and the like, as far as the folder names them."""
        return folder_files.special_pieces(self._companions, self._source)

    @property
    def model(self):
        raise UserError(f"{self._source}: a tokenizer.json; this needs a SentencePiece model, a tokenizer.model")

    @cached_property
    def bpe(self) -> byte_bpe.ByteBPE:
        """The vocabulary as GGUF describes it; raises UnsupportedError if it is of another kind than byte-level BPE."""
        return byte_bpe.read(read_object(self.data, self._source), self._source)

    def with_settings(self, *, add_bos: bool, **_) -> "Tokenizer":
        """Refused: the settings are part of tokenizer.json, which is this tokenizer's identity."""
        own, wrap = ("without bos", "eos") if add_bos else ("with bos", "bos_eos")
        raise UserError(f"{self._source}: a tokenizer.json stays as it is, and its texts begin {own}: --wrap {wrap}")

    def encode_rendered(self, text: str, marks: dict[int, str]) -> list[int]:
        """Ids of a filled-in chat template (see `Tokenizer.encode_rendered`)."""
        if text.translate(marks) == text:
            ids = self.pieces.encode_rendered(text)
            # a normalizer may make a control piece of other letters, such as <|IM_END|>
            written = Counter(self.control[piece] for piece in self.control_pattern.findall(text))
            found = Counter(ids)
            if all(found[i] == written[i] for i in self.pieces.normalized):
                return ids
        if not self.pieces.parts_are_independent:
            raise UserError(f"{self._source}: a message holds the text of a control piece, which cannot be kept apart")
        ids: list[int] = []
        for part in self.control_pattern.split(text):
            ids += [self.control[part]] if part in self.control else self.encode(part.translate(marks))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control pieces left out (see `Tokenizer.decode`)."""
        if self.pieces.table is not None:
            return super().decode(ids)
        text = ""
        for is_known, group in itertools.groupby(_checked(ids), lambda i: i < self.vocab_size):
            some = list(group)
            text += self.pieces.decode(some) if is_known else "".join(map(beyond, some))
        return text


def beyond(i: int) -> str:
    """How an id beyond the vocabulary is shown."""
    return f"<id {i}>"


def _checked(ids: Iterable[int]) -> list[int]:
    """These ids as a list of int. Raises `UserError` for a negative one."""
    ids = [int(i) for i in ids]
    if ids and min(ids) < 0:
        raise UserError(f"token id {min(ids)}: below 0")
    return ids


def _write_bytes(data: bytes, file: Path) -> None:
    file.write_bytes(data)


def _load_json(folder: Path) -> JsonTokenizer:
    try:
        return JsonTokenizer(folder_files.read_companions(folder), f"{folder}/tokenizer.json")
    except UserError as problem:
        raise type(problem)(f"{problem}; {folder_files.elsewhere(folder)}") from None


def _compare_with_json(tokenizer: Tokenizer, files: dict[str, bytes], source: str) -> None:
    """Raise `UserError` if a tokenizer.json beside the model cuts text otherwise: transformers takes that one.

    The texts are a few usual ones, and the pieces learnt last: what another training would have learnt otherwise.
    """
    if "tokenizer.json" not in files or importlib.util.find_spec("tokenizers") is None:
        return
    pieces = [piece.piece for piece in tokenizer.model.proto.pieces if piece.type == piece.NORMAL]
    texts = [*PROBES, " ".join(pieces[-100:]).replace(SPACE_MARK, " ").strip()]
    there = added_tokens.open_json(files, f"{source}: tokenizer.json beside it")
    for text, ids in zip(texts, there.encode_many(texts), strict=True):
        if ids != tokenizer.encode(text):
            raise UserError(
                f"{source}: it and the tokenizer.json beside it cut {text[:40]!r} differently, and transformers takes "
                "tokenizer.json: remove the one that the model was not trained with"
            )


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text, character {error.start}: the lone surrogate U+{ord(text[error.start]):04X} "
            "has no UTF-8 form; remove it or replace it by U+FFFD"
        ) from None
