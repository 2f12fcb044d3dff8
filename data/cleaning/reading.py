"""Documents of a user's files, of more kinds than training reads: pages, tables, archives, any encoding.

As for training, one process goes through a file and cuts out what is raw (`raw_documents`), so that many can decode it
(`document_of`). What cannot be read is no error here but a document that is dropped for that reason: of a file that is
broken, what stands before the break is read, and the rest counts as one.
"""

import codecs
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.cleaning.text.normalise import SURROGATES
from minillm.base.errors import UserError
from minillm.datasets.files import encodings, tables
from minillm.datasets.files.json_rows import (
    BOM,
    GZIP,
    OTHER_KINDS,
    UNPACKED_AT_ONCE,
    array_items,
    numbered_lines,
    opens_array,
)
from minillm.datasets.files.text_files import LONGEST_TEXT, cut_text, ending

PACKINGS = ("", ".gz", ".zst")
PLAIN = (".txt", ".md", ".markdown")
PAGES = (".html", ".htm", ".xhtml", ".shtml", ".asp", ".aspx", ".php", ".jsp")  # as servers name what they send
ROWS = (".jsonl", ".json", ".ndjson")
TABLES = (".csv", ".tsv")
ARCHIVES = (".warc",)
SUFFIXES = tuple(f"{kind}{packing}" for kind in (*PLAIN, *PAGES, *ROWS, *TABLES, *ARCHIVES) for packing in PACKINGS)
SUFFIXES += (".parquet",)
ZSTD = b"\x28\xb5\x2f\xfd"
TO_SKIP = b"\x2a\x4d\x18"  # behind one byte: a part of zstd without contents, with which pzstd begins
PACKED_AT_ONCE = 1 << 12  # bytes, which may be a thousand times as many unpacked, and of zstd more
HEAD = 1 << 16  # bytes from which an encoding is told
LARGEST = 2 * LONGEST_TEXT  # bytes of a document; one takes ten times its size while it is described
TOO_LARGE = ("too_large", f"more than {LARGEST >> 20} MB in one document; cut it")
PARSERS = ("zstandard", "warcio", "pyarrow")
MOST_WRONG = 0.01  # of a text's bytes: with fewer it counts as UTF-8 that was damaged
MOST_WRONG_NAMED = 0.001  # of a page's bytes, in the encoding that it names
ASIAN = ("gb18030", "big5hkscs", "hz", "shift_jis", "cp932", "euc_jp", "euc_kr", "cp949")
WESTERN = ("cp125", "iso8859", "koi8")  # one byte a character
HEAD_OF_PAGE = 1 << 12  # bytes in which a page names its encoding
NAMED_ENCODING = re.compile(
    rb"(?:<meta\b[^<>]{0,200}\bcharset|<\?xml\b[^<>]{0,100}\bencoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE
)
EXTRA = 'pip install -e ".[clean]"'


class Raw(NamedTuple):
    """A document as it lies in a file."""

    number: int  # its line, item, row or record, from 1
    kind: str  # "text", "page": bytes of it; "line": bytes of a JSON object; "row": the object; "fault": what is wrong
    value: bytes | dict | object
    n_read: int  # bytes of the file read so far
    file: int = 0  # its number among those that are read together


class Unreadable(Exception):
    """Why a document is dropped before it is judged. args: the reason's name, and what is wrong in words."""


# ---- A file's documents, raw.


def raw_documents(path: Path, boundary: str) -> Iterator[Raw]:
    """Every document of a file, and at the end what is wrong with the file if it is broken.

    boundary: where documents of a .txt end, "file", "blank" or "lines". Raises UserError for a missing package, and for
    a file that the system cannot read.
    """
    number = 0
    try:
        for raw in _raw_documents(path, boundary):
            number = raw.number
            is_too_large = isinstance(raw.value, bytes) and len(raw.value) > LARGEST
            yield raw._replace(kind="fault", value=TOO_LARGE) if is_too_large else raw
    except UserError:
        raise
    except Exception as problem:
        is_of_package = type(problem).__module__.partition(".")[0] in PARSERS  # those have errors of their own
        if not is_of_package and not isinstance(problem, OSError | EOFError | zlib.error | ValueError | RecursionError):
            raise
        if getattr(problem, "errno", None) is not None:
            raise UserError(f"{path}: cannot be read ({problem.strerror}); fix it or give another") from None
        what = f"{str(problem) or type(problem).__name__}; nothing after it is read"
        yield Raw(number + 1, "fault", ("broken_file", what), 0)


