"""One piece of a file's documents: from raw to mended text, on the disk.

<key>.jsonl   one object a document: file, number, text, row (its other fields), mended, known; or why it cannot be read
<key>.npz     hash of each text, hashes of its lines; written last: without it the piece is not done
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cleaning import sft
from data.cleaning.reading import Raw, Unreadable, document_of, row_of, writable
from data.cleaning.text import words
from data.cleaning.text.characters import KIND, code_points, kind_counts, owners
from data.cleaning.text.lines import cut_lines, line_hashes
from data.cleaning.text.masks import mask
from data.cleaning.text.normalise import SURROGATES, normalise
from minillm.base.files import write_file


class How(NamedTuple):
    """What determines the mended texts, besides the files and the code.

    field: the key of the text. boundary: where documents of a .txt end. is_sft: rows are conversations. masks: whether
    personal data is masked.
    """

    field: str = "text"
    boundary: str = "file"
    is_sft: bool = False
    masks: bool = True


def mend_piece(stem: Path, raws: list[Raw], how: How) -> None:
    """Write the mended documents of a piece beside `stem`."""
    documents = mended_documents(raws, how)
    lines = [np.array(line_hashes(document["text"]), np.uint64) for document in documents]
    arrays = {
        "hashes": np.array([text_hash(document["text"]) for document in documents], np.uint64),
        "lines": np.concatenate([np.zeros(0, np.uint64), *lines]),
        "n_lines": np.array([len(hashes) for hashes in lines], np.int64),
    }
    write_file(stem.with_suffix(".jsonl"), lambda path: write_rows(path, documents))
    write_file(stem.with_suffix(".npz"), lambda path: write_arrays(path, arrays))


def mended_documents(raws: list[Raw], how: How) -> list[dict]:
    """The documents as they are kept on the disk, in their order."""
    if how.is_sft:
        return [sft.mended(raw, how.masks) for raw in raws]
    documents = []
    for raw in raws:
        document = {"file": raw.file, "number": raw.number, "text": "", "row": {}, "mended": [], "size": 0}
        try:
            document["text"], row = document_of(raw, how.field)
            document["row"] = writable(row, document["mended"])
        except Unreadable as problem:
            document["bad"] = [SURROGATES.sub("\ufffd", said) for said in problem.args]  # it may name keys
            _keep_row(document, raw)
        document["size"] = len(document["text"].encode("utf-8", "surrogatepass"))
        documents.append(document)
    _mend(documents, how)
    return documents


def _keep_row(document: dict, raw: Raw) -> None:
    """A row without a text stays whole, for the list of what was dropped."""
    try:
        document["row"] = writable(row_of(raw), []) if raw.kind in ("line", "row") else {}
    except Unreadable:
        document["row"] = {}


def _mend(documents: list[dict], how: How) -> None:
    """Mend the texts in place, and note what was done and found: `known`, as `features` wants it."""
    points, borders = code_points([document["text"] for document in documents])
    damaged = kind_counts(points, owners(borders), len(documents))[:, KIND["damaged"]]
    for document, n_damaged in zip(documents, damaged, strict=True):
        before = document["text"]
        text, mended = normalise(before)
        document["mended"] = list(dict.fromkeys([*document["mended"], *mended]))
        masked, n_personal = mask(text)
        if how.masks and n_personal:
            text = masked
            document["mended"].append("personal_data")
        is_stub = bool(words.STUB.search(text[-200:]))
        n_before = len(text)
        text, n_cut, n_of_links = cut_lines(text)
        document["mended"] += ["lines"] if n_cut else []
        document["mended"] += ["links"] if n_of_links else []
        document["text"] = text
        document["known"] = [
            round(n_cut / max(n_before, 1), 6),
            n_personal,
            round(int(n_damaged) / max(len(before), 1), 6),
            int(is_stub),
        ]


# ---- Files of pieces.


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSONL, one object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict]:
    """The rows that `write_rows` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays of plain numbers in one .npz."""
    with path.open("wb") as file:
        np.savez(file, **arrays)


def text_hash(text: str) -> int:
    """64 bits of a text; spaces and case do not count. Among ten million texts two fall together once in 370,000."""
    data = "".join(text.split()).lower().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
