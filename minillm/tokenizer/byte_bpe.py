"""A byte-level BPE vocabulary (GPT-2, SmolLM, Qwen, Llama 3) as GGUF describes one: pieces, merges, the rules' name.

A `tokenizer.json` spells the rules out; here each known set of rules has GGUF's name, so that either can be written
from the other. The `tokenizers` library encodes text by them (`tokenizers_model`); docs/en/tokenizer.md shows how.
"""

import json
from dataclasses import dataclass

from minillm.base.errors import UnsupportedError

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


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        table[chr(256 + i)] = byte
    return table


@dataclass
class ByteBPE:
    """One such vocabulary.

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


def read(described: dict, source: str) -> ByteBPE:
    """The vocabulary in a tokenizer.json (as read by the `tokenizers` library, so that it is well-formed).

    Control pieces are left out. Raises `UnsupportedError` if its rules have no name in SPLITS.
    """
    model = described["model"]
    normalizer = described.get("normalizer") or {}
    rules = _steps(described.get("pre_tokenizer"))
    names = [name for name in SPLITS if _steps(_pre_tokenizer(name)) == rules]
    is_byte_level = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    if not names or not is_byte_level or normalizer.get("type") not in (None, "NFC"):
        known = ", ".join(SPLITS)
        raise UnsupportedError(f"{source}: cuts text by rules that have no name in GGUF (known are those of {known})")
    added = described.get("added_tokens") or []
    control = {token["content"] for token in added if token["special"]}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return ByteBPE(
        ids={piece: i for piece, i in model["vocab"].items() if piece not in control},
        merges=merges,
        split=names[0],
        whole={token["content"]: token["id"] for token in added if not token["special"]},
        nfc=normalizer.get("type") == "NFC",
        words_first=bool(model.get("ignore_merges")),
    )


def write(bpe: ByteBPE, control: dict[str, int], bos: str | None = None) -> bytes:
    """The tokenizer.json of a vocabulary. bos: the control piece that texts begin with."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted((i, piece) for piece, i in (bpe.whole | control).items())
    described = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, "special": piece in control, **flags} for i, piece in added],
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
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, other],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }


def _pre_tokenizer(split: str) -> dict:
    """The pre_tokenizer of a tokenizer.json for a name in SPLITS."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": SPLITS[split][-1] == GPT2,
    }
    if split == "gpt-2":
        return level
    if split == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    cut = {"type": "Split", "pattern": {"Regex": SPLITS[split][0]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, level]}


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """The steps of a pre_tokenizer in a comparable form: only what affects how a text is split."""
    pre_tokenizer = pre_tokenizer or {}
    comparable = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        step = {key: value for key, value in step.items() if key != "trim_offsets"}
        if step.get("type") == "ByteLevel":
            step.setdefault("use_regex", True)
        comparable.append(step)
    return comparable
