"""Listening: a socket, uvicorn behind it, and an orderly end.

uvicorn (extra `serve`) reads and writes HTTP. What it leaves to others is added here: a client that does not finish
asking, or does not read its answer, is dropped; SIGTERM and Ctrl-C end the server once all answers are given, and the
second one at once.
"""

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from minillm.base.errors import UserError
from minillm.base.printing import visible
from minillm.serving.app import App
from minillm.serving.door import is_this_machine

BACKLOG = 256  # connections that the system holds until they are accepted
ASKING_S = 20.0  # seconds for the head of a request to come
KEEP_ALIVE_S = 15  # seconds for the next request on a connection; clients end theirs sooner, by themselves
UNREAD_S = 60.0  # seconds that a client may leave its answer unread
SAME_SIGNAL_S = 0.3  # within which a second signal is the first one again: some programs send it twice
HEAD_BYTES = 1 << 15  # of a request
GRACE_S = 5.0  # seconds for the last bytes to leave, after the engines have ended


def check_installed() -> None:
    """Raise `UserError` where uvicorn is missing."""
    if importlib.util.find_spec("uvicorn") is None:
        raise UserError('serving needs uvicorn: pip install -e ".[serve]"')


def listening_socket(host: str, port: int, has_key: bool) -> socket.socket:
    """A socket that listens there. Raises `UserError` if it cannot, or if others could ask there without a key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)  # localhost: 127.0.0.1
    except (OSError, UnicodeError) as problem:
        raise UserError(f"--host {host}: no address of this machine ({problem})") from None
    if not has_key and not is_this_machine(address[0]):
        raise UserError(
            f"--host {host}: others can reach this address, so a key is needed: --api_key KEY, or MINILLM_API_KEY in "
            "the environment"
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as problem:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({os.strerror(problem.errno)}); choose another, "
            "--port 0 for any free one"
        ) from None


def build_server(app: App, drain_s: float, log: Callable[[str], None]):
    """A uvicorn server of the application, to be run by `run(sockets=[…])`.

    drain_s: seconds for the answers that are under way when the server is told to end.
    """
    check_installed()
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """A client's connection, which is cut where the client keeps it waiting."""

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            # else the system holds a small piece back until the one before is acknowledged, often 40 ms (Nagle)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._unread = None
            self._asking = self.loop.call_later(ASKING_S, self._cut_unless_asked, None)

        def connection_lost(self, problem: Exception | None) -> None:
            self._asking.cancel()
            self._unset_keepalive_if_required()  # where a client breaks off, uvicorn leaves this timer
            self.resume_writing()  # for what still waits to be written, which is dropped
            super().connection_lost(problem)

        def on_response_complete(self) -> None:
            self._asking.cancel()
            self._asking = self.loop.call_later(ASKING_S, self._cut_unless_asked, self.cycle)
            super().on_response_complete()

        def _cut_unless_asked(self, answered) -> None:
            """answered: the last request when the time began to run."""
            if self.cycle is answered:
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame) -> None:
            """The handler of SIGTERM and Ctrl-C: the first asks for an orderly end, a second one ends at once."""
            if not self.should_exit:
                self.should_exit = True
                self.told_at = time.monotonic()
            elif time.monotonic() - self.told_at > SAME_SIGNAL_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        async def shutdown(self, sockets=None) -> None:
            """Take no more connections, let the answers finish, and end the engines."""
            log("ending once the answers under way are given; another signal ends at once")
            closing = asyncio.create_task(app.close(drain_s))
            await super().shutdown(sockets)
            await closing

    _log_visibly(log)
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(drain_s + GRACE_S),
        )
    )


def _log_visibly(log: Callable[[str], None]) -> None:
    """What uvicorn warns of goes to `log`, where no text of a client commands a terminal."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log(visible(self.format(record)))

    logger = logging.getLogger("uvicorn.error")
    logger.handlers = [Handler()]
    logger.setLevel(logging.ERROR)
    logger.propagate = False
