"""Ends a run in which a rank hangs or is lost, and names that rank and its machine."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

ANSWER_S = 2.0  # seconds in which a rank that is alive reports where it is
TELL_S = 1.0  # seconds after which a rank tells again which step it has finished
LOADING = 10  # loading, and saving a checkpoint, may take this many times as long as a step
MOST_HOSTS = 4  # machines that a line names beside a group of ranks

_last_step = 0  # that this process has finished


class Sign(NamedTuple):
    """What a rank tells of itself through the store, one text of these with spaces between."""

    step: int  # finished last
    host: str
    place: str = ""  # file:line; "": not told

    @classmethod
    def read(cls, text: bytes) -> "Sign":
        step, host, place = text.decode().split(" ", 2)
        return cls(int(step), host, place)

    def __str__(self) -> str:
        return f"{self.step} {self.host} {self.place}"


class Watchdog:
    """Ends this rank, naming the one that hangs, when no step has been finished for `limit_s` seconds.

    It watches from the first `tick` on; loading may take `LOADING` times as long, and so may what is done in the
    context `patient`.

    Without it a rank that hangs would leave all others waiting silently. Each rank reports through the group's
    key-value store which step it finished last and, when time is up, which line it is at: the one that hangs is at
    another line than those that wait for it, or reports nothing at all.
    """

    def __init__(self, rank: int, world: int, limit_s: float):
        self.rank, self.world, self.limit_s = rank, world, limit_s
        self.patience = 1  # how many times limit_s may pass
        self.since = float("inf")  # when the last step was finished; infinity: not watching
        self.told_at = float("-inf")
        self.store = _store() if world > 1 else None
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def tick(self, step: int) -> None:
        """This rank has finished `step`."""
        global _last_step
        _last_step, self.since = step, time.monotonic()
        if self.store is not None and self.since >= self.told_at + TELL_S:
            self.told_at = self.since
            self.store.set(f"step/{self.rank}", str(Sign(step, socket.gethostname())))

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """A context that may take `LOADING` times as long as a step: a checkpoint is written, and the others wait."""
        self.patience = LOADING
        try:
            yield
        finally:
            if self.since < float("inf"):
                self.since = time.monotonic()  # before patience ends: the thread must not look in between
            self.patience = 1

    def pause(self) -> None:
        """Training is over: watch no more."""
        self.since = float("inf")

    def _watch(self) -> None:
        while time.monotonic() - self.since < self.limit_s * self.patience:
            time.sleep(min(1.0, self.limit_s / 4))
        # ask in a thread of its own: the store does not answer if the hanging rank hosts it
        lines: list[str] = []
        asking = threading.Thread(target=lambda: lines.append(self._line()), daemon=True)
        asking.start()
        asking.join(2 * ANSWER_S)
        keeper_is_silent = "the rank that keeps the store (rank 0, without torchrun) gives no sign"
        _end(lines[0] if lines else self._says(keeper_is_silent))

    def _says(self, what: str) -> str:
        limit_s = self.limit_s * self.patience
        return f"rank {self.rank}: no step finished for {limit_s:.0f} s after step {_last_step}: {what}"

    def _line(self) -> str:
        """Which line each rank is at, as far as it reports it; "" if another rank of this machine says so."""
        # the innermost line of the main thread that is not torch's own
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame.f_back is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.store.set(f"place/{self.rank}", str(Sign(_last_step, socket.gethostname(), place)))

        signs = _answers(self.store, "place", self.world, ANSWER_S)
        if not _speaks(self.rank, signs):
            return ""
        silent = set(range(self.world)) - signs.keys()
        return self._says(places(signs | _answers(self.store, "step", self.world, among=silent), self.world))


def places(signs: dict[int, Sign], world: int) -> str:
    """Where the ranks are, those at one line after one step together: the silent first, then few before many."""
    groups = defaultdict(list)
    for rank in range(world):
        sign = signs.get(rank, Sign(0, ""))
        groups[sign.place, sign.step].append(rank)
    n_hosts = len({sign.host for sign in signs.values()})
    parts = []
    for (place, step), ranks in sorted(groups.items(), key=lambda group: (group[0][0] != "", len(group[1]))):
        verb = ("is at" if len(ranks) == 1 else "are at") if place else ("gives" if len(ranks) == 1 else "give")
        hosts = sorted({signs[rank].host for rank in ranks if rank in signs}) if n_hosts > 1 else []
        on = f" on {', '.join(hosts)}" if 0 < len(hosts) <= MOST_HOSTS else ""
        parts.append(f"{listed(ranks)}{on} {verb} {place or 'no sign'} (last finished step {step})")
    return ", ".join(parts)


def listed(ranks: Iterable[int]) -> str:
    """Ranks in words, in their order: "rank 3", "ranks 0–6, 9"."""
    runs: list[list[int]] = []  # first and last of each
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if is_one else 'ranks'} {', '.join(parts)}"


def explain_lost_ranks(rank: int, world: int) -> None:
    """When a collective fails because another rank is gone, end this one with one line instead of a traceback.

    Of the ranks of one machine that notice it, the first writes the line.
    """
    usual_hook = sys.excepthook

    def explain(kind, problem, traceback):
        if not isinstance(problem, dist.DistError) and "gloo" not in str(problem):
            return usual_hook(kind, problem, traceback)
        who = "the rank that keeps the store (rank 0, without torchrun) is gone"
        with contextlib.suppress(RuntimeError, ValueError):  # the store may be gone, too
            who = _who_is_lost(rank, world, timed_out="imed out" in str(problem))
        reason = str(problem).splitlines()[0].rpartition("] ")[2]  # after gloo's "[file:line] "
        advice = "the same command goes on from the newest checkpoint"
        _end(f"rank {rank}: {who} ({reason[:80]}); {advice}" if who else "")

    sys.excepthook = explain


def _who_is_lost(rank: int, world: int, timed_out: bool) -> str:
    """Which ranks do not answer any more; every rank that notices a loss asks so, and thereby answers the others.

    "" if another rank of this machine says so.
    """
    store = _store()
    store.set(f"lost/{rank}", str(Sign(_last_step, socket.gethostname())))
    alive = _answers(store, "lost", world, ANSWER_S)
    if not _speaks(rank, alive):
        return ""
    lost = set(range(world)) - alive.keys()
    told = _answers(store, "step", world, among=lost)
    hosts = sorted({sign.host for sign in told.values()})
    of_several = len({*hosts, *(sign.host for sign in alive.values())}) > 1
    on = f" on {', '.join(hosts)}" if of_several and 0 < len(hosts) <= MOST_HOSTS else ""
    verb = "gives no sign" if timed_out else "has failed or ended"
    if len(lost) > 1:
        verb = "give no sign" if timed_out else "have failed or ended"
    return f"{listed(lost) if lost else 'rank ?'}{on} {verb} after step {_last_step}"


def _speaks(rank: int, signs: dict[int, Sign]) -> bool:
    """Whether this rank is the first of its machine that has given a sign."""
    here = [other for other, sign in signs.items() if sign.host == socket.gethostname()]
    return rank == min(here, default=rank)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _answers(
    store: dist.Store, what: str, world: int, wait_s: float = 0.0, among: Iterable[int] | None = None
) -> dict[int, Sign]:
    """What the ranks have set under `what`, by rank, once all have done so or `wait_s` seconds have passed.

    among: of these ranks alone.
    """
    ranks = list(range(world)) if among is None else sorted(among)
    until = time.monotonic() + wait_s
    while not store.check(_keys(what, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    answered = _answered(store, what, ranks)
    if not answered:
        return {}
    return dict(zip(answered, map(Sign.read, store.multi_get(_keys(what, answered))), strict=True))


def _answered(store: dist.Store, what: str, ranks: list[int]) -> list[int]:
    """Those of the ranks that have set `what`: one request if all have, and few if few have not."""
    if not ranks or store.check(_keys(what, ranks)):
        return ranks
    if len(ranks) == 1:
        return []
    middle = len(ranks) // 2
    return _answered(store, what, ranks[:middle]) + _answered(store, what, ranks[middle:])


def _keys(what: str, ranks: list[int]) -> list[str]:
    return [f"{what}/{rank}" for rank in ranks]


def _end(problem: str) -> None:
    """End this process at once, "": without a word; a thread that waits for another rank cannot be interrupted."""
    if problem:
        with contextlib.suppress(OSError):  # nobody reads it: all the more it must end
            os.write(2, f"error: {problem}\n".encode())  # torch's exception hook has replaced sys.stderr by a buffer
    os._exit(3)
