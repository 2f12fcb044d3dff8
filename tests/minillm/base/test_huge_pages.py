"""Large pages are asked for, and change no number."""

import ctypes
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from minillm.base import huge_pages
from minillm.base.huge_pages import ANONYMOUS, PAGE, use_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_NONE = not SWITCH.exists() or "[never]" in SWITCH.read_text()
IS_OLD = HAS_NONE or tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 1)  # moves nothing at once
N_BYTES = 32 * PAGE


def in_huge_pages(address: int) -> int:
    """Bytes of the mapping around an address that lie in large pages."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_here and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.skipif(IS_OLD, reason="this system gives no large pages at once")
def test_memory_that_is_there_comes_to_lie_in_large_pages():
    room = mmap.mmap(-1, N_BYTES + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_NOHUGEPAGE)
    numbers = np.frombuffer(room, dtype=np.uint8)
    numbers[:] = np.arange(len(numbers)) % 251
    address = numbers.ctypes.data + len(numbers) // 2
    assert in_huge_pages(address) == 0
    use_huge_pages()
    assert in_huge_pages(address) >= PAGE  # a machine may have no room for more of them in one piece
    assert np.array_equal(numbers, np.arange(len(numbers)) % 251)
    del numbers
    room.close()


@pytest.mark.parametrize(
    ("line", "is_meant"),
    [
        ("7f00-7fff rw-p 00000000 00:00 0", True),
        ("7f00-7fff rw-p 00000000 00:00 0 ", True),
        ("7f00-7fff rw-p 00000000 00:00 0                          [heap]", True),
        ("7f00-7fff rw-p 00000000 00:00 0                          [stack]", False),
        ("7f00-7fff r--p 00000000 00:00 0", False),
        ("7f00-7fff rw-s 00000000 00:01 1025                       /dev/zero (deleted)", False),
        ("7f00-7fff rw-p 00001000 fe:00 260386                     /usr/lib/libc.so.6", False),
    ],
)
def test_only_private_memory_without_a_file_is_meant(line, is_meant):
    assert bool(ANONYMOUS.fullmatch(line)) == is_meant


def no_library(name: None):
    raise TypeError("LoadLibrary() argument 1 must be str, not None")


@pytest.mark.parametrize(
    ("has_maps", "library"), [(False, no_library), (False, ctypes.CDLL), (True, lambda _: object())]
)
def test_other_systems_go_on_without(has_maps, library, monkeypatch):
    """Windows, macOS, and a system without madvise."""
    if not has_maps:
        monkeypatch.setattr(huge_pages, "Path", lambda name: Path("/nowhere") / name.lstrip("/"))
    monkeypatch.setattr(ctypes, "CDLL", library)
    use_huge_pages()
