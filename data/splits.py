"""Whether training and validation each get a document: known before the long work.

Documents are read only until one of each split is found. That is soon: of documents of which one in a hundred is for
validation, about a hundred are read. All are read only if a split gets none of them.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from data.held_out import document_hash, is_held_out
from data.sources import Source
from data.tokenize_files import bad_line_error, fault, is_val
from minillm.base.errors import UserError
from minillm.datasets.files.text_files import text_of


@dataclass
class Look:
    """What was found in the documents that were read."""

    documents: Counter[str] = field(default_factory=Counter)  # split → how many
    lowest: int = 1 << 64  # hash of them
    highest: int = -1
    n_bad: int = 0
    first_bad: str = ""


def share_for_validation(sources: list[Source], share: float) -> float:
    """The share of documents for validation, raised if no document would be: so far that one falls below it.

    That is the document with the lowest hash. Raises UserError if no document would be left to train on, and for a
    line that cannot be read, unless such are skipped.
    """
    look = _look(sources, {"train", "val"} if share else {"train"})
    if look.documents["train"] == 0 and look.documents["val"]:
        raise UserError(f"--val_fraction {share}: all documents fell into the validation split; choose a lower one")
    _refuse_nothing_to_train_on(look)
    if look.documents["val"] or not share:
        return share
    if look.lowest == look.highest:
        raise UserError(
            "--input: there is one document only, or copies of one, so none is left for validation; name --val_input "
            "files, cut the text into more documents (--split), or give --val_fraction 0"
        )
    raised = math.nextafter(look.lowest / 2**64, 1)  # the next number above
    print(
        f"none of {look.documents['train']:,} documents falls below --val_fraction {share}: raised to {raised:.4g}, so "
        "that one is for validation"
    )
    return raised


def check_files_of_each(train: list[Source], val: list[Source]) -> None:
    """Raises UserError if the files for training, or those for validation, hold no document."""
    _refuse_nothing_to_train_on(_look(train, {"train"}))
    look = _look(val, {"val"})
    if not look.documents["val"]:
        names = ", ".join(source.name for source in val[:5])
        raise UserError(f"--val_input {names}: no document is in it{_left_out(look)}; give another, or none")


def _look(sources: list[Source], wanted: set[str]) -> Look:
    """Read documents until one of each wanted split is found."""
    look = Look()
    for source in sources:
        options = source.options
        for record in source.records():
            try:
                data = text_of(record.kind, record.raw, options.field).encode()
            except UserError as error:
                if options.on_bad_line == "error":
                    raise bad_line_error(source.name, fault(record, error)) from None
                look.n_bad += 1
                look.first_bad = look.first_bad or f"{source.name}, {fault(record, error)}"
                continue
            if not data or (options.held_out and is_held_out(data, options.held_out)):
                continue
            look.documents["val" if is_val(data, options) else "train"] += 1
            look.lowest = min(look.lowest, document_hash(data))
            look.highest = max(look.highest, document_hash(data))
            if wanted <= look.documents.keys():
                return look
    return look


def _refuse_nothing_to_train_on(look: Look) -> None:
    if not look.documents["train"]:
        raise UserError(f"--input: no document is left to train on{_left_out(look)}; give other files")


def _left_out(look: Look) -> str:
    """How many bad lines were left out, and the first of them."""
    return f" ({look.n_bad:,} bad lines left out, the first: {look.first_bad})" if look.n_bad else ""
