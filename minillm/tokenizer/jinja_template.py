"""A chat template in Jinja, as model folders bring one, filled in and turned into token ids and a mask.

A template is a program from elsewhere, so it runs in jinja2's sandbox, with the settings and functions that
transformers gives it. It says nowhere which part of its text is an answer. That is found by filling it in again: up to
the question, with what opens an answer; and up to the answer. What the second has beyond the first is the answer and
its end.
"""

import datetime
import itertools
import json
import re
from functools import lru_cache

from minillm.base.errors import UserError

REMEDY = "choose --template simple, or another model"
STARTED = datetime.datetime.now()
FIRST_MARK = 0xE000  # of Unicode's private use area


# ---------------------------------------------------------------- filling in


@lru_cache(maxsize=16)
def compile_template(text: str):
    """The compiled template. Raises `UserError` if jinja2 is missing, or the text is no template."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError('a chat template needs jinja2: pip install -e ".[hf]", or choose --template simple') from None

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}, which some templates put around an answer: its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as problem:
        raise UserError(f"chat template: no Jinja ({problem}); {REMEDY}") from None


def to_json(value: object, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """The filter `tojson`: unlike jinja2's own it leaves <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    """The time that some templates tell the model (Llama 3's the day).

    It is when this program started, so that all its texts agree; of a training run the day on which that began.
    """
    return STARTED.strftime(form)


def tell_day(number: int) -> None:
    """From now on templates are told this day, at midnight. number: counted from 1 January of year 1, as day 1."""
    global STARTED
    STARTED = datetime.datetime.fromordinal(number)


def render(text: str, messages: list[dict], pieces: dict[str, str], add_generation_prompt: bool) -> str:
    """The text that the template makes of a conversation. pieces: bos_token, eos_token and so on, by name.

    Raises `UserError` if the template refuses the conversation, or cannot write it.
    """
    template = compile_template(text)
    said = [{key: message[key] for key in ("role", "content")} for message in messages]  # not whether it is learned
    variables = {"messages": said, "tools": None, "documents": None, **pieces}
    try:
        return template.render(**variables, add_generation_prompt=add_generation_prompt)
    except Exception as problem:  # whatever that program does wrong
        raise UserError(f"chat template: it cannot write this conversation ({problem}); {REMEDY}") from None


# ---------------------------------------------------------------- token ids and mask


def encode(tokenizer, messages: list[dict], text: str, add_generation_prompt: bool) -> tuple[list[int], list[bool]]:
    """What `Tokenizer.encode_chat` gives, for a template that is filled in.

    The ids are those of the whole text. A token over the border between a prompt and its answer is not learned: when
    the model is asked, the prompt's part of it is there already. Raises `UserError` for a template whose answers cannot
    be found in the text.
    """
    marks, messages = mark_control(messages, tokenizer.control)

    def write(messages: list[dict], prompt: bool = False) -> str:
        return render(text, messages, tokenizer.special_pieces, prompt)

    whole = write(messages, add_generation_prompt)
    ids = tokenizer.encode_rendered(whole, marks)
    learn = [False] * len(ids)
    if add_generation_prompt:
        return ids, learn

    last = 0  # where the answer before ended, in tokens
    begin, n_begun = 0, 0  # from where on the text is encoded again, in characters and in tokens
    for start, end in answer_spans(write, messages, tokenizer.control_pattern):
        prompt_ids = tokenizer.encode_rendered(whole[begin:start], marks)
        first = n_begun + n_common(prompt_ids, ids[n_begun : n_begun + len(prompt_ids)])
        if first < n_begun + len(prompt_ids):
            first += 1  # the token over the border
        n_answered = n_begun + len(tokenizer.encode_rendered(whole[begin:end], marks))
        if not last < first < n_answered:
            raise UserError(f"chat template: an answer has no tokens of its own, so none is learned; {REMEDY}")
        learn[first:n_answered] = [True] * (n_answered - first)
        last = n_answered
        if tokenizer.parts_are_independent:  # an answer ends with a control piece; long chats would take its square
            begin, n_begun = end, n_answered
    return ids, learn


def answer_spans(write, messages: list[dict], control_pattern: re.Pattern) -> list[tuple[int, int]]:
    """(start, end) in the text of the conversation, in characters, of each answer to learn and the piece that ends it.

    write(messages, prompt): fills the template in. The text up to an answer must be the same whatever follows it, or
    the model would be taught after other words than those it is asked with: of templates that drop earlier thoughts
    (Qwen3's) only the last answer can be learned.
    """
    whole = write(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("learn", True):
            continue
        prompt = write(messages[:i], True)
        answered = write(messages[: i + 1])
        if not whole.startswith(prompt) or not answered.startswith(prompt):
            raise UserError(f"chat template: it rewrites what came before an answer once it is there; {REMEDY}")
        content = message["content"].strip()
        begin = answered.find(content, len(prompt))
        if answered.count(content, len(prompt)) > 1:  # the template has it in what it writes around the answer, too
            begin = answered.find(content, _place_of_answer(write, messages[: i + 1], answered))
        if begin < 0:
            raise UserError(f"chat template: it changes the text of an answer ({content[:40]!r}); {REMEDY}")
        end_piece = control_pattern.search(answered, begin + len(content))
        if end_piece is None:
            raise UserError(f"chat template: it writes no control piece after an answer to end it; {REMEDY}")
        if not whole.startswith(answered[: end_piece.end()]):
            raise UserError(
                'chat template: it rewrites an answer when others follow; mark all but the last "learn": false, with '
                f"rows of their own for earlier ones, or {REMEDY}"
            )
        spans.append((len(prompt), end_piece.end()))
    return spans


def _place_of_answer(write, messages: list[dict], answered: str) -> int:
    """From where in the text `answered` of these messages the last one's content is to be looked for.

    A character that stands nowhere in the text is written in its place, to see how much the template puts before it.
    """
    mark = next(chr(number) for number in itertools.count(FIRST_MARK) if chr(number) not in answered)
    before = write([*messages[:-1], messages[-1] | {"content": mark}]).partition(mark)[0]
    return len(before) if answered.startswith(before) else len(write(messages[:-1], True))


def end_of_answer(tokenizer, text: str) -> int | None:
    """The id that the template ends an answer with; None where it writes none or cannot write a short conversation."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        ids, learn = encode(tokenizer, messages, text, add_generation_prompt=False)
    except UserError:
        return None
    return ids[max(i for i, learned in enumerate(learn) if learned)]


def mark_control(messages: list[dict], control: dict[str, int]) -> tuple[dict[int, str], list[dict]]:
    """The messages, changed wherever they hold the text of a control piece, and what `str.translate` undoes that by.

    A character that no message holds is put inside the piece's text; of a piece of one character another takes the
    place. So what the template writes and what a message says can be told apart in the text.
    """
    spoken = "".join(message["content"] for message in messages)
    unused = (chr(number) for number in itertools.count(FIRST_MARK) if chr(number) not in spoken)
    mark = next(unused)
    marks = {ord(mark): ""}
    marked = [dict(message) for message in messages]
    for piece in sorted((piece for piece in control if piece in spoken), key=len, reverse=True):
        changed = piece[0] + mark + piece[1:]
        if len(piece) == 1:
            changed = next(unused)
            marks[ord(changed)] = piece
        for message in marked:
            message["content"] = message["content"].replace(piece, changed)
    return marks, marked


def n_common(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
