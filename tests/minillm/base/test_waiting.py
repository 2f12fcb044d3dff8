"""No times here: what is chosen from readings of the cores, and that torch's threads then sleep or stay awake."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillm.base import waiting

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def anew():
    """No test finds the choice that another has begun."""
    waiting.of_this_process.cache_clear()
    yield
    waiting.of_this_process.cache_clear()


@pytest.fixture
def cores(monkeypatch):
    """A process that has as many cores as the fake team has threads; gives what `run_on` was asked for."""
    asked = []
    monkeypatch.setattr(waiting, "run_on", lambda cores: asked.append(set(cores)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(torch.get_num_threads())), raising=False)
    return asked


class FakeOpenMP:
    """Counts the meetings of teams by their number of threads."""

    def __init__(self, n_cores: int):
        self.n_cores, self.teams = n_cores, []
        self.omp_get_num_threads = None

    def omp_get_num_procs(self) -> int:
        return self.n_cores

    def GOMP_parallel(self, function, data, n_threads: int, flags: int) -> None:
        self.teams.append(n_threads)


def readings(share_kept: float, shares_idle: dict[int, float] | None = None) -> tuple:
    """Two readings, a second apart, between which a thread was kept from its core, and cores were idle."""
    shares_idle = shares_idle or {}
    before = waiting.Reading(10.0, {"1": 5}, dict.fromkeys(shares_idle, 3.0))
    idle_s = {core: 3.0 + share for core, share in shares_idle.items()}
    return before, waiting.Reading(11.0, {"1": 5 + round(share_kept * 1e9)}, idle_s)


def sleeping(one: waiting.Waiting, shares: list[float]) -> list[bool]:
    """Whether threads sleep after each look."""
    asleep = []
    for share in shares:
        one.look(*readings(share))
        asleep.append("asleep" in one.words)
    return asleep


@pytest.mark.usefixtures("cores")
def test_threads_sleep_from_the_first_look_that_finds_the_cores_crowded():
    one = waiting.Waiting(FakeOpenMP(2))
    assert sleeping(one, [0.0, 0.1, waiting.CROWDED, 0.21, 0.5]) == [False, False, False, True, True]
    one.wake()


@pytest.mark.parametrize(
    ("n_threads", "share_kept", "n_taken"),
    # n programs beside t threads on t cores keep them, while all want one, from t · n / (t + n) cores
    [(2, 2 / 3, 1), (2, 1.0, 1), (2, 4 / 3, 1), (2, 0.25, 2), (8, 8 / 9, 8), (8, 4.0, 4), (8, 6.0, 2), (64, 0.98, 64)],
)
def test_a_team_shares_as_many_cores_as_it_had_the_time_of(monkeypatch, cores, n_threads, share_kept, n_taken):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    one = waiting.Waiting(FakeOpenMP(n_threads))
    one.look(*readings(share_kept))
    if n_taken == n_threads:
        assert cores == [] and "share" not in one.words
    else:
        assert [len(taken) for taken in cores] == [n_taken] and one.left_cores.isdisjoint(cores[0])
        assert one.words.endswith(f"so they share {n_taken} of {n_threads}")
    one.wake()


def test_a_team_spreads_again_when_the_cores_that_it_left_are_idle(monkeypatch, cores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(waiting, "QUIET_LOOKS", 2)
    one = waiting.Waiting(FakeOpenMP(2))
    one.look(*readings(1.0))
    (left,) = one.left_cores

    # its two threads keep each other from their core, which says nothing of others; the core that they left does
    for idle, is_together in [(0.1, True), (0.9, True), (0.4, True), (0.9, True), (0.9, False)]:
        one.look(*readings(0.7, {left: idle, 1 - left: 0.0}))
        assert bool(one.left_cores) == is_together
    assert cores == [{1 - left}, {0, 1}]


def test_a_team_with_more_cores_than_threads_does_not_move(monkeypatch, cores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    one = waiting.Waiting(FakeOpenMP(3))
    one.look(*readings(1.5))
    assert "asleep" in one.words and cores == []
    one.wake()


@pytest.mark.usefixtures("cores")
def test_threads_wake_only_after_many_quiet_looks_in_a_row():
    one = waiting.Waiting(FakeOpenMP(2))
    quiet = [0.0] * (waiting.QUIET_LOOKS - 1)
    assert all(sleeping(one, [0.5, *quiet, 0.1, *quiet]))  # 0.1: something was there
    assert sleeping(one, [0.0, 0.0]) == [False, False]


@pytest.mark.parametrize(("n_cores", "n_threads"), [(2, 2), (8, 2), (8, 8), (64, 3), (2, 4)])
def test_the_idle_team_makes_more_threads_than_there_are_cores(monkeypatch, n_cores, n_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    openmp = FakeOpenMP(n_cores)
    one = waiting.Waiting(openmp)
    one.sleep()
    one.sleep()  # asleep already: no second one
    (n_idle,) = openmp.teams
    assert n_threads + n_idle - 1 == max(n_cores + 1, n_threads + 1)  # libgomp counts one of the idle only once
    one.wake()


def test_the_share_kept_from_a_core_is_of_the_time_between_two_readings():
    """One of sixteen threads that has no core for half of the time holds up all of them."""
    others = {str(task): 5_000_000_000 for task in range(15)}
    before = waiting.Reading(10.0, others | {"last": 1_000_000_000, "ended": 7}, {})
    after = waiting.Reading(12.0, others | {"last": 2_000_000_000, "new": 300_000_000}, {})
    assert after.share_kept(before) == pytest.approx((1.0 + 0.3) / 2)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_a_reading_is_of_all_threads():
    reading = waiting.Reading.now()
    assert str(os.getpid()) in reading.kept_ns and all(kept >= 0 for kept in reading.kept_ns.values())
    assert os.sched_getaffinity(0) <= set(reading.idle_s) and all(idle_s >= 0 for idle_s in reading.idle_s.values())


@pytest.mark.usefixtures("cores")
def test_a_run_is_told_how_its_threads_wait(monkeypatch):
    openmp = FakeOpenMP(2)
    shares = iter([0.5, 0.5])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(waiting, "gnu_openmp", lambda n_threads: openmp)
    monkeypatch.setattr(waiting, "LOOK_S", 1e6)
    monkeypatch.setattr(waiting, "TRY_S", 1e-3)
    monkeypatch.setattr(waiting.Reading, "share_kept", lambda after, before: next(shares))
    monkeypatch.setattr(waiting.Reading, "now", lambda: waiting.Reading(time.perf_counter(), {}, {}))
    said = []
    for _ in range(2):  # a second run of this process
        waiting.report(said.append)
    assert said == ["2 CPU threads, which wait for one another asleep: other programs need their cores too"] * 2
    assert set(openmp.teams) == {2}
    waiting.of_this_process().stop()


@pytest.mark.usefixtures("cores")
def test_each_change_is_said_once(monkeypatch):
    one = waiting.Waiting(FakeOpenMP(2))
    monkeypatch.setattr(waiting, "QUIET_LOOKS", 1)
    shares = iter([0.0, 0.5, 0.5, 0.0, 0.5, 0.0])
    monkeypatch.setattr(waiting.Reading, "share_kept", lambda after, before: next(shares))
    monkeypatch.setattr(waiting.Reading, "now", lambda: waiting.Reading(time.perf_counter(), {}, {}))

    class SixLooks:
        left = 6

        def wait(self, seconds: float) -> bool:
            self.left -= 1
            return self.left < 0

    said = []
    one.over, one.log = SixLooks(), said.append
    one._watch()
    assert [line.split(":")[0] for line in said] == [
        "the threads now wait for one another asleep",
        "the threads now wait for one another awake",
    ]


TURNS = """
import ctypes, os, platform, struct, threading
from minillm.base import waiting

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}

