"""How a command of the kernels ends when it has no Triton, or when nobody reads what it prints any more."""

import signal
import sys


def end_with_reader() -> None:
    """From now on a reader that has gone (`| head` has read enough) ends this process quietly, as it ends `cat`."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def need_triton() -> None:
    """End in one line where Triton cannot be imported (macOS, Windows); called before what imports it."""
    try:
        import triton  # noqa: F401
    except ImportError as problem:
        sys.exit(f"kernels need triton, which is for Linux: {problem}; all else runs without it, by PyTorch's ops")
