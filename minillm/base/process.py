"""A process and its end: signals that never cut a save, a lock with one owner, one line for an error."""

import io
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from minillm.base import files
from minillm.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ---- one owner, orderly ends


class RunLock:
    """Locks a run's folder for this process; the system unlocks it when the process ends, however it ends."""

    def __init__(self, run: str | Path):
        """Raises `UserError` naming the holder if another process trains in `run`."""
        path = Path(run) / "lock"
        with files.writing(path):
            self.file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            print(f"{run}: cannot be locked on this system; start no second run with the same --out")
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(f"--out {run}: in use by {holder}; end that run or choose another --out") from None
        except OSError as problem:  # some network disks
            print(f"{run}: cannot be locked ({problem.strerror}); start no second run with the same --out")
            return
        os.register_at_fork(after_in_child=self.file.close)  # a child that outlives us must not keep the lock
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Let go before the process ends."""
        self.file.close()


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours between two steps.

    The loop sees `requested` (signal number, 0 for none), saves one checkpoint and exits with 128 + that number: 130
    after Ctrl-C, 143 after SIGTERM. A second signal changes nothing; a third Ctrl-C ends the process at once. torchrun
    passes SIGTERM on to every rank and kills them after 30 s; a save cut short by that leaves the checkpoint before.
    """

    def __init__(self):
        self.requested, self.interrupts = 0, 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(os, "register_at_fork"):  # a worker process must end when told to
            os.register_at_fork(after_in_child=self.restore)

    def _note(self, number: int, frame) -> None:
        nth = self.interrupts = self.interrupts + (number == signal.SIGINT)  # the next may come meanwhile
        if nth == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next is the system's, even inside a long call
        if os.environ.get("RANK", "0") == "0":
            ends = "once more ends at once, unsaved" if nth == 2 else "finishing this step, then saving"
            os.write(2, f"\n{signal.Signals(number).name}: {ends}\n".encode())  # print is not safe in here
        self.requested = self.requested or int(number)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit status.

    130 after Ctrl-C; 141 if whoever reads the output has stopped reading; 2 and one line on stderr for a `UserError`, a
    file without permission, or when memory runs out.
    """
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error: rank {rank}"
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it does not have
    try:
        status = main() or 0
        print(end="", flush=True)  # what is buffered, while a closed pipe can still be told
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it was stdout's: `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
            return 128 + 13  # as if SIGPIPE had ended it
        raise
    except UserError as problem:
        line = str(problem)
    except PermissionError as problem:
        line = f"{problem.filename}: {problem.strerror or problem}; fix its permissions (chmod)"
    except (MemoryError, RuntimeError) as problem:
        text = str(problem)  # the first is torch's wording on a GPU, the second on a CPU
        if not isinstance(problem, MemoryError) and not re.search("out of memory|can't allocate memory", text):
            raise
        asked = re.search(r"allocate [\d.,]+ \w+", text)
        line = f"out of memory (could not {asked[0]})" if asked else "out of memory"
        line += ": to train, halve --micro_batch_size, set --checkpoint_activations true, or choose a smaller --preset"
    print(f"{who}: {line}", file=sys.stderr, flush=True)
    return 2
