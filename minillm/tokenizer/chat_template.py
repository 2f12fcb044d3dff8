"""Our own ways to write a conversation as one text.

Each is a Jinja template, which transformers reads as well. "chat" is `<s>`, then for each message its role piece and
its content, and `</s>` after an assistant's. "simple" is `prompt <s> answer </s>` turn by turn, what precedes an answer
joined by newlines; it needs no role pieces.

A template in JINJA is all that another format needs: `jinja_template` fills it in and finds the answers, as it does for
the template that a model's folder brings. The two above are the usual ones, so they are written in token ids as well
(WRITERS): quicker, without jinja2, and each message by itself. Tests hold both forms equal.
"""

import hashlib

from minillm.base.errors import UserError
from minillm.tokenizer import jinja_template

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

JINJA = {
    "chat": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "simple": (
        "{% set ns = namespace(prompt=[]) %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ns.prompt | join('\\n') + bos_token + m['content'] + eos_token }}{% set ns.prompt = [] %}"
        "{% else %}{% set ns.prompt = ns.prompt + [m['content']] %}{% endif %}{% endfor %}"
        "{{ ns.prompt | join('\\n') }}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    ),
}

TEMPLATES = ("auto", *JINJA)


def encode(tokenizer, messages: list[dict], template: str, add_generation_prompt: bool) -> tuple[list[int], list[bool]]:
    """What `Tokenizer.encode_chat` gives."""
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(f"message role {message.get('role')!r}: choose system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message content of role {message['role']}: a string is needed")
    name = resolve(tokenizer, template)
    if name in WRITERS and tokenizer.parts_are_independent:
        sequence = WRITERS[name](tokenizer, messages, add_generation_prompt)
        return sequence.ids, sequence.learn
    return jinja_template.encode(tokenizer, messages, _jinja(tokenizer, name), add_generation_prompt)


def stop_ids(tokenizer, template: str) -> list[int]:
    """What `Tokenizer.stop_ids` gives."""
    name = resolve(tokenizer, template)
    if name in WRITERS:
        return tokenizer.end_ids
    end = jinja_template.end_of_answer(tokenizer, _jinja(tokenizer, name))
    return sorted({*tokenizer.end_ids, end} - {None})


def resolve(tokenizer, template: str) -> str:
    """What a name in TEMPLATES means for a folder: a name in JINJA, or "own " and a hash of the folder's own template.

    Raises `UserError` for another name, and for "chat" where the role pieces are missing.
    """
    if template not in TEMPLATES:
        raise UserError(f"template {template!r}: choose {', '.join(TEMPLATES[:-1])} or {TEMPLATES[-1]}")
    has_roles = len(tokenizer.roles) == len(ROLES)
    if template == "chat" and not has_roles:
        raise UserError("template 'chat': this tokenizer lacks the role pieces; choose simple or auto")
    if template != "auto":
        return template
    own = tokenizer.chat_template
    if own is None:
        return usual(tokenizer)
    for name in JINJA:
        if own in (JINJA[name], text_of(tokenizer, name)) and (name != "chat" or has_roles):
            return name
    return f"own {hashlib.sha256(own.encode()).hexdigest()[:16]}"


def usual(tokenizer) -> str:
    """The name of our template for a folder without one of its own."""
    return "chat" if len(tokenizer.roles) == len(ROLES) else "simple"


def text_of(tokenizer, name: str) -> str:
    """One of JINJA in the terms of a folder: transformers knows no bos_token where the folder names none."""
    piece = tokenizer.special_pieces.get("bos_token")
    if piece is not None and tokenizer.pieces.id_of(piece) == tokenizer.bos_id:
        return JINJA[name]
    if tokenizer.bos_id == tokenizer.eos_id:
        return JINJA[name].replace("bos_token", "eos_token")
    return JINJA[name].replace("bos_token", repr(tokenizer.pieces.piece_of(tokenizer.bos_id)))


def _jinja(tokenizer, name: str) -> str:
    """The text of a template by its resolved name."""
    return text_of(tokenizer, name) if name in JINJA else tokenizer.chat_template


# ---------------------------------------------------------------- our templates in token ids


class Sequence:
    """Token ids that grow, and which of them are to be learned."""

    def __init__(self):
        self.ids: list[int] = []
        self.learn: list[bool] = []

    def add(self, ids: list[int], learned: bool = False) -> None:
        """Append ids, all of them to be learned or none."""
        self.ids.extend(ids)
        self.learn.extend([learned] * len(ids))


def write_chat(tokenizer, messages: list[dict], add_generation_prompt: bool) -> Sequence:
    """The template "chat" in token ids."""
    sequence = Sequence()
    sequence.add([tokenizer.bos_id])
    for message in messages:
        sequence.add([tokenizer.roles[message["role"]]])
        content = tokenizer.encode(message["content"])
        if message["role"] == "assistant":
            sequence.add([*content, tokenizer.eos_id], learned=message.get("learn", True))
        else:
            sequence.add(content)
    if add_generation_prompt:
        sequence.add([tokenizer.roles["assistant"]])
    return sequence


def write_simple(tokenizer, messages: list[dict], add_generation_prompt: bool) -> Sequence:
    """The template "simple" in token ids."""
    sequence = Sequence()
    prompt: list[str] = []  # what was said since the last answer
    for message in messages:
        if message["role"] != "assistant":
            prompt.append(message["content"])
            continue
        sequence.add([*tokenizer.encode("\n".join(prompt)), tokenizer.bos_id])
        answer = [*tokenizer.encode(message["content"]), tokenizer.eos_id]
        sequence.add(answer, learned=message.get("learn", True))
        prompt = []
    sequence.add(tokenizer.encode("\n".join(prompt)))
    if add_generation_prompt:
        sequence.add([tokenizer.bos_id])
    return sequence


WRITERS = {"chat": write_chat, "simple": write_simple}
