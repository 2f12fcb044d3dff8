"""One piece of documents, mended: what recurs is cut, and each is described by what the decisions are made from.

<key>.judged-<of>.npz   of each document its features, language, hash, sizes, signature, what was mended, why it is
                        bad; `of` is a checksum of what they depend on besides the piece
"""

import json
from pathlib import Path

import numpy as np

from data.cleaning.mending import read_rows, text_hash, write_arrays
from data.cleaning.near_duplicates import SHINGLE, signatures
from data.cleaning.text.features import NAMES, features, languages
from data.cleaning.text.lines import cut_recurring
from data.decontaminate import Index, found_in, tokens_of
from minillm.base.files import write_file

SHINGLE_OF_PROMPTS = 3  # tokens
MENU_FROM = 3  # documents that share a menu, from which it does not count where they are compared


def judge_piece(
    stem: Path,
    judged: Path,
    recurring: np.ndarray,
    index: Index | None,
    with_signatures: bool,
    is_sft: bool,
    menus: np.ndarray,
) -> None:
    """Write what describes the documents of a piece to the file `judged`.

    recurring: hashes of lines to be cut, sorted. index: of rows that no training text may hold. is_sft: documents are
    conversations, of which the prompts are compared: the first line, and what follows it. menus: hashes of lines, runs
    of which do not count where texts are compared, sorted.
    """
    documents = final_documents(stem, recurring)
    texts = [document["text"] for document in documents]
    known = np.array([document.get("known", (0, 0, 0, 0)) for document in documents], float).reshape(-1, 4)
    matches = found_in(index, texts) if index is not None else [[] for _ in texts]
    arrays = {
        "features": np.zeros((len(texts), len(NAMES)), np.float32) if is_sft else features(texts, known),
        "language": languages(texts),
        "hashes": np.array([text_hash(text) for text in texts], np.uint64),
        "size": np.array([len(text.encode()) for text in texts], np.int64),
        "file_number": np.array([document["file"] for document in documents], np.int32),
        "line": np.array([document["number"] for document in documents], np.int64),
        "read": np.array([document["size"] for document in documents], np.int64),
        "bad": np.array([document["bad"][0] if "bad" in document else "" for document in documents], np.str_),
        "mended": np.array([",".join(document["mended"]) for document in documents], np.str_),
        "flags": np.array([",".join(document.get("flags", [])) for document in documents], np.str_),
        "contamination": np.array([found[0].run if found else "" for found in matches], np.str_),
    }
    if with_signatures and is_sft:
        prompts = [document.get("prompt", "").partition("\n") for document in documents]
        first_lines, below = [first for first, _, _ in prompts], [rest for _, _, rest in prompts]
        arrays["signatures"] = signatures(first_lines, SHINGLE_OF_PROMPTS)
        arrays["signatures_below"] = signatures(below, SHINGLE_OF_PROMPTS)
        n_tokens = [[len(tokens_of(text).hashes) for text in part] for part in (first_lines, below)]
        arrays["n_tokens"] = np.array(n_tokens, np.int64).T
        arrays["context"] = np.array([text_hash(document.get("context", "")) for document in documents], np.uint64)
    elif with_signatures:
        own = _own_lines(stem, menus)
        arrays["signatures"] = signatures([cut_recurring(text, own, cuts_alone=False).text for text in texts], SHINGLE)
    write_file(judged, lambda path: write_arrays(path, arrays))


def final_documents(stem: Path, recurring: np.ndarray) -> list[dict]:
    """The documents of a piece without the lines that recur; "known" and "mended" tell of them."""
    documents = read_rows(stem.with_suffix(".jsonl"))
    if not len(recurring):
        return documents
    hashes = _own_lines(stem, recurring)
    with np.load(stem.with_suffix(".npz")) as arrays:
        is_recurring = np.isin(arrays["lines"], recurring)
        owner = np.repeat(np.arange(len(documents)), arrays["n_lines"])
    for number in np.unique(owner[is_recurring]):
        document = documents[number]
        size = len(document["text"])
        document["text"], n_in_runs, n_alone = cut_recurring(document["text"], hashes)
        if n_in_runs or n_alone:
            document["mended"].append("recurring_lines")
            document["known"][0] += n_alone / size  # a text below a long menu is no worse for it
    return documents


def _own_lines(stem: Path, hashes: np.ndarray) -> set[int]:
    """Those of the hashes that lines of a piece have."""
    with np.load(stem.with_suffix(".npz")) as arrays:
        return set(np.intersect1d(arrays["lines"], hashes).tolist())


def read_judged(judged: Path) -> dict[str, np.ndarray]:
    """The arrays that `judge_piece` wrote."""
    with np.load(judged) as arrays:
        return dict(arrays)


def as_line(row: dict) -> bytes:
    """A row as a line of JSONL."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
