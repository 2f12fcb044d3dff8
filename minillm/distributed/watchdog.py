"""Ends a run in which a rank hangs or is lost, and names that rank."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

ANSWER_S = 2.0  # seconds in which a rank that is alive reports where it is


class Watchdog:
    """Ends this rank, naming the one that hangs, when no step has been finished for `limit_s` seconds.

    It watches from the first `tick` on; loading may take `LOADING` times as long.

    Without it a rank that hangs would leave all others waiting silently. Each rank reports through the group's
    key-value store which step it finished last and, when time is up, which line it is at: the one that hangs is at
    another line than those that wait for it, or reports nothing at all.
    """

    def __init__(self, rank: int, world: int, limit_s: float):
        self.rank, self.world, self.limit_s = rank, world, limit_s
        self.step = 0  # finished last
        self.since = float("inf")  # when; infinity: not watching
        self.store = _store() if world > 1 else None
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def tick(self, step: int) -> None:
        """This rank has finished `step`."""
        self.step, self.since = step, time.monotonic()
        if self.store is not None:
            self.store.set(f"step/{self.rank}", str(step))

    def pause(self) -> None:
        """Training is over: watch no more."""
        self.since = float("inf")

    def _watch(self) -> None:
        while time.monotonic() - self.since < self.limit_s:
            time.sleep(min(1.0, self.limit_s / 4))
        # ask in a thread of its own: the store does not answer if the hanging rank hosts it
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(self._places()), daemon=True)
        asking.start()
        asking.join(2 * ANSWER_S)
        places = answers[0] if answers else "the rank that keeps the store (rank 0, without torchrun) gives no sign"
        _end(f"rank {self.rank}: no step finished for {self.limit_s:.0f} s after step {self.step}: {places}")

    def _places(self) -> str:
        """Which line each rank is at, as far as it reports it."""
        # the innermost line of the main thread that is not torch's own
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame.f_back is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        self.store.set(f"place/{self.rank}", f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

        places = _answers(self.store, "place", self.world, ANSWER_S)
        steps = _answers(self.store, "step", self.world)
        lines = []
        for rank in range(self.world):
            where = f"is at {places[rank]}" if rank in places else "gives no sign"
            lines.append(f"rank {rank} {where} (last finished step {steps.get(rank, 0)})")
        return ", ".join(lines)


def explain_lost_ranks(rank: int, world: int) -> None:
    """When a collective fails because another rank is gone, end this one with one line instead of a traceback."""
    usual_hook = sys.excepthook

    def explain(kind, problem, traceback):
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            return usual_hook(kind, problem, traceback)
        who = "the rank that keeps the store (rank 0, without torchrun) is gone"
        with contextlib.suppress(RuntimeError, ValueError):  # the store may be gone, too
            who = _who_is_lost(rank, world, timed_out="imed out" in str(problem))
        reason = str(problem).splitlines()[0].rpartition("] ")[2]  # after gloo's "[file:line] "
        _end(f"rank {rank}: {who} ({reason[:80]}); the same command goes on from the newest checkpoint")

    sys.excepthook = explain


def _who_is_lost(rank: int, world: int, timed_out: bool) -> str:
    """Which ranks do not answer any more; every rank that notices a loss asks so, and thereby answers the others."""
    store = _store()
    store.set(f"lost/{rank}", "another rank")
    alive = _answers(store, "lost", world, ANSWER_S)
    lost = [str(other) for other in range(world) if other not in alive]
    steps = _answers(store, "step", world)
    how = "gives no sign" if timed_out else "has failed or ended"
    return f"rank {' and '.join(lost) or '?'} {how} after step {steps.get(rank, 0)}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _answers(store: dist.Store, what: str, world: int, wait_s: float = 0.0) -> dict[int, str]:
    """What the ranks have set under `what`, by rank, once all have done so or `wait_s` seconds have passed."""
    until = time.monotonic() + wait_s
    while True:
        answered = [rank for rank in range(world) if store.check([f"{what}/{rank}"])]
        if len(answered) == world or time.monotonic() >= until:
            return {rank: store.get(f"{what}/{rank}").decode() for rank in answered}
        time.sleep(0.05)


def _end(problem: str) -> None:
    """End this process at once: a thread that waits for another rank cannot be interrupted."""
    with contextlib.suppress(OSError):  # nobody reads it: all the more it must end
        os.write(2, f"error: {problem}\n".encode())  # torch's exception hook has replaced sys.stderr by a buffer
    os._exit(3)