def _raw_documents(path: Path, boundary: str) -> Iterator[Raw]:
    kind = kind_of(path)
    if kind == ".parquet":
        size = path.stat().st_size
        for number, (row, share) in enumerate(tables.parquet_rows(path), 1):
            yield Raw(number, "row", row, int(size * share))
        return
    with path.open("rb") as file:
        stream = _opened(path, file)
        for number, name, value in _documents(path, kind, stream, boundary):
            yield Raw(number, name, value, file.tell())


def kind_of(path: Path) -> str:
    """What a file holds, by its name without what it is packed by: .txt, .html …"""
    return ending(path, SUFFIXES).removesuffix(".gz").removesuffix(".zst")


def _documents(path: Path, kind: str, stream: BinaryIO, boundary: str) -> Iterator[tuple[int, str, object]]:
    if kind in PAGES:
        yield 1, "page", stream.read()
    elif kind == ".txt":
        yield from cut_text(stream, boundary)
    elif kind in PLAIN:
        yield from cut_text(stream, "file")
    elif kind in ARCHIVES:
        yield from _archived_pages(path, stream)
    elif kind in TABLES:
        rows = tables.csv_rows(_as_utf_8(stream), tables.SEPARATORS[kind])
        yield from ((number, "row", row) for number, row in enumerate(rows, 1))
    elif opens_array(stream):
        yield from ((number, "row", value) for number, value in array_items(_as_utf_8(stream)))
    else:
        yield from ((number, "line", line) for number, _, line in numbered_lines(stream) if line)


def _opened(path: Path, file: BinaryIO) -> BinaryIO:
    """The unpacked bytes of a file without a BOM; UTF-16 and UTF-32, whose line ends are of several bytes, as UTF-8."""
    stream = file
    magic = file.peek(4)[:4]
    if magic[:2] == GZIP:
        stream = _unpacked(file, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16))
    elif magic == ZSTD or magic[1:] == TO_SKIP:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst needs zstandard; {EXTRA}") from None
        stream = _unpacked(file, zstandard.ZstdDecompressor().decompressobj)
    head = stream.peek()[:HEAD]
    for first_bytes, what in OTHER_KINDS.items():
        if head.startswith(first_bytes):
            raise ValueError(what)
    name = encodings.guess(head) if head.startswith(tuple(encodings.BOMS)) or b"\0" in head[:256] else None
    if name and name.startswith("utf-"):
        stream = encodings.recoded(stream, name)
    if stream.peek(3)[:3] == BOM:
        stream.read(3)
    return stream


class _Unpacked(io.RawIOBase):
    """What is packed in a stream. A break in it is raised only when all that stands before it has been read.

    Python's own reader of gzip gives up what it holds at a break, and zstandard's takes one for the end of the file.
    """

    def __init__(self, stream: BinaryIO, new_part: Callable):
        """new_part: makes what unpacks one part, since a file may be several, one after another."""
        self.stream = stream
        self.new_part = new_part
        self.part = new_part()
        self.has_begun = False  # whether the part has been given some bytes
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready and self._unpack_more():
            pass
        n_bytes = min(len(buffer), len(self.ready))
        buffer[:n_bytes] = self.ready[:n_bytes]
        self.ready = self.ready[n_bytes:]
        return n_bytes

    def _unpack_more(self) -> bool:
        """Unpack the next bytes into `ready`; False at the end of the file. Raises EOFError in the middle of a part."""
        packed = self.part.unused_data  # what stands behind the end of a part
        if self.part.eof:
            self.part = self.new_part()
            self.has_begun = False
        packed = packed or self.stream.read(PACKED_AT_ONCE)
        if not packed:
            if self.has_begun:
                raise EOFError("the packed file ends in the middle")
            return False
        if not self.has_begun:
            packed = packed.lstrip(b"\0")  # zeros may fill up a block of a disk or tape
        if packed:
            self.ready = memoryview(self.part.decompress(packed))
            self.has_begun = True
        return True


def _unpacked(stream: BinaryIO, new_part: Callable) -> BinaryIO:
    return io.BufferedReader(_Unpacked(stream, new_part), UNPACKED_AT_ONCE)


def _as_utf_8(stream: BinaryIO) -> BinaryIO:
    """A stream whose encoding its head tells, as UTF-8. Raises ValueError if it does not."""
    head = stream.peek()
    try:
        encodings.refuse_other_encoding(head)
    except ValueError:
        name = encodings.guess(head)
        return encodings.recoded(stream, name)
    return stream


