"""Text to token ids and back: SentencePiece BPE, special pieces, the chat templates.

A tokenizer is one file, `tokenizer.model`, in SentencePiece's format. Ours are trained so that nothing is lost:
no normalization, spaces kept, digits split, and byte pieces for every character that has no piece of its own.
Then `decode(encode(text)) == text` for any text. The ids of ours: unk 0, bos 1, eos 2, pad 3, the chat roles 4–6,
the 256 bytes, and the learnt pieces from 263 on.
"""

import codecs
import hashlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from minillm import UserError

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPACE_MARK = "▁"  # U+2581: how SentencePiece writes a space inside a piece
LONG_TEXT = 1 << 15  # characters; longer texts are encoded in stretches of this size

# What transformers reads beside the model file; kept as it was found when a foreign folder is loaded and saved.
COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# The same two templates as encode_chat, for transformers' apply_chat_template.
CHAT_JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIMPLE_JINJA = (
    "{% set ns = namespace(prompt=[]) %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ns.prompt | join('\\n') + bos_token + m['content'] + eos_token }}{% set ns.prompt = [] %}"
    "{% else %}{% set ns.prompt = ns.prompt + [m['content']] %}{% endif %}{% endfor %}"
    "{{ ns.prompt | join('\\n') }}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


class Tokenizer:
    """A SentencePiece model with its special ids.

    vocab_size, bos_id, eos_id, pad_id: int (pad falls back to eos where the model has none, bos likewise).
    sha256: hex digest of the model file, by which token bins and checkpoints know their tokenizer.
    """

    def __init__(self, model_bytes: bytes, source: str, companions: dict[str, bytes] | None = None):
        self._proto = _parse(model_bytes, source)
        self._companions = companions or {}
        self._model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size = len(self._proto.pieces)
        self._dummy_prefix = self._proto.normalizer_spec.add_dummy_prefix
        self._no_prefix = self._processor
        if self._dummy_prefix:  # a second reading of the model, for text that does not begin a sequence
            bare = proto.ModelProto.FromString(model_bytes)
            bare.normalizer_spec.add_dummy_prefix = False
            self._no_prefix = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())

        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{source}: the model has no end-of-text piece; train one with a tokenizer of ours")
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else self.eos_id
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        control = {p.piece: i for i, p in enumerate(self._proto.pieces) if p.type == p.CONTROL}
        self._roles = {role: control[piece] for role, piece in ROLES.items() if piece in control}

        self._table = [_piece_bytes(piece) for piece in self._proto.pieces]
        byte_ids = {self._table[i]: i for i, p in enumerate(self._proto.pieces) if p.type == p.BYTE}
        unknown = self._processor.unk_id()
        # SentencePiece takes the character ▁ for a space; only its bytes can stand for it.
        self._mark_ids = [byte_ids.get(bytes([b]), unknown) for b in SPACE_MARK.encode()]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a SentencePiece `.model` file, or the `tokenizer.model` of a folder.

        Raises UserError if there is none or it is damaged.
        """
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            model_bytes = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{file}: cannot read the tokenizer ({error.strerror}); give a .model file or its folder"
            ) from None
        beside = file.parent if file.name == "tokenizer.model" else Path("/nonexistent")
        companions = {n: (beside / n).read_bytes() for n in COMPANIONS if (beside / n).is_file()}
        return cls(model_bytes, str(file), companions)

    # ---------------------------------------------------------------- text → ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos; raises UserError on a lone surrogate."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text; `threads` of SentencePiece's own share the work."""
        return self._encode_with(self._processor, texts, threads)

    def _encode_with(self, processor, texts: list[str], threads: int = 1) -> list[list[int]]:
        odd = [i for i, text in enumerate(texts) if len(text) > LONG_TEXT or SPACE_MARK in text]
        plain = list(texts)
        for i in odd:
            plain[i] = ""
        try:
            rows = processor.encode(plain, num_threads=threads)
            for i in odd:
                rows[i] = self._encode_odd(processor, texts[i], threads)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            for text in texts:
                _refuse_surrogates(text)
            raise
        return rows

    def _encode_odd(self, processor, text: str, threads: int) -> list[int]:
        """A text that is long or holds the character ▁, stretch by stretch, with the same ids as at one go."""
        ids: list[int] = []
        for number, between in enumerate(text.split(SPACE_MARK)):
            if number:
                ids += self._mark_ids
            stretches = list(self._stretches(between))
            if number == 0:
                ids += processor.encode(stretches.pop(0))
            for row in self._no_prefix.encode(stretches, num_threads=threads):
                ids += row
        return ids

    def _stretches(self, text: str) -> Iterator[str]:
        """Cut where no piece could span the cut; after LONG_TEXT characters without such a place, anywhere."""
        start = 0
        while len(text) - start > LONG_TEXT:
            end = start + LONG_TEXT
            while end > start and text[end - 1 : end + 1] in self._joined_pairs:
                end -= 1
            end = end if end > start else start + LONG_TEXT
            yield text[start:end]
            start = end
        yield text[start:]

    @cached_property
    def _joined_pairs(self) -> set[str]:
        """Every two characters that stand side by side in some piece."""
        pieces = (p.piece.replace(SPACE_MARK, " ") for p in self._proto.pieces)
        return {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

    def encode_chat(
        self, messages: list[dict], *, template: str = "auto", add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them are to be learnt.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, …]; an assistant message with
            "learn": False is context only.
        template: "chat" is `<s>`, then for each message its role piece and its content, and `</s>` after an
            assistant's. "simple" is `prompt <s> answer </s>` turn by turn, what precedes an answer joined by
            newlines. "auto" takes "chat" if the model has the role pieces.
        add_generation_prompt: end with what an answer follows: the assistant piece, or `<s>`.

        Returns (ids, learn), of equal length: learn[i] is True where ids[i] belongs to an answer or is its eos.
        """
        template = self.resolve_template(template)
        contents = [_content(message) for message in messages]
        opener = [self.bos_id] if template == "chat" else []
        ids, learn = list(opener), [False] * len(opener)

        def add(tokens: list[int], learnt: bool = False) -> None:
            ids.extend(tokens)
            learn.extend([learnt] * len(tokens))

        def encode(text: str) -> list[int]:  # a dummy prefix only at the very start of the sequence
            return self._encode_with(self._no_prefix if ids else self._processor, [text])[0]

        prompt: list[str] = []
        for message, content in zip(messages, contents, strict=True):
            answer = message["role"] == "assistant"
            if template == "chat":
                add([self._roles[message["role"]]])
            elif answer:
                add([*encode("\n".join(prompt)), self.bos_id])
                prompt = []
            else:
                prompt.append(content)
                continue
            add([*encode(content), *([self.eos_id] if answer else [])], answer and message.get("learn", True))
        add(encode("\n".join(prompt)))
        if add_generation_prompt:
            add([self._roles["assistant"] if template == "chat" else self.bos_id])
        return ids, learn

    def resolve_template(self, template: str) -> str:
        """Which of "chat" and "simple" the name `template` ("auto", "chat", "simple") means for this model."""
        if template not in ("auto", "chat", "simple"):
            raise UserError(f"template {template!r}: choose auto, chat or simple")
        has_roles = len(self._roles) == len(ROLES)
        if template == "chat" and not has_roles:
            raise UserError("template 'chat': this tokenizer lacks the role pieces; choose simple or auto")
        return "chat" if template != "simple" and has_roles else "simple"

    # ---------------------------------------------------------------- ids → text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control pieces left out; bytes that are not UTF-8 become U+FFFD.

        A model that puts a dummy space before each text (Llama's) loses one leading space here, as in
        SentencePiece; `decode(encode(text)) == text` holds with it. StreamDecoder keeps that space.
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

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: int64 [vocab_size], 0 for control pieces."""
        return np.array([len(piece) for piece in self._table], dtype=np.int64)

    # ---------------------------------------------------------------- files

    def save(self, folder: str | Path, *, template: str | None = None) -> None:
        """Write tokenizer.model and what transformers' AutoTokenizer needs beside it.

        template: the chat template to record, "auto", "chat" or "simple"; None keeps a loaded folder's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.model": self._model_bytes, **self._companions}
        config = json.loads(files.get("tokenizer_config.json", b"{}")) or self._transformers_config()
        if template or "tokenizer_config.json" not in files:
            files.pop("chat_template.jinja", None)
            chat = self.resolve_template(template or "auto") == "chat"
            config["chat_template"] = CHAT_JINJA if chat else SIMPLE_JINJA
            files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def _transformers_config(self) -> dict:
        pieces = self._proto.pieces
        special = {
            str(i): {"content": p.piece, "special": p.type != p.USER_DEFINED, "normalized": False}
            | {"lstrip": False, "rstrip": False, "single_word": False}
            for i, p in enumerate(pieces)
            if p.type in (p.UNKNOWN, p.CONTROL, p.USER_DEFINED)
        }
        unknown = self._processor.unk_id()
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": self._dummy_prefix,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": pieces[self.bos_id].piece,
            "eos_token": pieces[self.eos_id].piece,
            "pad_token": pieces[self.pad_id].piece,
            "unk_token": pieces[unknown].piece,
            "added_tokens_decoder": special,
        }


class StreamDecoder:
    """Turns ids into text one by one, never showing part of a character.

    It decodes what follows a prompt, so a leading space is kept.
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


def _parse(model_bytes: bytes, source: str) -> proto.ModelProto:
    remedy = "it is no SentencePiece model, or damaged: copy or train it again"
    try:
        model = proto.ModelProto.FromString(model_bytes)
    except Exception:
        raise UserError(f"{source} ({len(model_bytes):,} bytes): {remedy}") from None
    # Protobuf reads a file cut between two fields without complaint; the specs come after the pieces.
    if not model.pieces or not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise UserError(f"{source} ({len(model_bytes):,} bytes): cut short; {remedy}")
    return model


def _piece_bytes(piece) -> bytes:
    if piece.type == piece.CONTROL:
        return b""
    if piece.type == piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # "<0x0A>"
    if piece.type == piece.UNKNOWN:
        return "\ufffd".encode()
    return piece.piece.replace(SPACE_MARK, " ").encode()


def _content(message: dict) -> str:
    if message.get("role") not in ROLES:
        raise UserError(f"message role {message.get('role')!r}: choose system, user or assistant")
    if not isinstance(message.get("content"), str):
        raise UserError(f"message content of role {message['role']}: a string is needed")
    return message["content"]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text, character {error.start}: the lone surrogate U+{ord(text[error.start]):04X} "
            "has no UTF-8 form; remove it or replace it by U+FFFD"
        ) from None


