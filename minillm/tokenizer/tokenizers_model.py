"""A `tokenizer.json`, read by the `tokenizers` library, which knows every kind: BPE, Unigram, WordPiece, any rules.

Two things are ours. No text is ever encoded as a control piece (`<|im_end|>`), so that a user cannot forge the turn of
another. And the bytes that each id stands for, by which text is shown id by id and bits per byte are counted.
"""

import json
import re
import secrets
from functools import cached_property

import numpy as np

from minillm.base.contents import Contents
from minillm.base.errors import UnsupportedError, UserError
from minillm.tokenizer.byte_bpe import byte_characters
from minillm.tokenizer.folder_files import LARGEST_ID, read_object
from minillm.tokenizer.sentencepiece_model import SPACE_MARK

KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
SMALLEST_LIMIT = 1 << 17  # no file is so small that an id up to here is refused; above, an id needs a byte of the file

# Steps that lose nothing of a text: the bytes of its ids are then the bytes of the text.
FAITHFUL_NORMALIZERS = {"NFC", "Prepend", "Replace"}
FAITHFUL_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}


class TokenizersModel:
    """The pieces of a tokenizer.json, and encoding with them.

    data: the file. rules: parts of it that transformers replaces, such as its pre_tokenizer.

    library: its tokenizer, to which a control piece is text. ids: piece → id, added pieces included. control: id of
    each control piece, which no text is encoded as. normalized: the ids of those that are looked for in the normalized
    text, so that other letters may become one. table: the bytes that each id shows; None if that depends on its
    neighbours. dummy_prefix: whether one space at the front of a decoded text was put there by the tokenizer.
    unfaithful: why the bytes of a text's ids are not the bytes of the text, or None if they are.

    Raises `UserError` if the library is missing, or if it cannot read the file.
    """

    def __init__(self, data: bytes, source: str, rules: dict | None = None):
        self.data = data
        file = read_object(data, source)
        _check_model(file.get("model"), source)
        _check_ids(Contents(file, source), min(LARGEST_ID, max(SMALLEST_LIMIT, len(data))))
        self._source = source
        self._text = json.dumps(file | rules) if rules else data.decode(errors="replace")
        self.library = _build(self._text, source)
        self.library.encode_special_tokens = True  # as the text they are
        described = json.loads(self.library.to_str())  # as the library understood the file
        added = described.get("added_tokens") or []
        self.ids: dict[str, int] = self.library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.ids.values(), default=0) + 1
        for token in file.get("added_tokens") or []:
            if self.ids.get(token["content"]) != token["id"]:
                raise UserError(f"{source}: damaged, {token['content']!r:.80} has another id than {token['id']}")
        self.control = {token["content"]: token["id"] for token in added if token["special"]}
        self.normalized: set[int] = set()
        if described.get("normalizer"):
            self.normalized = {token["id"] for token in added if token["special"] and token["normalized"]}
        vocab = described["model"]["vocab"]
        own_pieces = vocab.keys() if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        if not own_pieces.isdisjoint(self.control):
            self.library = _without_control(described, self.control, source)
        self.dummy_prefix = _strips_a_space(described)
        self.table = self._bytes_of_ids(described)
        self.unfaithful = _reason_against(described, self.table)

    def id_of(self, piece: str) -> int | None:
        """The id of the piece with this text; None if there is none."""
        return self.ids.get(piece)

    def piece_of(self, i: int) -> str:
        """The text of the piece with this id."""
        return next(piece for piece, number in self.ids.items() if number == i)

    # ---------------------------------------------------------------- text → ids

    def encode_many(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text. Whatever `threads`, the library takes all processors, or one (TOKENIZERS_PARALLELISM)."""
        try:
            return [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            raise  # a lone surrogate, which the caller names
        except Exception as problem:  # a character without a piece, and no piece for that
            raise UserError(f"{self._source}: it cannot encode this text ({problem}); choose another") from None

    def encode_array(self, text: str, dtype: np.dtype, threads: int = 1) -> np.ndarray:
        """Ids of one text, (n,); the library has them all in its own form first."""
        return np.array(self.encode_many([text], threads)[0], dtype)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text in which control pieces count, such as a filled-in chat template."""
        return self._seeing_control.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _seeing_control(self):
        """A second tokenizer of the library, which takes the text of a control piece for the piece."""
        return _build(self._text, self._source)

    @cached_property
    def parts_are_independent(self) -> bool:
        """Whether what is before and after a control piece is encoded as if it were alone: no space added or eaten."""
        before, after = self.encode_many([" a ", " b "])
        return all(self.encode_rendered(f" a {piece} b ") == [*before, i, *after] for piece, i in self.control.items())

    # ---------------------------------------------------------------- ids → text

    def decode(self, ids: list[int]) -> str:
        """The library's text of these ids, control pieces left out."""
        return self.library.decode(ids, skip_special_tokens=True)

    def _bytes_of_ids(self, described: dict) -> list[bytes] | None:
        decoders = steps(described.get("decoder"), "decoders")
        if not decoders or not all(_is_side_by_side(decoder) for decoder in decoders):
            return None
        kinds = {decoder["type"] for decoder in decoders}
        added = {token["content"] for token in described.get("added_tokens") or []}
        byte_of = byte_characters()
        alphabet = frozenset(byte_of)
        table = [b""] * self.vocab_size
        for piece, i in self.ids.items():
            if piece in self.control:
                continue
            if piece in added:
                table[i] = piece.encode()
            elif "ByteLevel" in kinds and alphabet.issuperset(piece):
                table[i] = bytes([byte_of[character] for character in piece])
            elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
                table[i] = bytes([int(piece[3:5], 16)])
            elif "ByteLevel" in kinds:
                table[i] = piece.encode()
            else:
                table[i] = piece.replace(SPACE_MARK, " ").encode()
        return table


def _is_side_by_side(decoder: dict) -> bool:
    """Whether a step of a decoder shows ids as the text of each, put side by side."""
    kind = decoder["type"]
    if kind == "Replace":
        return decoder["pattern"] == {"String": SPACE_MARK} and decoder["content"] == " "
    if kind == "Strip":  # one space at the front of the text
        return decoder["content"] == " " and decoder["start"] <= 1 and decoder["stop"] == 0
    if kind == "Metaspace":
        return decoder["replacement"] == SPACE_MARK
    return kind in ("ByteLevel", "ByteFallback", "Fuse")


def _check_model(model: object, source: str) -> None:
    """Raises `UserError` for what the library would not refuse in words."""
    if not isinstance(model, dict):
        raise UserError(f"{source}: damaged, or of another kind (it holds no model); copy it again")
    kind = model.get("type", "BPE")
    if isinstance(kind, str) and kind not in KINDS:
        raise UnsupportedError(f"{source}: a vocabulary of the kind {kind[:40]!r} (known are {', '.join(KINDS)})")
    # The library cuts this prefix off the right part of each merge, and ends the process if it is not there.
    prefix = model.get("continuing_subword_prefix")
    merges = model.get("merges")
    if isinstance(prefix, str) and isinstance(merges, list):
        for pair in merges:
            right = pair.split(" ")[-1] if isinstance(pair, str) else pair[-1] if pair else ""
            if not str(right).startswith(prefix):
                raise UserError(f"{source}: damaged, the merge {pair!r:.80} lacks the prefix {prefix[:20]!r}")


def _check_ids(file: Contents, limit: int) -> None:
    """Raises `UserError` for ids and pieces of the wrong kind, ids from `limit` on, or one that two pieces have."""
    model = file.part("model")
    seen: dict[int, str] = {}
    if isinstance(model.values.get("vocab"), dict):
        for piece, i in model.need("vocab", dict[str, int]).items():
            _check_id(file.source, piece, i, limit)
            if seen.setdefault(i, piece) != piece:
                raise UserError(f"{file.source}: damaged, {seen[i][:40]!r} and {piece[:40]!r} both have the id {i}")
    for token in file.parts("added_tokens"):
        piece, i = token.need("content", str), token.need("id", int)
        _check_id(token.source, piece, i, limit)
        if seen.setdefault(i, piece) != piece:
            raise UserError(f"{token.source}: damaged, {seen[i][:40]!r} and {piece[:40]!r} both have the id {i}")


def _check_id(source: str, piece: str, i: int, limit: int) -> None:
    if not 0 <= i < limit:
        raise UserError(f"{source}: damaged, {piece[:40]!r} has the id {i}: ids of such a file are 0 to {limit - 1:,}")


def _build(text: str, source: str):
    """The library's tokenizer for the text of a tokenizer.json."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f'{source}: reading it needs the tokenizers library: pip install -e ".[hf]"') from None
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as problem:  # the library raises nothing more particular
        version = tokenizers.__version__
        raise UserError(
            f"{source}: damaged, or of a kind that tokenizers {version} does not know ({problem})"
        ) from None
    library.no_truncation()  # both may be set in the file, for other uses of it
    library.no_padding()
    return library


def _without_control(described: dict, control: dict[str, int], source: str):
    """The same tokenizer, its control pieces renamed to what no text holds.

    Leaving them out of the search for added pieces is not enough: a Unigram model has `<s>` among its pieces and would
    find it in a text. An unknown piece keeps its name, since the model looks it up.
    """
    model = described["model"]
    unknown = model.get("unk_token")
    secret = secrets.token_hex(16)
    hidden = {piece: f"control-{secret}-{i}" for piece, i in control.items() if piece != unknown}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: [[piece, score], …], the piece at `unk_id` being unknown
        model["vocab"] = [
            [piece if i == model.get("unk_id") else hidden.get(piece, piece), score]
            for i, (piece, score) in enumerate(vocab)
        ]
        if isinstance(model.get("unk_id"), int):
            hidden.pop(vocab[model["unk_id"]][0], None)
    if "merges" in model:
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & hidden.keys()]
    for token in described.get("added_tokens") or []:
        token["content"] = hidden.get(token["content"], token["content"])
    described = {**described, "post_processor": None}  # which may name control pieces; nothing is added here
    library = _build(json.dumps(described), source)
    library.encode_special_tokens = True  # an unknown piece in a text is text as well
    for piece, i in control.items():
        if library.token_to_id(hidden.get(piece, piece)) != i:
            raise UserError(f"{source}: damaged, its pieces are not where their ids say ({piece!r:.80}, id {i})")
    return library


def steps(step: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be a sequence of others under `name`."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for other in step[name] for inner in steps(other, name)]


def _strips_a_space(described: dict) -> bool:
    for decoder in steps(described.get("decoder"), "decoders"):
        if decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"]:
            return True
        if decoder["type"] == "Metaspace" and decoder.get("prepend_scheme", "always") != "never":
            return True
    return False


def _reason_against(described: dict, table: list[bytes] | None) -> str | None:
    """Why bytes of ids are not bytes of text, in words for people; None if they are."""
    if table is None:
        decoders = [decoder["type"] for decoder in steps(described.get("decoder"), "decoders")]
        return f"its decoder ({', '.join(decoders) or 'none'}) puts pieces together by rules of its own"
    for step in steps(described.get("normalizer"), "normalizers"):
        to_mark = step.get("pattern") == {"String": " "} and step.get("content") == SPACE_MARK
        if step["type"] not in FAITHFUL_NORMALIZERS or (step["type"] == "Replace" and not to_mark):
            return f"its normalizer ({step['type']}) changes texts"
    for step in steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] not in FAITHFUL_PRE_TOKENIZERS or step.get("behavior") == "Removed":
            return f"its pre-tokenizer ({step['type']}) leaves something out"
    model = described["model"]
    byte_level = any(step["type"] == "ByteLevel" for step in steps(described.get("decoder"), "decoders"))
    if not byte_level and not model.get("byte_fallback"):
        return "characters without a piece are lost"
    return None
