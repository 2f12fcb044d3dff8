"""How good a model is: reading any text for `validation.Validation`, and counting questions answered exactly."""

from collections.abc import Iterable

import torch

from minillm.datasets.checks import is_right
from minillm.generation.completion import generate
from minillm.generation.sampling import GREEDY
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer

ASKED_AT_ONCE = 128  # questions per batch
LONGEST_ANSWER = 64  # tokens, unless the caller says otherwise


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Iterable[list[dict]],
    *,
    template: str = "auto",
    max_new_tokens: int = LONGEST_ANSWER,
) -> list[str | None]:
    """The greedy answer to each conversation, in their order; None where one fills the model's context.

    conversations: messages up to the question. template: see `Tokenizer.encode_chat`.
    """
    prompts = [
        tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)[0] for messages in conversations
    ]
    stop_ids = tokenizer.stop_ids(template)
    found: list[str | None] = [None] * len(prompts)
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < model.context]
    short.sort(key=lambda i: len(prompts[i]))  # like lengths together: little padding
    for begin in range(0, len(short), ASKED_AT_ONCE):
        batch = short[begin : begin + ASKED_AT_ONCE]
        done = generate(model, [prompts[i] for i in batch], max_new_tokens, sampling=GREEDY, stop_ids=stop_ids)
        for i, completion in zip(batch, done, strict=True):
            found[i] = tokenizer.decode(completion.tokens)
    return found


@torch.no_grad()
def exact_match(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[dict],
    *,
    template: str = "auto",
    max_new_tokens: int = LONGEST_ANSWER,
) -> dict[str, tuple[int, int]]:
    """(right, asked) for each family of questions (rows of `read_questions`), answered greedily.

    A question that does not fit into the model's context counts as asked and wrong; a line says how many did not.
    """
    asked = [row["messages"][:-1] for row in questions]
    said = answers(model, tokenizer, asked, template=template, max_new_tokens=max_new_tokens)
    if too_long := said.count(None):
        print(f"{too_long} of {len(said)} questions fill the context of {model.context} tokens: counted as wrong")
    scores: dict[str, tuple[int, int]] = {}
    for row, answer in zip(questions, said, strict=True):
        family = str(row.get("family", "all"))  # perhaps a number
        right, n = scores.get(family, (0, 0))
        scores[family] = (right + (answer is not None and is_right(row, answer)), n + 1)
    return dict(sorted(scores.items()))


def with_total(scores: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The scores and, if there are several, their sum as "total"."""
    return {**scores, "total": tuple(map(sum, zip(*scores.values(), strict=True)))} if len(scores) > 1 else scores


def table(scores: dict[str, tuple[int, int]]) -> str:
    """Exact-match scores as lines for the terminal, their sum last."""
    rows = with_total(scores)
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {n and right / n:6.1%}  ({right}/{n})" for name, (right, n) in rows.items())
