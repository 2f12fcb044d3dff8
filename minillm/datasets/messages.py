"""Turns a row of an instruction file, in any of the known forms, into messages."""

from minillm.base.errors import UnsupportedError, UserError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PAIRS = [  # keys of a question and its answer
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
]
KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a text"}
NOT_LEARNED = ("learn", "train", "weight")  # false or 0 here: the answer is read, but not learned


def conversations(row: dict) -> list[list[dict]]:
    """The conversations in one row of a file, each a list of {"role", "content"} and maybe "learn": False.

    Known are `messages` and ShareGPT's `conversations` (role/content or from/value); `instruction`,
    `input`, `output` and the other names in PAIRS; and such pairs nested in `instances`, each of them
    a conversation. A `system` text and earlier turns in `history` ([[question, answer], …]) come first.
    Raises UserError with the reason if something in the row is wrong, UnsupportedError if it has none of these forms.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, not {KINDS.get(type(row), 'null')}")
    system = _text(row, "system", "")
    opening = [{"role": "system", "content": system}] if system else []
    for key in ("messages", "conversations"):
        if key in row:
            return [opening + [_message(message) for message in _objects(row, key)]]
    for question, answer in _history(row):
        opening += _pair({"prompt": question, "response": answer})
    if "instances" in row:
        return [opening + _pair({**row, **instance}) for instance in _objects(row, "instances")]
    return [opening + _pair(row)]


def is_learned(message: dict) -> bool:
    """Whether a message is an answer to learn: neither marked otherwise nor empty (which would teach silence)."""
    return message["role"] == "assistant" and message.get("learn", True) and bool(message["content"].strip())


# ---- Parts of a row.


def _pair(row: dict) -> list[dict]:
    """Question and answer, two messages, from whatever keys they are under."""
    for question, answer in PAIRS:
        if question in row and answer in row:
            parts = [_text(row, question), _text(row, "input", "")]
            prompt = "\n".join(part for part in parts if part.strip())
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, answer)}]
    keys = ", ".join(row)[:200] or "none"
    known = ["messages", "conversations", *(f"{question} with {answer}" for question, answer in PAIRS)]
    raise UnsupportedError(f"its keys are {keys}; known are {', '.join(known)}")


def _history(row: dict) -> list[list]:
    """The earlier turns, each [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError("'history' is a list of [question, answer] pairs")
    return history


def _message(message: dict) -> dict:
    """One message in our form, from either of the known ones."""
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role = _text(message, role_key)
    content = _text(message, content_key)
    if role not in ROLES:
        raise UserError(f"role {role[:40]!r} is none of {', '.join(ROLES)}")
    flags = [message[name] for name in NOT_LEARNED if name in message]
    if any(flag not in (True, False) for flag in flags):
        raise UserError(f"whether a message is learned is true or false, not {flags!r}")
    if all(flags):
        return {"role": ROLES[role], "content": content}
    return {"role": ROLES[role], "content": content, "learn": False}


def _text(row: dict, key: str, default: str | None = None) -> str:
    """The text under a key; `default`, if there is one, where it is missing or null."""
    value = row.get(key, default)
    if value is None and default is not None:
        return default  # "input": null
    if not isinstance(value, str):
        kind = KINDS.get(type(value), "null")
        raise UserError(f"{key!r} is {kind}, not a text" if key in row else f"{key!r} is missing")
    return value


def _objects(row: dict, key: str) -> list[dict]:
    if not isinstance(row[key], list) or not all(isinstance(item, dict) for item in row[key]):
        raise UserError(f"{key!r} is not a list of JSON objects")
    return row[key]
