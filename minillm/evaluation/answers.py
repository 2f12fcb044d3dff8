"""A model's answers to questions, and how many are exactly right."""

from collections.abc import Callable, Iterable, Sequence

import torch

from minillm.datasets.questions import is_right
from minillm.generation.completion import Completion, generate
from minillm.generation.sampling import GREEDY
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.adapter import merged
from minillm.tuning.virtual_tokens import context_of

QUESTIONS_PER_BATCH = 128
LONGEST_ANSWER = 64  # tokens that an answer may have, if no right answer of the questions has more
LONGEST_OF_ALL = 512  # tokens, whatever the right answers have: a batch waits for its longest answer


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Iterable[list[dict]],
    *,
    template: str = "auto",
    max_new_tokens: int = LONGEST_ANSWER,
) -> list[str | None]:
    """The greedy answer to each conversation, in their order; None where the conversation fills the model's context.

    conversations: messages up to the question. template: see `Tokenizer.encode_chat`.
    """
    prompts = []
    for messages in conversations:
        ids, _ = tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)
        prompts.append(ids)
    texts: list[str | None] = [None] * len(prompts)
    context = context_of(model)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
    how = dict(n_at_once=QUESTIONS_PER_BATCH, stop_ids=tokenizer.stop_ids(template))
    with merged(model):
        completions = greedy_completions(model, [prompts[i] for i in fitting], max_new_tokens, **how)
    for i, completion in zip(fitting, completions, strict=True):
        texts[i] = tokenizer.decode(completion.tokens)
    return texts


def greedy_completions(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, n_at_once: int, **how
) -> list[Completion]:
    """The greedy completion of each prompt, in their order. how: see `generate`.

    So many at once are generated together, prompts of like length, so that they need little padding.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    for begin in range(0, len(by_length), n_at_once):
        batch = by_length[begin : begin + n_at_once]
        made = generate(model, [prompts[i] for i in batch], max_new_tokens, sampling=GREEDY, **how)
        completions.update(zip(batch, made, strict=True))
    return [completions[i] for i in range(len(prompts))]


def _lengths(tokenizer: Tokenizer, conversations: list[list[dict]], template: str, **how) -> list[int]:
    """Tokens of each conversation as a template writes it. how: see `Tokenizer.encode_chat`."""
    return [len(tokenizer.encode_chat(messages, template=template, **how)[0]) for messages in conversations]


@torch.no_grad()
def exact_match(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[dict],
    *,
    template: str = "auto",
    max_new_tokens: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, tuple[int, int]]:
    """(right answers, questions) for each family of questions (rows of `read_questions`), answered greedily.

    max_new_tokens: of an answer; None: as many as the longest right one has, from LONGEST_ANSWER to LONGEST_OF_ALL.
    A question that does not fit into the context of the model counts as answered wrong. `log` prints how many did not,
    and how many right answers are longer than an answer can be.
    """
    conversations = [row["messages"][:-1] for row in questions]
    n_prompt = _lengths(tokenizer, conversations, template, add_generation_prompt=True)
    n_whole = _lengths(tokenizer, [row["messages"] for row in questions], template)
    n_right = [whole - prompt for whole, prompt in zip(n_whole, n_prompt, strict=True)]  # of a right answer and its end
    if max_new_tokens is None:
        max_new_tokens = min(LONGEST_OF_ALL, max([LONGEST_ANSWER, *n_right]))
    rooms = [min(max_new_tokens, context_of(model) - prompt) for prompt in n_prompt]
    n_cut = sum(0 < room < length for room, length in zip(rooms, n_right, strict=True))
    if n_cut:
        log(
            f"{n_cut} of {len(questions)} right answers are longer than the {max_new_tokens} tokens that an answer may "
            f"have, or than the context of {context_of(model)} has room for"
        )
    texts = answers(model, tokenizer, conversations, template=template, max_new_tokens=max_new_tokens)
    n_too_long = texts.count(None)
    if n_too_long:
        log(f"{n_too_long} of {len(texts)} questions fill the context of {context_of(model)} tokens: counted as wrong")

    # count by family
    scores: dict[str, tuple[int, int]] = {}
    for row, text in zip(questions, texts, strict=True):
        family = str(row.get("family", "all"))  # perhaps a number
        n_right, n_questions = scores.get(family, (0, 0))
        if text is not None and is_right(row, text):
            n_right += 1
        scores[family] = (n_right, n_questions + 1)
    return dict(sorted(scores.items()))


def total(scores: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(right answers, questions) of all families together."""
    n_right = sum(n_right for n_right, _ in scores.values())
    n_questions = sum(n_questions for _, n_questions in scores.values())
    return n_right, n_questions


def with_total(scores: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The scores and, if there are several, their sum as "total"."""
    if len(scores) < 2:
        return scores
    return {**scores, "total": total(scores)}


def table(scores: dict[str, tuple[int, int]]) -> str:
    """Exact-match scores as lines for the terminal, their sum last."""
    rows = with_total(scores)
    width = max(len(family) for family in rows)
    lines = []
    for family, (n_right, n_questions) in rows.items():
        share = n_right / n_questions if n_questions else 0
        lines.append(f"  {family:<{width}}  {share:6.1%}  ({n_right}/{n_questions})")
    return "\n".join(lines)


def exact_lines(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """What to print of `exact_match` before and after training; nothing if no question was asked."""
    if not after:
        return []
    _, n_questions = total(after)
    head = f"exact answers to {n_questions} held-out questions, before → after:"
    return [head, *before_and_after(before, after)]


def before_and_after(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Exact-match scores before and after training, a line a family, their sum last."""
    before = with_total(before)
    lines = []
    for family, (n_right, n_questions) in with_total(after).items():
        share_before = "not asked"
        if family in before:
            n_right_before, n_questions_before = before[family]
            share_before = f"{n_right_before / n_questions_before:6.1%}"
        lines.append(f"  {family:<16} {share_before} → {n_right / n_questions:6.1%}   ({n_right}/{n_questions})")
    return lines
