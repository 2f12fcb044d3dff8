"""Mends what a text went through on its way: entities, controls, spaces, mojibake that can be undone. Drops nothing.

Not NFKC, which turns “，” into “,” and “……” into six points; and punctuation stays as it is.
"""

import html
import re
import unicodedata
from collections.abc import Callable

FENCED = re.compile(r"(^ {0,3}(?:```|~~~).*?(?:^ {0,3}(?:```|~~~)[ \t]*$|\Z))", re.MULTILINE | re.DOTALL)

# Characters of which one makes a text worth searching for what follows; the most part of texts has none.
SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xad\xc2-\xf4\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u2007\u200b-\u200f"
    "\u2028-\u202f\u2060-\u2069\u20d0-\u20ff\ud800-\udfff\ufeff０-９Ａ-Ｚａ-ｚ]"
)
INDENTED = re.compile(r"^(?: {4}|\t).*\n?", re.MULTILINE)
LEAST_PROSE = 100  # characters
RUBY = re.compile(r"</?(rt|rp)>", re.IGNORECASE)
RUBY_BEGIN = re.compile("<ruby>(?=.*</ruby>)", re.IGNORECASE)
ONLY_TAGS = re.compile(r"\s*(?:<[^<>]*>\s*)+")
_INLINE = "ruby|b|i|u|em|strong|center|sub|sup|small|big|font|mark|s|tt"
_NO_NAME = r"(?!\s*(?:标签|标记|元素|tags?\b|elements?\b))"  # behind a tag that is spoken of
BREAK_TAG = re.compile(rf"(?:(?<=\S)|^)[ \t]*<br\s*/?>{_NO_NAME}|<br\s*/?>$", re.IGNORECASE)
SPOKEN_BREAK = re.compile(r"[ \t]<br\s*/?>[ \t]", re.IGNORECASE)
TAG_WITH_VALUE = re.compile(rf"<(?:{_INLINE})\s[^<>\n]{{0,80}}>", re.IGNORECASE)
PAIR = re.compile(rf"<({_INLINE})>{_NO_NAME}(?=\S)([^<>\n]*)(?<=\S)</\1>", re.IGNORECASE)
MOST_NESTED = 8  # pairs of tags around a word: each is a pass over its line
LONE_END = re.compile(r"</(?:font|ruby|rt|rp)>", re.IGNORECASE)
# A line in which tags are no dress: code, or of other tags, which are what the text is about.
CODE_WITH_TAGS = re.compile(
    r"[{}]|;\s*$|^\s*(?://|/\*)|(?:\b(?:echo|print|write|return)|[=(+,])\s*[\"'][^\n]*<"
    rf"|</?(?!(?:{_INLINE}|rt|rp|br)\b)[a-zA-Z][^<>\n]{{0,300}}>",
    re.IGNORECASE,
)
SURROGATES = re.compile("[\ud800-\udfff]")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
NO_BREAK_SPACES = re.compile("[\u00a0\u2007\u202f]")
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
STACKED_MARKS = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]{4,}")
ENTITY = re.compile(r"&(?:#\d{2,7}|#[xX][0-9a-fA-F]{2,6}|[a-zA-Z][a-zA-Z0-9]{1,24});")
FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")
TO_ASCII = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_WIDE = "\u3001-\u303f\u4e00-\u9fff\uff01-\uff65"
# Both begin at the first space of a run alone and never give one back, so that long runs take no longer than others.
BETWEEN_HANZI = re.compile(f"[ \t\u3000](?<=[{_WIDE}].)[ \t\u3000]*+(?=[{_WIDE}])")
HANZI = re.compile("[\u4e00-\u9fff]")
END_OF_LINE_SPACE = re.compile(r"[ \t](?<![ \t]{2})[ \t]*+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n(?:[ \t\u3000]*\n){2,}")

MOST_SPACED = 0.3  # of the gaps between hanzi: above, a scanner put the spaces there
# A first byte of UTF-8 and what follows it, as Latin-1 and cp1252 show them.
UNICODE_AS_BYTES = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]+"
)
FEWEST_UNDONE = 3  # sequences of mojibake in a text, without which nothing is undone


