"""A rank that hangs or is lost ends the others, and is named; the store is a dictionary, and no process ends."""

import os
import socket
import sys
import threading
import time

import pytest
import torch

from minillm.distributed import watchdog
from minillm.distributed.watchdog import Sign, Watchdog, listed, places

HOST = socket.gethostname()


class Store(dict):
    """What the watchdog uses of a group's key-value store."""

    n_requests = 0

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        self.n_requests += 1
        return all(key in self for key in keys)

    def multi_get(self, keys):
        self.n_requests += 1
        return [self[key] for key in keys]


@pytest.fixture
def watched(monkeypatch):
    """(store, lines with which ranks were ended): a watchdog here ends no process."""
    store, ended = Store(), []
    monkeypatch.setattr(watchdog, "_store", lambda: store)
    monkeypatch.setattr(watchdog, "_end", ended.append)
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.2)
    monkeypatch.setattr(watchdog, "_last_step", 0)
    return store, ended


def wait_for(ended: list, seconds: float = 20) -> str:
    until = time.monotonic() + seconds
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    return ended[0]


def test_the_watchdog_says_where_this_rank_stands_and_who_gives_no_sign(watched):
    store, ended = watched
    store.set("step/2", f"5 {HOST} ")
    dog = Watchdog(0, 3, limit_s=0.3)
    dog.tick(7)
    store.set("place/1", f"6 {HOST} data.py:88")
    line = wait_for(ended)
    assert line.startswith("rank 0: no step finished for 0 s after step 7: rank 2 gives no sign (last finished step 5)")
    assert "rank 0 is at test_watchdog.py:" in line
    assert line.endswith("(last finished step 7), rank 1 is at data.py:88 (last finished step 6)")


def test_ranks_at_one_line_are_named_together_and_the_odd_one_with_its_machine():
    signs = {rank: Sign(7, f"host{rank // 8}", "step.py:61") for rank in range(1024) if rank != 77}
    signs[300] = Sign(6, "host37", "windows.py:12")
    signs[77] = Sign(7, "host9")
    assert places(signs, 1024) == (
        "rank 77 on host9 gives no sign (last finished step 7), "
        "rank 300 on host37 is at windows.py:12 (last finished step 6), "
        "ranks 0–76, 78–299, 301–1023 are at step.py:61 (last finished step 7)"
    )
    del signs[77]  # it never told a step either
    assert places(signs, 1024).startswith("rank 77 gives no sign (last finished step 0), rank 300")


@pytest.mark.parametrize(("ranks", "words"), [([3], "rank 3"), ([1, 0], "ranks 0–1"), ([5, 1, 2, 3], "ranks 1–3, 5")])
def test_ranks_in_words(ranks, words):
    assert listed(ranks) == words


def test_one_rank_of_each_machine_speaks(watched):
    """The first that answers: the first of all may be the one that hangs."""
    store, ended = watched
    for rank, host in ((1, "another"), (2, HOST)):
        store.set(f"place/{rank}", f"0 {host} step.py:61")
    Watchdog(3, 4, limit_s=0.2).tick(0)
    assert wait_for(ended) == "" and store["place/3"].startswith(f"0 {HOST} ".encode())
    ended.clear()
    del store["place/2"]
    Watchdog(3, 4, limit_s=0.2).tick(0)
    assert wait_for(ended).startswith("rank 3: no step finished for 0 s after step 0: ranks 0, 2 give no sign")


def test_asking_a_thousand_ranks_takes_few_requests():
    store = Store()
    for rank in set(range(1024)) - {77, 600}:
        store.set(f"place/{rank}", "3 host step.py:61")
    signs = watchdog._answers(store, "place", 1024)
    assert len(signs) == 1022 and 77 not in signs and signs[5] == Sign(3, "host", "step.py:61")
    assert store.n_requests < 60


