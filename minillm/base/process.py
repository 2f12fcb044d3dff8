"""A process and its end: signals that never interrupt a save, a lock with one owner, one line for an error."""

import contextlib
import faulthandler
import io
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.printing import VisibleOutput, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOLDER = re.compile(r"process \d+ on ")  # how the line in a lock begins
HOLDER_BYTES = 200  # it is no longer
LEASE_S = 100  # seconds after which a network disk's server frees the locks of a machine that is gone (NFS: 90)
MEMORY_REMEDY = "close other programs, or give a smaller model or input"

_memory_remedy = MEMORY_REMEDY

# ---- one owner, orderly ends


class RunLock:
    """Locks a run's folder for this process; the system unlocks it when the process ends, however it ends."""

    def __init__(self, run: str | Path):
        """Raises `UserError` naming the holder if another process trains in `run`."""
        self.path = Path(run) / "lock"
        self.file = files.open_own(self.path)
        self.file.seek(0)
        holder = self.file.read(HOLDER_BYTES).decode(errors="replace").strip()
        if holder and not HOLDER.match(holder):
            raise UserError(f"{run}: its file lock was not written by a run; delete it or choose another --out")
        if fcntl is None:
            print(f"{run}: cannot be locked on this system; start no second run with the same --out")
            return
        try:
            is_ours = self._locked(run, holder)
        except OSError as problem:  # some network disks
            print(f"{run}: cannot be locked ({problem.strerror}); start no second run with the same --out")
            return
        if not is_ours:
            self.file.close()
            holder = holder or "another process"
            raise UserError(f"--out {run}: in use by {holder}; end that run or choose another --out")
        os.register_at_fork(after_in_child=self.file.close)  # a child that outlives us must not keep the lock
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _locked(self, run: str | Path, holder: str) -> bool:
        """Whether the file is locked for this process now; holder: the line in it.

        The server of a network disk keeps the lock of a machine that is gone until its lease ends. So the end of a
        lock that another machine has is waited for.
        """
        if self._try_lock():
            return True
        machine = holder.rpartition(" on ")[2]
        if machine in ("", socket.gethostname()):
            return False
        print(f"{run}: locked by {holder}; waiting up to {LEASE_S} s, in case {machine} is gone", flush=True)
        until = time.monotonic() + LEASE_S
        while time.monotonic() < until:
            time.sleep(LEASE_S / 100)
            if self._try_lock():
                return True
        return False

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Unlock before the process ends."""
        self.file.close()


class StopSignals:
    """Turns SIGTERM, Ctrl-C and a closed terminal into a request that training obeys between two steps (`Run.steps`).

    After the step, `Run.steps` sees `requested` (signal number, 0 for none), saves one checkpoint and stops; the script
    exits with 128 + that number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (not under nohup). A second
    signal changes nothing; a third Ctrl-C ends the process at once. torchrun passes SIGTERM on to every rank and kills
    them after 30 s; if that interrupts a save, the checkpoint before it stays the newest.
    """

    def __init__(self):
        self.requested = 0
        self.interrupts = 0  # how often Ctrl-C came
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.old_handlers = {number: signal.signal(number, self._note) for number in numbers}
        if hasattr(os, "register_at_fork"):  # a worker process must end when a signal tells it to
            os.register_at_fork(after_in_child=self._restore_in_child)

    def _note(self, number: int, frame) -> None:
        """The handler of them all."""
        nth = self.interrupts + (number == signal.SIGINT)
        self.interrupts = nth  # at once: the next signal may come before the end of this function
        if nth == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system handles the next, even inside a long call
        if os.environ.get("RANK", "0") == "0":
            effect = "once more ends at once, unsaved" if nth == 2 else "finishing this step, then saving"
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, f"\n{signal.Signals(number).name}: {effect}\n".encode())  # print is not safe in a handler
        self.requested = self.requested or int(number)

    def restore(self) -> None:
        """Give the signals back to their handlers from before."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def _restore_in_child(self) -> None:
        """Give the signals back to the handlers from before any run, of which this process may have had several."""
        for number, handler in self.old_handlers.items():
            while isinstance(getattr(handler, "__self__", None), StopSignals):
                handler = handler.__self__.old_handlers.get(number, signal.SIG_DFL)
            signal.signal(number, handler)


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit status. What it prints is visible (`base/printing.py`).

    130 after Ctrl-C; 141 if the reader of the output has closed it; 2 and one line on stderr for a `UserError`, a file
    without permission, output that cannot be written, or when memory runs out.
    """
    _open_missing_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # a script's, while it imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a file that is cut while it is mapped ends the process: this says where
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it does not have
    output = VisibleOutput(sys.stdout)
    with contextlib.redirect_stdout(output):
        status, line = _run(main, output)
        with contextlib.suppress(OSError):
            output.flush()  # here, where a full disk or a closed pipe is handled

    # output that takes no more: its rest is dropped, which Python would write once more at its end
    if output.lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(output.lost, BrokenPipeError):  # `| head` has read enough
            status = status or 128 + 13  # as if SIGPIPE had ended it
        elif not line:
            status = status or 2
            line = f"standard output: {output.lost.strerror}; make room there, or send the output elsewhere"
    if line:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error: rank {rank}"
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"{prefix}: {one_line(line)}", file=sys.stderr, flush=True)
    return status


def _open_missing_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Else the next file to be opened would get the stream's number, and what is printed would go into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  (as long as the process)


def _run(main: Callable[[], int | None], output: VisibleOutput) -> tuple[int, str]:
    """main's exit status, and the line of a mistake or fault that a user can fix."""
    try:
        return main() or 0, ""
    except KeyboardInterrupt:
        return 130, ""
    except UserError as problem:
        was_output = output.lost is not None and problem.__context__ is output.lost  # raised for a print that failed
        return (0, "") if was_output else (2, str(problem))
    except PermissionError as problem:
        return 2, f"{problem.filename}: {problem.strerror or problem}; fix its permissions (chmod)"
    except OSError as problem:
        if problem is not output.lost:
            raise
        return 0, ""
    except (MemoryError, RuntimeError) as problem:
        if not _is_out_of_memory(problem):
            raise
        return 2, _out_of_memory_line(str(problem))


def _is_out_of_memory(problem: MemoryError | RuntimeError) -> bool:
    """torch raises RuntimeErrors, in the first wording on a GPU and in the second on a CPU."""
    if isinstance(problem, MemoryError):
        return True
    return re.search("out of memory|can't allocate memory", str(problem)) is not None


def advise_on_memory(remedy: str = "") -> None:
    """What the line of a lack of memory advises from now on; "": what helps in general."""
    global _memory_remedy
    _memory_remedy = remedy or MEMORY_REMEDY


def _out_of_memory_line(message: str) -> str:
    """One line with the size that could not be allocated, if the message has it, and the remedies."""
    size = re.search(r"allocate [\d.,]+ \w+", message)
    could_not = f" (could not {size[0]})" if size else ""
    return f"out of memory{could_not}: {_memory_remedy}"
