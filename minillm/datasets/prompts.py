"""Prompt files: what a model is asked while it learns from rewards, and what the reward needs to know.

A row has a prompt in any form that messages.py reads, with or without an answer. The answer is a reference for the
reward function, never learned. All columns of the row reach the reward function; two of them in one form:

    row["answer"]   the reference as a text, if there is one: the answer beside a prompt, what follows "####" on the
                    last line of GSM8K's (Cobbe et al. 2021), `reward_model.ground_truth` in verl's rows, the last
                    message of a conversation that ends with the assistant's, or a preference's chosen answer
    row["check"]    how it is compared (questions.py); if the row does not say: number where the answer is one of JSON,
                    or "####" or verl gives one, else exact
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.base.errors import UnsupportedError, UserError
from minillm.datasets.files.json_rows import refuse_wrong_bytes
from minillm.datasets.files.row_files import PLACE, RowFiles
from minillm.datasets.messages import (
    ANSWERS,
    ASSISTANT,
    BELOW_QUESTION,
    GOOD_IF,
    KINDS,
    LISTS,
    QUESTIONS,
    SWITCH,
    SYSTEMS,
    conversations,
    first_of,
    is_absent,
    is_missing,
    list_of,
)
from minillm.datasets.packing import shuffled
from minillm.datasets.preference_forms import PAIR, preference
from minillm.datasets.questions import check_of, final_answer, number_as_text

IN_PROMPT = (*LISTS, *QUESTIONS, *BELOW_QUESTION, *SYSTEMS, "history", "tools", "images", "videos", "audios")
VERL = "reward_model"


class Prompt(NamedTuple):
    """number: of the prompt in the data. ids: its tokens, with what opens an answer. text: the last question.

    row: all columns, "answer" and "check" as said above. messages: the whole prompt, as a conversation.
    """

    number: int
    ids: list[int]
    text: str
    row: dict
    messages: tuple[dict, ...] = ()


class PromptRows:
    """Prompt files, epoch after epoch; the prompt at a position is a pure function of (seed, position).

    A first pass reads and tokenizes everything once and keeps each prompt's place in its file; its row is read again
    when it is asked for.
    """

    def __init__(
        self,
        paths: str | Path | list[str | Path],
        tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        template: str = "auto",
        room: int = 1,
        check_row: Callable[[dict], None] | None = None,
        **reading,
    ):
        """paths: files as `open_rows` reads them. seq_len: tokens of a prompt and its answer. room: those that an
        answer needs; a longer prompt is dropped. check_row: raises UserError for columns, as `prompt_of` gives them,
        that are a bad row all the same. reading: on_bad_line and encoding, see `Reading`. Raises UserError.
        """
        if seq_len <= room:
            raise UserError(f"--seq_len {seq_len}: an answer needs {room} positions, and a prompt some too; raise it")
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.template = template
        self.room = room
        self.check_row = check_row
        self.files = RowFiles(paths, **reading)
        self.counts = self.files.counts
        self.first_texts = self.files.first_texts
        self.order: tuple[int, np.ndarray] | None = None  # of the last epoch asked for

        self.index = bytearray()  # PLACE of each prompt
        self.families: set[str] = set()  # what the rows say under "family"
        self.files.scan(self._read, "prompts")
        self.index = np.frombuffer(self.index, dtype=PLACE)
        self.rows_per_epoch = len(self.index)
        self.fingerprint = self.files.fingerprint
        if self.counts["too long"]:  # which of the lines are prompts then depends on the room that answers take
            self.fingerprint += f" {self.rows_per_epoch}"
        if not self.rows_per_epoch:
            remedy = "; lower --max_new_tokens or, in training, raise --seq_len" if self.counts["too long"] else ""
            raise UserError(f"{self.files.names}: holds no prompt that can be asked ({self.summary()}){remedy}")

    def total_rows(self, epochs: float) -> int:
        """How many prompts these epochs have, rounded up: the `end` of a run."""
        return math.ceil(epochs * self.rows_per_epoch)

    def rows(self, positions: np.ndarray, end: int | None = None) -> list[Prompt]:
        """The prompts at these data positions, (B,) int; those at or beyond `end` are left out.

        Raises UserError if a line that is read again is not what it was.
        """
        return [self._prompt_at(p) for p in np.asarray(positions).tolist() if end is None or p < end]

    def summary(self) -> str:
        """One line: rows read, prompts kept and dropped, their tokens, how many have an answer."""
        counts = self.counts
        dropped = [f"{counts['too long']:,} dropped (no room for an answer of {self.room:,} tokens)"]
        dropped = dropped if counts["too long"] else ["0 dropped"]
        if counts["bad rows"]:
            dropped.append(f"{counts['bad rows']:,} bad rows skipped")
        line = (
            f"{counts['rows']:,} rows: {len(self.index):,} prompts kept, {', '.join(dropped)}; {counts['tokens']:,} "
            f"tokens, the longest has {counts['longest']:,}; {counts['answers']:,} with a right answer"
        )
        if 0 < len(self.index) < counts["too long"]:
            line += (
                "\nmore prompts are too long than are kept: a lower --max_new_tokens keeps more, or, in training, a "
            )
            line += "longer --seq_len"
        return line

    def _prompt_at(self, position: int) -> Prompt:
        epoch, row = divmod(position, self.rows_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, shuffled(self.rows_per_epoch, self.seed, epoch)
        number = int(self.order[1][row])
        messages, columns = prompt_of(self.files.row_at(self.index[number]))
        return Prompt(number, self._encode(messages), messages[-1]["content"], columns, tuple(messages))

    def _encode(self, messages: list[dict]) -> list[int]:
        ids, _ = self.tokenizer.encode_chat(messages, template=self.template, add_generation_prompt=True)
        return ids

    def _read(self, row: object, place: tuple) -> None:
        """Keeps the place of one row, if there is room for an answer after its prompt."""
        messages, columns = prompt_of(row)
        if self.check_row is not None:
            self.check_row(columns)
        n_tokens = len(self._encode(messages))
        self.files.keep_texts([message["content"] for message in messages], place[0])
        if n_tokens + self.room > self.seq_len:
            self.counts["too long"] += 1
            return
        n_questions = sum(message["role"] == "user" for message in messages)
        self.counts["turns"] = max(self.counts["turns"], n_questions)
        self.counts["tokens"] += n_tokens
        self.counts["longest"] = max(self.counts["longest"], n_tokens)
        self.counts["answers"] += "answer" in columns
        if isinstance(columns.get("family"), str):
            self.families.add(columns["family"])
        self.index += np.array(place, dtype=PLACE).tobytes()


def prompt_of(row: object) -> tuple[list[dict], dict]:
    """The messages of a row's prompt, and its columns with "answer" and "check" in one form.

    Raises UserError with the reason if something in the row is wrong, UnsupportedError if it has no prompt.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, not {KINDS.get(type(row), 'null')}")
    columns = {key: value for key, value in row.items() if not is_missing(value)}
    in_prompt = {key: columns[key] for key in IN_PROMPT if key in columns and not is_absent(key, columns[key])}
    messages, reference = _messages(in_prompt, columns)
    if not messages or messages[-1]["role"] == ASSISTANT or not messages[-1]["content"].strip():
        raise UserError("its prompt is empty, or does not end with a question")

    answer, check = _answer(columns, reference)
    columns.pop("answer", None)
    if answer is not None:
        columns["answer"] = answer
    columns["check"] = columns.get("check", check)
    return messages, columns


