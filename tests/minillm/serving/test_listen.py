"""Connections of slow clients, and the end of a server."""

import contextlib
import gc
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from minillm.serving import listen
from tests.minillm.serving.conftest import running, serve_home

ROOT = Path(__file__).parents[3]
HI = [{"role": "user", "content": "Who?"}]


def request(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def ends(connection: socket.socket, within_s: float = 10.0) -> bool:
    """Whether the other side closes the connection."""
    connection.settimeout(within_s)
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


def test_whoever_does_not_finish_asking_is_dropped(home, monkeypatch):
    monkeypatch.setattr(listen, "ASKING_S", 0.2)
    with running([serve_home(home, slots=1)]) as here:
        for beginning in (b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"):
            with socket.create_connection(("127.0.0.1", here.port)) as connection:
                connection.sendall(beginning)
                assert ends(connection)
        # an answer that takes longer is waited for
        with socket.create_connection(("127.0.0.1", here.port)) as connection:
            monkeypatch.setattr(listen, "ASKING_S", 20.0)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


LOCAL = b" HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions" + LOCAL
ODD = [
    (b"\x00" * 100, 400),
    (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # TLS
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    (b"GET /\x1b]52" + LOCAL + b"\r\n", 400),
    (b"GET /%ff%1b" + LOCAL + b"\r\n", 404),
    (b"GET http://x/" + LOCAL + b"\r\n", 404),
    (b"CONNECT a:1" + LOCAL + b"\r\n", 404),
    (b"GET /v1/models" + LOCAL + b"Authorization: \xff\xfe\r\n\r\n", 200),
    (b"GET /health HTTP/1.0\r\n\r\n", 200),
    (b"GET /" + LOCAL + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n\r\n", 200),
    (POST + b"Content-Length: -5\r\n\r\n", 400),
    (POST + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
]


@pytest.mark.parametrize("data, status", ODD)
def test_bytes_that_no_client_should_send_are_answered(here, data, status):
    with socket.create_connection(("127.0.0.1", here.port), timeout=20) as connection:
        connection.sendall(data)
        assert connection.recv(1000).startswith(b"HTTP/1.1 %d " % status)
    assert not here.log


def test_no_piece_of_a_stream_waits_for_the_one_before_to_be_acknowledged(here):
    with socket.create_connection(("127.0.0.1", here.port)) as connection:
        connection.sendall(b"GET /health" + LOCAL + b"\r\n")
        assert connection.recv(1000)
        (open_one,) = [c for c in here.server.server_state.connections if c.client == connection.getsockname()]
        ours = open_one.transport.get_extra_info("socket")
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_head_that_is_too_large_is_refused(here):
    with socket.create_connection(("127.0.0.1", here.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 17))
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert ends(connection)


def test_whoever_does_not_read_costs_nobody_anything_and_is_dropped(home, monkeypatch):
    monkeypatch.setattr(listen, "UNREAD_S", 0.5)
    with running([serve_home(home, slots=5)], send_buffer=4096) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", here.port))
        asked = {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 20, "seed": 1, "n": 4}
        slow.sendall(request(asked))
        here.until(lambda: here.engine.counters()["new_tokens"] > 60)  # it does not wait for its reader
        here.until(lambda: here.engine.counters()["running"] == 0)
        assert here.app.n_open == 1  # which has not read all of it yet
        assert here.client().chat.completions.create(model="tom", messages=HI, max_tokens=5).choices
        here.until(lambda: here.app.n_open == 0)
        assert ends(slow)
        slow.close()


@contextlib.contextmanager
def process(home, *options: str):
    """A server in a process of its own, and its port."""
    command = [sys.executable, "-m", "minillm", "serve", "--model", f"tom={home.path / 'out/sft'}", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=home.path,
    )
    try:
        lines = []
        while not (match := re.search(r"http://127.0.0.1:(\d+)", lines[-1] if lines else "")):
            lines.append(server.stdout.readline())
            assert lines[-1], "".join(lines)
        yield server, int(match[1]), lines
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.slow
def test_a_signal_lets_answers_under_way_finish_and_a_second_one_does_not(home):
    with process(home, "--slots", "1") as (server, port, lines):
        assert lines[0].startswith("tom: ") and "cache" in lines[0] and "context 64" in lines[0]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=20)
        streams = [client.chat.completions.create(model="tom", messages=HI, stream=True, n=1) for _ in range(3)]
        server.send_signal(signal.SIGTERM)
        for stream in streams:  # one has the slot, two wait for it
            *_, last = stream
            assert last.choices[0].finish_reason in ("stop", "length")
        assert server.wait(20) == 0
        rest = server.stdout.read()
        assert "answers under way" in rest and "Traceback" not in rest
        with pytest.raises(openai.APIConnectionError):
            client.models.list()

    with process(home) as (server, port, _), socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.poll() is None  # it waits for the request that has begun
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == -signal.SIGTERM


@pytest.mark.slow
def test_a_signal_lets_answers_finish_where_nobody_reads_the_log(home):
    """Ctrl-C ends `serve 2>&1 | tee serve.log` on both sides of the pipe at once."""
    with process(home, "--slots", "1") as (server, port, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=20)
        streams = [client.chat.completions.create(model="tom", messages=HI, stream=True) for _ in range(3)]
        server.stdout.close()
        server.send_signal(signal.SIGINT)
        for stream in streams:
            *_, last = stream
            assert last.choices[0].finish_reason in ("stop", "length")
        server.wait(20)


def test_nothing_is_left_of_connections_that_clients_broke_off(here):
    def n_connections() -> int:
        return sum(type(thing).__name__ == "Connection" for thing in gc.get_objects()) - len(open_ones)

    open_ones = here.server.server_state.connections
    here.until(lambda: not open_ones)
    gc.collect()
    before = n_connections()
    gc.disable()  # they must go by themselves, at once
    try:
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", here.port)) as connection:
                connection.sendall(b"GET /health" + LOCAL + b"\r\n")
                assert connection.recv(1000)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # breaks it off
        here.until(lambda: not open_ones)
        here.until(lambda: n_connections() <= before + 2)  # what the loop still holds of the last one
    finally:
        gc.enable()
