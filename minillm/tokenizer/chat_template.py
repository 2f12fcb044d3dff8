"""Our own ways to write a conversation as one text.

Each is a Jinja template, which transformers reads as well. "chat" is `<s>`, then for each message its role piece and
its content, and `</s>` after an assistant's. "simple" is `prompt <s> answer </s>` turn by turn, what precedes an answer
joined by newlines; it needs no role pieces.

A template in JINJA is all that another format needs: `jinja_template` fills it in and finds the answers. The two above
are the usual ones, so they are written in token ids as well (WRITERS): quicker, without jinja2, and each message by
itself. Tests hold both forms equal.
"""

from minillm.base.errors import UserError

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


def check(messages: list[dict]) -> None:
    """Raises UserError for a message without a known role or a text."""
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(f"message role {message.get('role')!r}: choose system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message content of role {message['role']}: a string is needed")


class Sequence:
    """Token ids that grow, and which of them are to be learned."""

    def __init__(self):
        self.ids: list[int] = []
        self.learn: list[bool] = []

    def add(self, ids: list[int], learned: bool = False) -> None:
        """Append ids, all of them to be learned or none."""
        self.ids.extend(ids)
        self.learn.extend([learned] * len(ids))


def encode(
    tokenizer, messages: list[dict], name: str, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """What `Tokenizer.encode_chat` gives, for a template in WRITERS."""
    check(messages)
    sequence = WRITERS[name](tokenizer, messages, add_generation_prompt)
    return sequence.ids, sequence.learn


def write_chat(tokenizer, messages: list[dict], add_generation_prompt: bool) -> Sequence:
    """The template "chat" in token ids."""
    sequence = Sequence()
    sequence.add([tokenizer.bos_id])
    for message in messages:
        sequence.add([tokenizer.roles[message["role"]]])
        content = tokenizer.encode(message["content"])
        if message["role"] == "assistant":
            sequence.add([*content, tokenizer.eos_id], learned=True)
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
        sequence.add([*tokenizer.encode(message["content"]), tokenizer.eos_id], learned=True)
        prompt = []
    sequence.add(tokenizer.encode("\n".join(prompt)))
    if add_generation_prompt:
        sequence.add([tokenizer.bos_id])
    return sequence


WRITERS = {"chat": write_chat, "simple": write_simple}
