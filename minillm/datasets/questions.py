"""Questions with their answers, from rows of instructions."""

from pathlib import Path

from minillm.base.errors import UserError
from minillm.datasets import json_rows
from minillm.datasets.messages import conversations as conversations_in

CHECKS = ("exact", "number", "words")  # how an answer may be compared (evaluation/checks.py)


def read_questions(path: str | Path, limit: int | None = None) -> list[dict]:
    """Rows of an instruction file, each with an added key "messages", of which the last is the answer.

    path: .jsonl or .json, also .gz. limit: at most this many rows, the first. Raises UserError with the row's number,
    and UnsupportedError for a row without a conversation.
    """
    rows = []
    with json_rows.open_rows(Path(path)) as file:
        for number, _, line in json_rows.numbered_lines(file):
            try:
                row = json_rows.parse_line(line)
                for messages in conversations_in(row):
                    if len(messages) < 2 or messages[-1]["role"] != "assistant":
                        raise UserError("does not end with an assistant's answer after a question")
                    if row.get("check", "exact") not in CHECKS:  # it may be a list, which has no hash
                        raise UserError(f"check {row['check']!r}: choose one of {', '.join(CHECKS)}")
                    rows.append({**row, "messages": messages})
            except UserError as problem:
                raise type(problem)(f"{path}, row {number}: {problem}") from None
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise UserError(f"{path}: holds no question")
    return rows[:limit]
