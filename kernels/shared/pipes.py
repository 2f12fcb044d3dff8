"""How a command of the kernels ends when nobody reads what it prints any more."""

import signal


def end_with_reader() -> None:
    """From now on a reader that has gone (`| head` has read enough) ends this process quietly, as it ends `cat`."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
