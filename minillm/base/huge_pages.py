"""Pages of 2 MB in place of 4 KB for a process's memory, where a CPU reads all weights for each token.

A processor remembers where some 2,000 pages lie. 25 MB of weights are 6,400 small ones, so that most have to be looked
up again in every step, which in a virtual machine takes a walk through two tables. Linux gives large pages to whoever
asks for them ("transparent huge pages", `man 2 madvise`); elsewhere, and where they are switched off, nothing happens.
"""

import contextlib
import ctypes
import re
from pathlib import Path

PAGE = 1 << 21  # bytes
MADV_HUGEPAGE = 14  # from now on, of linux/mman.h
MADV_COLLAPSE = 25  # at once, of what is there; since Linux 6.1, before that the kernel does so by and by
MOST = 1 << 31  # bytes moved at once, which takes some 2 s a GB; the kernel moves what is beyond by and by
# a line of /proc/self/maps about private memory without a file: its first address, and one past the last
ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?")


def use_huge_pages() -> None:
    """Ask for large pages for all memory that the process has by now, such as weights that were just loaded."""
    with contextlib.suppress(OSError, AttributeError):  # no /proc, or no madvise: another system
        lines = Path("/proc/self/maps").read_text().splitlines()  # first, since Windows knows no CDLL(None) either
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        room = MOST
        for line in lines:
            if found := ANONYMOUS.fullmatch(line):
                begin = -(-int(found[1], 16) // PAGE) * PAGE
                n_bytes = int(found[2], 16) // PAGE * PAGE - begin
                if n_bytes > 0:  # what is refused stays as it is
                    madvise(begin, n_bytes, MADV_HUGEPAGE)
                    madvise(begin, min(n_bytes, room), MADV_COLLAPSE)
                    room -= min(n_bytes, room)
