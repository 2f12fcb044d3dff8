"""One command for so many seconds and no longer, with everything that it starts.

A kernel that waits for a barrier forever hangs its process, and whatever waits for that process. So a command runs in a
session of its own, writes to a file (a full pipe would block it), and is ended at its limit: SIGTERM, some seconds to
clean up, SIGKILL. What it started ends with it, also what has left its session, and also after a good end: a forgotten
process would hold the GPU while the next line is measured.

To find those processes we walk from parent to child. One whose parent has ended would be handed to init and be lost, so
we ask the kernel to hand it to us instead (a "child subreaper", prctl(2)).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
POLL_S = 0.05
TERMINATE_S = 4.0  # from SIGTERM to SIGKILL
SETTLE_S = 1.0  # for what ends by itself when its parent has ended, as the processes that compile do
KILL_S = 4.0  # after SIGKILL: a process inside the driver may take that long, or never end
LOG_BYTES = 256 << 20  # a command that prints more than this is ended
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

PASSED, FAILED, TIMED_OUT, INTERRUPTED = "passed", "failed", "timed out", "interrupted"


class Stop:
    """Whether a signal has asked for the end, and which. A signal's handler only notes it; loops look."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def note(self, number: int, frame: object = None) -> None:
        self.signal = signal.Signals(number)


@dataclass(frozen=True)
class Ending:
    """How a command ended. exit_code: None if it could not start or did not end; notes: what else is to be told."""

    verdict: str
    exit_code: int | None
    seconds: float
    notes: tuple[str, ...] = ()


def run(command: list[str], log: Path, limit_s: float, stop: Stop, environment: dict[str, str]) -> Ending:
    """Run a command in the project's folder, its output added to the file `log`."""
    adopt_orphans()
    ours = descendants()
    began = time.monotonic()
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as problem:
            output.write(f"cannot start: {problem}\n".encode())
            return Ending(FAILED, None, time.monotonic() - began)

    notes = []
    try:
        verdict = wait(child, log, began + limit_s, stop, notes)
        if child.poll() is not None:
            settle(child, ours)
    finally:
        n_left, unended = end(child, ours)
    if verdict == PASSED and n_left:
        notes.append(f"left {n_left} process(es) behind, which were ended")
    if unended:
        notes.append(f"could not end process {', '.join(map(str, sorted(unended)))}, not even by SIGKILL")
    return Ending(verdict, child.poll(), time.monotonic() - began, tuple(notes))


def wait(child: subprocess.Popen, log: Path, until: float, stop: Stop, notes: list[str]) -> str:
    """The verdict, when the child has ended or has to be ended."""
    while child.poll() is None:
        if stop.signal:
            return INTERRUPTED
        if time.monotonic() >= until:
            return TIMED_OUT
        if log.stat().st_size > LOG_BYTES:
            notes.append(f"ended because it printed more than {LOG_BYTES >> 20} MiB")
            return FAILED
        time.sleep(POLL_S)
    return FAILED if child.returncode else PASSED


def settle(child: subprocess.Popen, spared: set[int]) -> None:
    """Wait a moment for what a command started to end by itself."""
    until = time.monotonic() + SETTLE_S
    while alive(child, spared) and time.monotonic() < until:
        time.sleep(POLL_S)


def end(child: subprocess.Popen, spared: set[int]) -> tuple[int, set[int]]:
    """End all that is left of a command: how many processes there were, and which of them are still there.

    spared: processes that were there before the command.
    """
    left = alive(child, spared)
    n_left = len(left)
    for number, seconds in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
        until = time.monotonic() + seconds
        send(left, child, number)
        while left and time.monotonic() < until:
            time.sleep(POLL_S)
            appeared = alive(child, spared) - left
            left = alive(child, spared)
            send(appeared, child, number)  # started by another before that one got the signal
    return n_left, left


def alive(child: subprocess.Popen, spared: set[int]) -> set[int]:
    """Processes of a command that have not ended."""
    running = descendants() - spared
    return running | {child.pid} if child.poll() is None else running - {child.pid}


def send(processes: set[int], child: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to the processes, and to the child's whole group if it is among them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if child.pid in processes:
            os.killpg(child.pid, number)
    for process in processes - {child.pid}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def adopt_orphans() -> None:
    """From now on a process whose parent has ended becomes our child, if one of us started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[int]:
    """Processes that this one started, and that those started, without what has ended; none without /proc."""
    children: dict[int, list[int]] = {}
    ended = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "12 (name) S 11 …": the name may hold anything, state and parent follow its last bracket
            state, parent = file.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()[:2]
        except (OSError, ValueError):  # it has ended while we looked
            continue
        process = int(file.parent.name)
        children.setdefault(int(parent), []).append(process)
        if state in "ZX":
            ended.add(process)

    found: set[int] = set()
    to_visit = [os.getpid()]
    while to_visit:
        of_this_one = children.get(to_visit.pop(), [])
        found.update(of_this_one)
        to_visit += of_this_one
    return found - ended
