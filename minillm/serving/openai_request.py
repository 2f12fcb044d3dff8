"""The body of a request to /v1/chat/completions or /v1/completions → what it asks for, checked; or a `Refusal`.

null means "not given". A field that would change the answer and is not supported is refused by its name, unless its
value asks for nothing (`"tools": []`, `"logit_bias": {}`). Fields that nobody here knows are ignored, since
programs add some of their own. The fields: https://platform.openai.com/docs/api-reference/chat/create
"""

import reprlib
import secrets
from dataclasses import dataclass
from typing import Any, NamedTuple

from minillm.base.contents import WORDS, is_of_kind
from minillm.base.errors import UserError
from minillm.base.json_door import parse_json
from minillm.base.options import LARGEST_COUNT, Option
from minillm.generation.sampling import Sampling
from minillm.serving.refusal import Refusal, wrong

MOST_STOPS = 16
MOST_TOP = 20  # log-probabilities beside a token
LARGEST = (1 << 63) - 1  # whole number where "as many as there are" may be asked for by a large one
NEW_TOKENS_OF_TEXT = 16  # of a completion that names no limit, as OpenAI has it; a chat may fill the context

# What is not supported, and the values with which it means nothing.
NO_EFFECT: dict[str, tuple] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "json_schema": (),
    "grammar": ("",),
    # what other servers know
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "length_penalty": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "n_predict": (),
    "max_new_tokens": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
# What the other kind of request knows.
NO_EFFECT_ON_CHATS = {"prompt": (), "echo": (False,)}
NO_EFFECT_ON_COMPLETIONS = {"messages": (), "top_logprobs": (0,)}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Limits(NamedTuple):
    """What one request may ask for at most."""

    n: int  # answers to one prompt
    texts: int  # answers to all of its prompts


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    messages: of a chat, else None. prompts: of completions: texts, or lists of ids. max_tokens: None: as many as fit.
    is_seeded: whether the client chose the seed. log_probs: None: none; k: of each token and of the k likeliest in its
    place. echo: a text begins with its prompt.
    """

    model: str | None
    messages: list[dict] | None
    prompts: list[str | list[int]]
    n: int
    max_tokens: int | None
    sampling: Sampling
    is_seeded: bool
    stop_strings: tuple[str, ...]
    log_probs: int | None
    echo: bool
    streams: bool
    includes_usage: bool

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


class Fields:
    """The fields of a body, each checked where it is read."""

    def __init__(self, values: dict):
        self.values = values

    def get(self, name: str, kind: Any, default: Any = None, **limits) -> Any:
        """The value of a field, of a kind in `WORDS`; `default` if it is missing or null. limits: as of an `Option`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not is_of_kind(value, kind):
            raise wrong(name, f"{reprlib.repr(value)} is not {WORDS[kind]}")
        problem = Option("", **limits).problem(value)
        if problem:
            raise wrong(name, f"{reprlib.repr(value)}: {problem}")
        return value


def fields_of(body: bytes) -> Fields:
    """The fields of a request's body. Raises `Refusal` for what is no JSON object, or holds half a character."""
    if not body.strip():
        raise Refusal(400, "the body is empty; send a JSON object")
    try:
        values = parse_json(body, "the body", remedy="send one JSON object in UTF-8")
    except UserError as problem:
        raise Refusal(400, str(problem)) from None
    if not isinstance(values, dict):
        raise Refusal(400, f"the body: {reprlib.repr(values)} is no JSON object")
    return Fields(values)


def read_chat(fields: Fields, limits: Limits) -> Asked:
    """What a request to /v1/chat/completions asks for."""
    _refuse_unsupported(fields, NO_EFFECT | NO_EFFECT_ON_CHATS)
    messages = _messages(fields)
    n_top = fields.get("top_logprobs", int, at_least=0, at_most=MOST_TOP)
    wants_log_probs = fields.get("logprobs", bool, False)
    if n_top and not wants_log_probs:
        raise wrong("top_logprobs", "needs logprobs: true")
    log_probs = (n_top or 0) if wants_log_probs else None
    return _asked(fields, limits, messages=messages, log_probs=log_probs)


def read_completion(fields: Fields, limits: Limits) -> Asked:
    """What a request to /v1/completions asks for."""
    _refuse_unsupported(fields, NO_EFFECT | NO_EFFECT_ON_COMPLETIONS)
    return _asked(
        fields,
        limits,
        prompts=_prompts(fields),
        log_probs=fields.get("logprobs", int, at_least=0, at_most=MOST_TOP),
        echo=fields.get("echo", bool, False),
    )


