"""One HTTP request and its answer, over ASGI (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from minillm.serving.openai_answer import as_json
from minillm.serving.refusal import Refusal

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


class Gone(Exception):
    """The client has closed the connection: nobody reads an answer."""


class Call:
    """A request that is read, and an answer that is written, whole or in pieces.

    method, path, headers: what is asked; names of headers are in small letters. status: of the answer, once it has
    begun, else None. own_headers: what every answer to this request says. owner: whose request it is (`Door.owner`).
    """

    def __init__(self, scope: dict, receive: Callable, send: Callable):
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.own_headers: dict[str, str] = {}
        self.owner = ""
        self.status: int | None = None
        self._receive = receive
        self._send = send

    # ---- in

    async def body(self, most_bytes: int, seconds: float) -> bytes:
        """The request's body. Raises `Refusal` if it is larger, or is not here after so many seconds; and `Gone`."""
        too_large = Refusal(413, f"the body is larger than {most_bytes:,} bytes, the most that this server reads")
        if int(self.headers.get("content-length", 0)) > most_bytes:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    data += message["body"]
                    if len(data) > most_bytes:
                        raise too_large
                    if not message["more_body"]:
                        return bytes(data)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {seconds:g} seconds") from None

    async def while_there(self, work: Coroutine) -> Any:
        """The result of `work`, during which the client is watched: it is cancelled, and `Gone` raised, if it goes.

        The body must have been read.
        """
        task = asyncio.create_task(work)
        leaving = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            task.cancel()
            leaving.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ---- out

    async def answer(self, status: int, body: bytes | dict, headers: dict[str, str] | None = None) -> None:
        """A whole answer; a dict as JSON."""
        data = body if isinstance(body, bytes) else as_json(body)
        about = {"Content-Type": "application/json"} | (headers or {}) | {"Content-Length": str(len(data))}
        await self._begin(status, about)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def begin_stream(self) -> None:
        """The head of an answer that comes in events."""
        await self._begin(200, STREAM_HEADERS)

    async def write(self, data: bytes) -> None:
        """More of a stream; waits while the client reads more slowly than it is written."""
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | self.own_headers).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
