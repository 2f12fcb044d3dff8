"""Turns a row of an instruction file, in any of the known forms, into messages."""

from minillm.base.errors import UnsupportedError, UserError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PAIRS = [pair.split() for pair in ("instruction output", "question answer", "prompt response", "prompt completion")]
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
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError("'history' is a list of [question, answer] pairs")
    for asked, answered in history:
        opening += _pair({"prompt": asked, "response": answered})
    if "instances" in row:
        return [opening + _pair({**row, **instance}) for instance in _objects(row, "instances")]
    return [opening + _pair(row)]


def _pair(row: dict) -> list[dict]:
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            parts = [_text(row, asked), _text(row, "input", "")]
            prompt = "\n".join(part for part in parts if part.strip())
            answer = _text(row, answered)
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    known = ["messages", "conversations", *(f"{asked} with {answered}" for asked, answered in PAIRS)]
    raise UnsupportedError(f"its keys are {', '.join(row)[:200] or 'none'}; known are {', '.join(known)}")


def _message(message: dict) -> dict:
    names = ("role", "content") if "role" in message else ("from", "value")
    role, content = (_text(message, name) for name in names)
    if role not in ROLES:
        raise UserError(f"role {role[:40]!r} is none of {', '.join(ROLES)}")
    flags = [message[name] for name in NOT_LEARNED if name in message]
    if any(flag not in (True, False) for flag in flags):
        raise UserError(f"whether a message is learned is true or false, not {flags!r}")
    return {"role": ROLES[role], "content": content} | ({} if all(flags) else {"learn": False})


def _text(row: dict, key: str, default: str | None = None) -> str:
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


def is_learned(message: dict) -> bool:
    """Whether a message is an answer to learn: neither marked otherwise nor empty (which would teach silence)."""
    return message["role"] == "assistant" and message.get("learn", True) and bool(message["content"].strip())
