"""How good a model is: reading any text for `validation.Validation`, and counting questions answered exactly."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minillm import UserError, readers
from minillm.generate import GREEDY, generate
from minillm.messages import conversations as conversations_in
from minillm.model import Transformer
from minillm.tokenizer import Tokenizer

ASKED_AT_ONCE = 128  # questions per batch
LONGEST_ANSWER = 64  # tokens, unless the caller says otherwise
FINAL = ".。!！?？;；,，、"  # punctuation at the end of an answer does not count


class TextTokens(NamedTuple):
    """A text file's tokens, with the attributes that `validation.Validation` reads from `TokenBins`."""

    arrays: list[np.ndarray]  # one, int64: each document's tokens and eos, after bos if texts begin with it
    eos_id: int
    start_id: int
    path: Path


def read_text(path: Path, tokenizer: Tokenizer, *, split: str = "blank", field: str = "text") -> TextTokens:
    """Tokenize the documents of a .txt, .jsonl, .json or .parquet file (also .gz) as `data/prepare.py` would.

    split: where documents of a .txt end: "blank" lines, every one of its "lines", or with the "file".
    """
    files = readers.find_files([path])
    documents = [text for file in files for text, _ in readers.texts_of(file, split=split, field=field) if text]
    if not documents:
        raise UserError(f"{path}: holds no text")
    start, end = tokenizer.start_id, tokenizer.eos_id
    begin = [start] if start != end else []
    ids = [t for tokens in tokenizer.encode_many(documents) for t in (*begin, *tokens, end)]
    return TextTokens([np.array(ids, dtype=np.int64)], end, start, Path(path))


def read_questions(path: str | Path, limit: int | None = None) -> list[dict]:
    """Rows of an instruction file, each with an added key "messages", of which the last is the answer.

    path: .jsonl or .json, also .gz. limit: at most this many rows, the first. Raises UserError with the row's number,
    and UnsupportedError for a row without a conversation.
    """
    rows = []
    with readers.open_rows(Path(path)) as file:
        for number, _, line in readers.numbered_lines(file):
            try:
                row = readers.parse_line(line)
                for messages in conversations_in(row):
                    if len(messages) < 2 or messages[-1]["role"] != "assistant":
                        raise UserError("does not end with an assistant's answer after a question")
                    if row.get("check", "exact") not in tuple(CHECKS):  # it may be a list, which has no hash
                        raise UserError(f"check {row['check']!r}: choose one of {', '.join(CHECKS)}")
                    rows.append({**row, "messages": messages})
            except UserError as problem:
                raise type(problem)(f"{path}, row {number}: {problem}") from None
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise UserError(f"{path}: holds no question")
    return rows[:limit]


def _plain(text: str) -> str:
    """The text with single spaces and no final punctuation."""
    return " ".join(text.split()).rstrip(FINAL + " ")


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", unicodedata.normalize("NFKC", text).replace("−", "-"))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> set[str]:
    """The items listed in a text: what is between spaces and punctuation, without "and"."""
    words = re.split(r"[\s,，、;；.。:：]+|和", unicodedata.normalize("NFKC", text).casefold())
    return set(words) - {"", "and"}


CHECKS = {"exact": _plain, "number": _last_number, "words": _words}


def is_right(row: dict, answer: str) -> bool:
    """Whether `answer` equals the row's last message, compared by the rule in "check".

    exact: the same text up to spaces and final punctuation; number: the same last number; words: the same set.
    """
    reduce = CHECKS[row.get("check", "exact")]
    expected, given = reduce(row["messages"][-1]["content"]), reduce(answer)
    return given is not None and expected == given


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Iterable[list[dict]],
    *,
    template: str = "auto",
    max_new_tokens: int = LONGEST_ANSWER,
) -> list[str | None]:
    """The greedy answer to each conversation, in their order; None where one fills the model's context.

    conversations: messages up to the question. template: see `Tokenizer.encode_chat`.
    """
    prompts = [
        tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)[0] for messages in conversations
    ]
    found: list[str | None] = [None] * len(prompts)
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < model.context]
    short.sort(key=lambda i: len(prompts[i]))  # like lengths together: little padding
    for begin in range(0, len(short), ASKED_AT_ONCE):
        batch = short[begin : begin + ASKED_AT_ONCE]
        done = generate(
            model, [prompts[i] for i in batch], max_new_tokens, sampling=GREEDY, stop_ids=[tokenizer.eos_id]
        )
        for i, completion in zip(batch, done, strict=True):
            found[i] = tokenizer.decode(completion.tokens)
    return found


@torch.no_grad()
def exact_match(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[dict],
    *,
    template: str = "auto",
    max_new_tokens: int = LONGEST_ANSWER,
) -> dict[str, tuple[int, int]]:
    """(right, asked) for each family of questions (rows of `read_questions`), answered greedily.

    A question that does not fit into the model's context counts as asked and wrong; a line says how many did not.
    """
    asked = [row["messages"][:-1] for row in questions]
    said = answers(model, tokenizer, asked, template=template, max_new_tokens=max_new_tokens)
    if too_long := said.count(None):
        print(f"{too_long} of {len(said)} questions fill the context of {model.context} tokens: counted as wrong")
    scores: dict[str, tuple[int, int]] = {}
    for row, answer in zip(questions, said, strict=True):
        family = str(row.get("family", "all"))  # perhaps a number
        right, n = scores.get(family, (0, 0))
        scores[family] = (right + (answer is not None and is_right(row, answer)), n + 1)
    return dict(sorted(scores.items()))


def with_total(scores: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The scores and, if there are several, their sum as "total"."""
    return {**scores, "total": tuple(map(sum, zip(*scores.values(), strict=True)))} if len(scores) > 1 else scores


def table(scores: dict[str, tuple[int, int]]) -> str:
    """Exact-match scores as lines for the terminal, their sum last."""
    rows = with_total(scores)
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {n and right / n:6.1%}  ({right}/{n})" for name, (right, n) in rows.items())