def _asked(fields: Fields, limits: Limits, **own) -> Asked:
    """What both kinds of requests have in common; own: the values of fields that one kind alone has."""
    n = fields.get("n", int, 1, at_least=1, at_most=limits.n)
    prompts = own.get("prompts", [])
    if len(prompts) * n > limits.texts:
        message = f"{len(prompts)} prompts with n {n} are {len(prompts) * n} answers; at most {limits.texts} a request"
        raise wrong("prompt", message)

    # the later name for the limit wins
    limit = {"at_least": 1, "at_most": LARGEST}
    max_tokens = fields.get("max_tokens", int, **limit)
    max_tokens = fields.get("max_completion_tokens", int, max_tokens, **limit)
    if max_tokens is None and prompts:
        max_tokens = NEW_TOKENS_OF_TEXT

    stream_options = fields.get("stream_options", dict, {})
    return Asked(
        model=fields.get("model", str),
        messages=own.get("messages"),
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        is_seeded=fields.values.get("seed") is not None,
        stop_strings=_stop_strings(fields),
        log_probs=own["log_probs"],
        echo=own.get("echo", False),
        streams=fields.get("stream", bool, False),
        includes_usage=Fields(stream_options).get("include_usage", bool, False),
    )


def _refuse_unsupported(fields: Fields, no_effect: dict[str, tuple]) -> None:
    """Refuse what would change the answer. no_effect: the values of each name with which it asks for nothing."""
    for name, values_without_effect in no_effect.items():
        value = fields.values.get(name)
        if value is not None and value not in values_without_effect:
            raise wrong(name, f"{reprlib.repr(value)}: is not supported here; leave it out")


def _sampling(fields: Fields) -> Sampling:
    """How tokens are drawn; without a seed, with one that nobody knows."""
    usual = Sampling()
    seed = fields.get("seed", int, secrets.randbits(64), at_least=-1 << 63, at_most=(1 << 64) - 1)
    top_k = fields.get("top_k", int, usual.top_k, at_least=-1, at_most=LARGEST)  # some clients say -1 for all
    return Sampling(
        temperature=fields.get("temperature", float, usual.temperature, at_least=0, at_most=2),
        top_k=max(0, min(top_k, LARGEST_COUNT)),  # that many are all, too
        top_p=fields.get("top_p", float, usual.top_p, at_least=0, at_most=1),
        min_p=fields.get("min_p", float, usual.min_p, at_least=0, at_most=1),
        repetition_penalty=fields.get("repetition_penalty", float, usual.repetition_penalty, above=0, at_most=100),
        presence_penalty=fields.get("presence_penalty", float, usual.presence_penalty, at_least=-2, at_most=2),
        frequency_penalty=fields.get("frequency_penalty", float, usual.frequency_penalty, at_least=-2, at_most=2),
        seed=seed % (1 << 64),  # a negative one is folded
    )


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    stop = fields.values.get("stop")
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not is_of_kind(strings, list[str]):
        raise wrong("stop", f"{reprlib.repr(stop)} is neither a text nor {WORDS[list[str]]}")
    if len(strings) > MOST_STOPS:
        raise wrong("stop", f"{len(strings)} texts; at most {MOST_STOPS}")
    if "" in strings:
        raise wrong("stop", "an empty text would end every answer at once; leave it out")
    return tuple(strings)


# ---------------------------------------------------------------- what is to be continued


def _messages(fields: Fields) -> list[dict]:
    """The conversation, as {"role": system | user | assistant, "content": str}."""
    values = fields.values.get("messages")
    if not is_of_kind(values, list[dict]) or not values:
        raise wrong("messages", f"{reprlib.repr(values)} is not {WORDS[list[dict]]} with at least one")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(values)]
    if messages[-1]["role"] == "assistant":
        raise wrong("messages", "the last one is the assistant's; end with one that is to be answered")
    return messages


def _message(message: dict, place: str) -> dict:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{place}.role", f"{reprlib.repr(role)}: choose one of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise wrong(f"{place}.{name}", "tools are not supported; leave it out")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{place}.content")}


def _content(content: Any, place: str) -> str:
    """The text of a message: a text, or a list of parts of text."""
    if isinstance(content, str):
        return content
    if not is_of_kind(content, list[dict]):
        raise wrong(place, f"{reprlib.repr(content)} is neither a text nor a list of parts")
    for i, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{place}[{i}]", f"a part of type {reprlib.repr(part.get('type'))}; only text is supported")
    return "".join(part["text"] for part in content)


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The texts to be continued: one text, several, the ids of one, or those of several."""
    prompt = fields.values.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if prompt and is_of_kind(prompt, list[int]):
        return [prompt]
    if prompt and (is_of_kind(prompt, list[str]) or is_of_kind(prompt, list[list])):
        for i, item in enumerate(prompt):
            if isinstance(item, list) and not (item and is_of_kind(item, list[int])):
                raise wrong(f"prompt[{i}]", f"{reprlib.repr(item)} is no list of token ids with at least one")
        return prompt
    raise wrong("prompt", f"{reprlib.repr(prompt)} is neither a text, nor a list of texts, nor token ids")
