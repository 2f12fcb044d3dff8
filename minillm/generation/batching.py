"""Many requests at once: they join and leave a running batch between its steps (continuous batching).

A step is: end what was cancelled or took too long; give free slots to those who wait, first come, first served; read at
most `prefill_chunk` tokens of their prompts, so that a long one does not hold up the others; then one token for every
request whose prompt is read. All memory is taken at the start: a cache of `slots` rows.

    requests.py   what is asked and answered        slots.py    who has which row of the cache
    running.py    a request that has a slot         passes.py   the model's part of a step

A request's tokens are those of `generate` alone, up to rounding: each row computes what it would compute by itself, and
draws with numbers of its own. See docs/en/generation.md.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.base.errors import UserError
from minillm.base.options import Options, option
from minillm.base.printing import log_line
from minillm.distributed.shards import is_sharded_model
from minillm.generation.completion import check_prompts
from minillm.generation.passes import Passes
from minillm.generation.requests import Closed, End, PromptRead, QueueFull, Request, Ticket, Token, TokenLogProbs
from minillm.generation.running import Running, log_probs_of
from minillm.generation.sampling import not_finite, pick_each
from minillm.generation.slots import Slot, Slots, common_prefix
from minillm.model.transformer import Transformer
from minillm.tuning.virtual_tokens import context_of


@dataclass(frozen=True)
class EngineOptions(Options):
    """How many requests are computed and wait, and how large they may be."""

    slots: int = option(8, "requests that are computed at once", at_least=1, at_most=1024, group="engine")
    context: int | None = option(
        None, "tokens of a prompt and its answer; none: as many as the model can", at_least=2, group="engine"
    )
    prefill_chunk: int = option(128, "tokens of prompts that are read between two steps", at_least=1, group="engine")
    max_waiting: int = option(64, "requests that may wait for a slot; more are refused", at_least=0, group="engine")
    time_limit: float = option(600.0, "seconds from a request's arrival to its end", above=0, group="engine")


class Engine:
    """Computes the requests that `submit` accepts, by `step`, or in a thread of its own (`start`)."""

    def __init__(self, model: Transformer, options: EngineOptions, log: Callable[[str], None] | None = None):
        """log: gets a line for every fault of a step; None: standard error.

        Raises UserError for a model that generates no text by itself, and for a context beyond the model's.
        """
        if is_sharded_model(model):
            raise UserError("the model is sharded over ranks: merge or export it, and load the whole on one device")
        if model.config.score_head:
            raise UserError("the model gives scores and no tokens (a reward or value model): choose a language model")
        longest = context_of(model)
        self.context = options.context or longest
        if self.context > longest:
            raise UserError(f"--context {self.context}: the model's is {longest}; choose at most that")

        self.model = model.eval()
        self.options = options
        self.slots = Slots(model, options.slots, self.context)
        self.passes = Passes(model, self.slots)
        self.cache_bytes = self.slots.n_bytes
        self.log = log or log_line

        # requests, from their arrival to their end
        self.waiting: deque[Ticket] = deque()
        self.running: dict[Slot, Running] = {}  # all that have a slot
        self._changed: dict[Ticket, None] = {}  # tickets with new events in this step, in their order
        self._counts = Counter()

        # what other threads touch is changed under this condition, which also wakes the engine's own thread
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._stop_at: float | None = None  # when the rest is ended, once it is closing; monotonic seconds
        self.fault: str | None = None  # what ended the engine for good, if anything did

    # ---- from any thread

    def check(self, request: Request) -> None:
        """Raise UserError for a request that nothing can be generated for."""
        check_prompts(self.model, [request.prompt], request.max_new_tokens)
        if len(request.prompt) >= self.context:
            raise UserError(
                f"the prompt's {len(request.prompt)} tokens leave no room for a new one in the context of "
                f"{self.context}; shorten it"
            )
        if request.prompt_log_probs and request.log_probs is None:
            raise UserError("prompt_log_probs: say by log_probs how many are wanted")

    def submit(self, request: Request, notify: Callable[[], None] = lambda: None) -> Ticket:
        """Let a request wait for its turn: `submit_all` of one."""
        return self.submit_all([request], notify)[0]

    def submit_all(self, requests: Sequence[Request], notify: Callable[[], None] = lambda: None) -> list[Ticket]:
        """Let requests wait for their turns, all or none. notify: called in the engine's thread after new events of
        one of them, at most once a step for each.

        Raises UserError for a wrong request, QueueFull or Closed.
        """
        for request in requests:
            self.check(request)
        tickets = [Ticket(request, notify, self._wake_up) for request in requests]
        with self._wake:
            if self._is_closing:
                raise Closed(self.fault or "the server is shutting down: ask another, or later")
            n_waiting = len(self.waiting)
            if n_waiting + len(tickets) > self.options.max_waiting + self.slots.n_free:
                self._counts["refused"] += len(tickets)
                raise QueueFull(f"{n_waiting} requests wait already, and {len(tickets)} more are too many: ask later")
            self.waiting.extend(tickets)
            self._counts["requests"] += len(tickets)
            self._wake.notify()
        return tickets

    def counters(self) -> dict[str, int]:
        """What there is to do now, and what was done since the start."""
        names = ("requests", "refused", "cancelled", "failed", "steps", "prompt_tokens", "cached_prompt_tokens")
        done = {name: self._counts[name] for name in (*names, "new_tokens")}
        free_slots = self.slots.n_free
        n_running = self.options.slots - free_slots
        return {"waiting": len(self.waiting), "running": n_running, "free_slots": free_slots, **done}

    def start(self) -> None:
        """Step in a thread of its own, which sleeps while there is nothing to do."""
        self._thread = threading.Thread(target=self._run, name="minillm engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, finish those there are, and end the thread; called again, it may end them sooner.

        drain: False: end all requests now, as "closed". timeout: end those that are left after so many seconds.
        """
        now = time.monotonic()
        with self._wake:
            self._is_closing = True
            if not drain:
                self._stop_at = now
            elif timeout is not None:
                self._stop_at = now + timeout
            self._wake.notify()
        if self._thread is None:
            self._run()
        else:
            self._thread.join()

    def _wake_up(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        """Step until the engine is closed and has nothing left to do; whatever ends it sooner, nobody waits for it."""
        has_more = True
        try:
            while has_more or not self._is_closing:
                with self._wake:
                    while not self._is_closing and not self.waiting and not self.running:
                        self._wake.wait()
                try:
                    has_more = self.step()
                except Exception as problem:  # a fault of the engine itself: no request may wait for ever
                    self._fail_all(problem)
                    has_more = False
        except BaseException as problem:
            self._give_up(problem)
            raise

    # ---- a step

    def step(self) -> bool:
        """Let every request have a token, or a part of its prompt be read. Returns False if there is nothing to do."""
        with torch.inference_mode():
            self._end_those_that_must()
            has_read = self._read_prompts()
            n_active = self.slots.n_active
            if n_active:
                self._write_tokens()
        if has_read or n_active:
            self._counts["steps"] += 1
        self._notify()
        return bool(self.waiting or self.running)

    def _notify(self) -> None:
        """Tell whoever waits for events that there are new ones."""
        changed = list(self._changed)
        self._changed.clear()
        for ticket in changed:
            try:
                ticket.notify()
            except Exception as problem:  # the other end's fault, which must not stop this one
                self.log(f"notify: {problem!r}")
                ticket.is_cancelled = True

    def _end_those_that_must(self) -> None:
        """End requests that are cancelled or took too long; of an engine that stops, all."""
        now = time.monotonic()
        stops = self._stop_at is not None and now >= self._stop_at
        limit = self.options.time_limit

        def must_end(ticket: Ticket) -> End | None:
            """Why a request ends now, if it does."""
            if ticket.is_cancelled:
                return End("cancelled")
            if stops:
                return End("closed", "the server is shutting down")
            if now - ticket.submitted > limit:
                return End("timeout", f"the request took more than {limit:g} seconds")
            return None

        for running in list(self.running.values()):
            end = must_end(running.ticket)
            if end:
                self._end(running, end)
        with self._wake:
            ends = [(ticket, must_end(ticket)) for ticket in self.waiting]
            if any(end for _, end in ends):
                self.waiting = deque(ticket for ticket, end in ends if not end)
        for ticket, end in ends:
            if end:
                self._put_end(ticket, end)

    # ---- prompts

    def _read_prompts(self) -> bool:
        """Read the next part of a long prompt, or several short ones, in one pass. Returns False if there is none."""
        # whose prompt is being read already; then those who wait, as long as they fit beside it
        group = [self.running[slot] for slot in self.slots.reading()]
        while not group or group[-1].n_unread <= self.options.prefill_chunk:
            running = self._admit(group)
            if running is None:
                break
            group.append(running)
        if not group:
            return False
        try:
            self._read(group)
        except Exception as problem:  # out of memory, for example: it ends these requests, not the engine
            self._fail([running for running in group if running.slot in self.running], problem)
        return True

    def _admit(self, group: list[Running]) -> Running | None:
        """Give a slot to the request that has waited longest; None if none waits, no slot is free, or it does not fit
        into the pass that reads the prompts of `group`.
        """
        if not self.waiting or not self.slots.n_free:
            return None
        ticket = self.waiting[0]
        request = ticket.request
        prompt = list(request.prompt)
        source, n_shared = None, 0
        if not request.prompt_log_probs:
            source, n_shared = self.slots.longest_beginning(prompt, request.owner)
        if group and not self._fits(group, prompt, n_shared):
            return None

        device = self.slots.cache.lengths.device
        slot = self.slots.take(prompt, request.owner, source, n_shared)
        with self._wake:
            self.waiting.popleft()
        try:
            running = Running(ticket, slot, self.context, self.model.config.vocab_size, device)
        except Exception as problem:  # no memory for its numbers, for example: it ends this request, not the engine
            self._put_end(ticket, End("error", one_line(problem)))
            self.slots.release(slot, self._counts["steps"])
            self.log(f"a request failed: {one_line(problem)}")
            return None
        self.running[slot] = running
        self._counts["prompt_tokens"] += len(prompt)
        self._counts["cached_prompt_tokens"] += n_shared
        return running

    def _fits(self, group: list[Running], prompt: list[int], n_shared: int) -> bool:
        """Whether a prompt, of which n_shared tokens are there, can be read to its end beside those of `group`."""
        width = max(len(prompt) - n_shared, *(running.n_unread for running in group))  # of the padded rows
        longest = max(n_shared, *(len(running.slot.text) for running in group))
        is_small = (len(group) + 1) * width <= self.options.prefill_chunk
        has_room = longest + width <= self.context
        # what most of it begins with is just being read: from the next step on it can be copied
        begins_alike = any(2 * common_prefix(running.prompt, prompt) > len(prompt) + n_shared for running in group)
        return is_small and has_room and not begins_alike

    def _read(self, group: list[Running]) -> None:
        """One pass over the next tokens of these prompts; those that are read to their end get their first token."""
        logits = self.passes.read(group, self.options.prefill_chunk)
        rows = [running for running in group if not running.n_unread]
        for running in rows:
            self.slots.activate(running.slot)
            self._put(running.ticket, PromptRead(running.n_cached, running.prompt_log_probs))
        if rows:
            self._draw(logits, rows)

    # ---- tokens

    def _write_tokens(self) -> None:
        """One token more for every row in use."""
        rows = [self.running[slot] for slot in self.slots.slots[: self.slots.n_active]]
        try:
            self._draw(self.passes.next(rows), rows)
        except Exception as problem:
            self._fail([running for running in rows if running.slot in self.running], problem)

    def _draw(self, logits: Tensor, rows: list[Running]) -> None:
        """Draw the next token of each row from its logits (B, V), and hand it out."""
        # a row ends whose logits are not finite, of which their sum tells
        is_finite = torch.isfinite(logits.float().sum(-1)).tolist()
        if not all(is_finite):
            for running, fine in zip(rows, is_finite, strict=True):
                if not fine:
                    self._fail([running], not_finite(running.n_new))
            rows = [running for running, fine in zip(rows, is_finite, strict=True) if fine]
            logits = logits[is_finite]
            if not rows:
                return
        tokens = pick_each(logits, [running.draws for running in rows])

        # log-probabilities, where they are wanted
        log_probs: dict[int, TokenLogProbs] = {}
        for row, running in enumerate(rows):
            n_top = running.ticket.request.log_probs
            if n_top is not None:
                (log_probs[row],) = log_probs_of(logits[row : row + 1], tokens[row : row + 1], n_top)

        for row, running in enumerate(rows):
            self._hand_out(running, tokens[row], log_probs.get(row))

    def _hand_out(self, running: Running, token: int, log_probs: TokenLogProbs | None) -> None:
        """Give a request its next token, and end it if that is the last one."""
        request = running.ticket.request
        if token in request.stop_ids:
            self._end(running, End("stop", last=Token(token, log_probs)))
            return
        self._put(running.ticket, Token(token, log_probs))
        self._counts["new_tokens"] += 1
        running.last = token
        running.n_new += 1
        if running.n_new == running.most:
            self._end(running, End("length" if running.n_new == request.max_new_tokens else "context"))

    # ---- events and ends
    #
    # Whoever waits for an answer is told of its end before a tensor is touched: on a device that has failed (an illegal
    # access on a GPU, say) every further call fails as well.

    def _put(self, ticket: Ticket, event) -> None:
        ticket.put(event)
        self._changed[ticket] = None

    def _put_end(self, ticket: Ticket, end: End) -> None:
        if end.reason == "cancelled":
            self._counts["cancelled"] += 1
        elif end.message is not None:
            self._counts["failed"] += 1
        self._put(ticket, end)

    def _end(self, running: Running, end: End) -> None:
        """A request ends, and its slot is free."""
        del self.running[running.slot]
        self._put_end(running.ticket, end)
        self.slots.release(running.slot, self._counts["steps"])

    def _fail(self, rows: list[Running], problem: Exception) -> None:
        """These requests end by a fault; nothing of their texts is used again."""
        message = one_line(problem)
        for running in rows:
            del self.running[running.slot]
            self._put_end(running.ticket, End("error", message))
        self.log(f"{len(rows)} request(s) failed: {message}")
        for running in rows:
            self.slots.forget(running.slot)
            self.slots.release(running.slot, self._counts["steps"])

    def _fail_all(self, problem: Exception) -> None:
        """Every request ends by a fault, after which the engine goes on. Raises RuntimeError if it cannot."""
        with self._wake:
            waiting = list(self.waiting)
            self.waiting.clear()
        for ticket in waiting:
            self._put_end(ticket, End("error", one_line(problem)))
        self._fail(list(self.running.values()), problem)
        self._notify()
        for slot in self.slots.slots:  # what was copied between them may be half done; a device that has failed says so
            self.slots.forget(slot)
        if self.slots.n_taken:  # the fault came where a slot changed hands, and the rows' order is lost
            raise RuntimeError(f"lost {self.slots.n_taken} slot(s) by a fault: {one_line(problem)}")

    def _give_up(self, problem: BaseException) -> None:
        """Every request ends, and no more are taken: the engine itself cannot go on."""
        with self._wake:
            self._is_closing = True
            self.fault = f"the engine has stopped: {one_line(problem)}; start the server again"
            left = [*self.waiting, *(running.ticket for running in self.running.values())]
            self.waiting.clear()
            self.running.clear()
        for ticket in left:
            self._put_end(ticket, End("error", self.fault))
        self._notify()
        self.log(self.fault)


def one_line(problem: BaseException) -> str:
    """The first line of what a fault says."""
    return str(problem).strip().split("\n")[0] or repr(problem)
