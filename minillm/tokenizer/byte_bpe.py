"""Byte-level BPE: the tokenizer of GPT-2, SmolLM, Qwen and Llama 3, read from a `tokenizer.json`.

Regular expressions split a text into words, digits, signs and spaces; each of these becomes UTF-8 bytes, which are
merged pair by pair, the earliest-learnt pair first (Radford et al. 2019, GPT-2, section 2.2). In the file each byte is
written as one printable character, a space as Ġ.
"""

import heapq
import itertools
import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

from minillm.base.errors import UnsupportedError, naming_damage

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Contractions; letters with the sign before them; digits, up to so many; signs; line ends; spaces.
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # GGUF's names; each expression splits the parts that the one before made
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "qwen2": (LATER % "",),
    "llama-bpe": (LATER % "{1,3}",),
}


@cache
def _classes() -> dict[str, str]:
    r"""Members of \p{L}, \p{N} and \s by the Unicode standard, as they stand between the brackets of `re`."""
    members = {
        r"\p{L}": lambda c: unicodedata.category(c)[0] == "L",
        r"\p{N}": lambda c: unicodedata.category(c)[0] == "N",
        r"\s": lambda c: c.isspace() and c not in "\x1c\x1d\x1e\x1f",  # which Python counts as spaces
    }
    every = [chr(i) for i in range(sys.maxunicode + 1)]
    classes = {}
    for name, belongs in members.items():
        runs = [list(run) for is_member, run in itertools.groupby(every, belongs) if is_member]
        classes[name] = "".join(f"\\U{ord(run[0]):08x}-\\U{ord(run[-1]):08x}" for run in runs)
    return classes