def nice_and_turn(thread):
    room = ctypes.create_string_buffer(48)
    ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], thread, room, 48, 0)
    _, policy, _, nice, _, runtime, _, _ = struct.unpack("IIQiIQQQ", room.raw)
    return policy, nice, runtime

os.nice(3)
end = threading.Event()
other = threading.Thread(target=end.wait)
other.start()
threads = (os.getpid(), other.native_id)
before = [nice_and_turn(thread) for thread in threads]
waiting.ask_for_turns(200_000)
asked = [nice_and_turn(thread) for thread in threads]
waiting.ask_for_turns(0)
assert [nice_and_turn(thread) for thread in threads] == before
end.set()
print(before, asked)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_all_threads_ask_for_short_turns_and_keep_their_priority():
    command = [sys.executable, "-c", TURNS]
    told = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert told.returncode == 0, told.stderr
    (policy, nice, usual), *_ = before = eval(told.stdout.partition("] ")[0] + "]")
    asked = eval(told.stdout.partition("] ")[2])
    assert before == [(policy, nice, usual)] * 2
    turn = 200_000 if usual else 0  # Linux before 6.12 has no turns
    assert asked == [(policy, nice, turn)] * 2 and nice >= 3


@pytest.mark.parametrize(
    ("platform", "n_threads", "environment"),
    [
        ("darwin", 2, {}),
        ("win32", 2, {}),
        ("linux", 1, {}),
        ("linux", 10_000, {}),  # more than cores: they sleep anyway
        ("linux", 2, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("linux", 2, {"GOMP_SPINCOUNT": "10000"}),
    ],
)
def test_where_nothing_can_be_chosen_nothing_is_said_of_it(monkeypatch, platform, n_threads, environment):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = []
    waiting.report(said.append)
    assert said == [f"{n_threads} CPU thread{'s' * (n_threads > 1)}"]


MEETINGS = """
import re, time, torch
from pathlib import Path
from minillm.base import waiting

torch.set_num_threads(2)
numbers = torch.linspace(0, 1, 1 << 18)

def switches():
    found = re.findall
    return sum(
        int(found(r"^voluntary_ctxt_switches:\\s+(\\d+)", (task / "status").read_text(), re.M)[0])
        for task in Path("/proc/self/task").iterdir()
    )

def meet():
    before = switches()
    total = 0.0
    for _ in range(200):
        total += float(numbers.exp().sum())
        end = time.perf_counter() + 3e-4  # the other thread waits meanwhile
        while time.perf_counter() < end:
            pass
    return switches() - before, total

openmp = waiting.gnu_openmp(2)
if openmp is None:
    print("no choice here")
else:
    meet()
    one = waiting.Waiting(openmp)
    results = []
    for change in (one.wake, one.sleep, one.wake):
        change()
        time.sleep(0.2)  # a team that is given up ends in its own time
        results.append(meet())
    (awake, a), (asleep, b), (awake_again, c) = results
    assert a == b == c, "how threads wait must not change what they compute"
    print(awake, asleep, awake_again)
"""


def test_an_idle_team_sends_torchs_threads_to_sleep_and_changes_no_bit():
    """Counted by the system: a thread that falls asleep gives up its core of its own accord."""
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    command = [sys.executable, "-c", MEETINGS]
    told = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)})
    assert told.returncode == 0, told.stderr
    if not re.fullmatch(r"\d+ \d+ \d+\n", told.stdout):
        pytest.skip(told.stdout)
    awake, asleep, awake_again = map(int, told.stdout.split())
    assert asleep > 150 and awake < asleep / 2 and awake_again < asleep / 2
