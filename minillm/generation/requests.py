"""What is asked of the engine (`batching.py`) and what it answers: requests, their events, and tickets.

ticket = engine.submit(Request(prompt, max_new_tokens=20))
for event in ticket.events():          # PromptRead, Token, Token, …, End
    …
"""

import queue
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minillm.base.errors import UserError
from minillm.generation.sampling import GREEDY, Sampling


class QueueFull(UserError):
    """As many requests wait as may: ask again later."""


class Closed(UserError):
    """The engine ends and takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    prompt: ids, at least one. max_new_tokens: at most this many follow, fewer where the context is full.
    choice: number t is drawn by a function of (sampling.seed, choice, t), as `generate` does for its row `choice`.
    stop_ids: the answer ends at one of these, which is left out.
    log_probs: None: none are given; k: those of each token and of the k most probable, from the model's own
    distribution, before temperature, filters and penalties. prompt_log_probs: also of the prompt's tokens; then no
    part of it is taken from the cache. owner: prefixes are shared among the requests of one owner.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    choice: int = 0
    stop_ids: Collection[int] = ()
    log_probs: int | None = None
    prompt_log_probs: bool = False
    owner: str = ""


class TokenLogProbs(NamedTuple):
    """Log-probability in nats of a token, and (id, log-probability) of the most probable ones, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class PromptRead(NamedTuple):
    """The prompt is read.

    n_cached: how many of its tokens were there already. log_probs: of each of its tokens, None for the first, which
    nothing predicts; None altogether if they were not asked for.
    """

    n_cached: int
    log_probs: list[TokenLogProbs | None] | None


class Token(NamedTuple):
    """A new token of the answer."""

    id: int
    log_probs: TokenLogProbs | None


class End(NamedTuple):
    """The answer ends.

    reason: "stop" (a stop id came), "length" (max_new_tokens), "context" (it is full), "cancelled", "timeout",
    "closed" (the engine ended first) or "error". message: one line on the last three; None for the others.
    last: the stop id, which is no part of the answer.
    """

    reason: str
    message: str | None = None
    last: Token | None = None


Event = PromptRead | Token | End


class Ticket:
    """A request that the engine has accepted, and its events: one `PromptRead`, a `Token` each, one `End`.

    One thread may take the events; any may cancel.
    """

    def __init__(self, request: Request, notify: Callable[[], None], wake: Callable[[], None]):
        """notify: called after new events. wake: lets the engine see at once that the ticket is cancelled."""
        self.request = request
        self.notify = notify
        self.submitted = time.monotonic()  # seconds
        self.is_cancelled = False
        self.ended: End | None = None
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        """Add an event; the engine's side."""
        if isinstance(event, End):
            self.ended = event
        self._events.put(event)

    def take(self) -> list[Event]:
        """All events that wait, without waiting for more."""
        events = []
        while True:
            try:
                events.append(self._events.get_nowait())
            except queue.Empty:
                return events

    def events(self) -> Iterator[Event]:
        """Each event, as it comes; the last is an `End`."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, End):
                return

    def cancel(self) -> None:
        """End it before the engine's next step, with the reason "cancelled". Once it has ended this does nothing."""
        self.is_cancelled = True
        self._wake()
