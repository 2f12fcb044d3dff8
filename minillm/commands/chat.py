"""Talk with a model: answers come token by token.

An empty line or Ctrl-D ends, /new starts a new conversation.
"""

import contextlib
import sys
from dataclasses import dataclass, replace

from minillm.base.options import option, part
from minillm.commands.model_options import (
    CompileOptions,
    ModelOptions,
    OutputOptions,
    TemplateOptions,
    learned_texts_only,
    load_model,
    prepare_steps,
    print_stream,
    template_of,
    trained_with,
)
from minillm.generation import completion
from minillm.generation.load import Loaded
from minillm.generation.sampling import Sampling
from minillm.model.size import n_parameters
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import context_of

REASONS = {"length": "--max_new_tokens reached", "context": "the context is full"}


@dataclass(frozen=True)
class Config(ModelOptions, CompileOptions, TemplateOptions, Sampling, OutputOptions):
    system: str | None = option(
        None,
        "what the model is told before the first question",
        may_be_blank=True,
        group="conversation",
    )
    turns: int | None = option(
        None,
        "questions it sees at once; none: 1 if taught so, else all that fit",
        at_least=1,
        group="conversation",
    )
    max_new_tokens: int = option(200, "at most this many new tokens an answer", at_least=1, group="conversation")


def run(config: Config) -> None:
    loaded = load_model(config)
    prepare_steps(config, loaded.model)
    print(f"{loaded.folder} ({n_parameters(loaded.model.config):,} parameters); an empty line ends, /new starts over")
    trained = trained_with(loaded.folder)
    if learned_texts_only(trained):
        print("(its last training was on texts, so it goes on with yours: train_sft.py teaches it to answer)")
    turns = config.turns
    if turns is None and trained.get("turns") == 1:
        turns = 1
        print("(it was taught single questions, so it is shown each alone; --turns N shows it the last N)")
    opening = [{"role": "system", "content": config.system}] if config.system else []  # of every conversation
    messages = list(opening)
    sampling = part(config, Sampling)
    sys.stdin.reconfigure(errors="replace")  # one line that is not UTF-8 must not end the chat
    while True:
        # read a question, or a command
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question.strip():
            return
        if question.strip() == "/new":
            messages = list(opening)
            continue
        if "\ufffd" in question:
            print("(that line is not UTF-8, so it was not asked: set the terminal or file to UTF-8 and ask again)")
            continue

        # answer it, from the last turns of the conversation
        conversation = [*messages, {"role": "user", "content": question}]
        if turns is not None:  # of the earlier messages only the last turns - 1 questions and answers
            end = len(conversation) - 2 * turns + 1
            del conversation[len(opening) : max(len(opening), end)]
        answer = _answer(config, loaded, conversation, len(opening), sampling)
        # the next one draws with other random numbers, so that a question asked again can get another answer
        sampling = replace(sampling, seed=(sampling.seed + 1) % (1 << 64))
        if answer and answer.strip():  # Ctrl-C may come before it begins, and templates refuse a blank one
            messages = [*conversation, {"role": "assistant", "content": answer}]


def _answer(config: Config, loaded: Loaded, messages: list[dict], opening: int, sampling: Sampling) -> str | None:
    """Print the model's answer to the last message, and return it; None if that message is too long to be asked.

    Messages that no longer fit are dropped from the list; opening: how many at its beginning must stay.
    """
    model, tokenizer, folder = loaded
    context = context_of(model)

    # the prompt: as much of the conversation as fits
    template = template_of(config, folder)
    ids, n_forgotten = _fit(tokenizer, messages, template, context, opening)
    if len(ids) >= context:
        remedy = "say it in fewer words" + (", or shorten --system" if opening else "")
        print(f"(not asked: its {len(ids)} tokens fill the context of {context}; {remedy})")
        return None
    if n_forgotten:
        print(f"(the context of {context} tokens is full: {n_forgotten} earlier messages forgotten)")

    # the answer, printed as it comes
    stream = completion.stream(
        model,
        tokenizer,
        ids,
        config.max_new_tokens,
        sampling=sampling,
        stop_ids=tokenizer.stop_ids(template),
    )
    pieces: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C cuts an answer short
        end = print_stream(stream, pieces, config.raw)
        if end.reason != "stop":
            print(f" … ({REASONS[end.reason]})", end="")
    print()
    return "".join(pieces)


def _fit(
    tokenizer: Tokenizer, messages: list[dict], template: str, context: int, opening: int
) -> tuple[list[int], int]:
    """Ids of the conversation, and how many messages were dropped from it, earliest first.

    It is shortened to at most half the context. The last question stays whole, even if it alone does not fit.
    """
    n_dropped = 0
    while True:
        ids, _ = tokenizer.encode_chat(messages, template=template, add_generation_prompt=True)
        if len(ids) <= context // 2 or len(messages) <= opening + 1:
            return ids, n_dropped
        del messages[opening : opening + 2]  # a question and its answer
        n_dropped += 2
