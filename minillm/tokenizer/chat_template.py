"""The two ways to write a conversation as one text: in token ids, and for transformers in Jinja.

"chat" is `<s>`, then for each message its role piece and its content, and `</s>` after an assistant's. "simple" is
`prompt <s> answer </s>` turn by turn, what precedes an answer joined by newlines; it needs no role pieces.
"""

from minillm.base.errors import UserError

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

JINJA = {  # the same, for transformers' apply_chat_template
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


def encode(
    tokenizer, messages: list[dict], template: str, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """What `Tokenizer.encode_chat` gives, for "chat" or "simple"."""
    contents = [_content(message) for message in messages]
    opener = [tokenizer.bos_id] if template == "chat" else []
    ids, learn = list(opener), [False] * len(opener)

    def add(tokens: list[int], learnt: bool = False) -> None:
        ids.extend(tokens)
        learn.extend([learnt] * len(tokens))

    prompt: list[str] = []
    for message, content in zip(messages, contents, strict=True):
        answer = message["role"] == "assistant"
        if template == "chat":
            add([tokenizer.roles[message["role"]]])
        elif answer:
            add([*tokenizer.encode("\n".join(prompt)), tokenizer.bos_id])
            prompt = []
        else:
            prompt.append(content)
            continue
        add([*tokenizer.encode(content), *([tokenizer.eos_id] if answer else [])], answer)
    add(tokenizer.encode("\n".join(prompt)))
    if add_generation_prompt:
        add([tokenizer.roles["assistant"] if template == "chat" else tokenizer.bos_id])
    return ids, learn


def _content(message: dict) -> str:
    if message.get("role") not in ROLES:
        raise UserError(f"message role {message.get('role')!r}: choose system, user or assistant")
    if not isinstance(message.get("content"), str):
        raise UserError(f"message content of role {message['role']}: a string is needed")
    return message["content"]
