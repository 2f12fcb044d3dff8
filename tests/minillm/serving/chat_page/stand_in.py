"""A server that speaks as much of the API as the chat page uses, with answers and faults that a test chooses."""

import json
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

from minillm.serving.page import chat_page


class Refused(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "code": code}}


class CutOff(Exception):
    """The connection ends in the middle of an answer."""


class StandIn(ThreadingHTTPServer):
    """`answer(body)` gives what a chat is answered with, or raises Refused; a generator may end in CutOff.

    text: a piece of the answer · number: a pause in seconds · Event: wait until the test sets it ·
    dict: an event as it is, "finish_reason" or "error" for example
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()

    def reset(self) -> None:
        self.models: list[dict] = [
            {"id": "tiny", "context_length": 512, "turns": None},
            {"id": "larger", "context_length": 1024, "turns": None},
        ]
        self.key: str | None = None
        self.answer: Callable[[dict], Iterable] = lambda body: ["Hello", " you."]
        self.total = 40  # tokens of prompt and answer, as usage says
        self.asked: list[dict] = []  # bodies of the chats that were asked for
        self.left = Event()  # a client went before its answer ended


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def log_message(self, *_):
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, *chat_page())
        elif not self.allowed():
            self.refuse(Refused(401, "no such key", "invalid_api_key"))
        else:
            self.reply(200, json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return self.refuse(Refused(401, "no such key", "invalid_api_key"))
        self.server.asked.append(body)
        try:
            pieces = iter(self.server.answer(body))
        except Refused as error:
            return self.refuse(error)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.stream(pieces)
        except CutOff:
            self.close_connection = True
        except OSError:
            self.server.left.set()
            self.close_connection = True

    def stream(self, pieces: Iterable) -> None:
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        end = "stop"
        for piece in pieces:
            end = self.play(piece) or end
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
        usage = {"prompt_tokens": self.server.total - 8, "completion_tokens": 8, "total_tokens": self.server.total}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def play(self, piece) -> str | None:
        """Do what one piece says; the finish_reason, if it is one."""
        if isinstance(piece, str):
            self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        elif isinstance(piece, Event):
            while not piece.wait(0.02):
                self.chunk(b": waiting\n\n")  # a comment, which also notices that the client has gone
        elif isinstance(piece, dict) and "finish_reason" in piece:
            return piece["finish_reason"]
        elif isinstance(piece, dict):
            self.event(piece)
        else:
            time.sleep(piece)
        return None

    def event(self, value: dict) -> None:
        """Send an event in two parts, cut inside a character where it holds Chinese."""
        data = f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
        cut = next((place for place in range(len(data)) if data[place] >> 6 == 0b10), len(data) // 2)
        for part in (data[:cut], data[cut:]):
            self.chunk(part)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def allowed(self) -> bool:
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def refuse(self, error: Refused) -> None:
        self.reply(error.status, json.dumps(error.body).encode())

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
