"""Text that is not UTF-8: which encoding it seems to be in, and reading it in the one that is named.

Nothing is read by guess. A guess only names the option that reads the file.
"""

import codecs
import io
import re
from functools import cache
from typing import BinaryIO

from minillm.base.errors import UserError

UTF_8 = "utf-8"
BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before those of UTF-16, which begin alike
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CHINESE = ("gb18030", "big5", "utf-16-le", "utf-16-be")  # gb18030 holds GBK, and that GB2312
PUNCTUATION = re.compile("[\u2010-\u2027\u3000-\u301f\uff01-\uff5e]")
ESCAPED = re.compile("[\udc80-\udcff]")  # how Python keeps a byte that it cannot decode
SURE_FROM = 0.8  # share of the characters beyond ASCII that must be usual in an encoding
FEWEST_WESTERN = 3  # letters beyond ASCII, without which a wrong byte would count as cp1252
FEWEST_OF_UTF_16 = 16  # characters: any two bytes are one of UTF-16
NUL_SHARE = 0.1  # of a text in UTF-16, every second byte of a Latin letter
READ_AT_ONCE = 1 << 16  # bytes
WORDS = {"gb18030": "GB18030 (or GBK)", "big5": "Big5", "cp1252": "cp1252 (Western European)"}


def check_encoding(name: str) -> None:
    """Raises UserError if Python does not know a text encoding of this name."""
    try:
        data = "a".encode(name)
        codecs.getincrementaldecoder(name)(errors="surrogateescape").decode(data, final=True)  # as `recoded` reads
    except (LookupError, UnicodeError, ValueError):
        raise UserError(f"--encoding {name}: no known encoding; choose one such as gb18030, big5, utf-16") from None


def problems(name: str) -> list[str]:
    """What is wrong with the option `--encoding`, as `Options.problems` gives it."""
    try:
        check_encoding(name)
    except UserError as problem:
        return [str(problem)]
    return []


def is_utf_8(name: str) -> bool:
    """Whether this is one of the names of UTF-8, of which nothing has to be decoded."""
    return codecs.lookup(name).name in (UTF_8, "utf-8-sig")


# ---- Naming.


def refuse_other_encoding(head: bytes) -> None:
    """Raises ValueError if the head of a file, taken for UTF-8, is as a whole in another encoding that is recognized.

    A few wrong bytes in a text of UTF-8 are no matter of its encoding.
    """
    text = head.decode(UTF_8, "surrogateescape")
    n_wrong = len(ESCAPED.findall(text))
    n_right = sum(character > "\x7f" for character in text) - n_wrong
    if n_wrong > n_right or head.count(0) > NUL_SHARE * len(head):
        name = guess(head)
        if name:
            raise ValueError(f"not UTF-8 but, as it seems, {WORDS.get(name, name)}; read it by --encoding {name}")


def guess(data: bytes) -> str | None:
    """The encoding that some bytes seem to be in, as `--encoding` takes it; None if it is not clear."""
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return name
    if data.count(0) > NUL_SHARE * len(data):  # Latin letters in UTF-16: every second byte is 0
        return "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
    score, name = max((_chinese_share(data, name), name) for name in CHINESE)
    if score >= SURE_FROM:
        return name
    runs = re.findall(rb"[\x80-\xff]+", data)
    n_high = sum(map(len, runs))
    n_alone = sum(len(run) for run in runs if len(run) <= 2)  # letters with accents, between others
    is_western = n_high >= FEWEST_WESTERN and n_alone >= SURE_FROM * n_high
    return "cp1252" if is_western and _decoded(data, "cp1252") is not None else None


def _chinese_share(data: bytes, encoding: str) -> float:
    """The share of usual Chinese characters among those beyond ASCII, 0 if the bytes are not of this encoding."""
    text = _decoded(data, encoding)
    beyond = [character for character in text or "" if character > "\x7f"]
    if encoding.startswith("utf-16") and len(beyond) < FEWEST_OF_UTF_16:
        return 0.0
    return sum(c in usual_characters() or bool(PUNCTUATION.match(c)) for c in beyond) / max(2, len(beyond))


def _decoded(data: bytes, encoding: str) -> str | None:
    """The text, without a last character that is cut; None if it is not of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return None


@cache
def usual_characters() -> frozenset[str]:
    """The Chinese characters in daily use: the first level of GB 2312 (3,755) and of Big5 (5,401)."""
    simplified = (bytes([a, b]) for a in range(0xB0, 0xD8) for b in range(0xA1, 0xFF))
    traditional = (bytes([a, b]) for a in range(0xA4, 0xC7) for b in (*range(0x40, 0x7F), *range(0xA1, 0xFF)))
    text = b"".join(simplified).decode("gb2312", "ignore") + b"".join(traditional).decode("big5", "ignore")
    return frozenset(text)


# ---- Reading.


class _Recoded(io.RawIOBase):
    """A stream in some encoding as UTF-8. A byte that cannot be decoded stays, so that its document can be named."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder(encoding)(errors="surrogateescape")
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        has_ended = False
        while not self.ready and not has_ended:
            data = self.stream.read(READ_AT_ONCE)
            has_ended = not data
            self.ready = self.decoder.decode(data, final=has_ended).encode(UTF_8, "surrogateescape")
        n_bytes = min(len(buffer), len(self.ready))
        buffer[:n_bytes] = self.ready[:n_bytes]
        self.ready = self.ready[n_bytes:]
        return n_bytes


def recoded(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A stream in this encoding as UTF-8; reading raises UnicodeDecodeError where a wrong byte cannot be kept."""
    return io.BufferedReader(_Recoded(stream, encoding), READ_AT_ONCE)
