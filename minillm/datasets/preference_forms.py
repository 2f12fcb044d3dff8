"""Turns a row of a preference file, in any of the known forms, into answers to one prompt and what is said of them.

Each answer becomes a whole conversation that ends with it, by the rules for instructions (messages.py): a row of two
answers is read as two rows of instructions that differ in their last message.

    {prompt, chosen, rejected}              texts, or lists of messages; a row of instructions with two answers
    {conversations, chosen, rejected}       the answers as texts or messages
    {chosen, rejected}                      two whole conversations: messages, or texts of "Human: … Assistant: …"
    {prompt, responses}                     best first: every one against every later one
    {prompt, responses, scores}             the best against every one with a lower score, the difference the margin
    {prompt, completion, label}             one answer, and whether it is wanted (KTO, Ethayarajh et al. 2024)
"""

import re
from typing import NamedTuple

from minillm.base.errors import UnsupportedError, UserError
from minillm.datasets.messages import (
    ANSWERS,
    ASSISTANT,
    GOOD_IF,
    KINDS,
    LISTS,
    QUESTIONS,
    SWITCH,
    USER,
    conversations,
    first_of,
    holds_text,
    is_absent,
    list_of,
    unlearned,
)

PAIR = ("chosen", "rejected")
ANSWER_LISTS = ("responses", "completions", "answers", "output")  # keys of a list of texts, best first
NOT_READ = ("rank", "ranks", "ranking", "rankings")  # an order of its own: refused
LARGEST = 1e30  # of scores and margins, which become fp32
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # in a text of hh-rlhf (Bai et al. 2022)
HH_ROLES = {"Human": USER, "Assistant": ASSISTANT}


class Preference(NamedTuple):
    """One row. talks: for each answer a conversation that ends with it, of which it alone is learned.

    pairs: (the better, the worse, margin), the first two as positions in `talks`. label: whether the only answer is
    wanted; None for pairs. kind: of fault, as the row names it. n_ties: pairs left out, since their scores are equal.
    """

    talks: list[list[dict]]
    pairs: list[tuple[int, int, float]]
    label: bool | None
    kind: str
    n_ties: int = 0


