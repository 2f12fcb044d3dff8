"""One answer as it grows: the engine's events in, text and tokens out.

Text that may begin a stop string is held back, and the tokens that it is made of with it. So whatever an answer has
given out once is part of it, and the chunks of a stream joined are the text of a whole answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.generation.pieces import Pieces
from minillm.generation.requests import End, Event, PromptRead, Token, TokenLogProbs
from minillm.tokenizer.stream_decoder import StreamDecoder
from minillm.tokenizer.tokenizer import Tokenizer


class Placed(NamedTuple):
    """A token, its log-probabilities (None: of the first of a text), and where its text begins, in characters."""

    id: int
    log_probs: TokenLogProbs | None
    offset: int


class Part(NamedTuple):
    """What an answer grows by: text, and the tokens that begin in it."""

    text: str
    tokens: list[Placed]


class Echo(NamedTuple):
    """A prompt that an answer begins with."""

    text: str
    ids: Sequence[int]


@dataclass
class Answer:
    """One answer. number: its index among those to a request; n_prompt: tokens of its prompt."""

    number: int
    tokenizer: Tokenizer
    stop_strings: Sequence[str]
    n_prompt: int
    echo: Echo | None = None
    n_cached: int = 0  # tokens of the prompt that need not be read again
    n_new: int = 0
    end: End | None = None
    n_given: int = 0  # characters given out
    held: list[Placed] = field(default_factory=list)  # tokens whose text is not given out yet

    def __post_init__(self):
        self.pieces = Pieces(self.tokenizer, self.stop_strings)

    def take(self, events: Sequence[Event]) -> Part:
        """What these events add to the answer; those after its end add nothing."""
        texts: list[str] = []
        tokens: list[Placed] = []
        for event in events:
            if self.end is not None:
                break
            if isinstance(event, PromptRead):
                part = self._begin(event)
            elif isinstance(event, Token):
                part = self._push(event)
            else:
                part = self._finish(event)
            texts.append(part.text)
            tokens += part.tokens
        return Part("".join(texts), tokens)

    def _begin(self, read: PromptRead) -> Part:
        """The prompt has been read; it is given out if it is to be echoed."""
        self.n_cached = read.n_cached
        if self.echo is None:
            return Part("", [])
        self.n_given = len(self.echo.text)
        placed = []
        if read.log_probs is not None:
            decoder = StreamDecoder(self.tokenizer)
            texts = [decoder.push(i) for i in self.echo.ids]
            # a text that goes on keeps the space that some tokenizers put before a text; one that begins loses it
            n_dummy = len("".join(texts) + decoder.flush()) - len(self.tokenizer.decode(self.echo.ids))
            offset = -n_dummy
            for i, log_probs, text in zip(self.echo.ids, read.log_probs, texts, strict=True):
                placed.append(Placed(i, log_probs, max(0, offset)))
                offset += len(text)
        return Part(self.echo.text, placed)

    def _push(self, token: Token) -> Part:
        """One more token, which ends the answer if it completes a stop string."""
        self.n_new += 1
        self.held.append(Placed(token.id, token.log_probs, self.n_given + self.pieces.n_waiting))
        text = self.pieces.push(token.id)
        if self.pieces.is_stopped:
            self.end = End("stop")
        return self._give(text)

    def _finish(self, end: End) -> Part:
        """The engine has ended the answer: what was held back belongs to it."""
        self.end = end
        part = self._give(self.pieces.flush())
        rest = [*self.held]
        if end.last is not None and end.last.log_probs is not None:  # the id that ended it, which has no text
            rest.append(Placed(end.last.id, end.last.log_probs, self.n_given))
        self.held.clear()
        return Part(part.text, [*part.tokens, *rest])

    def _give(self, text: str) -> Part:
        """Give out the next characters, and the tokens that begin in them."""
        self.n_given += len(text)
        given = [token for token in self.held if token.offset < self.n_given]
        self.held = [token for token in self.held if token.offset >= self.n_given]
        return Part(text, given)
