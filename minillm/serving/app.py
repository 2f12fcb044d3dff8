"""The server's answers: which path does what. An ASGI application, which `listen.py` runs.

    body → fields → Asked → ids of the prompts → requests to the engines ⇒ events → text → whole, or in chunks

The engines compute in threads of their own; here one thread waits for all of them and for all clients (asyncio).
"""

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from minillm.base.errors import UserError
from minillm.generation.requests import Closed, End, QueueFull, Ticket
from minillm.serving.answers import Answer, Part
from minillm.serving.call import Call, Gone
from minillm.serving.door import Door
from minillm.serving.metrics import Metrics
from minillm.serving.openai_answer import STILL_THERE, Form, as_event
from minillm.serving.openai_request import Asked, fields_of, read_chat, read_completion
from minillm.serving.page import chat_page
from minillm.serving.refusal import Refusal
from minillm.serving.served import Served

READERS = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}
OPEN_PATHS = ("/", "/health")  # for which no key is needed
MOST_BYTES = 1 << 22  # of a body: four times a context of 128k tokens and more
BODY_S = 30.0  # seconds for a body to come
SILENT_S = 15.0  # seconds after which a stream says that it is still there
SPARE_CALLS = 64  # chats and completions at once, beyond those that the engines have room for
GONE = 499  # the status, in metrics, of a request whose client left before there was one (as in nginx)
FAULTS = {"timeout": 504, "closed": 503, "error": 500, "cancelled": 500}  # ends of an answer that are none


class Work(NamedTuple):
    """A request to the engine, and the answer that becomes of it."""

    ticket: Ticket
    answer: Answer


