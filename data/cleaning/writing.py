"""Writes what was kept and what was dropped, each row with the fields that it came with.

DIR/kept-00000.jsonl …   kept documents, in the order of the input; DIR/val/… those for validation
DIR/dropped/<rule>.jsonl   the others, by reason
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cleaning import scores
from data.cleaning.judging import as_line, final_documents, read_judged
from data.cleaning.near_duplicates import times
from data.cleaning.outcomes import Outcomes
from data.cleaning.passes import Piece, in_order, worth_a_pool
from data.cleaning.rules import Rule
from minillm.base.files import write_json_atomically
from minillm.datasets.files.text_files import REPORT

FILE_BYTES = 256 << 20  # of an output file, about


class Files:
    """Output files, numbered, each of about FILE_BYTES."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.number = -1
        self.file = None
        self.n_bytes = 0

    def write(self, data: bytes) -> None:
        """Append whole lines."""
        if not data:
            return
        if self.file is None or self.file.tell() >= FILE_BYTES:
            self.close()
            self.number += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = (self.folder / f"kept-{self.number:05d}.jsonl").open("wb")
        self.file.write(data)
        self.n_bytes += len(data)

    def close(self) -> None:
        """Close the file that is open."""
        if self.file is not None:
            self.file.close()


def remove_old(out: Path) -> None:
    """Delete what an earlier run wrote; first, the report says that the folder is not whole: see `is_cleaned`."""
    write_json_atomically(out / REPORT, {"by_reason": {}, "written_bytes": None})
    for path in (
        out / "report.html",
        *out.glob("kept-?????.jsonl"),
        *out.glob("val/kept-?????.jsonl"),
    ):
        path.unlink(missing_ok=True)
    for path in out.glob("dropped/*.jsonl"):
        path.unlink()


def write_all(out: Path, pieces: list[Piece], judged: list[Path], found: Outcomes, how: tuple, workers: int) -> int:
    """Write every document where it belongs; returns the bytes of what was kept.

    how: (key of the text, rules, recurring lines, repeats), what `rows_of_piece` needs besides the piece.
    """
    remove_old(out)
    kept = {False: Files(out), True: Files(out / "val")}
    dropped = {}
    try:
        tasks = _tasks(pieces, judged, found)
        sources = list(dict.fromkeys(piece.source for piece in pieces))
        for task, (lines, lines_by_reason) in in_order(rows_of_piece, tasks, how, worth_a_pool(sources, workers)):
            kept[task[0].source.is_val].write(lines)
            for name, data in lines_by_reason.items():
                if name not in dropped:
                    (out / "dropped").mkdir(exist_ok=True)
                    dropped[name] = (out / "dropped" / f"{name}.jsonl").open("wb")
                dropped[name].write(data)
    finally:
        for file in (*kept.values(), *dropped.values()):
            file.close()
    return sum(files.n_bytes for files in kept.values())


def _tasks(pieces: list[Piece], judged: list[Path], found: Outcomes) -> Iterator[tuple]:
    """What `rows_of_piece` needs of each piece: reasons, scores and originals, how many documents each is for."""
    for number, (piece, path) in enumerate(zip(pieces, judged, strict=True)):
        documents = slice(found.begins[number], found.begins[number + 1])
        reasons = [found.reasons[reason] for reason in found.reason[documents]]
        facts = [_facts(pieces, found, document) for document in range(documents.start, documents.stop)]
        yield piece, path, reasons, facts, found.copies[documents].tolist()


def _facts(pieces: list[Piece], found: Outcomes, number: int) -> dict:
    """What a document says of its scores, and a copy of the document that is kept in its place."""
    facts = scores.why(found, number)
    of = int(found.original[number])
    if of < 0:
        return facts
    piece, _ = found.place(of)
    place = f"{pieces[piece].source.name(found.file_number[of])}:{found.line[of]}"
    return {**facts, "of": place, "similarity": round(float(found.similarity[number]), 3)}


def rows_of_piece(
    piece: Piece, judged: Path, reasons: list[str], facts: list[dict], copies: list[int], *how
) -> tuple[bytes, dict[str, bytes]]:
    """(lines of the documents kept, reason → lines of those that are not). how: see `write_all`."""
    field, rules, recurring, repeats = how
    kept = []
    dropped: dict[str, list[bytes]] = {}
    arrays = read_judged(judged)
    for number, document in enumerate(final_documents(piece.stem, recurring)):
        about = {"source": piece.source.name(document["file"]), "line": document["number"]}
        if document["mended"]:
            about["mended"] = document["mended"]
        row = document["row"] if document.get("is_whole") else {field: document["text"], **document["row"]}
        reason = reasons[number]
        if reason:
            about |= {**why(reason, rules, arrays, number), **facts[number]}
            about |= {"what": document["bad"][1]} if "bad" in document else {}
            dropped.setdefault(reason, []).append(as_line({**row, "cleaning": about}))
            continue
        flags = [
            rule.name for rule in rules if rule.do == "flag" and rule.holds(arrays["features"][number : number + 1])[0]
        ]
        flags += document.get("flags", [])
        about |= {"flags": flags} if flags else {}
        about |= facts[number]
        about |= {"copies": copies[number]} if copies[number] > 1 else {}
        if "id" not in row:
            row = {**row, **{key: about[key] for key in ("source", "line") if key not in row}}
        is_repeated = repeats and not piece.source.is_val  # a validation text counts once
        n_times = times(copies[number]) if is_repeated else 1
        kept += [as_line({**row, "cleaning": about})] * n_times
    return b"".join(kept), {name: b"".join(lines) for name, lines in dropped.items()}


def why(reason: str, rules: list[Rule], arrays: dict[str, np.ndarray], number: int) -> dict:
    """What a dropped row says of the reason: the value that was measured, and the limit."""
    about = {"rule": reason}
    for rule in rules:
        if rule.name == reason:
            value = arrays["features"][number][rule.column()]
            about |= {"value": round(float(value), 4), "limit": rule.limit()}
    if reason == "contaminated":
        about["value"] = str(arrays["contamination"][number])
    return about
