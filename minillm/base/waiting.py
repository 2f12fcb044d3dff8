"""How the threads of a CPU wait for one another: awake while the cores are free, asleep while others want them too.

torch cuts an op into parts, one for each thread of its *team*, and goes on when the last part is done (a *barrier*); a
small model's step has hundreds of these. A thread can wait at a barrier in two ways:

- awake: it looks again and again (spinning), goes on within a microsecond, and keeps its core busy meanwhile.
- asleep: the system gives the core to others, and wakes the thread later, which takes some ten microseconds.

On a free machine awake is faster by a fifth. Where other programs want the cores it is ruinous: the one that waits
holds the very core that the awaited one needs, until the system takes it away some milliseconds later, barrier after
barrier. So neither is right for all of a run, and the choice is made while it goes on.

The team of torch's Linux wheels is GNU OpenMP's (libgomp). A thread waits awake for 300,000 looks, about 3 ms, then
asleep; in a process with more OpenMP threads than cores it sleeps after 1,000 looks already
(gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). The threads are counted at each wait. So one more team, which
does nothing, sends the others to sleep at their next barrier, and when it ends they wait awake again. Results depend on
the number of threads alone: how they wait changes no bit.

A thread that is woken still has to get a core. Where several want one, Linux lets each have it for turns of about 3 ms,
and a thread that has had its share waits as long for its next turn, all of its team with it. So threads that sleep also
ask for turns of 0.1 ms: the same share, in pieces of about the length of an op. Linux before 6.12 ignores that.

Whether others want our cores is in /proc/self/task/*/schedstat: for how long each of our threads could have run but had
no core. A single thread that is kept from its core holds up the whole team, so their times are added.

A team that gets half of its cores is better off with one half whole than with all of them half of the time: its threads
then meet on a core that is theirs, and the system gives the other cores to the others. So a team that fills all its
cores, and gets less than two thirds of their time, moves together onto a part of them. It spreads again once the cores
that it left have been idle.
"""

import contextlib
import ctypes
import functools
import math
import os
import platform
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

TASKS = Path("/proc/self/task")
CORES = Path("/proc/stat")  # what each core has done so far
LOOK_S = 0.5  # seconds between two looks at the cores
TRY_S = 0.1  # seconds of the first look
CROWDED = 0.2  # share of the time that some thread of ours is kept from a core, from which on they sleep
FREE = 0.08  # and below which no other program is there
TURN_NS = 100_000  # nanoseconds of a core that a thread asks for at once, while threads sleep
QUIET_LOOKS = 20  # that find the cores free, one after another, before threads wait awake again
IDLE = 0.5  # share of the time that a core which the team has left does nothing, from which on it is free


class Waiting:
    """How the threads of torch's teams wait at present, and the choice of it."""

    def __init__(self, openmp: ctypes.CDLL):
        """openmp: the library of the teams (`gnu_openmp`)."""
        self.openmp = openmp
        self.log: Callable[[str], None] = lambda line: None  # prints the first change in each direction
        self.logged: set[str] = set()
        self.choosing = threading.Lock()
        self.end_idle_team: threading.Event | None = None  # None: there is no such team, threads wait awake
        self.all_cores: set[int] = set()  # of a team that has moved together; empty: it is on all its cores
        self.left_cores: set[int] = set()  # those it has left to others
        self.n_quiet = 0  # looks in a row that found the cores free
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Look at the cores from now on, from a thread of its own, however long a step takes."""
        self.watcher.start()

    def stop(self) -> None:
        """Look no more; threads wait awake again."""
        self.over.set()
        self.watcher.join()
        self.wake()

    @property
    def words(self) -> str:
        """What the threads do, to be printed."""
        if self.end_idle_team is None:
            return "wait for one another awake: no other program needs their cores"
        asleep = "wait for one another asleep: other programs need their cores too"
        n_cores = len(self.all_cores) - len(self.left_cores)
        return f"{asleep}, so they share {n_cores} of {len(self.all_cores)}" if self.left_cores else asleep

    def try_out(self) -> None:
        """A first look: torch's team passes one barrier after another, to see whether its threads get their cores."""
        with self.choosing:
            self.wake()  # the number of threads may have changed since they were sent to sleep
        before = Reading.now()
        while time.perf_counter() < before.at_s + TRY_S:
            self.run_nothing(torch.get_num_threads())
        self.look(before, Reading.now())

    def look(self, before: "Reading", now: "Reading") -> None:
        """Choose by what has happened between two readings."""
        share = now.share_kept(before)
        with self.choosing:
            is_quiet = now.share_idle(before, self.left_cores) > IDLE if self.left_cores else share < FREE
            self.n_quiet = self.n_quiet + 1 if is_quiet else 0
            if self.n_quiet >= QUIET_LOOKS:
                self.wake()
            elif share > CROWDED:
                self.sleep()
                self.move_together(share)

    def _watch(self) -> None:
        seen = Reading.now()
        while not self.over.wait(LOOK_S):
            before, seen = seen, Reading.now()
            words = self.words
            self.look(before, seen)
            if self.words != words and self.words not in self.logged:
                self.logged.add(self.words)
                self.log(f"the threads now {self.words}")

    def run_nothing(self, n_threads: int) -> None:
        """Run an empty parallel region of so many threads, with a barrier at its end. Its team stays."""
        nothing_to_do = self.openmp.omp_get_num_threads  # any function of the library will do
        self.openmp.GOMP_parallel(nothing_to_do, None, n_threads, 0)

    def sleep(self) -> None:
        """From the next barrier on, threads wait asleep."""
        if self.end_idle_team is not None:
            return
        self.n_quiet = 0
        made, end = threading.Event(), threading.Event()
        # with torch's team one thread more than cores; the one that makes a further team is not counted again
        n_idle = max(2, self.openmp.omp_get_num_procs() - torch.get_num_threads() + 2)

        def keep_idle_team() -> None:
            self.run_nothing(n_idle)
            made.set()
            end.wait()  # a team lives as long as the thread that has made it

        threading.Thread(target=keep_idle_team, daemon=True).start()
        made.wait()
        self.end_idle_team = end
        ask_for_turns(TURN_NS)

    def wake(self) -> None:
        """From the next barrier on, threads wait awake."""
        if self.end_idle_team is not None:
            self.end_idle_team.set()
            self.end_idle_team = None
            ask_for_turns(0)
        if self.left_cores:
            run_on(self.all_cores)
            self.all_cores, self.left_cores = set(), set()

    def move_together(self, share_kept: float) -> None:
        """Let the team share as many of its cores as its time on all of them amounts to.

        share_kept: for how long its t threads were kept from a core, all added, as a share of that time. If each wanted
        one all the time, they had that of t - share_kept cores.
        """
        n_threads = torch.get_num_threads()
        cores = os.sched_getaffinity(0)
        if self.left_cores or len(cores) != n_threads:  # with cores besides, each thread may find a free one
            return
        n_had = max(1.0, n_threads - share_kept)
        threads_a_core = int(n_threads / n_had + 0.5)
        n_taken = math.ceil(n_threads / threads_a_core)
        if n_taken == n_threads:
            return
        # by chance: two runs that see each other should not take the same
        taken = set(random.SystemRandom().sample(sorted(cores), n_taken))
        self.all_cores, self.left_cores = cores, cores - taken
        run_on(taken)