def _messages(in_prompt: dict, columns: dict) -> tuple[list[dict], str | None]:
    """The messages of a prompt, and the answer that follows them, if one does. in_prompt: the columns IN_PROMPT."""
    list_name, question = list_of(in_prompt), first_of(in_prompt, QUESTIONS)
    if list_name is None and question is None:
        if not set(PAIR) <= set(columns):
            raise UnsupportedError(
                f"its keys are {', '.join(columns)[:200] or 'none'}; a prompt is under one of "
                f"{', '.join((*LISTS, *QUESTIONS))}"
            )
        *messages, chosen = preference(columns).talks[0]  # the prompt is in the answers
        return messages, chosen["content"]

    # read it as an instruction, with an empty answer where there is none
    if list_name is None:
        in_prompt = in_prompt | {"output": [] if isinstance(in_prompt[question], list) else ""}
    messages = conversations(in_prompt)[0]
    if messages and messages[-1]["role"] == ASSISTANT:
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _answer(columns: dict, reference: str | None) -> tuple[str | None, str]:
    """The right answer of a row as a text, None if there is none, and the usual check for it.

    An answer that the row calls bad (a label of KTO) is none.
    """
    of_verl = columns.get(VERL)
    if isinstance(of_verl, dict) and not is_missing(of_verl.get("ground_truth")):
        answer = _as_text(of_verl["ground_truth"], f"{VERL}.ground_truth")
        return answer, check_of(answer)
    if any(SWITCH.get(str(columns[key]).lower()) is False for key in GOOD_IF if key in columns):
        return None, "exact"
    name = next((name for name in ("answer", *ANSWERS) if name in columns), None)
    if name is not None:
        answer = _as_text(columns[name], name)
    else:
        answer = reference or (columns["chosen"] if isinstance(columns.get("chosen"), str) else None)
    if answer is None:
        return None, "exact"
    final = final_answer(answer)
    if final is not None:
        return final, check_of(final)
    is_number = name is not None and isinstance(columns[name], int | float)
    return answer, check_of(answer) if is_number else "exact"


def _as_text(value: object, name: str) -> str:
    """A right answer as a text: a number is written out, a list of messages is its last text."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return conversations({"messages": value[-1:]})[0][0]["content"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{name!r} is {KINDS.get(type(value), 'null')}, not a right answer: a text or a number")
    if isinstance(value, str):
        refuse_wrong_bytes(value)
        return value
    return number_as_text(value)