def test_a_quick_run_tells_its_step_once_a_second(watched):
    store, _ = watched
    told = []
    store.set = lambda key, value: told.append((key, value))
    dog = Watchdog(1, 2, limit_s=60)
    for step in range(1000):
        dog.tick(step)
    assert told == [("step/1", f"0 {HOST} ")]
    dog.told_at -= 1
    dog.tick(1000)
    assert told[1:] == [("step/1", f"1000 {HOST} ")]
    dog.pause()


def test_the_watchdog_ends_the_rank_even_if_the_store_answers_no_more(watched):
    store, ended = watched
    store.check = lambda keys: time.sleep(5)
    Watchdog(1, 2, limit_s=0.2).tick(0)
    assert "the rank that keeps the store (rank 0, without torchrun) gives no sign" in wait_for(ended, 3)


def test_the_watchdog_lets_a_run_that_moves_or_has_ended_alone(watched):
    _, ended = watched
    dog = Watchdog(0, 2, limit_s=0.5)
    for step in range(10):
        time.sleep(0.1)
        dog.tick(step)
    dog.pause()
    time.sleep(1)
    assert not ended


def test_saving_may_take_longer_than_a_step(watched):
    _, ended = watched
    dog = Watchdog(0, 2, limit_s=0.3)
    dog.tick(20)
    with dog.patient():
        time.sleep(1)
    assert not ended
    assert wait_for(ended, 5).startswith("rank 0: no step finished for 0 s after step 20")


def test_a_save_that_hangs_is_ended_too(watched, monkeypatch):
    monkeypatch.setattr(watchdog, "LOADING", 3)
    _, ended = watched
    dog = Watchdog(0, 2, limit_s=0.4)
    dog.tick(20)
    with dog.patient():
        assert wait_for(ended, 5).startswith("rank 0: no step finished for 1 s after step 20")


def test_the_watchdog_waits_for_the_first_tick_however_long_loading_takes(watched):
    _, ended = watched
    dog = Watchdog(0, 2, limit_s=0.1)
    with dog.patient():  # a save before the first tick does not begin the watch
        time.sleep(0.5)
    time.sleep(0.2)
    assert not ended
    dog.tick(20)
    assert "after step 20: rank 1 gives no sign" in wait_for(ended)


def test_one_rank_is_not_watched():
    before = threading.active_count()
    Watchdog(0, 1, limit_s=0.01).tick(1)
    assert threading.active_count() == before


def test_only_the_loss_of_a_rank_is_explained(watched, monkeypatch):
    store, ended = watched
    shown = []
    monkeypatch.setattr("sys.excepthook", lambda kind, problem, traceback: shown.append(problem))
    watchdog.explain_lost_ranks(1, 3)

    bug = RuntimeError("shapes do not match")
    sys.excepthook(RuntimeError, bug, None)
    assert shown == [bug] and not ended

    monkeypatch.setattr(watchdog, "_last_step", 41)
    store.set("lost/2", f"41 {HOST} ")
    closed = RuntimeError("[/gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    sys.excepthook(RuntimeError, closed, None)
    store.set("step/0", "40 another ")
    sys.excepthook(torch.distributed.DistNetworkError, torch.distributed.DistNetworkError("socket timeout"), None)
    assert shown == [bug]
    assert ended[0].startswith("rank 1: rank 0 has failed or ended after step 41 (Connection closed by peer);")
    assert ended[1].startswith("rank 1: rank 0 on another has failed or ended after step 41 (socket timeout);")
    store.set("lost/0", f"41 {HOST} ")  # it notices the loss as well, and speaks for its machine
    sys.excepthook(RuntimeError, closed, None)
    assert ended[2] == ""


def test_a_rank_ends_even_if_nobody_reads_why():
    """An error while writing would end the thread alone, and the rank would wait for ever."""
    pid = os.fork()
    if pid == 0:
        os.close(2)
        watchdog._end("rank 1 is gone")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
