"""A server in a thread of the tests' own process, and clients for it."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import openai
import pytest

from minillm.generation.batching import Engine, EngineOptions
from minillm.serving.app import App
from minillm.serving.door import Door
from minillm.serving.listen import build_server, listening_socket
from minillm.serving.served import Served, why_no_chat

KEY = "any"


@dataclass
class Running:
    """A server that runs. log: the lines that it has written."""

    port: int
    app: App
    server: object
    log: list[str]

    @property
    def served(self) -> Served:
        return next(iter(self.app.models.values()))

    @property
    def engine(self) -> Engine:
        return self.served.engine

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": KEY, "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def raw(self, method: str, path: str, body: dict | bytes | None = None, headers: dict | None = None):
        """(status, headers, bytes) of an answer to whatever bytes are sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            data = json.dumps(body).encode() if isinstance(body, dict | list) else body
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, path: str, body: dict | bytes, headers: dict | None = None):
        """(status, value of the JSON) of an answer."""
        status, _, data = self.raw("POST", path, body, headers)
        return status, json.loads(data)

    def until(self, is_so, seconds: float = 10.0) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it never became so"
            time.sleep(0.005)

    @property
    def is_idle(self) -> bool:
        counters = self.engine.counters()
        return self.app.n_open == 0 and counters["running"] == counters["waiting"] == 0


@contextlib.contextmanager
def running(
    models: list[Served], door: Door | None = None, starts: bool = True, send_buffer: int | None = None
) -> Iterator[Running]:
    """Serve these models as long as the context lasts.

    starts: False: their engines are stepped by the test. send_buffer: bytes that the system keeps for a slow reader.
    """
    door = door or Door()
    log: list[str] = []
    app = App(models, door, log.append)
    listener = listening_socket("127.0.0.1", 0, has_key=bool(door.keys))
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = build_server(app, 5.0, log.append)
    for model in models:
        if starts:
            model.engine.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    here = Running(listener.getsockname()[1], app, server, log)
    try:
        here.until(lambda: server.started)
        yield here
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def serve_home(home, name: str = "tom", template: str = "auto", **options) -> Served:
    """The model of a home folder, to be served."""
    engine = Engine(home.model, EngineOptions(**options))
    no_chat = why_no_chat(home.tokenizer, template)
    return Served(name, engine, home.tokenizer, template, no_chat, None, 1_700_000_000, 4096)


@pytest.fixture(scope="module")
def here(home) -> Iterator[Running]:
    """A server of a small model with random weights and a context of 64, four slots and a queue of eight."""
    with running([serve_home(home, slots=4, max_waiting=8)]) as server:
        yield server
    assert not [line for line in server.log if "Traceback" in line]