def preference(row: dict, unused: set[str] | None = None) -> Preference:
    """What a row of a preference file says. null and NaN count as missing.

    unused: gets the names of keys that hold text and were not read.
    Raises UserError with the reason if something in the row is wrong, UnsupportedError if it has none of these forms.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is a JSON object, not {KINDS.get(type(row), 'null')}")
    unused = set() if unused is None else unused
    row = {key: value for key, value in row.items() if not is_absent(key, value)}
    kind, margin = _kind(row.pop("kind", "")), row.pop("margin", None)
    scores = row.pop("scores", None)
    for key in ("instances", *NOT_READ):
        if key in row:
            raise UserError(f"{key!r} is not read in preferences; write a row for each prompt, its answers best first")

    several = next((key for key in ANSWER_LISTS if isinstance(row.get(key), list) and _all_texts(row[key])), None)
    if any(key in row for key in PAIR):
        found = _pair(row, kind, _margin(margin), unused)
    elif several:
        found = _ranked(row, several, scores, kind, unused)
    else:
        found = _labelled(row, kind, unused)
    if scores is not None and not several:
        raise UserError("'scores' belong to a list of answers under " + ", ".join(ANSWER_LISTS) + "; take them out")
    if margin is not None and not any(key in row for key in PAIR):
        raise UserError("'margin' belongs to a pair of chosen and rejected; take it out")
    return found


# ---- the forms


def _pair(row: dict, kind: str, margin: float, unused: set[str]) -> Preference:
    """A chosen answer and a rejected one."""
    for key in PAIR:
        if key not in row:
            raise UserError(f"{key!r} is missing (or null) beside {' and '.join(k for k in PAIR if k in row)!r}")
    about_them = {key for key in row if key not in PAIR and set(PAIR) & set(re.split("[^a-z]+", key.lower()))}
    unused |= {key for key in about_them if holds_text(row[key])}
    context = {key: value for key, value in row.items() if key not in (*PAIR, *about_them)}
    talks = [_talk(context, row[key], key, unused) for key in PAIR]
    return Preference(talks, [(0, 1, margin)], None, kind)


def _ranked(row: dict, several: str, scores: object, kind: str, unused: set[str]) -> Preference:
    """A list of answers, best first, or each with a score."""
    answers = row[several]
    if len(answers) < 2:
        raise UserError(f"{several!r} has {len(answers)} answer; a preference needs at least 2")
    context = {key: value for key, value in row.items() if key != several}
    talks = [_talk(context, answer, several, unused) for answer in answers]
    numbers = range(len(answers))
    if scores is None:
        return Preference(talks, [(i, j, 0.0) for i in numbers for j in numbers if i < j], None, kind)
    if not isinstance(scores, list) or len(scores) != len(answers) or not all(map(_is_number, scores)):
        raise UserError(f"'scores' is no list of {len(answers)} numbers, one for each of {several!r}")
    best = max(numbers, key=scores.__getitem__)  # the first of the best
    pairs = [(best, j, float(scores[best] - scores[j])) for j in numbers if scores[j] < scores[best]]
    return Preference(talks, pairs, None, kind, n_ties=len(answers) - 1 - len(pairs))


def _labelled(row: dict, kind: str, unused: set[str]) -> Preference:
    """One answer that is wanted or not."""
    labels = {key: SWITCH.get(str(row[key]).lower()) for key in GOOD_IF if key in row}
    if not labels or (not list_of(row) and (first_of(row, QUESTIONS) is None or first_of(row, ANSWERS) is None)):
        raise UnsupportedError(
            f"its keys are {', '.join(row)[:200] or 'none'}; a preference is chosen and rejected, a list of texts "
            f"under {', '.join(ANSWER_LISTS)}, or an answer and a label; and its prompt"
        )
    if None in labels.values() or len(set(labels.values())) > 1:
        said = ", ".join(f"{key!r} is {row[key]!r:.40}" for key in labels)
        raise UserError(f"{said}; a label is true or false, and one is enough")
    context = {key: value for key, value in row.items() if key not in labels}
    return Preference([_last_learned(context, unused)], [], labels.popitem()[1], kind)


# ---- one answer with its prompt


def _talk(context: dict, answer: object, key: str, unused: set[str]) -> list[dict]:
    """The conversation that ends with an answer. context: the row without its answers; key: where the answer is."""
    list_name, question = list_of(context), first_of(context, QUESTIONS)
    whole = _whole(context, answer)
    if list_name and whole and isinstance(answer, list):
        row = {**{k: v for k, v in context.items() if k not in (question, list_name)}, "messages": whole}
        _check_prompt(context.get(question) if question else None, whole)
        _check_same_prompt(context[list_name], whole, list_name)
    elif list_name:
        before = context[list_name] if isinstance(context[list_name], list) else [None]  # which is refused by its name
        row = {**context, list_name: [*before, _message(answer, key)]}
    elif whole:
        prompt = context.get(question) if question else None
        row = {**{k: v for k, v in context.items() if k != question}, "messages": whole}
        _check_prompt(prompt, whole)
    elif question is None:
        raise UnsupportedError(
            f"{key!r} has no prompt: give one of {', '.join((*LISTS, *QUESTIONS))}, whole conversations as "
            "messages, or texts of turns that begin with 'Human:' and end with one that begins with 'Assistant:'"
        )
    else:
        if "output" in context and holds_text(context["output"]):
            unused.add("output")
        is_list = isinstance(context[question], list)
        row = {**context, "output": [_message(answer, key)] if is_list else _text(answer, key)}
        unused |= {name for name in ANSWERS if name != "output" and name in row and holds_text(row[name])}
        row = {name: value for name, value in row.items() if name == "output" or name not in ANSWERS}
    return _last_learned(row, unused)


def _whole(context: dict, answer: object) -> list | None:
    """The messages of an answer that brings its prompt with it, else None."""
    if isinstance(answer, list) and all(isinstance(message, dict) for message in answer):
        first = next(iter(answer), {})
        is_answer = str(first.get("role", first.get("from"))).lower() in ("assistant", "gpt")
        return None if is_answer and len(answer) == 1 else answer
    question = first_of(context, QUESTIONS)
    prompt = "" if question is None else context[question]
    if not isinstance(answer, str) or not isinstance(prompt, str):
        return None
    ends_open = prompt.rstrip().endswith("\n\nAssistant:")
    if (question is None and TURN.match(answer.lstrip())) or ends_open:
        return _turns(prompt + answer)
    return None


def _turns(text: str) -> list[dict]:
    """The messages of a text of hh-rlhf; the last "\\n\\nAssistant:" begins the answer."""
    opening, *parts = TURN.split(text.strip())
    if opening.strip() or not parts or parts[-2] != "Assistant":
        raise UserError("a text of turns begins with 'Human:' or 'Assistant:', and its last turn is the Assistant's")
    return [
        {"role": HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _check_prompt(prompt: object, whole: list[dict]) -> None:
    """Raises UserError if a row's prompt is not part of the whole conversation beside it."""
    said = [message.get("content", message.get("value")) for message in whole[:-1]]
    if isinstance(prompt, list):
        given = [message.get("content", message.get("value")) for message in prompt if isinstance(message, dict)]
        is_there = given == said[: len(given)]
    else:
        is_turns = isinstance(prompt, str) and TURN.match(prompt.lstrip())
        is_there = prompt is None or prompt in said or is_turns
    if not is_there:
        raise UserError("its prompt is not in the conversation of its answer; take out one of the two")