def normalise(text: str, has_markup: bool = True) -> tuple[str, list[str]]:
    """The mended text, and the names of what was mended in it, other than spaces at the ends of lines.

    has_markup: whether tags in it are those of a page; else they are what the text is about.
    """
    mended = []

    def apply(name: str, change: Callable[[str], str]) -> None:
        nonlocal text
        changed = change(text)
        if changed != text:
            text = changed
            if name:
                mended.append(name)

    if SUSPECT.search(text):
        apply("surrogates", lambda t: SURROGATES.sub("\ufffd", t))
        apply("mojibake", undo_mojibake)
        apply("line_ends", lambda t: LINE_ENDS.sub("\n", t))
        apply("controls", lambda t: CONTROLS.sub("", t))
        apply("invisible", lambda t: NO_BREAK_SPACES.sub(" ", INVISIBLE.sub("", t)))
        apply("stacked_marks", lambda t: STACKED_MARKS.sub("", t))
        apply("full_width", lambda t: FULL_WIDTH.sub(lambda match: match[0].translate(TO_ASCII), t))
    if "&" in text:
        apply("entities", lambda t: outside_code(t, without_entities))
    if has_markup and "<" in text:
        apply("inline_tags", lambda t: outside_code(t, without_inline_tags))
    if not text.isascii():
        apply("nfc", lambda t: t if unicodedata.is_normalized("NFC", t) else unicodedata.normalize("NFC", t))
        apply("spaced_hanzi", lambda t: outside_code(t, without_scanned_spaces))
    if " \n" in text or "\t\n" in text or "\n\n\n" in text:
        apply("", lambda t: BLANK_LINES.sub("\n\n", END_OF_LINE_SPACE.sub("", t)))
    text = text.strip("\n").rstrip()
    return text, mended


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to what lies outside blocks of code (``` or ~~~)."""
    if "```" not in text and "~~~" not in text:
        return change(text)
    parts = FENCED.split(text)  # text, code, text, …
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def without_code(text: str) -> str:
    """The text without its blocks of code, fenced or indented; as it is if nearly nothing else is in it."""
    prose = FENCED.sub("", text) if "```" in text or "~~~" in text else text
    if "\n    " in prose or "\n\t" in prose:
        prose = INDENTED.sub("", prose)
    return prose if len(prose) >= LEAST_PROSE and len(prose) > 0.2 * len(text) else text


def without_inline_tags(text: str) -> str:
    """Words without the tags that dress them: <b>, <sub> and the like; <ruby> as parentheses, <br> as a line's end.

    Tags in code, and those that a text speaks of, which have no end in their line, stay.
    """
    return "\n".join([_undressed(line) if "<" in line else line for line in text.split("\n")])


def _undressed(line: str) -> str:
    plain = TAG_WITH_VALUE.sub("", line)  # a tag with a value is markup, and its end too
    if CODE_WITH_TAGS.search(plain) or ONLY_TAGS.fullmatch(line):  # the latter dresses no word
        return line
    if plain != line or RUBY_BEGIN.search(line):
        plain = RUBY.sub(_parenthesis, plain)
        plain = LONE_END.sub("", RUBY_BEGIN.sub("", plain))
    line = plain
    for _ in range(MOST_NESTED):  # from inside out
        line = PAIR.sub(r"\2", line)
    return line if SPOKEN_BREAK.search(line) else BREAK_TAG.sub("\n", line)


def _parenthesis(tag: re.Match) -> str:
    if tag[1].lower() == "rp":
        return ""
    return "）" if tag[0][1] == "/" else "（"


def without_entities(text: str) -> str:
    """HTML entities as their characters; twice, since a page that was escaped twice holds `&amp;nbsp;`."""
    for _ in range(2):
        text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return CONTROLS.sub("", NO_BREAK_SPACES.sub(" ", INVISIBLE.sub("", text)))


def without_scanned_spaces(text: str) -> str:
    """No spaces between hanzi, if so many gaps have one that a scanner or a typesetter put them there."""
    if " " not in text and "\t" not in text:
        return text
    n_spaced = len(BETWEEN_HANZI.findall(text))
    if n_spaced < 4 or n_spaced <= MOST_SPACED * len(HANZI.findall(text)):
        return text
    return BETWEEN_HANZI.sub("", text)


def undo_mojibake(text: str) -> str:
    """UTF-8 that was read as Latin-1 or cp1252, read again; other text as it is.

    Only runs of characters that are whole UTF-8 are undone, and only where a text has several: “Ã©” alone may be meant.
    """
    n_undone = 0

    def undone(match: re.Match) -> str:
        nonlocal n_undone
        data = bytes_of(match[0])
        if data is None:
            return match[0]
        try:
            again = data.decode()
        except UnicodeDecodeError:
            return match[0]
        n_undone += len(again)
        return again

    again = UNICODE_AS_BYTES.sub(undone, text)
    return again if n_undone >= FEWEST_UNDONE else text


def bytes_of(text: str) -> bytes | None:
    """The bytes that were read as this text, each as Latin-1 or cp1252 has it; None if a character is in neither."""
    data = bytearray()
    for character in text:
        for encoding in ("cp1252", "latin-1"):
            try:
                data += character.encode(encoding)
                break
            except UnicodeEncodeError:
                continue
        else:
            return None
    return bytes(data)
