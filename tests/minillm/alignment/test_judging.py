"""The most that any policy has where one answer is right: by enumeration of a tiny model's answers."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from minillm.alignment.judging import Judge, optimum_by_answers, print_row
from minillm.alignment.reference import Reference
from minillm.alignment.rollouts import RolloutConfig
from minillm.datasets.prompts import Prompt
from minillm.tokenizer.chat_template import JINJA
from minillm.tokenizer.train import train_tokenizer
from tests.minillm.model_options import build

TEMPERATURE, BETA = 1.3, 0.2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["the cat sees the dog"] * 20, 362, tmp_path_factory.mktemp("tokenizer"))


def prompt_of(tokenizer, question: str, row: dict, before: tuple[dict, ...] = ()) -> Prompt:
    messages = (*before, {"role": "user", "content": question})
    ids, _ = tokenizer.encode_chat(list(messages), add_generation_prompt=True)
    return Prompt(0, ids, question, row, messages)


@torch.no_grad()
def probability(model, tokenizer, prompt: Prompt, answer: str) -> float:
    """Of the answer and its end, token by token."""
    messages = [*prompt.messages, {"role": "assistant", "content": answer}]
    ids, _ = tokenizer.encode_chat(messages)
    p = 1.0
    for end in range(len(prompt.ids), ids.index(tokenizer.eos_id, len(prompt.ids)) + 1):
        logits = model(torch.tensor([ids[:end]]))[0, -1] / TEMPERATURE
        p *= float(torch.softmax(logits.double(), 0)[ids[end]])
    return p


@pytest.mark.parametrize("tail", ["", "{{ '\\n the cat' }}"])
def test_the_optimum_by_right_answers_is_that_of_their_probability(tokenizer, tail):
    """Also of a template that goes on after the end of an answer, as ChatML does with a newline."""
    if tail:
        template = JINJA["chat"].replace("{{ eos_token }}", "{{ eos_token }}" + tail)
        tokenizer = tokenizer.with_settings(add_bos=False, chat_template=template)
    model = build(vocab_size=400).eval()
    talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "the dog"})
    prompts = [
        prompt_of(tokenizer, "the cat", {"answer": "the dog sees"}),
        prompt_of(tokenizer, "sees", {}),
        prompt_of(tokenizer, "sees", {"answer": "the dog sees the cat " * 9}),  # longer than an answer may be
        prompt_of(tokenizer, "dog", {"answer": "cat"}, talk),
    ]
    rollout = RolloutConfig(2, 24, TEMPERATURE, (2,), 3, 0)
    judge = Judge(model, None, Reference(model, model), rollout, 1, contextlib.nullcontext)
    found = optimum_by_answers(judge, prompts, tokenizer, "auto", BETA).tolist()
    for prompt, value in zip(prompts, found, strict=True):
        if prompt.text == "sees":
            assert value == -math.inf
            continue
        p = probability(model, tokenizer, prompt, prompt.row["answer"])
        assert value == pytest.approx(BETA * math.log1p(p * (math.exp(1 / BETA) - 1)), rel=1e-4)


def test_what_rounds_to_zero_is_printed_without_a_sign():
    """The KL of the first step, of a policy that is still the reference, is rounding of either sign."""
    printed = []
    run = SimpleNamespace(step=1, due=lambda step, every: False, print=printed.append)
    print_row(run, {"kl": -1e-7, "reward": -0.25}, ("kl", "reward", "absent"))
    assert printed == ["step 1: kl 0.000, reward -0.250"]
