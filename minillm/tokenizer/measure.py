"""What a vocabulary holds, and how densely it writes a text."""

import unicodedata
from collections import Counter
from collections.abc import Iterable

from minillm.base.errors import UserError
from minillm.base.printing import visible
from minillm.tokenizer.edit import is_reachable
from minillm.tokenizer.sentencepiece_model import SPACE_MARK
from minillm.tokenizer.tokenizer import Tokenizer

SCRIPTS = {
    *("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic"),
    *("devanagari", "tamil", "thai", "cjk", "hiragana", "katakana", "hangul"),
}


MOST_LOST = 0.001  # share of the characters of a text; a rare character that is lost is said and no more
TRIED = 1 << 16  # characters of a text, and of a file


def control_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """How often the text of control pieces (`<|im_end|>`) stands in some texts, of which none becomes the piece.

    In words for people; empty if there is none.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.control_pattern.findall(text))
    return ", ".join(f"{visible(piece)} {count:,}" for piece, count in counts.most_common(5))


def check_round_trip(tokenizer: Tokenizer, texts: Iterable[str], where: str, allow_lossy: bool) -> None:
    """Encode and decode the beginnings of some texts, and print what share of their characters is lost, if any is.

    Lost are a character without a piece where there are no bytes, one that a normalizer turns into another, spaces and
    line ends that are taken together. where: the texts, as the line names them.
    Raises UserError above MOST_LOST, unless `allow_lossy`.
    """
    lost: Counter[str] = Counter()
    n_characters = 0
    for text in texts:
        text = text[:TRIED]
        n_characters += len(text)
        given_back = tokenizer.decode(tokenizer.encode(text))
        if given_back != text:
            lost += Counter(text) - Counter(given_back)
    if not lost:
        return
    share = lost.total() / n_characters
    most = ", ".join(f"{character!r} {count:,} times" for character, count in lost.most_common(4))
    line = f"{where}: the tokenizer loses {share:.2%} of their first {n_characters:,} characters ({most})"
    if share > MOST_LOST and not allow_lossy:
        raise UserError(f"{line}; choose another that has byte pieces, or go on without them by --allow_lossy true")
    print(visible(line))


def unreachable(tokenizer: Tokenizer, pieces: Iterable[str]) -> list[str]:
    """Which of these pieces no text is ever encoded as."""
    ids = {p.piece: i for i, p in enumerate(tokenizer.model.proto.pieces)}
    return [piece for piece in pieces if not is_reachable(tokenizer, piece, ids[piece])]


def compare(old: Tokenizer, new: Tokenizer, added: Iterable[str], texts: Iterable[str]) -> dict[str, int]:
    """How two vocabularies encode the lines of some texts, the second being the first with `added`.

    Returns counts: lines, characters, old_tokens, new_tokens; without (lines that contain no added piece) and
    changed (those of them that are encoded differently).
    """
    added = set(added)
    lengths = sorted({len(piece) for piece in added})
    first_characters = {piece[0] for piece in added}

    def holds_an_added_piece(line: str) -> bool:
        for i, character in enumerate(line):
            if character in first_characters and any(line[i : i + length] in added for length in lengths):
                return True
        return False

    counts = dict(lines=0, characters=0, old_tokens=0, new_tokens=0, without=0, changed=0)
    for text in texts:
        for line in text.split("\n"):
            before = old.encode(line)
            after = new.encode(line)
            counts["lines"] += 1
            counts["characters"] += len(line)
            counts["old_tokens"] += len(before)
            counts["new_tokens"] += len(after)
            if not holds_an_added_piece(line):
                counts["without"] += 1
                counts["changed"] += before != after
    return counts


def scripts(tokenizer: Tokenizer) -> dict[str, int]:
    """How many pieces of text there are in each script (of a piece's first letter), most frequent first."""
    counts: Counter[str] = Counter()
    for piece in tokenizer.model.proto.pieces:
        kinds = {piece.CONTROL: "control", piece.BYTE: "byte", piece.UNKNOWN: "unknown"}
        counts[kinds.get(piece.type) or _script(piece.piece)] += 1
    return dict(counts.most_common())


def _script(text: str) -> str:
    """The script of the first letter, from its Unicode name, "other" if not listed; "digit", "space" or "sign"."""
    text = text.replace(SPACE_MARK, " ")
    for character in text:
        if character.isalpha():
            script = unicodedata.name(character, "").split(" ")[0].lower()
            return script if script in SCRIPTS else "other"
    if any(character.isdigit() for character in text):
        return "digit"
    return "space" if text.isspace() else "sign"
