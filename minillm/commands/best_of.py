"""Best of n: draw n answers to a question and keep the one with the highest reward, without training anything.

The answer that is kept is drawn from a policy whose distance from the model is KL ≤ log n − (n − 1)/n (Beirami et al.
2024, arXiv:2401.01879), so it shows how far a reward leads before any reinforcement learning.
"""

from typing import NamedTuple

import numpy as np

from minillm.alignment.rewards import Rewards
from minillm.datasets.instructions import collate
from minillm.datasets.prompts import Prompt
from minillm.generation.completion import Completion, generate
from minillm.generation.pieces import text_before
from minillm.generation.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer
from minillm.tuning.virtual_tokens import context_of


class Candidate(NamedTuple):
    """An answer, why it ended (as a `Completion` says), and its reward."""

    text: str
    reason: str
    reward: float


class Asking(NamedTuple):
    """How a question is put to a model: its prompt format, the longest answer in tokens, and texts that end one."""

    template: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


def prompt_of(question: str, tokenizer: Tokenizer, asking: Asking) -> Prompt:
    """A question as it is put to a model."""
    messages = [{"role": "user", "content": question}]
    ids, _ = tokenizer.encode_chat(messages, template=asking.template, add_generation_prompt=True)
    return Prompt(0, ids, question, {}, tuple(messages))


def load_judge(reward: str, prompt: Prompt, model: Transformer, tokenizer: Tokenizer, asking: Asking) -> Rewards:
    """What --reward means, ready to judge answers to a prompt. Raises `UserError` as `Rewards` does."""
    longest = min(context_of(model), len(prompt.ids) + asking.max_new_tokens)
    return Rewards(
        reward,
        tokenizer,
        device=model.norm.weight.device,
        template=asking.template,
        longest=longest,
        remedy="--max_new_tokens",
    )


def best_of(
    n: int, prompt: Prompt, model: Transformer, tokenizer: Tokenizer, rewards: Rewards, asking: Asking
) -> list[Candidate]:
    """n answers to a prompt, the one with the highest reward first; of equal ones the one that was drawn first."""
    completions = generate(
        model,
        [prompt.ids] * n,
        asking.max_new_tokens,
        sampling=asking.sampling,
        stop_ids=tokenizer.stop_ids(asking.template),
        stop_strings=asking.stop,
        tokenizer=tokenizer,
    )
    end = _end_of_answer(tokenizer, [*prompt.messages], asking.template)
    texts, rows = [], []
    for completion in completions:
        whole = tokenizer.decode(completion.tokens)
        text = text_before(tokenizer, completion.tokens, asking.stop)
        tokens = completion.tokens if text == whole else tokenizer.encode(text)  # of what is judged, and printed
        ids = np.array([*prompt.ids, *tokens, *_end(completion, end)])
        texts.append(text)
        rows.append([(ids, np.arange(len(ids)) >= len(prompt.ids))])
    longest = max(len(ids) - 1 for [(ids, _)] in rows)
    batch = collate(rows, longest, tokenizer.pad_id, documents=False).to(model.norm.weight.device)
    found = rewards.of_texts([prompt] * n, texts, batch).tolist()
    reasons = [completion.reason for completion in completions]
    candidates = [Candidate(*each) for each in zip(texts, reasons, found, strict=True)]
    return sorted(candidates, key=lambda candidate: -candidate.reward)


def _end_of_answer(tokenizer: Tokenizer, messages: list[dict], template: str) -> int:
    """The id that ends an answer in this prompt format, as reward models have seen it."""
    ids, learn = tokenizer.encode_chat([*messages, {"role": "assistant", "content": "."}], template=template)
    learned = [i for i, is_learned in zip(ids, learn, strict=True) if is_learned]
    return (learned or ids)[-1]


def _end(completion: Completion, end: int) -> list[int]:
    """The end of an answer that ended; one that was cut has none."""
    return [end] if completion.reason == "stop" else []
