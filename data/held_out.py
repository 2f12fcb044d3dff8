"""Documents for validation that files of their own hold: no copy of one is trained on."""

import contextlib
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.sources import Source
from minillm.base.errors import UserError
from minillm.base.files import write_file
from minillm.datasets.files.text_files import text_of

NAME = "held_out.u64"  # in the folder of the bins: the hashes, sorted, 8 bytes each


def document_hash(data: bytes) -> int:
    """64 bits of a document, by its UTF-8 bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def write_hashes(sources: Iterable[Source], folder: Path) -> str:
    """Write the hashes of all documents of these files into the folder; returns the path of that file."""
    hashes = []
    for source in sources:
        for record in source.records():
            with contextlib.suppress(UserError):  # a bad line is reported when it is tokenized
                hashes.append(document_hash(text_of(record.kind, record.raw, source.options.field).encode()))
    data = np.unique(np.array(hashes, "<u8")).tobytes()
    write_file(folder / NAME, lambda path: path.write_bytes(data))
    return str(folder / NAME)


@lru_cache(maxsize=1)
def _hashes(path: str, checksum: str) -> np.ndarray:
    """checksum: of the file, so that another one is read anew."""
    return np.fromfile(path, "<u8")


def is_held_out(data: bytes, held_out: tuple[str, str]) -> bool:
    """Whether the document with these UTF-8 bytes is one of those. held_out: the file of hashes, and its checksum."""
    hashes = _hashes(*held_out)
    place = int(np.searchsorted(hashes, np.uint64(document_hash(data))))
    return place < len(hashes) and int(hashes[place]) == document_hash(data)


def checksum_of(path: str) -> str:
    """What of these hashes decides which documents are left out."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
