"""Best of n: draw n answers to a question and keep the one with the highest reward, without training anything.

The answer that is kept is drawn from a policy whose distance from the model is KL ≤ log n − (n − 1)/n (Beirami et al.
2024, arXiv:2401.01879), so it shows how far a reward leads before any reinforcement learning.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.alignment.reward_model import load_reward_model
from minillm.base.errors import UserError
from minillm.evaluation.checks import load_reward
from minillm.generation.completion import Completion, generate
from minillm.generation.pieces import text_before
from minillm.generation.sampling import Sampling
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer


class Candidate(NamedTuple):
    """An answer, why it ended (as a `Completion` says), and its reward."""

    text: str
    reason: str
    reward: float


Judge = Callable[[str, list[str], list[list[int]]], list[float]]  # question, answers, ids of both → rewards


def load_judge(reward: str, tokenizer: Tokenizer, device: torch.device, template: str = "auto") -> Judge:
    """What --reward means: the folder of a reward model, or a function as `load_reward` takes it.

    Raises `UserError` for a folder that holds no reward model, or one with another tokenizer or prompt format than
    the language model.
    """
    if not Path(reward).is_dir():
        function = load_reward(reward)
        return lambda question, texts, ids: function([question] * len(texts), texts, [{} for _ in texts])
    model = load_reward_model(reward, device, tokenizer=tokenizer, template=template)
    return lambda question, texts, ids: _scores(model, ids, tokenizer.pad_id).tolist()


@torch.no_grad()
def _scores(model: Transformer, texts: list[list[int]], pad_id: int) -> Tensor:
    """The score at the last token of each text, (N,) fp32."""
    lengths = torch.tensor([len(ids) for ids in texts])  # (N,)
    if lengths.max() > model.config.max_seq_len:
        raise UserError(
            f"--reward: a question with its answer has {lengths.max()} tokens, and the reward model's longest context "
            f"is {model.config.max_seq_len}; lower --max_new_tokens"
        )
    tokens = torch.full((len(texts), int(lengths.max())), pad_id)  # (N, T)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    device = model.norm.weight.device
    scores = model(tokens.to(device))  # (N, T)
    return scores.gather(1, lengths.to(device)[:, None] - 1).squeeze(1)


class Asking(NamedTuple):
    """How a question is put to a model: its prompt format, the longest answer in tokens, and texts that end one."""

    template: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


def best_of(
    n: int, question: str, model: Transformer, tokenizer: Tokenizer, judge: Judge, asking: Asking
) -> list[Candidate]:
    """n answers to a question, the one with the highest reward first; of equal ones the one that was drawn first."""
    messages = [{"role": "user", "content": question}]
    prompt, _ = tokenizer.encode_chat(messages, template=asking.template, add_generation_prompt=True)
    completions = generate(
        model,
        [prompt] * n,
        asking.max_new_tokens,
        sampling=asking.sampling,
        stop_ids=tokenizer.stop_ids(asking.template),
        stop_strings=asking.stop,
        tokenizer=tokenizer,
    )
    end = _end_of_answer(tokenizer, messages, asking.template)
    texts, ids = [], []
    for completion in completions:
        whole = tokenizer.decode(completion.tokens)
        text = text_before(tokenizer, completion.tokens, asking.stop)
        tokens = completion.tokens if text == whole else tokenizer.encode(text)  # of what is judged, and printed
        texts.append(text)
        ids.append([*prompt, *tokens, *_end(completion, end)])
    rewards = judge(question, texts, ids)
    found = [Candidate(*each) for each in zip(texts, (c.reason for c in completions), rewards, strict=True)]
    return sorted(found, key=lambda candidate: -candidate.reward)


def _end_of_answer(tokenizer: Tokenizer, messages: list[dict], template: str) -> int:
    """The id that ends an answer in this prompt format, as reward models have seen it."""
    ids, learn = tokenizer.encode_chat([*messages, {"role": "assistant", "content": "."}], template=template)
    return max(zip(range(len(ids)), ids, learn, strict=True), key=lambda item: (item[2], item[0]))[1]


def _end(completion: Completion, end: int) -> list[int]:
    """The end of an answer that ended; one that was cut has none."""
    return [end] if completion.reason == "stop" else []