# -------------------------------------------------------------------- training


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_folder: str | Path,
    *,
    sample_bytes: int = 24 << 20,
    seed: int = 0,
) -> Tokenizer:
    """Learn a BPE vocabulary and save it in `out_folder`, with a readable `tokenizer.vocab` beside it.

    texts: any number of documents; at most about `sample_bytes` (UTF-8) of their lines, chosen evenly by `seed`,
        are kept in memory and learnt from.
    vocab_size: all pieces, the 263 special and byte pieces and printable ASCII included.

    Same texts and seed give the same file. Raises UserError when the text is too small for the vocabulary,
    naming the largest possible, or the vocabulary for the characters.
    """
    printable = "".join(map(chr, range(33, 127)))
    smallest = 263 + len(printable) + 3
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size}: at least {smallest} (bytes, ASCII and special pieces)")
    lines = _sample_lines(texts, sample_bytes, seed)
    if not lines:
        raise UserError("no text to train a tokenizer on: every document is empty")
    counts = Counter()
    for line in lines:
        counts.update(line)

    def train(size: int) -> bytes | int:
        """The model, or the largest size that SentencePiece thinks possible."""
        # At most half of what is left goes to single characters; the rare ones are spelt in bytes.
        common = counts.most_common((size - smallest) // 2 + 1)
        coverage = min(0.9995, sum(n for _, n in common) / counts.total())
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                character_coverage=coverage,
                required_chars=printable,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                pad_id=3,
                pad_piece="<pad>",
                control_symbols=list(ROLES.values()),
                max_sentence_length=4 * MAX_LINE + 1,
                num_threads=4,  # recorded in the file, so it must not depend on the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            limit = re.search(r"value <= (\d+)", str(error))
            if not limit:
                raise
            return int(limit[1])
        return model.getvalue()

    model = train(vocab_size)
    if isinstance(model, int):
        largest = model
        while isinstance(again := train(largest), int):
            largest = again
        raise UserError(
            f"vocab_size {vocab_size:,}: the text gives at most {largest:,} pieces; ask for fewer or add text"
        )
    tokenizer = Tokenizer(model, "trained model")
    tokenizer.save(out_folder)
    rows = (f"{i}\t{p.piece}\t{p.score:g}\n" for i, p in enumerate(tokenizer._proto.pieces))
    (Path(out_folder) / "tokenizer.vocab").write_text("".join(rows), encoding="utf-8")
    return tokenizer


MAX_LINE = 1000  # characters; SentencePiece would drop a line over 4,192 bytes, so longer ones are cut


def _sample_lines(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Lines of the texts, each kept with the same probability, halved whenever they exceed `limit` bytes."""
    draw = random.Random(seed).random
    kept: list[str] = []
    size, rate = 0, 1.0
    for text in texts:
        # ▁ would be taken for a space; a line with ▅, SentencePiece's own mark, would be dropped.
        for line in re.split("[\n▁▅]", text):
            for start in range(0, len(line), MAX_LINE):
                if rate == 1.0 or draw() < rate:
                    kept.append(line[start : start + MAX_LINE])
                    size += len(kept[-1].encode())
            if size > limit:
                kept = [line for line in kept if draw() < 0.5]
                size, rate = sum(len(line.encode()) for line in kept), rate / 2
    return kept
