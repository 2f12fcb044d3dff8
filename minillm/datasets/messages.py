"""Turns a row of an instruction file, in any of the known forms, into messages.

Nothing of a row is left out in silence. What says that an answer is not to be learned is honoured; what would change an
answer and is not read here (tools, thoughts, images, a rejected answer) is refused by its name; any other key that
holds text is noted as not used.
"""

import math
import re
from collections.abc import Iterable
from functools import lru_cache

from minillm.base.errors import UnsupportedError, UserError
from minillm.datasets.files.json_rows import refuse_wrong_bytes

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    **{"system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT},
    **{"gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT},
}
LISTS = ("messages", "conversations")  # keys of a list of messages
MAY_BE_EMPTY = (*LISTS, "instances", "history")  # lists that a table of several data sets has in every row
QUESTIONS = ("instruction", "question", "query", "prompt", "input")  # the first of these that a row has
ANSWERS = ("output", "response", "answer", "completion", "target")
BELOW_QUESTION = ("input", "context")  # texts that belong to a question
SYSTEMS = ("system", "system_prompt")
READ_ELSEWHERE = ("check", "family")  # by questions.py
TEXT_PARTS = ("text", "input_text", "output_text")  # kinds of parts in a content that is a list
KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a text"}

# What a key says about learning.
LEARNED_IF = {
    **dict.fromkeys(("learn", "train", "trainable", "training", "loss", "loss_weight", "loss_scale", "weight"), True),
    **dict.fromkeys(("masked", "is_masked", "no_loss", "ignore", "ignore_loss"), False),
}
# false: a bad answer, as KTO (Ethayarajh et al. 2024) learns to avoid it
GOOD_IF = ("label", "kto_tag", "desirable", "is_desirable", "correct", "is_correct", "accepted", "preferred")
SWITCH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # by text, as in a .csv

# Words in the name of a key, for what is refused if it is there.
ABOUT_LEARNING = {"learn", "learned", "loss", "mask", "masked", "train", "trained", "trainable", "training"}
ABOUT_LEARNING |= {"weight", "weights", "label", "labels"}
NOT_READ = {
    **dict.fromkeys(("chosen", "rejected"), "a preference pair, of which one answer is not to be learned"),
    **dict.fromkeys(("reasoning", "thinking", "thought", "thoughts"), "thoughts before an answer"),
    **dict.fromkeys(("tool", "tools", "function", "functions"), "tools"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images or sound"),
}


def conversations(row: dict, unused: set[str] | None = None) -> list[list[dict]]:
    """The conversations in one row of a file, each a list of {"role", "content"} and maybe "learn": False.

    Known are lists of messages (LISTS: role/content or from/value); a question and an answer under any of the names in
    QUESTIONS and ANSWERS, both texts or both lists of messages, of which the latter alone are learned; and such pairs
    nested in `instances`, each of them a conversation. A text in SYSTEMS and, before a pair of texts, earlier turns in
    `history` ([[question, answer], …]) come first. null, NaN and an empty list count as missing.

    unused: gets the names of keys that hold text and were not read.
    Raises UserError with the reason if something in the row is wrong, UnsupportedError if it has none of these forms.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, not {KINDS.get(type(row), 'null')}")
    row = _without_empty(row)
    parts = [row]
    if "instances" in row and not list_of(row):
        parts = [_without_empty({**row, **instance}) for instance in _objects(row, "instances")]
    return [_conversation(part, set() if unused is None else unused) for part in parts]


def is_learned(message: dict) -> bool:
    """Whether a message is an answer to learn: neither marked otherwise nor empty (which would teach silence)."""
    return message["role"] == ASSISTANT and message.get("learn", True) and bool(message["content"].strip())


# ---- The forms of a row.


def _conversation(row: dict, unused: set[str]) -> list[dict]:
    """The one conversation in a row without `instances`."""
    system = first_of(row, SYSTEMS)
    list_name = list_of(row)
    if list_name:
        messages = [_message(message, list_name, unused) for message in _objects(row, list_name)]
        read = {list_name}
    else:
        question, answer = _pair_of(row)
        below = [key for key in BELOW_QUESTION if key != question]
        read = {question, answer, *below, "history", "instances"}
        if isinstance(row[question], list) and isinstance(row[answer], list):  # the prompt and completion of TRL
            given = [unlearned(_message(message, question, unused)) for message in _objects(row, question)]
            messages = [*given, *(_message(message, answer, unused) for message in _objects(row, answer))]
            read -= {*below, "history"}
        else:
            messages = [*_history(row), *_pair(row, question, answer, below)]
    read |= {system, *READ_ELSEWHERE}

    _refuse_not_read(row, read)
    unused |= _not_used(row, read)
    if not all(_marks(row, any_kind=False).values()):
        messages = [unlearned(message) for message in messages]
    opening = _text(row, system, "") if system else ""
    is_said = messages[:1] and messages[0]["role"] == SYSTEM and messages[0]["content"] == opening
    return [{"role": SYSTEM, "content": opening}, *messages] if opening and not is_said else messages


def _without_empty(row: dict) -> dict:
    """The row without empty lists; a list of no messages stays if that is all there is."""
    full = {key: value for key, value in row.items() if key not in MAY_BE_EMPTY or not is_absent(key, value)}
    has_form = list_of(full) or "instances" in full or first_of(full, QUESTIONS)
    return row if not has_form and any(row.get(key) == [] for key in LISTS) else full


def list_of(row: dict) -> str | None:
    """The key of the list of messages, if there is one."""
    return next((key for key in LISTS if not is_missing(row.get(key))), None)


def _pair_of(row: dict) -> tuple[str, str]:
    """The keys of question and answer. Raises UnsupportedError if a row has none."""
    question, answer = first_of(row, QUESTIONS), first_of(row, ANSWERS)
    if question is None or answer is None:
        _refuse_not_read(row, set(), words=("chosen", "rejected"))
        raise UnsupportedError(
            f"its keys are {', '.join(row)[:200] or 'none'}; known are {' and '.join(LISTS)}, or one of "
            f"{', '.join(QUESTIONS)} with one of {', '.join(ANSWERS)}"
        )
    return question, answer


def _pair(row: dict, question: str, answer: str, below: list[str]) -> list[dict]:
    """Question and answer, two messages. below: keys of texts that belong to the question, if they are there."""
    parts = [_text(row, question), *(_text(row, key, "") for key in below)]
    prompt = "\n".join(part for part in parts if part.strip())
    return [{"role": USER, "content": prompt}, {"role": ASSISTANT, "content": _text(row, answer)}]


def _history(row: dict) -> list[dict]:
    """The earlier turns, from a list of [question, answer]."""
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError("'history' is a list of [question, answer] pairs")
    turns = [{"question": question, "answer": answer} for question, answer in history]
    return [message for turn in turns for message in _pair(turn, "question", "answer", [])]


def _message(message: dict, list_name: str, unused: set[str]) -> dict:
    """One message in our form, from either of the known ones. list_name: the key of the list that it is in."""
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    read = {role_key, content_key}
    _refuse_not_read(message, read)
    role = ROLES.get(_text(message, role_key).lower())
    if role is None:
        raise UserError(f"role {message[role_key][:40]!r} is none of {', '.join(ROLES)}")
    marks = _marks(message, any_kind=True)
    if role != ASSISTANT and True in marks.values():
        raise UserError(
            f"{', '.join(marks)}: marks a {role}'s message to be learned, but only answers are; take it out"
        )
    unused |= {f"{list_name}.{key}" for key in _not_used(message, read)}
    ours = {"role": role, "content": _content(message, content_key)}
    return ours if all(marks.values()) else unlearned(ours)


def unlearned(message: dict) -> dict:
    return message | {"learn": False} if message["role"] == ASSISTANT else message


def _content(message: dict, key: str) -> str:
    """The text of a message, which may be a list of parts that are texts."""
    content = message.get(key)
    if not isinstance(content, list):
        return _text(message, key)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS:
            raise UserError(f"{key!r} holds a part of type {str(kind)[:40]!r}; only text is read, take it out")
        texts.append(_text(part, "text") if isinstance(part, dict) else _text({key: part}, key))
    return "".join(texts)


# ---- What a key says about learning, and keys that are not read.


def _marks(values: dict, any_kind: bool) -> dict[str, bool]:
    """Key → whether it says that an answer is learned. any_kind: even a text under such a key is a mark.

    Raises UserError for a mark of unknown meaning, and for an answer that is marked as bad.
    """
    marks = {}
    for key, value in values.items():
        is_about_learning = bool(ABOUT_LEARNING & _words(key)) or key in LEARNED_IF or key in GOOD_IF
        if is_missing(value) or not is_about_learning:
            continue
        switch = SWITCH.get(str(value).lower())
        if key in LEARNED_IF and switch is not None:
            marks[key] = switch == LEARNED_IF[key]
        elif key in GOOD_IF and switch is not None:
            if not switch:
                raise UserError(f"{key!r} is {value!r}: a bad answer (KTO), not to be learned; take such rows out")
        elif any_kind or isinstance(value, bool | list) or (key in LEARNED_IF and not isinstance(value, str)):
            known = ", ".join(LEARNED_IF)
            raise UserError(f"{key!r} is {value!r:.40}; what is learned is said by true or false under one of {known}")
    return marks


def _refuse_not_read(values: dict, read: set[str], words: Iterable[str] = NOT_READ) -> None:
    """Raises UserError for a key that is not read and would change an answer."""
    for key, value in values.items():
        named = [NOT_READ[word] for word in words if word in _words(key)]
        if named and key not in read and (holds_text(value) or value is True):
            raise UserError(f"{key!r} is not read ({named[0]}); put it into the text, or take the key or the row out")


def _not_used(values: dict, read: set[str]) -> set[str]:
    """Keys that hold text and were not read."""
    return {key for key, value in values.items() if key not in read and holds_text(value)}


@lru_cache(maxsize=1024)  # a file's rows have the same keys
def _words(key: str) -> frozenset[str]:
    """The words of a key: `reasoning_content`, `reasoningContent` → reasoning, content."""
    return frozenset(re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", key).lower()))


def holds_text(value) -> bool:
    """Whether there is text in a value, at any depth. An empty list that is written as a text is none."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and item.strip() not in ("", "[]", "{}", "null"):
            return True
        if isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item
    return False


# ---- Values.


def is_missing(value) -> bool:
    """null, or NaN, which pandas writes for an empty field."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_absent(key: str, value) -> bool:
    """Whether a key's value is missing, or an empty list or text where the key is of MAY_BE_EMPTY."""
    return is_missing(value) or (key in MAY_BE_EMPTY and value in ([], ""))


def first_of(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of these keys that has a value; else the first that is there; else None."""
    there = [name for name in names if name in row]
    return next((name for name in there if not is_missing(row[name])), there[0] if there else None)


def _text(row: dict, key: str, default: str | None = None) -> str:
    """The text under a key; `default`, if there is one, where it is missing, null or NaN."""
    value = row.get(key, default)
    if is_missing(value) and default is not None:
        return default
    if not isinstance(value, str):
        kind = "empty (null or NaN)" if is_missing(value) else KINDS.get(type(value))
        raise UserError(f"{key!r} is {kind}, not a text" if key in row else f"{key!r} is missing")
    refuse_wrong_bytes(value)
    return value


def _objects(row: dict, key: str) -> list[dict]:
    if not isinstance(row[key], list) or not all(isinstance(item, dict) for item in row[key]):
        raise UserError(f"{key!r} is not a list of JSON objects")
    return row[key]