class App:
    """The application. models: what is served; log: gets a line, or a traceback, for what must not happen."""

    def __init__(self, models: Sequence[Served], door: Door, log: Callable[[str], None]):
        self.models = {model.name: model for model in models}
        self.door = door
        self.log = log
        self.metrics = Metrics()
        self.n_open = 0  # chats and completions under way
        self.most_open = SPARE_CALLS + sum(model.limits.texts for model in models)
        self.page, self.page_headers = chat_page()

    async def close(self, seconds: float) -> None:
        """Take no more requests, let the engines finish those they have within so many seconds, and end them."""
        engines = [model.engine for model in self.models.values()]
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(len(engines)) as threads:  # of their own: asyncio's are few, and read requests
            await asyncio.gather(*(loop.run_in_executor(threads, engine.close, True, seconds) for engine in engines))

    # ---- any request

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer one request, whatever happens."""
        call = Call(scope, receive, send)
        call.own_headers = self.door.cors_headers(call.headers)
        route, actions = self._route(call.path)
        try:
            await self._act(call, route, actions)
        except Gone:
            self.metrics.gone += 1
        except Refusal as refusal:
            await self._refuse(call, refusal)
        except Exception:
            self.log(traceback.format_exc())
            await self._refuse(call, Refusal(500, "the server has a fault; its log says more"))
        finally:
            self.metrics.calls[route, call.status or GONE] += 1

    def _route(self, path: str) -> tuple[str, dict[str, Callable[[Call], Coroutine]]]:
        """The route of a path, as metrics name it, and what it does for each method."""
        if path in READERS:
            return path, {"POST": self._complete}
        if path.startswith("/v1/models/"):
            return "/v1/models/…", _read_by(self._model)
        gets = {"/": self._page, "/health": self._health, "/metrics": self._metrics, "/v1/models": self._models}
        return (path, _read_by(gets[path])) if path in gets else ("elsewhere", {})

    async def _act(self, call: Call, route: str, actions: dict[str, Callable[[Call], Coroutine]]) -> None:
        """Let in whoever may, and do what is asked."""
        if not actions:
            there = ", ".join([*READERS, "/v1/models", "/health", "/metrics"])
            raise Refusal(404, f"{call.method} {call.path!r:.80}: not here; there are {there}")
        preflight = self.door.preflight(call.headers) if call.method == "OPTIONS" else None
        if preflight is not None:
            await call.answer(204, b"", preflight)
            return
        if call.method not in actions:
            refusal = Refusal(405, f"{call.method} {route}: use {' or '.join(actions)}")
            await call.answer(405, refusal.body, {"Allow": ", ".join(actions)})
            return
        if route not in OPEN_PATHS:
            call.owner = self.door.owner(call.headers)
        await actions[call.method](call)

    async def _refuse(self, call: Call, refusal: Refusal) -> None:
        """Say why there is no answer; in a stream that has begun, by its last event."""
        if call.status is None:
            await call.answer(refusal.status, refusal.body, refusal.headers)
        else:
            await call.write(as_event(refusal.body))
            await call.end_stream()

    # ---- what there is

    async def _page(self, call: Call) -> None:
        await call.answer(200, self.page, self.page_headers)

    async def _health(self, call: Call) -> None:
        """Whether all engines are at work: whatever watches over the server starts it again where one is not."""
        for model in self.models.values():
            if model.engine.fault is not None:
                raise Refusal(503, f"{model.name}: {model.engine.fault}")
        await call.answer(200, {"status": "ok"})

    async def _metrics(self, call: Call) -> None:
        text = self.metrics.text([*self.models.values()], self.n_open)
        await call.answer(200, text.encode(), {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, call: Call) -> None:
        await call.answer(200, {"object": "list", "data": [model.entry for model in self.models.values()]})

    async def _model(self, call: Call) -> None:
        await call.answer(200, self._find(call.path.removeprefix("/v1/models/")).entry)

    def _find(self, name: str | None) -> Served:
        """The model of this name; None: the only one, or the first."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"model {name!r:.80}: not served here; there is {', '.join(self.models)}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.models[name]

    # ---- chats and completions

    async def _complete(self, call: Call) -> None:
        """Answer a chat or continue texts, if not too many are under way."""
        if self.n_open == self.most_open:
            raise Refusal(503, f"{self.most_open} requests are open already: ask again later")
        self.n_open += 1
        try:
            await self._answer(call)
        finally:
            self.n_open -= 1

    async def _answer(self, call: Call) -> None:
        """From the body to the end of the answer."""
        begin = time.monotonic()
        body = await call.body(MOST_BYTES, BODY_S)
        served, asked, prompts = await asyncio.to_thread(self._read, call.path, body)

        wake = asyncio.Event()
        work = _submit(served, asked, prompts, call.owner, wake)
        try:
            form = Form(asked, served.name, served.tokenizer)
            grow = self._grow(work, wake, begin)
            write = self._stream if asked.streams else self._whole
            await call.while_there(write(call, form, [answer for _, answer in work], grow))
        finally:
            for ticket, _ in work:
                if ticket.ended is None:
                    ticket.cancel()
        self.metrics.answer.add(time.monotonic() - begin)

    def _read(self, path: str, body: bytes) -> tuple[Served, Asked, list[list[int]]]:
        """What a request asks for, and of whom. In a thread of its own, since a large body takes its time."""
        fields = fields_of(body)
        served = self._find(fields.get("model", str))
        asked = READERS[path](fields, served.limits)
        return served, asked, served.prompts(asked)

    async def _whole(self, call: Call, form: Form, answers: list[Answer], grow: AsyncIterator) -> None:
        """All answers at once, when they are complete."""
        parts = [Part("", []) for _ in answers]
        async for answer, part in grow:
            if answer is not None:
                before = parts[answer.number]
                parts[answer.number] = Part(before.text + part.text, before.tokens + part.tokens)
        await call.answer(200, form.whole(answers, parts))

    async def _stream(self, call: Call, form: Form, answers: list[Answer], grow: AsyncIterator) -> None:
        """Each answer in chunks, as it grows."""
        await call.begin_stream()
        await call.write(form.opening(answers))
        async for answer, part in grow:
            await call.write(STILL_THERE if answer is None else form.chunks(answer, part))
        await call.write(form.closing(answers))
        await call.end_stream()

    async def _grow(self, work: list[Work], wake: asyncio.Event, begin: float) -> AsyncIterator:
        """(answer, what it grew by), again and again until all have ended; (None, None) when nothing came for long."""
        going = list(work)
        has_begun = False
        while going:
            try:
                async with asyncio.timeout(SILENT_S):
                    await wake.wait()
            except TimeoutError:
                yield None, None
                continue
            wake.clear()
            for ticket, answer in going:
                part = answer.take(ticket.take())
                if answer.end and answer.end.reason in FAULTS:
                    raise _fault(answer.end)
                if answer.n_new and not has_begun:
                    has_begun = True
                    self.metrics.first_token.add(time.monotonic() - begin)
                yield answer, part
                if answer.end and ticket.ended is None:  # by a stop string, of which the engine knows nothing
                    ticket.cancel()
            going = [item for item in going if item.answer.end is None]


def _read_by(action: Callable[[Call], Coroutine]) -> dict[str, Callable[[Call], Coroutine]]:
    """What can be read, or by HEAD be asked about: then the answer's body is left out (by uvicorn)."""
    return {"GET": action, "HEAD": action}


def _submit(served: Served, asked: Asked, prompts: list[list[int]], owner: str, wake: asyncio.Event) -> list[Work]:
    """Ask the engine for all answers, or for none. wake: is set when there is news of any."""
    loop = asyncio.get_running_loop()

    def notify() -> None:
        loop.call_soon_threadsafe(wake.set)

    requests = served.requests(asked, prompts, owner)
    try:
        tickets = served.engine.submit_all([request for request, _ in requests], notify)
    except UserError as problem:
        raise Refusal(503 if isinstance(problem, QueueFull | Closed) else 400, str(problem)) from None
    return [Work(ticket, answer) for ticket, (_, answer) in zip(tickets, requests, strict=True)]


def _fault(end: End) -> Refusal:
    """What a client is told about an answer that the engine could not finish."""
    return Refusal(FAULTS[end.reason], end.message or "the answer was cancelled")
