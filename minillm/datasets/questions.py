"""Questions with their answers, from rows of instructions."""

from pathlib import Path

from minillm.base.errors import UserError
from minillm.datasets import json_rows
from minillm.datasets.checks import CHECKS
from minillm.datasets.messages import conversations, is_learned


def read_questions(path: str | Path, limit: int | None = None) -> list[dict]:
    """Rows of an instruction file, each with an added key "messages", of which the last is the answer.

    path: .jsonl or .json, also .gz. limit: at most this many rows, the first. Raises UserError with the row's number,
    and UnsupportedError for a row without a conversation.
    """
    questions: list[dict] = []
    with json_rows.open_rows(Path(path)) as file:
        for number, _, line in json_rows.numbered_lines(file):
            try:
                questions += _questions_in(json_rows.parse_line(line))
            except UserError as problem:
                raise type(problem)(f"{path}, row {number}: {problem}") from None
            if limit is not None and len(questions) >= limit:
                break
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions[:limit]


def _questions_in(row: dict) -> list[dict]:
    """The row once for each conversation in it. Raises UserError with the reason if one is not a question."""
    questions = []
    for messages in conversations(row):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError("does not end with an assistant's answer after a question")
        if messages[-1]["content"].strip() and not is_learned(messages[-1]):
            raise UserError("its answer is marked as not to be learned, so it is not the right one")
        if row.get("check", "exact") not in list(CHECKS):  # a list, since the value may have no hash
            raise UserError(f"check {row['check']!r}: choose one of {', '.join(CHECKS)}")
        questions.append({**row, "messages": messages})
    return questions