def _check_same_prompt(given: object, whole: list[dict], name: str) -> None:
    """Raises UserError if a conversation beside whole ones is neither their prompt nor one with that prompt."""
    said = [message.get("content", message.get("value")) for message in whole]
    messages = given if isinstance(given, list) else [given]
    beside = [message.get("content", message.get("value")) for message in messages if isinstance(message, dict)]
    if beside != said[: len(beside)] and beside[:-1] != said[:-1]:
        raise UserError(f"{name!r} is another conversation than that of its answers; take out one of the two")


def _last_learned(row: dict, unused: set[str]) -> list[dict]:
    """The row's conversation, of which the last answer alone is learned."""
    messages = conversations(row, unused)[0]
    if not messages or messages[-1]["role"] != ASSISTANT:
        raise UserError("does not end with an assistant's answer")
    if not messages[-1].get("learn", True):
        raise UserError("its answer is marked as not to be learned; take the row out")
    return [*map(unlearned, messages[:-1]), messages[-1]]


def _message(answer: object, key: str) -> dict:
    """An answer as a message: a text, a message, or a list of one."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str):
        return {"role": ASSISTANT, "content": answer}
    if not isinstance(answer, dict):
        raise UserError(f"{key!r} is {KINDS.get(type(answer), 'null')}, not an answer: a text or one message")
    return answer


def _text(answer: object, key: str) -> str:
    """An answer as a text."""
    if isinstance(answer, str):
        return answer
    return conversations({"messages": [_message(answer, key)]})[0][0]["content"]


# ---- values


def _all_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _kind(value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"'kind' is {KINDS.get(type(value), 'null')}, not a text")
    return value


def _margin(value: object) -> float:
    """The margin of a pair, 0 if there is none (an empty field of a .csv)."""
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, str) else value
    except ValueError:
        margin = None
    if not _is_number(margin) or margin < 0:
        raise UserError(f"'margin' is {value!r:.40}; it is a number from 0 up")
    return float(margin)
