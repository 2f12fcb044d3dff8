"""Answers in the model's own words, worked out step by step, of which only the number at the end counts (GSM8K)."""

import re
from collections.abc import Sequence

from minillm.base.errors import UserError
from minillm.evaluation.answers import greedy_completions
from minillm.generation.pieces import text_before
from minillm.model.transformer import Transformer
from minillm.tokenizer.tokenizer import Tokenizer

LONGEST = 256  # new tokens
ENDS = ("Question:", "</s>", "<|im_end|>")  # before which an answer ends
PROMPTS_AT_ONCE = 32
NONE = "[invalid]"  # where no number is found, as lm-evaluation-harness writes it
MARKED = re.compile(r"#### (-?[0-9.,]+)")  # as the data set marks its results
ANY = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def continued(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], max_len: int, longest: int = LONGEST
) -> list[str]:
    """The greedy continuation of each prompt, up to one of `ENDS`, the end of the text or `longest` new tokens.

    max_len: most tokens of prompt and continuation; longer prompts lose their beginning. Raises `UserError` as
    `room_for_prompt` does.
    """
    room = room_for_prompt(max_len, longest)
    ids = [of_prompt[-room:] for of_prompt in ids_of(tokenizer, prompts)]
    how = dict(stop_ids=tokenizer.end_ids, stop_strings=ENDS, tokenizer=tokenizer)
    completions = greedy_completions(model, ids, longest, n_at_once=PROMPTS_AT_ONCE, **how)
    return [text_before(tokenizer, completion.tokens, ENDS) for completion in completions]


def ids_of(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt, behind a bos if the tokenizer puts one there."""
    start = [tokenizer.bos_id] if tokenizer.begins_with_bos else []
    return [[*start, *tokens] for tokens in tokenizer.encode_many(list(prompts))]


def room_for_prompt(max_len: int, longest: int = LONGEST) -> int:
    """Tokens that an answer leaves to the prompt. Raises `UserError` if there is none."""
    if max_len <= longest:
        raise UserError(f"--seq_len {max_len}: an answer may have {longest} tokens, so more than these are needed")
    return max_len - longest


def marked_number(text: str) -> str:
    """The first number behind "####"."""
    found = MARKED.search(text)
    return found[1].strip() if found else NONE


def last_number(text: str) -> str:
    """The last thing in a text that looks like a number."""
    found = ANY.findall(text)
    return found[-1].strip() if found else NONE


def same_number(given: str, right: str) -> bool:
    """Whether a number is that behind the mark of the right answer, as texts."""
    return _plain(given) == _plain(right)


def _plain(text: str) -> str:
    """A number without what is before its mark, commas, dollars and a full stop."""
    without_signs = re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))
    return re.sub(r"\.$", "", without_signs).lower()
