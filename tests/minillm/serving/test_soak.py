"""Hours of a server's life in seconds: requests of all kinds at once, and everything is as before.

MINILLM_SOAK_S=600 pytest tests/minillm/serving/test_soak.py      # ten minutes of it
"""

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from minillm.generation.completion import generate
from minillm.generation.sampling import Sampling
from tests.minillm.serving.test_listen import process

SECONDS = float(os.environ.get("MINILLM_SOAK_S", 15))
N_CLIENTS = 6
GROWTH_MB = 12  # what memory may grow by between the first fifth and the end: allocators keep some


@dataclass(frozen=True)
class Case:
    """A request, and the text that it is answered by when it is alone."""

    body: dict
    text: str


@dataclass
class Soak:
    port: int
    cases: list[Case]
    end: float
    done: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    # ---- one request of each kind

    def whole(self, rng: random.Random) -> None:
        case = rng.choice(self.cases)
        status, data = self.post(case.body)
        self.check(status == 503 or json.loads(data)["choices"][0]["message"]["content"] == case.text, case.body)
        self.done["refused" if status == 503 else "whole"] += 1

    def stream(self, rng: random.Random) -> None:
        case = rng.choice(self.cases)
        status, data = self.post(case.body | {"stream": True}, slowly=rng.random() < 0.3)
        if status == 503:
            self.done["refused"] += 1
            return
        events = [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        self.check(text == case.text and data.endswith(b"data: [DONE]\n\n"), case.body)
        self.done["stream"] += 1

    def leave(self, rng: random.Random) -> None:
        """Go after some of an answer, or before it begins."""
        body = json.dumps(rng.choice(self.cases).body | {"stream": rng.random() < 0.7, "n": rng.choice((1, 2))})
        with self.connection() as connection:
            connection.sendall(_head(len(body)) + body.encode())
            if rng.random() < 0.5:
                connection.recv(rng.choice((1, 300)))
        self.done["left"] += 1

    def half(self, rng: random.Random) -> None:
        """Go before the request is complete."""
        whole = _head(500) + b'{"messages": [{"role"'
        with self.connection() as connection:
            connection.sendall(whole[: rng.randrange(len(whole))])
        self.done["half"] += 1

    def malformed(self, rng: random.Random) -> None:
        data = bytearray(json.dumps(rng.choice(self.cases).body).encode())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]",:\x00\xff0')
        status, _ = self.post(bytes(data))
        self.check(status in (200, 400, 404, 503), bytes(data))  # a letter of the text may be all that has changed
        self.done["malformed"] += 1

    def too_long(self, rng: random.Random) -> None:
        text = "Tom has the ball. " * rng.choice((20, 2000))
        status, data = self.post({"messages": [{"role": "user", "content": text}]})
        self.check(status == 400 and b"context_length_exceeded" in data, len(text))
        self.done["too long"] += 1

    # ---- what they have in common

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def post(self, body: dict | bytes, slowly: bool = False) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", "/v1/chat/completions", data)
            response = connection.getresponse()
            read = b""
            while slowly and len(read) < 400 and (piece := response.read(40)):
                read += piece
                time.sleep(0.005)
            return response.status, read + response.read()

    def check(self, is_right: bool, what: object) -> None:
        if not is_right:
            self.wrong.append(repr(what))

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = [self.whole] * 4 + [self.stream] * 3 + [self.leave] * 3 + [self.half, self.malformed, self.too_long]
        try:
            while time.monotonic() < self.end:
                rng.choice(kinds)(rng)
        except Exception as problem:
            self.wrong.append(repr(problem))


def _head(n_bytes: int) -> bytes:
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n_bytes}\r\n\r\n".encode()


def cases_of(home, n: int = 40) -> list[Case]:
    """Requests of all kinds with the texts that `generate` gives to them alone."""
    rng = random.Random(5)
    cases = []
    for i in range(n):
        thing = rng.choice(("ball", "cat", "apple", "球", "苹果"))
        messages = [{"role": "user", "content": f"Who has the {thing}?" * rng.choice((1, 1, 2))}]
        sampling = Sampling(temperature=rng.choice((0.0, 0.8, 1.5)), top_k=rng.choice((0, 20)), seed=i)
        n_tokens = rng.randrange(1, 45)
        prompt, _ = home.tokenizer.encode_chat(messages, add_generation_prompt=True)
        (found,) = generate(home.model, [prompt], n_tokens, sampling=sampling, stop_ids=home.tokenizer.stop_ids())
        body = {"messages": messages, "max_tokens": n_tokens, "seed": i}
        body |= {"temperature": sampling.temperature, "top_k": sampling.top_k}
        cases.append(Case(body, home.tokenizer.decode(found.tokens)))
    return cases


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def n_files(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_after_requests_of_all_kinds_nothing_is_lost_wrong_or_larger(home):
    with process(home, "--slots", "4", "--max_waiting", "6") as (server, port, _):
        soak = Soak(port, cases_of(home), time.monotonic() + SECONDS)
        clients = [threading.Thread(target=soak.run, args=(seed,)) for seed in range(N_CLIENTS)]
        files_before = n_files(server.pid)
        for client in clients:
            client.start()
        time.sleep(SECONDS / 5)
        memory_before = memory_mb(server.pid)
        for client in clients:
            client.join()

        # all is as it was
        values = {}
        until = time.monotonic() + 20
        while not values or values["minillm_http_requests_open"] != 0 or values['minillm_running{model="tom"}'] != 0:
            assert time.monotonic() < until, values
            lines = [line.rpartition(" ") for line in metrics(port).splitlines() if not line.startswith("#")]
            values = {name: float(value) for name, _, value in lines}
        memory_after = memory_mb(server.pid)
        print(f"{soak.done.total()} requests in {SECONDS:g} s: {dict(soak.done)}")
        print(f"memory {memory_before:.1f} MB after a fifth of them, {memory_after:.1f} MB after all")
        assert not soak.wrong, (len(soak.wrong), soak.wrong[:5])
        assert values['minillm_free_slots{model="tom"}'] == 4 and values['minillm_waiting{model="tom"}'] == 0
        assert values['minillm_failed_total{model="tom"}'] == 0
        assert min(soak.done[kind] for kind in ("whole", "stream", "left", "half", "malformed", "too long")) > 0
        assert memory_after - memory_before < GROWTH_MB
        assert n_files(server.pid) <= files_before + 1


def metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
