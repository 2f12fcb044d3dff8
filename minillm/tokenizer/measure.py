"""What a vocabulary holds, and how densely it writes a text."""

import unicodedata
from collections import Counter
from collections.abc import Iterable

from minillm.tokenizer.edit import _arises
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

SCRIPTS = "latin greek cyrillic armenian georgian hebrew arabic devanagari tamil thai cjk hiragana katakana hangul"


def unreachable(tokenizer: Tokenizer, pieces: Iterable[str]) -> list[str]:
    """Which of these pieces no text is ever encoded as."""
    ids = {p.piece: i for i, p in enumerate(tokenizer.model.proto.pieces)}
    return [piece for piece in pieces if not _arises(tokenizer, piece, ids[piece])]


# ---------------------------------------------------------------- statistics of a vocabulary


def compare(old: Tokenizer, new: Tokenizer, added: Iterable[str], texts: Iterable[str]) -> dict[str, int]:
    """How two vocabularies encode the lines of some texts, the second being the first with `added`.

    Returns counts: lines, characters, old_tokens, new_tokens; without (lines that contain no added piece) and
    changed (those of them that are encoded differently).
    """
    added = set(added)
    lengths = sorted({len(piece) for piece in added})
    starts = {piece[0] for piece in added}
    counts = Counter(lines=0, characters=0, old_tokens=0, new_tokens=0, without=0, changed=0)
    for line in (line for text in texts for line in text.split("\n")):
        before, after = old.encode(line), new.encode(line)
        counts.update(lines=1, characters=len(line), old_tokens=len(before), new_tokens=len(after))
        holds = any(
            line[i : i + n] in added for i, character in enumerate(line) if character in starts for n in lengths
        )
        counts.update(without=not holds, changed=not holds and before != after)
    return dict(counts)


def scripts(tokenizer: Tokenizer) -> dict[str, int]:
    """How many pieces of text there are in each script (of a piece's first letter), most frequent first."""
    counts: Counter[str] = Counter()
    for piece in tokenizer.model.proto.pieces:
        kind = {piece.CONTROL: "control", piece.BYTE: "byte", piece.UNKNOWN: "unknown"}.get(piece.type)
        counts[kind or _script(piece.piece)] += 1
    return dict(counts.most_common())


def _script(text: str) -> str:
    """The script of the first letter, from its Unicode name, "other" if not listed; "digit", "space" or "sign"."""
    text = text.replace(SPACE_MARK, " ")
    for character in text:
        if character.isalpha():
            script = unicodedata.name(character, "").split(" ")[0].lower()
            return script if script in SCRIPTS.split() else "other"
    return "digit" if any(c.isdigit() for c in text) else "space" if text.isspace() else "sign"