def compile_split(pattern: str) -> re.Pattern:
    r"""An expression of the `regex` kind, with \p{L}, \p{N}, for Python's own `re`."""

    def translate(found: re.Match) -> str:
        text = found[0]
        if text == r"\S":
            return "[^" + _classes()[r"\s"] + "]"
        members = re.sub(r"\\p\{[LN]\}|\\s", lambda name: _classes()[name[0]], text)
        return members if text.startswith("[") else f"[{members}]"

    return re.compile(re.sub(r"\[[^\]]*\]|\\p\{[LN]\}|\\s|\\S", translate, pattern))


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass
class ByteBPE:
    """Text → ids for one such vocabulary.

    ids: piece, in byte characters → id. merges: pairs of pieces, earliest learnt first. split: a name in SPLITS.
    whole: pieces that are cut out of a text before anything else, with their ids. nfc: normalize to NFC first.
    words_first: a word that is itself a piece is taken without merging.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    split: str
    whole: dict[str, int]
    nfc: bool
    words_first: bool

    def __post_init__(self):
        self._rank = {pair: i for i, pair in enumerate(self.merges)}
        self._splits = [compile_split(pattern) for pattern in SPLITS[self.split]]
        longest_first = sorted(self.whole, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # which matches nothing
        self._character = {byte: character for character, byte in byte_characters().items()}
        self._known: dict[str, list[int]] = {}  # words met before

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for part, is_whole in _isolate(self._whole, [text]):
            if is_whole:
                ids.append(self.whole[part])
                continue
            words = [unicodedata.normalize("NFC", part) if self.nfc else part]
            for pattern in self._splits:
                words = [word for word, _ in _isolate(pattern, words)]
            for word in words:
                ids += self._known.get(word) or self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        parts = [self._character[byte] for byte in word.encode()]
        if self.words_first and "".join(parts) in self.ids:
            parts = ["".join(parts)]
        n = len(parts)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # neighbours that are left
        waiting: list[tuple[int, int, tuple[str, str]]] = []  # (rank, place, pair): earliest learnt, leftmost first

        def offer(i: int) -> None:
            if i >= 0 and after[i] < n and (pair := (parts[i], parts[after[i]])) in self._rank:
                heapq.heappush(waiting, (self._rank[pair], i, pair))

        for i in range(n):
            offer(i)
        while waiting:
            _, i, pair = heapq.heappop(waiting)
            j = after[i]
            if j < n and (parts[i], parts[j]) == pair:  # else one of them has been merged since
                parts[i], parts[j], after[i] = parts[i] + parts[j], "", after[j]
                if after[i] < n:
                    before[after[i]] = i
                offer(before[i])
                offer(i)
        ids = [self.ids[part] for part in parts if part in self.ids]
        if len(self._known) < 1 << 16 and n < 64:
            self._known[word] = ids
        return ids

    def bytes_of(self) -> dict[int, bytes]:
        """The bytes that each id stands for."""
        byte_of = byte_characters()
        table = {i: bytes(byte_of[c] for c in piece) for piece, i in self.ids.items() if set(piece) <= set(byte_of)}
        return table | {i: piece.encode() for piece, i in self.whole.items()}


def _isolate(pattern: re.Pattern, texts: list[str]):
    """(part, whether the pattern matched it) of each text, in order, nothing left out."""
    for text in texts:
        end = 0
        for found in pattern.finditer(text):
            if found.start() > end:
                yield text[end : found.start()], False
            if found[0]:
                yield found[0], True
            end = found.end()
        if end < len(text):
            yield text[end:], False


# ---- tokenizer.json


def read(data: bytes, source: str) -> tuple[ByteBPE, dict[str, int]]:
    """The vocabulary of a tokenizer.json, and its control pieces with their ids.

    Raises `UserError` if it is damaged, or if its kind is not supported here.
    """
    with naming_damage(source):
        described = json.loads(data)
        model, added = described["model"], described.get("added_tokens") or []
        splits = [name for name in SPLITS if _steps(described.get("pre_tokenizer")) == _steps(_pre_tokenizer(name))]
        normalizer = (described.get("normalizer") or {}).get("type")
        kind = model.get("type", "BPE"), bool(model.get("byte_fallback"))
        if kind != ("BPE", False) or not splits or normalizer not in (None, "NFC"):
            known = ", ".join(SPLITS)
            raise UnsupportedError(f"{source}: cuts text by rules that are not read here (known are those of {known})")
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        control, whole = (
            {t["content"]: t["id"] for t in added if t["special"] == special} for special in (True, False)
        )
        ids = {piece: i for piece, i in model["vocab"].items() if piece not in control}
        words_first = bool(model.get("ignore_merges"))
        return ByteBPE(ids, merges, splits[0], whole, normalizer == "NFC", words_first), control


def write(bpe: ByteBPE, control: dict[str, int], bos: str | None = None) -> bytes:
    """A tokenizer.json that `read` and the `tokenizers` library read. bos: the control piece that texts begin with."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted((i, piece, piece in control) for piece, i in (bpe.whole | control).items())
    described = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, "special": special, **flags} for i, piece, special in added],
        "normalizer": {"type": "NFC"} if bpe.nfc else None,
        "pre_tokenizer": _pre_tokenizer(bpe.split),
        "post_processor": begin_with(bos, control[bos]) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "byte_fallback": False,
            "ignore_merges": bpe.words_first,
            "vocab": bpe.ids | bpe.whole | control,
            "merges": [list(pair) for pair in bpe.merges],
        },
    }
    return (json.dumps(described, ensure_ascii=False) + "\n").encode()


def begin_with(piece: str, i: int) -> dict:
    """The post_processor of a tokenizer.json that puts this control piece before each text."""
    first = {"SpecialToken": {"id": piece, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], first, texts[1]],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }


def _pre_tokenizer(split: str) -> dict:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = SPLITS[split][-1] == GPT2
    if split == "gpt-2":
        return level
    if split == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    cut = {"type": "Split", "pattern": {"Regex": SPLITS[split][0]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, level]}


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """The steps of a pre_tokenizer in a comparable form: only what affects how a text is split."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    defaults = {"use_regex": True} if any(step.get("type") == "ByteLevel" for step in steps) else {}
    return [{**defaults, **{key: value for key, value in step.items() if key != "trim_offsets"}} for step in steps]
