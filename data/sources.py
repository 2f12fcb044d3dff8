"""What is to be tokenized: input files with the options that concern them, and groups of them that share a bin."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from minillm.base.errors import UserError
from minillm.base.files import sha256
from minillm.base.printing import visible
from minillm.datasets.files import encodings
from minillm.datasets.files.text_files import BOUNDARIES, Record, ending, is_txt, records
from minillm.tokenizer.tokenizer import Tokenizer

ON_BAD_LINE = ("error", "skip")
WRAPS = ("eos", "bos_eos")
SMALL = 16 << 20  # bytes; a smaller file shares its bin with its neighbours
MOST_GROUPS = 128  # with more, what counts as small is doubled: training keeps every bin open
GZIP_RATIO = 3  # assumed size of a text relative to its .gz


def checksum(value) -> str:
    """SHA-256 of any value that JSON can represent."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Options:
    """What determines the tokens, besides the files and the tokenizer; workers need it too.

    boundary: "blank", "lines" or "file": where a document of a .txt ends. field: where JSON or parquet has the text.
    encoding: of .txt and JSON. allow_lossy: whether the tokenizer may lose more than MOST_LOST of a text.
    on_bad_line: "error", or "skip" to leave out and count documents that cannot be read. val_fraction: each document
    whose hash falls below it is for validation, so that copies of a document never fall on both sides. wrap: "eos" ends
    each document in eos; "bos_eos" also begins it with bos, as other tools begin a text; None: `prepare` decides.
    held_out: a file of hashes of documents that are left out, since they are for validation, and its checksum.
    """

    boundary: str = "blank"
    field: str = "text"
    on_bad_line: str = "error"
    val_fraction: float = 0.01
    encoding: str = encodings.UTF_8
    allow_lossy: bool = False
    wrap: str | None = None
    held_out: tuple[str, str] | None = None

    def recorded(self) -> dict:
        """What meta.json says of them: in bins of UTF-8 just what it said before there were other encodings."""
        left_out = {"allow_lossy", "held_out"} | ({"encoding"} if encodings.is_utf_8(self.encoding) else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def check(self) -> None:
        """Raises UserError for a value that is not possible."""
        encodings.check_encoding(self.encoding)
        for option, value, choices in (
            ("--split", self.boundary, BOUNDARIES),
            ("--on_bad_line", self.on_bad_line, ON_BAD_LINE),
            ("--wrap", self.wrap or WRAPS[0], WRAPS),
        ):
            if value not in choices:
                raise UserError(f"{option} {value}: choose one of {', '.join(choices)}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction}: choose one from 0 to below 1")

    def of(self, path: Path) -> str:
        """Those options that determine which tokens this file gives."""
        documents = f"split {self.boundary}" if is_txt(path) else f"field {self.field}"
        if not (encodings.is_utf_8(self.encoding) or ending(path) == ".parquet"):
            documents += f", encoding {self.encoding}"
        if self.held_out:
            documents += f", without validation documents {self.held_out[1]}"
        return f"{documents}, val_fraction {self.val_fraction}, wrap {self.wrap}"


class Source(NamedTuple):
    """An input file."""

    path: Path
    size: int  # bytes
    sha256: str
    options: Options  # of a file that is train or validation as a whole, val_fraction is 0 or 1

    @property
    def name(self) -> str:
        """The path as it is written down and shown; it may hold any bytes."""
        return visible(str(self.path))

    def records(self) -> Iterator[Record]:
        """Every document of the file."""
        options = self.options
        return records(self.path, boundary=options.boundary, field=options.field, encoding=options.encoding)

    @property
    def text_size(self) -> int:
        """About how many bytes of text the file holds."""
        return self.size * (GZIP_RATIO if ending(self.path).endswith((".gz", ".parquet")) else 1)


class Group(NamedTuple):
    """Input files in a row whose tokens go into one bin of each split: a large file alone, or several small ones."""

    key: str  # SHA-256 over all that determines the tokens; no file's name is part of it, so that files may be moved
    sources: list[Source]


def read_sources(files: list[Path], options: Options, n_train: int | None) -> list[Source]:
    """n_train: files from this number on are for validation; None: each file has its share of both."""
    each_options = [options] * len(files)
    if n_train is not None:
        for_train, for_val = replace(options, val_fraction=0.0), replace(options, val_fraction=1.0)
        each_options = [for_train if number < n_train else for_val for number in range(len(files))]
    sizes = [file.stat().st_size for file in files]
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        return list(map(Source, files, sizes, pool.map(sha256, files), each_options))


def check_unchanged(sources: Iterable[Source]) -> None:
    """Raises UserError for a file that is not what it was when it was hashed: nobody knows what of it was read."""
    for source in sources:
        if source.path.stat().st_size != source.size or sha256(source.path) != source.sha256:
            raise UserError(f"{source.path}: was changed while it was read; run the same command again")


def tokenizer_key(tokenizer: Tokenizer) -> str:
    """What of a tokenizer determines the tokens."""
    return checksum([tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id])


def grouped(sources: Iterable[Source], tokenizer: Tokenizer) -> list[Group]:
    """The files in their order, in groups."""
    groups = []
    times = Counter()  # how often a key has come before: two groups may hold the same texts
    for members in _neighbours(list(sources)):
        texts = [[source.sha256, source.options.of(source.path)] for source in members]
        key = checksum([tokenizer_key(tokenizer), texts])
        groups.append(Group(f"{key[:32]}-{times[key]}", members))
        times[key] += 1
    return groups


def _neighbours(sources: list[Source]) -> list[list[Source]]:
    """Cuts the list into groups: a file that is not small is one by itself, small files are gathered.

    Where a group of small files ends is decided by each file alone: after a file of size s with the probability
    s / small, drawn from its hash. So a group has about `small` bytes, and when a file is changed, added or deleted, no
    group but its own is another:

        before   a b c d | e f | g h i        after g was changed   a b c d | e f | G h i
                                              after c was added     a b C c d | e f | g h i
    """
    small = SMALL
    while sum(source.size for source in sources) > MOST_GROUPS * small:
        small *= 2
    groups: list[list[Source]] = []
    group_has_ended = True
    for source in sources:
        is_large = source.size >= small
        if group_has_ended or is_large:
            groups.append([])
        groups[-1].append(source)
        draw = int(source.sha256[:12], 16) / 16**12  # 0 … 1
        group_has_ended = is_large or draw < source.size / small
    return groups
