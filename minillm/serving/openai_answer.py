"""Answers in the JSON that OpenAI's clients read: whole, or in chunks.

A chat and a completion differ in names (`message` and `delta`, or `text`) and in the form of log-probabilities.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from minillm.serving.answers import Answer, Part, Placed
from minillm.serving.openai_request import Asked
from minillm.tokenizer.tokenizer import Tokenizer

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
LEAST_LOG_PROB = -9999.0  # JSON has no -inf
DONE = b"data: [DONE]\n\n"
STILL_THERE = b": waiting\n\n"  # a comment, which keeps a connection open while there is nothing to say


def as_json(value: dict) -> bytes:
    """A value as the bytes of an answer."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def as_event(value: dict) -> bytes:
    """A value as an event of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + as_json(value) + b"\n\n"


@dataclass(frozen=True)
class Form:
    """Writes the answers to one request."""

    asked: Asked
    model: str  # the name that the answer tells
    tokenizer: Tokenizer

    @cached_property
    def _id(self) -> str:
        return ("chatcmpl-" if self.asked.is_chat else "cmpl-") + secrets.token_hex(12)

    @cached_property
    def _created(self) -> int:
        return int(time.time())

    def _around(self, choices: list[dict], kind: str) -> dict:
        """What stands around the choices of an answer or a chunk."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    # ---- whole

    def whole(self, answers: Sequence[Answer], parts: Sequence[Part]) -> dict:
        """All answers at once. parts: the text and tokens of each."""
        choices = []
        for answer, part in zip(answers, parts, strict=True):
            choice = {"index": answer.number}
            if self.asked.is_chat:
                choice["message"] = {"role": "assistant", "content": part.text, "refusal": None}
            else:
                choice["text"] = part.text
            choice["logprobs"] = self._log_probs(part.tokens)
            choice["finish_reason"] = FINISH_REASONS[answer.end.reason]
            choices.append(choice)
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return self._around(choices, kind) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict:
        """How many tokens were read and written. A prompt with several answers counts once."""
        first = answers[:: self.asked.n]  # answers to each prompt
        n_prompt = sum(answer.n_prompt for answer in first)
        n_new = sum(answer.n_new for answer in answers)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(answer.n_cached for answer in first)},
        }

    # ---- in chunks

    def opening(self, answers: Sequence[Answer]) -> bytes:
        """What a stream begins with: of a chat, who speaks."""
        if not self.asked.is_chat:
            return b""
        return b"".join(self._chunk(answer, {"role": "assistant", "content": ""}, [], None) for answer in answers)

    def chunks(self, answer: Answer, part: Part) -> bytes:
        """The next part of an answer, and its end if it has come."""
        reason = FINISH_REASONS[answer.end.reason] if answer.end else None
        if not self.asked.is_chat:
            return self._chunk(answer, part.text, part.tokens, reason) if part.text or part.tokens or reason else b""
        events = b""
        if part.text or part.tokens:
            events += self._chunk(answer, {"content": part.text}, part.tokens, None)
        if reason:
            events += self._chunk(answer, {}, [], reason)
        return events

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """What a stream ends with: the usage, if it was asked for, and a mark."""
        if not self.asked.includes_usage:
            return DONE
        return as_event(self._around([], self._chunk_kind) | {"usage": self.usage(answers)}) + DONE

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.is_chat else "text_completion"

    def _chunk(self, answer: Answer, what: dict | str, tokens: list[Placed], reason: str | None) -> bytes:
        """One event: some text of one answer."""
        choice = {
            "index": answer.number,
            "delta" if self.asked.is_chat else "text": what,
            "logprobs": self._log_probs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        chunk = self._around([choice], self._chunk_kind)
        if self.asked.includes_usage:
            chunk["usage"] = None
        return as_event(chunk)

    # ---- log-probabilities

    def _log_probs(self, tokens: Sequence[Placed]) -> dict | None:
        """Those of some tokens, in the form of a chat or of a completion; None if they were not asked for."""
        if self.asked.log_probs is None:
            return None
        if self.asked.is_chat:
            return {"content": [self._of_chat(token) for token in tokens], "refusal": None}
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.log_probs and _finite(token.log_probs.chosen) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens] if self.asked.log_probs else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _of_chat(self, token: Placed) -> dict:
        top = [self._entry(i, log_prob) for i, log_prob in token.log_probs.top]
        return self._entry(token.id, token.log_probs.chosen) | {"top_logprobs": top}

    def _entry(self, i: int, log_prob: float) -> dict:
        data = self._bytes_of(i)
        in_text = None if i in self._control else list(data)
        return {"token": data.decode(errors="replace"), "logprob": _finite(log_prob), "bytes": in_text}

    def _likeliest(self, token: Placed) -> dict[str, float] | None:
        """The likeliest tokens by name, and the chosen one; of two with one name the likelier."""
        if token.log_probs is None:
            return None
        named: dict[str, float] = {}
        for i, log_prob in (*token.log_probs.top, (token.id, token.log_probs.chosen)):
            named.setdefault(self._name(i), _finite(log_prob))
        return named

    def _name(self, i: int) -> str:
        r"""The text of a token alone; of half a character its bytes, such as `bytes:\xe4`."""
        data = self._bytes_of(i)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, i: int) -> bytes:
        """What a token adds to a text; of a control piece, which adds nothing, its name."""
        if i in self._control:
            return self._control[i].encode()
        table = self.tokenizer.pieces.table
        if table is not None and i < self.tokenizer.vocab_size:
            return table[i]
        return self.tokenizer.decode([i]).encode()

    @cached_property
    def _control(self) -> dict[int, str]:
        return {i: piece for piece, i in self.tokenizer.control.items()}


def _finite(log_prob: float) -> float:
    return max(log_prob, LEAST_LOG_PROB)
