"""A model that is served: from what a request asks for to requests of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from minillm.base.errors import UserError
from minillm.generation.batching import Engine
from minillm.generation.requests import Request
from minillm.model.transformer import Transformer
from minillm.serving.answers import Answer, Echo
from minillm.serving.openai_request import Asked, Limits
from minillm.serving.refusal import Refusal, too_long, wrong
from minillm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model behind a name.

    template: how a conversation becomes a text, a name in `chat_template.TEMPLATES`; no_chat: why it cannot, "" if it
    can. turns: 1 if the model was taught single questions, else None. created: when its folder was written, in seconds
    since 1970. most_tokens: of one answer.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: str
    no_chat: str
    turns: int | None
    created: int
    most_tokens: int

    @property
    def limits(self) -> Limits:
        """What a request may ask for: more could not be computed or wait here even if nobody else asked."""
        options = self.engine.options
        return Limits(options.slots, options.slots + options.max_waiting)

    @property
    def entry(self) -> dict:
        """What /v1/models says of it. Beyond OpenAI's fields: the context in tokens, and `turns`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minillm",
            "context_length": self.engine.context,
            "turns": self.turns,
            "chat": not self.no_chat,
        }

    # ---- prompts

    def prompts(self, asked: Asked) -> list[list[int]]:
        """The ids of each prompt. Raises `Refusal` for one that cannot be written or leaves no room for an answer."""
        if asked.is_chat:
            return [self._conversation(asked.messages)]
        return [self._ids(prompt) for prompt in asked.prompts]

    def _conversation(self, messages: list[dict]) -> list[int]:
        if self.no_chat:
            raise Refusal(400, f"model {self.name}: {self.no_chat}", param="model")
        self._check_length(sum(len(message["content"].encode()) for message in messages), "messages")
        try:
            ids, _ = self.tokenizer.encode_chat(messages, template=self.template, add_generation_prompt=True)
        except UserError as problem:
            raise wrong("messages", str(problem)) from None
        return self._fitting(ids, "messages")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_length(len(prompt.encode()), "prompt")
            return self._fitting(self.tokenizer.prompt_ids(prompt), "prompt")
        vocab_size = self.engine.model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise wrong("prompt", f"ids from {min(prompt)} to {max(prompt)}; the model knows 0 to {vocab_size - 1}")
        return self._fitting(prompt, "prompt")

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if len(ids) >= self.engine.context:
            raise too_long(len(ids), self.engine.context, param)
        return ids

    def _check_length(self, n_bytes: int, param: str) -> None:
        """Refuse a text that cannot fit whatever its tokens are, before time is spent on cutting it into them."""
        if self._longest_piece and n_bytes > self._longest_piece * self.engine.context:
            raise too_long(n_bytes // self._longest_piece, self.engine.context, param, at_least=True)

    @cached_property
    def _longest_piece(self) -> int:
        """Bytes of text that a token stands for at most; 0 if that is not known."""
        pieces = self.tokenizer.pieces
        if pieces.unfaithful or pieces.table is None:
            return 0
        return max(map(len, pieces.table))

    # ---- what the engine is asked for

    def requests(self, asked: Asked, prompts: Sequence[list[int]], owner: str) -> list[tuple[Request, Answer]]:
        """A request for every answer, and the answer that it will become.

        owner: whose request it is: what has been read of a prompt is kept for later prompts of the same owner alone.
        """
        work = []
        for number in range(len(prompts) * asked.n):
            nth_prompt, choice = divmod(number, asked.n)
            ids = prompts[nth_prompt]
            echo = None
            if asked.echo:
                prompt = asked.prompts[nth_prompt]
                echo = Echo(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids), ids)
            request = Request(
                prompt=ids,
                max_new_tokens=min(asked.max_tokens or self.most_tokens, self.most_tokens),
                sampling=asked.sampling,
                # with a seed each prompt is continued as it is alone; without one no two answers draw alike
                choice=choice if asked.is_seeded else number,
                stop_ids=self._stop_ids if asked.is_chat else self.tokenizer.end_ids,
                log_probs=asked.log_probs,
                prompt_log_probs=asked.echo and asked.log_probs is not None,
                owner=owner,
            )
            answer = Answer(number, self.tokenizer, asked.stop_strings, len(ids), echo)
            work.append((request, answer))
        return work

    @cached_property
    def _stop_ids(self) -> list[int]:
        return self.tokenizer.stop_ids(self.template)


def share_weights(model: Transformer, others: Sequence[Transformer]) -> int:
    """Let weights that equal those of another model lie in its memory; returns the bytes that this saves.

    An adapter of virtual tokens shares its whole base so; one that is merged, what it leaves as it was.
    """
    n_saved = 0
    for other in others:
        theirs = dict(other.named_parameters())
        for name, weight in model.named_parameters():
            same = theirs.get(name)
            if same is None or (same.shape, same.dtype, same.device) != (weight.shape, weight.dtype, weight.device):
                continue
            if same.data_ptr() != weight.data_ptr() and torch.equal(same, weight):
                weight.data = same.data
                n_saved += weight.nbytes
    return n_saved


def why_no_chat(tokenizer: Tokenizer, template: str) -> str:
    """Why a model cannot chat; "" if it can. Raises `UserError` for a template that its tokenizer does not know."""
    tokenizer.resolve_template(template)
    if template == "auto" and tokenizer.chat_template is None:
        return "it has no chat template: choose --template simple, or ask /v1/completions"
    try:
        tokenizer.encode_chat([{"role": "user", "content": "?"}], template=template, add_generation_prompt=True)
    except UserError as problem:
        return str(problem)
    return ""
