"""Questions with their answers, from rows of instructions, and the rules by which an answer counts as right."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from minillm.base.errors import UserError
from minillm.datasets.files import json_rows
from minillm.datasets.messages import ANSWERS, conversations, first_of, is_learned, is_missing, list_of


def read_questions_of(paths: Iterable[str | Path], limit: int, **how) -> list[dict]:
    """What `read_questions` finds in several files, one after the other; limit: of all of them together."""
    questions: list[dict] = []
    for path in paths:
        questions += read_questions(path, max(1, limit - len(questions)), **how)
    return questions[:limit]


def read_questions(path: str | Path, limit: int | None = None, **how) -> list[dict]:
    """Rows of an instruction file, each with a key "messages", of which the last is the answer, and a key "check".

    That is number, unless the row says another, where the answer is one or ends in one behind "####". path: as
    `open_rows` reads. limit: at most this many rows, the first. how: on_bad_line and encoding, see `Reading`.
    Raises UserError with the row's number, and UnsupportedError for a row without a conversation.
    """
    questions: list[dict] = []
    reading = json_rows.Reading(**how)
    with json_rows.open_rows(Path(path), reading.encoding) as file:
        for number, _, line in json_rows.numbered_lines(file):
            try:
                questions += _questions_in(json_rows.parse_line(line))
            except UserError as problem:
                if reading.on_bad_line == "error":
                    raise type(problem)(f"{path}, row {number}: {problem}") from None
            if limit is not None and len(questions) >= limit:
                break
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions[:limit]


def _questions_in(row: dict) -> list[dict]:
    """The row once for each conversation in it. Raises UserError with the reason if one is not a question."""
    questions = []
    row, is_number = _with_answer_as_text(row)
    for messages in conversations(row):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError("does not end with an assistant's answer after a question")
        if messages[-1]["content"].strip() and not is_learned(messages[-1]):
            raise UserError("its answer is marked as not to be learned, so it is not the right one")
        right_answer = messages[-1]["content"]
        check = row.get("check")
        if is_missing(check):  # the last number of both is compared: what leads to it may be said otherwise
            check = "number" if is_number else check_of(final_answer(right_answer) or "")
        if check not in list(CHECKS):  # a list, since the value may have no hash
            raise UserError(f"check {check!r}: choose one of {', '.join(CHECKS)}")
        refuse_incomparable(check, right_answer)
        questions.append({**row, "messages": messages, "check": check})
    return questions


def _with_answer_as_text(row: dict) -> tuple[dict, bool]:
    """The row with the answer to its question as a text, and whether it was a number of JSON."""
    name = first_of(row, ANSWERS) if isinstance(row, dict) and not list_of(row) else None
    value = row[name] if name else None
    if type(value) not in (int, float) or is_missing(value):
        return row, False
    return {**row, name: number_as_text(value)}, True


# ---- What the right answer is.


def final_answer(answer: str) -> str | None:
    """What follows "####", if that begins the last line or only a number follows: elsewhere it is Markdown.

    So GSM8K ends its answers, each of which tells first how one comes to it (Cobbe et al. 2021).
    """
    before, mark, final = answer.rpartition(FINAL_ANSWER)
    final = final.strip()
    begins_line = not before or before.endswith("\n")
    is_last = bool(mark and final) and "\n" not in final
    return final if is_last and (begins_line or NUMBER.fullmatch(final)) else None


def check_of(answer: str) -> str:
    """The usual rule for an answer that is given by itself."""
    return "number" if NUMBER.fullmatch(answer.strip()) else "exact"


def number_as_text(value: float) -> str:
    """A whole number may be a float, which pandas makes of a column with a gap."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


# ---- Whether an answer is right.

FINAL_ANSWER = "####"  # stands before it
FINAL = ".。!！?？;；,，、"  # punctuation at the end of an answer does not count
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z])-)?\d+(?:,\d{3})*(?:\.\d+)?")  # the hyphen of 10-12 is no minus
BETWEEN_WORDS = re.compile(r"[\s,，、;；.。:：]+|和")


def _plain(text: str) -> str:
    """The text with single spaces and no final punctuation."""
    return " ".join(text.split()).rstrip(FINAL + " ")


def _last_number(text: str) -> float | None:
    """The last number in a text; None if there is none."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> set[str]:
    """The items listed in a text: what is between spaces and punctuation, without "and"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return set(BETWEEN_WORDS.split(text)) - {"", "and"}


CHECKS = {"exact": _plain, "number": _last_number, "words": _words}  # name → what is compared


def refuse_incomparable(check: str, right_answer: str) -> None:
    """Raises UserError for a right answer in which a rule finds nothing to compare: no answer could equal it."""
    if CHECKS[check](right_answer) is None:
        raise UserError(f"its right answer {right_answer!r:.40} has no number, which the check {check!r} compares")


def is_right(row: dict, answer: str) -> bool:
    """Whether `answer` equals the row's last message, compared by the rule in "check".

    exact: the same text up to spaces and final punctuation; number: the same last number; words: the same set.
    """
    return agrees(row.get("check", "exact"), row["messages"][-1]["content"], answer)


def agrees(check: str, right_answer: str, answer: str) -> bool:
    """Whether an answer equals the right one by the rule `check`, a name in CHECKS."""
    compared = CHECKS[check]
    expected = compared(right_answer)
    given = compared(answer)
    return given is not None and expected == given
