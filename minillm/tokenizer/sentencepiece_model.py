"""A SentencePiece model, the file `tokenizer.model`: encoding with it, and converting it for transformers.

Nothing of a text is lost here: the character ▁, which SentencePiece takes for a space, is encoded as its bytes. A long
text is encoded in stretches, so that memory stays small, with the same ids as in one piece.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from minillm.base.errors import UserError

SPACE_MARK = "▁"  # U+2581: how SentencePiece writes a space inside a piece
STRETCHES = 64  # that are encoded at a time
LONG_TEXT = 1 << 15  # characters; longer texts are encoded in stretches of this size


@dataclass(frozen=True)
class Space:
    """Whether a space is put before a text (Llama's dummy prefix); before each part of it that follows an added token;
    and whether a text that begins with a space is spared it.
    """

    before: bool
    each_part: bool
    spared: bool


class SentencePieceModel:
    """The pieces of a model file, and encoding with them.

    proto: the parsed file. processor: SentencePiece's processor; no_prefix: another one, for a text that does not begin
    a sequence. dummy_prefix: whether a space is put before each text; space: the rule in full. control: id of each
    control piece, which text is never encoded as. table: the bytes that each id stands for. rewrites: how it changes
    texts first, or None. unfaithful: why the bytes of a text's ids are not the bytes of the text, or None if they are.

    A folder's settings may add to the rules (`added_tokens.open_model`): whole, the tokens that are cut out of a text
    before anything else, with their ids; eats_spaces, the tokens that take the spaces on their left or right with them.

    Raises UserError if the file is not such a model, or damaged.
    """

    def __init__(self, data: bytes, source: str):
        self.data = data
        self.proto = parse(data, source)
        self.vocab_size = len(self.proto.pieces)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:  # two pieces alike, or an empty one
            raise UserError(f"{source}: SentencePiece refuses the model ({error}); train or merge it again") from None
        self.whole: dict[str, int] = {}
        self.eats_spaces: dict[str, set[str]] = {"lstrip": set(), "rstrip": set()}
        # A second processor for what does not begin a text, where the model puts a space before each text.
        self.dummy_prefix = self.proto.normalizer_spec.add_dummy_prefix
        self.space = Space(self.dummy_prefix, each_part=True, spared=False)
        self.no_prefix = self.processor
        if self.dummy_prefix:
            bare = proto.ModelProto.FromString(data)
            bare.normalizer_spec.add_dummy_prefix = False
            self.no_prefix = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
        self.control = {p.piece: i for i, p in enumerate(self.proto.pieces) if p.type == p.CONTROL}
        self.table = [_piece_bytes(piece) for piece in self.proto.pieces]
        self.rewrites = _rewriting(self.proto)
        self.unfaithful = self.rewrites
        if not self.rewrites and not self.proto.trainer_spec.byte_fallback:
            self.unfaithful = "characters without a piece are lost"
        byte_ids = {self.table[i]: i for i, p in enumerate(self.proto.pieces) if p.type == p.BYTE}
        unknown = self.processor.unk_id()
        # SentencePiece takes the character ▁ for a space; only its bytes can stand for it.
        self._mark_ids = [byte_ids.get(bytes([b]), unknown) for b in SPACE_MARK.encode()]

    # ---------------------------------------------------------------- text → ids

    def encode_many(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text; `threads` of SentencePiece's own share the work."""
        if not self.whole:
            return self._encode_unbroken(texts, threads)
        # Texts that hold a token to be cut out are encoded one by one; empty texts keep their places.
        pattern = either_of(self.whole)
        parts = {i: pattern.split(text) for i, text in enumerate(texts) if pattern.search(text)}
        rows = self._encode_unbroken(["" if i in parts else text for i, text in enumerate(texts)], threads)
        for i in parts:
            rows[i] = self.encode_parts(parts[i], self.whole)
        return rows

    def encode_parts(self, parts: list[str], ids_of: dict[str, int]) -> list[int]:
        """Ids of a text in parts: text, token, text, … ids_of: of the tokens."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(ids_of[part])
                continue
            # some tokens take the spaces beside them with them
            if number and parts[number - 1] in self.eats_spaces["rstrip"]:
                part = part.lstrip()
            if number + 1 < len(parts) and parts[number + 1] in self.eats_spaces["lstrip"]:
                part = part.rstrip()
            if part and (number == 0 or self.space.each_part):
                ids += self._encode_unbroken([part], 1)[0]
            elif part:
                ids += self._encode_odd(part, self.no_prefix, threads=1)
        return ids

    def _encode_unbroken(self, texts: list[str], threads: int) -> list[list[int]]:
        """As `encode_many`, no token being cut out first."""
        # Long texts and those with ▁ are encoded one by one; empty texts keep their places.
        odd = [
            i for i, text in enumerate(texts) if len(text) > LONG_TEXT or SPACE_MARK in text or self._is_spared(text)
        ]
        plain = list(texts)
        for i in odd:
            plain[i] = ""
        if threads == 1 or len(plain) == 1:
            # Given a list SentencePiece starts threads, which for one text takes ten times as long as encoding it.
            rows = [self.processor.encode(text) for text in plain]
        else:
            rows = self.processor.encode(plain, num_threads=threads)
        for i in odd:
            first = self.no_prefix if self._is_spared(texts[i]) else self.processor
            rows[i] = self._encode_odd(texts[i], first, threads)
        return rows

    def _is_spared(self, text: str) -> bool:
        return self.space.spared and text.startswith(" ")

    def encode_array(self, text: str, dtype: np.dtype, threads: int = 1) -> np.ndarray:
        """Ids of one text, (n,). Of a long text a list of Python's numbers would take ten times the memory."""
        if self.whole and either_of(self.whole).search(text):
            return np.array(self.encode_many([text])[0], dtype)
        first = self.no_prefix if self._is_spared(text) else self.processor
        return np.concatenate([np.array(row, dtype) for row in self._rows_of(text, first, threads)])

    def _encode_odd(self, text: str, first: sentencepiece.SentencePieceProcessor, threads: int) -> list[int]:
        """Encode a text that is long or contains ▁ (see `_rows_of`)."""
        return [i for row in self._rows_of(text, first, threads) for i in row]

    def _rows_of(self, text: str, first: sentencepiece.SentencePieceProcessor, threads: int) -> Iterator[list[int]]:
        """The ids of a text stretch by stretch, the same as in one piece; only so many stretches are in memory.

        first: the processor for the first stretch, which may put a space before it.
        """
        for number, between in enumerate(text.split(SPACE_MARK)):
            stretches = self._stretches(between)
            if number == 0:
                yield first.encode(next(stretches))
            else:
                yield self._mark_ids
            while some := list(islice(stretches, STRETCHES)):
                if len(some) > 1:
                    yield from self.no_prefix.encode(some, num_threads=threads)
                elif some[0]:  # given a list SentencePiece starts threads
                    yield self.no_prefix.encode(some[0])

    def _stretches(self, text: str) -> Iterator[str]:
        """Cut a text where no piece can span the cut; in LONG_TEXT characters without such a place, anywhere."""
        start = 0
        while len(text) - start > LONG_TEXT:
            end = start + LONG_TEXT
            while end > start and text[end - 1 : end + 1] in self._joined_pairs:
                end -= 1
            if end == start:
                end = start + LONG_TEXT
            yield text[start:end]
            start = end
        yield text[start:]

    @cached_property
    def _joined_pairs(self) -> set[str]:
        """Every two characters that stand side by side in some piece."""
        pieces = (p.piece.replace(SPACE_MARK, " ") for p in self.proto.pieces)
        return {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

    # ---------------------------------------------------------------- files of transformers

    def transformers_config(self, special: dict[str, int]) -> dict:
        """Contents of tokenizer_config.json. special: ids of "bos", "eos" and "pad", which the model may lack."""
        names = special | {"unk": self.processor.unk_id()}
        # Transformers' own Llama class is BPE, adds no dummy prefix before a text that starts with a space, and does
        # not find user-defined pieces that hold one.
        is_bpe = self.proto.trainer_spec.model_type == proto.TrainerSpec.BPE
        is_llama = is_bpe and not self.dummy_prefix and not self._user_defined_has_space
        return {
            "tokenizer_class": "LlamaTokenizer" if is_llama else "PreTrainedTokenizerFast",
            "add_bos_token": self.processor.bos_id() >= 0,  # every document begins with it, if there is one
            "add_eos_token": False,
            "add_prefix_space": self.dummy_prefix,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": self.proto.pieces[i].piece for name, i in names.items()},
            "added_tokens_decoder": {added.pop("id"): added for added in self._added_tokens()},
        }

    def piece_of(self, i: int) -> str:
        """The text of a piece as the file writes it."""
        return self.proto.pieces[i].piece

    @cached_property
    def user_defined(self) -> dict[str, int]:
        """Id of each piece that is cut out of a text before anything else."""
        return {p.piece: i for i, p in enumerate(self.proto.pieces) if p.type == p.USER_DEFINED}

    @property
    def _user_defined_has_space(self) -> bool:
        return any(SPACE_MARK in piece for piece in self.user_defined)

    @property
    def parts_are_independent(self) -> bool:
        """Whether each part of a text beside a control piece is encoded as it is alone."""
        spaces = not self.space.before or (self.space.each_part and not self.space.spared)
        return spaces and not any(self.eats_spaces.values())

    def id_of(self, piece: str) -> int | None:
        """The id of the piece with this text; None if there is none."""
        i = self.processor.piece_to_id(piece)
        return i if self.proto.pieces[i].piece == piece else None

    def _added_tokens(self) -> list[dict]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        # A space in a piece is written as its mark. So the piece is looked for in the text that has marks, and with it
        # all others, since the longest of those at one place counts. A dummy prefix would be put before the piece, too.
        normalized = self._user_defined_has_space and not self.dummy_prefix
        added = []
        for i, p in enumerate(self.proto.pieces):
            if p.type in (p.UNKNOWN, p.CONTROL, p.USER_DEFINED):
                is_special = p.type != p.USER_DEFINED
                how = {"special": is_special, **flags, "normalized": normalized and not is_special}
                added.append({"id": i, "content": p.piece, **how})
        return added

    def tokenizers_file(self) -> dict:
        """Contents of tokenizer.json, for the `tokenizers` library, whose BPE has merges instead of scores."""
        plain = {p.piece: p.score for p in self.proto.pieces if p.type == p.NORMAL}
        ids = {piece.piece: i for i, piece in enumerate(self.proto.pieces)}
        # Each way to put a piece together from two others, those of the highest score first.
        merges = []
        for piece, score in plain.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in plain and right in plain:
                    merges.append((-score, ids[left], ids[right], left, right))
        merges.sort()
        normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]
        decoder = [
            {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self.dummy_prefix:
            normalizers.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
            decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "version": "1.0",
            "added_tokens": self._added_tokens(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoder},
            "model": {
                "type": "BPE",
                "unk_token": self.proto.pieces[self.processor.unk_id()].piece,
                "fuse_unk": True,
                "byte_fallback": self.proto.trainer_spec.byte_fallback,
                "vocab": ids,
                "merges": [[left, right] for *_, left, right in merges],
            },
        }


def either_of(pieces: Iterable[str]) -> re.Pattern:
    """Matches any of these, the longest where one begins with another; `split` keeps what it matched."""
    either = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    return re.compile(f"({either})" if either else "((?!))")  # the latter matches nothing


def with_dummy_prefix(data: bytes, dummy_prefix: bool) -> bytes:
    """A model file that puts a space before each text, or does not."""
    model = proto.ModelProto.FromString(data)
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    return model.SerializeToString()


def parse(model_bytes: bytes, source: str) -> proto.ModelProto:
    """What a model file holds. Raises `UserError` if it is no such file, or damaged."""
    remedy = "it is no SentencePiece model, or damaged: copy or train it again"
    try:
        model = proto.ModelProto.FromString(model_bytes)
    except Exception:
        raise UserError(f"{source} ({len(model_bytes):,} bytes): {remedy}") from None
    # Protobuf reads a file cut between two fields without complaint; the specs come after the pieces.
    if not model.pieces or not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise UserError(f"{source} ({len(model_bytes):,} bytes): cut short; {remedy}")
    for number, piece in enumerate(model.pieces):
        _check_piece(piece, f"{source}: piece {number}")
    return model


def _check_piece(piece, source: str) -> None:
    """Raises `UserError` for a piece that no training writes, and that SentencePiece reads all the same."""
    try:
        text = piece.piece
    except UnicodeDecodeError:
        text = b""
    if isinstance(text, bytes):  # protobuf raises for some, and gives others as they are
        raise UserError(f"{source} is not UTF-8; the model is damaged: copy or train it again") from None
    if not math.isfinite(piece.score):
        raise UserError(f"{source} {text[:40]!r} has the score {piece.score}; the model is damaged: copy it again")
    if piece.type == piece.BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        raise UserError(f"{source} {text[:40]!r} is no byte; the model is damaged: copy or train it again")


def _rewriting(model: proto.ModelProto) -> str | None:
    """How a model changes texts before it cuts them, in words for people; None if it does not."""
    rules = model.normalizer_spec
    if rules.precompiled_charsmap:
        return f"its normalizer ({rules.name}) changes texts"
    if rules.remove_extra_whitespaces:
        return "its normalizer removes spaces"
    return None


def _piece_bytes(piece) -> bytes:
    if piece.type == piece.CONTROL:
        return b""
    if piece.type == piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # "<0x0A>"
    if piece.type == piece.UNKNOWN:
        return "\ufffd".encode()
    return piece.piece.replace(SPACE_MARK, " ").encode()