def _archived_pages(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str, object]]:
    """The pages in a WARC: responses of HTML; what else it holds is passed over."""
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError:
        raise UserError(f"{path}: reading WARC needs warcio; {EXTRA}") from None
    for number, record in enumerate(ArchiveIterator(stream), 1):
        headers = record.http_headers
        if record.rec_type != "response" or headers is None:
            continue
        if "html" in (headers.get_header("Content-Type") or ""):
            url = record.rec_headers.get_header("WARC-Target-URI")
            yield number, "page", {"url": url, "html": record.content_stream().read()}


# ---- Raw → text, and the fields beside it.


def document_of(raw: Raw, field: str) -> tuple[str, dict]:
    """(text, the other fields of its row). Raises Unreadable with the reason."""
    if raw.kind == "fault":
        raise Unreadable(*raw.value)
    if raw.kind == "text":
        return decoded(raw.value), {}
    if raw.kind == "page":
        is_archived = isinstance(raw.value, dict)
        page = raw.value["html"] if is_archived else raw.value
        return text_of_page(decoded(page, encoding_named(page))), {"url": raw.value["url"]} if is_archived else {}
    row = row_of(raw)
    text = row.get(field)
    if field not in row:
        raise Unreadable("no_text", f"key {field!r} is missing; there are {', '.join(map(str, row))[:80] or 'none'}")
    if not isinstance(text, str):
        raise Unreadable("no_text", f"key {field!r} holds no string")
    return text, {key: value for key, value in row.items() if key != field}


def row_of(raw: Raw) -> dict:
    """The object of a "line" or a "row". Raises Unreadable."""
    row = raw.value
    if raw.kind == "fault":
        raise Unreadable(*row)
    if raw.kind == "line":
        try:
            row = json.loads(decoded(raw.value))
        except (ValueError, RecursionError) as problem:
            raise Unreadable("unreadable", f"not JSON ({str(problem)[:80]})") from None
    if not isinstance(row, dict):
        raise Unreadable("unreadable", str(row) if isinstance(row, UserError) else "not a JSON object")
    return row


def writable(row: dict, mended: list[str]) -> dict:
    """The row as UTF-8 can hold it: JSON may escape half a character, a surrogate, in any string and in any key.

    mended: gets "surrogates" if there were some. Raises Unreadable for a row that is nested too deeply to go through.
    """
    try:
        again = _without_surrogates(row)
    except RecursionError:
        raise Unreadable("unreadable", "nested too deeply") from None
    mended += ["surrogates"] if again != row else []
    return again


def _without_surrogates(value):
    if isinstance(value, str):
        return value if value.isascii() else SURROGATES.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value


def decoded(data: bytes, named: str | None = None) -> str:
    """Bytes as text: strictly UTF-8, else in the encoding that they are recognized to be in; never by a guess.

    named: the encoding that a page says it is in. It counts where the bytes fit; after UTF-8, since pages are recoded
    without a change of what they say, and if it has one byte a character after all others, since any bytes are of it.

    GB18030 decodes nearly any bytes, so it counts only if the characters are those of daily use. UTF-8 with a few
    wrong bytes is UTF-8, with U+FFFD for them. Raises Unreadable.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    if named in ASIAN or named == "utf-8":
        text = data.decode(named, "replace")
        if text.count("\ufffd") <= max(MOST_WRONG_NAMED * len(data), 0 if named in ASIAN else 1):
            return text
    text = data.decode("utf-8", "replace")
    n_beyond_ascii = sum(map(data.count, map(bytes, zip(range(0xC2, 0xF5)))))  # first bytes of characters
    if text.count("\ufffd") <= max(MOST_WRONG * n_beyond_ascii, 1) and n_beyond_ascii > 4:
        return text
    name = encodings.guess(data[:HEAD])
    if name is None and named and named.startswith(WESTERN):
        name = named
    if name is None:
        raise Unreadable("undecodable", "neither UTF-8 nor an encoding that is recognized")
    return data.decode(name, "replace")


def encoding_named(page: bytes) -> str | None:
    """The encoding that a page of HTML says it is in, by Python's name; None if it says none that is known."""
    match = NAMED_ENCODING.search(page[:HEAD_OF_PAGE])
    name = match[1].decode().lower() if match else ""
    try:
        name = codecs.lookup(name).name
    except LookupError:
        return None
    # The small ones of a family are named and the large ones meant: a page in “gb2312” has characters of GBK.
    return {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "iso8859-1": "cp1252"}.get(name, name)


def text_of_page(page: str) -> str:
    """The main text of a page of HTML, tables as Markdown. Raises UserError without the package."""
    try:
        import trafilatura
    except ImportError:
        raise UserError(f"reading .html needs trafilatura; {EXTRA}") from None
    text = trafilatura.extract(page, include_comments=False, include_tables=True, deduplicate=False)
    if not text:
        raise Unreadable("no_text", "no main text was found in the page")
    return text