@functools.cache
def of_this_process() -> Waiting | None:
    """The choice for this process; None where there is none to make. It begins with the first call and never ends."""
    openmp = gnu_openmp(torch.get_num_threads())
    if openmp is None:
        return None
    waiting = Waiting(openmp)
    waiting.start()
    return waiting


def report(log: Callable[[str], None]) -> None:
    """Print how many threads compute and how they wait, and from now on how that changes.

    log: prints a line. Where the way of waiting cannot be chosen, it is the number of threads alone.
    """
    n_threads = torch.get_num_threads()
    threads = f"{n_threads} CPU thread{'s' if n_threads > 1 else ''}"
    waiting = of_this_process()
    if waiting is None or n_threads == 1:
        log(threads)
        return
    waiting.try_out()
    waiting.log, waiting.logged = log, {waiting.words}
    log(f"{threads}, which {waiting.words}")


def gnu_openmp(n_threads: int) -> ctypes.CDLL | None:
    """The library behind torch's team if it waits as told above; else None.

    None, too, where there is no choice (one thread, more threads than cores), where the user has made it, or where the
    system does not tell how its threads fare.
    """
    if sys.platform != "linux" or n_threads == 1 or not Path("/proc/self/schedstat").exists():
        return None
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return None
    library = ctypes.CDLL(None)  # what is loaded for all, in the order in which torch finds it
    is_gnu = hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")  # Intel's and LLVM's
    if not is_gnu or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    return library if n_threads <= library.omp_get_num_procs() else None


class Reading(NamedTuple):
    """What the threads of this process, and the cores, have come to so far."""

    at_s: float  # when it was read
    kept_ns: dict[str, int]  # thread → how long it could have run but had no core
    idle_s: dict[int, float]  # core → how long it has done nothing

    @classmethod
    def now(cls) -> "Reading":
        kept_ns = {}
        for task in TASKS.iterdir():
            with contextlib.suppress(OSError):  # it has ended since
                _, kept, _ = (task / "schedstat").read_text().split()  # ran, was kept, how many times
                kept_ns[task.name] = int(kept)
        return cls(time.perf_counter(), kept_ns, idle_seconds())

    def share_kept(self, before: "Reading") -> float:
        """How long threads were kept from a core since the reading before, all added, as a share of that time."""
        kept_ns = sum(kept - before.kept_ns.get(task, 0) for task, kept in self.kept_ns.items())
        return kept_ns / 1e9 / (self.at_s - before.at_s)

    def share_idle(self, before: "Reading", cores: set[int]) -> float:
        """How long these cores did nothing since the reading before, on average, as a share of that time."""
        idle_s = sum(self.idle_s.get(core, 0.0) - before.idle_s.get(core, 0.0) for core in cores)
        return idle_s / len(cores) / (self.at_s - before.at_s)


def idle_seconds() -> dict[int, float]:
    """How long each core has done nothing since the system started; see proc_stat(5)."""
    seconds = {}
    for line in CORES.read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":  # "cpu" alone: all together
            idle, waited_for_disks = ticks[3:5]
            seconds[int(name[3:])] = (int(idle) + int(waited_for_disks)) / os.sysconf("SC_CLK_TCK")
    return seconds


def run_on(cores: set[int]) -> None:
    """Let each thread of this process run on these cores alone."""
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            os.sched_setaffinity(int(task.name), cores)


SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the number of the system call, for which glibc got a name late


def ask_for_turns(ns: int) -> None:
    """Ask for turns of so many nanoseconds for each thread of this process; 0: of the usual length.

    See sched_setattr(2). Priorities stay; where the system refuses or does not know it, nothing happens.
    """
    number = SCHED_SETATTR.get(platform.machine())
    for task in TASKS.iterdir() if number else ():
        thread = int(task.name)
        with contextlib.suppress(OSError):  # it has ended since
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                nice = os.getpriority(os.PRIO_PROCESS, thread)
                # its size, then policy, flags, nice, priority, runtime, deadline, period
                attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, ns, 0, 0)
                ctypes.CDLL(None).syscall(number, thread, attributes, 0)
