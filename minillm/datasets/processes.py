"""Work shared by several processes, its results in order.

Each process is a new Python that imports only what its work needs. multiprocessing would run the user's script once
more in each, or copy a process whose threads may hold a lock.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from minillm.base.errors import UserError

MOST_PROCESSES = 16  # of one rank; each takes about 0.4 GB
ROOT = Path(__file__).parents[2]  # the folder of the package
COMMAND = "from minillm.datasets.processes import serve; serve()"


def n_processes() -> int:
    """How many processes a rank may start: the cores, shared by the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def shared(work: Callable, pieces: Iterable, n: int) -> Iterator:
    """work(piece) of each piece, in order, by n processes; 1: by this one. pickle must take work and pieces.

    Raises UserError if a process dies. At most 2 n pieces are in memory.
    """
    if n == 1:
        yield from map(work, pieces)
        return
    processes = [_start(work) for _ in range(n)]
    idle = SimpleQueue()
    for process in processes:
        idle.put(process)

    def ask(piece: object) -> object:
        process = idle.get()
        try:
            _send(piece, process.stdin)
            return pickle.load(process.stdout)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(n)  # each waits for a process
    try:
        in_flight = deque()
        for piece in pieces:
            in_flight.append(threads.submit(ask, piece))
            if len(in_flight) == 2 * n:
                yield in_flight.popleft().result()
        for result in in_flight:
            yield result.result()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise UserError("a process that shared the work died, perhaps out of memory; close other programs") from None
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _start(work: Callable) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # it is one of many
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=ROOT,  # here it finds the package, and ours before another
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    _send(work, process.stdin)
    return process


def _send(value: object, pipe) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def serve() -> None:
    """What such a process does: the work for each piece that it reads, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed
    questions = sys.stdin.buffer
    try:
        work = pickle.load(questions)
        while True:
            _send(work(pickle.load(questions)), answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)
