"""Messages become token ids and, for each, whether it is learned; what is longer than a row is cut to fit.

What is cut is the text of messages, not their ids: the template writes a shortened conversation as it writes any other.
So every message keeps the pieces around it, whatever the template, and no two messages become one.
"""

import re
from bisect import bisect_left, bisect_right

import numpy as np

from minillm.datasets.messages import is_learned

TURNS, PROMPT, ANSWER = "earlier turns", "the prompt", "the answer's end"  # what may be cut
UNIT = re.compile(r"\s?(?:[0-9A-Za-z]{1,16}|\S)|\s")  # a word of ASCII letters, or one character; a space before it
LONGEST_TOKEN = 64  # characters; no more of a message than a row of such tokens is looked at


def encode_messages(messages: list[dict], tokenizer, template: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """ids (n,) int32 and learn (n,) bool, up to the last token that is learned; both empty if none is.

    Learned are the tokens of the answers for which `is_learned` is true, and the piece that ends each.
    """
    marked = [message | {"learn": is_learned(message)} for message in messages]
    ids, learn = tokenizer.encode_chat(marked, template=template)
    return _without_tail(np.array(ids, dtype=np.int32), np.array(learn, dtype=bool))


def _without_tail(ids: np.ndarray, learn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without what follows the last learned token."""
    if not learn.any():
        return ids[:0], learn[:0]
    end = len(learn) - int(np.argmax(learn[::-1]))
    return ids[:end], learn[:end]


def fit(
    messages: list[dict], tokenizer, seq_len: int, template: str = "auto"
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """ids and learn of at most seq_len + 1 tokens (see `encode_messages`), and what was cut: TURNS, PROMPT, ANSWER.

    A conversation that is too long loses its earliest turns, as few as will do, and keeps its system message. If its
    last learned turn alone is too long, the texts of its prompt are shortened from their middle (`shorten`), to no less
    than a quarter of the row. If that is not enough, the end of the answer is cut, with its eos, and no other eos is
    put there: a model must not learn to stop where the text did not. ids are empty if a row has no room for an answer.
    """
    limit = seq_len + 1
    ids, learn = encode_messages(messages, tokenizer, template)
    if len(ids) <= limit:
        return ids, learn, []
    cut = []

    # The earliest turn from which on it fits, found by halving; or the last turn, whether it fits or not.
    n_system, turns = _turns(messages)

    def from_turn(turn: int) -> list[dict]:
        return messages[:n_system] + messages[turn:]

    def fits(turn: int) -> bool:
        return len(encode_messages(from_turn(turn), tokenizer, template)[0]) <= limit

    earliest = turns[bisect_left(turns, True, hi=len(turns) - 1, key=fits)]
    if earliest > turns[0]:
        cut.append(TURNS)
        messages = from_turn(earliest)
        ids, learn = encode_messages(messages, tokenizer, template)

    # The prompt, then the answer.
    if len(ids) > limit:
        n_answer = len(ids) - int(np.argmax(learn))
        shorter = shorten(messages, tokenizer, limit, n_answer, template)
        if shorter != messages:
            cut.append(PROMPT)
            ids, learn = encode_messages(shorter, tokenizer, template)
    if len(ids) > limit:
        cut.append(ANSWER)
        ids, learn = _without_tail(ids[:limit], learn[:limit])
    return ids, learn, cut


def _turns(messages: list[dict]) -> tuple[int, list[int]]:
    """How many system messages come first, and where each turn begins, up to the last that is learned.

    A turn begins with a question that follows something else.
    """
    n_system = next(i for i, message in enumerate(messages) if message["role"] != "system")
    last_learned = max(i for i, message in enumerate(messages) if is_learned(message))
    turns = []
    for i in range(n_system, last_learned):
        follows_question = i > n_system and messages[i - 1]["role"] == "user"
        if messages[i]["role"] == "user" and not follows_question:
            turns.append(i)
    return n_system, turns or [n_system]


def shorten(messages: list[dict], tokenizer, limit: int, n_answer: int, template: str) -> list[dict]:
    """The messages, those before the first learned answer shortened until the answer's n_answer tokens fit as well.

    The longest lose first: each keeps at most so many words, the most with which the prompt has its room. Words go from
    the middle of a text, since it begins with the task and ends with the question. One word of each stays.
    """
    first_answer = next(i for i, message in enumerate(messages) if is_learned(message))
    prompt = messages[:first_answer]
    most = limit * LONGEST_TOKEN  # characters
    units = []
    for message in prompt:
        text = message["content"].rstrip()
        units.append(UNIT.findall(text if len(text) <= 2 * most else text[:most] + text[-most:]))
    longest = max(map(len, units), default=0)
    if not longest:
        return messages

    def with_words(n_words: int) -> list[dict]:
        """The prompt with at most so many words a message."""
        n_head = n_words // 2
        return [
            message | {"content": "".join(words[:n_head] + words[len(words) - (n_words - n_head) :])}
            if len(words) > n_words
            else message
            for message, words in zip(prompt, units, strict=True)
        ]

    def length(n_words: int) -> int:
        """Tokens of that prompt, with what opens the answer."""
        ids, _ = tokenizer.encode_chat(with_words(n_words), template=template, add_generation_prompt=True)
        return len(ids)

    room = max(limit - n_answer, limit // 4, length(1))
    counts = range(1, longest + 1)
    n_words = counts[max(0, bisect_right(counts, room, key=length) - 1)]
    return with_words(n_words) + messages[first_answer:]
