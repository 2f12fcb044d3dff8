"""Arrays that take long to make: made once, kept in a folder, and mapped from there by every later start.

~/.cache/minillm/tokens/<name>/       about.json, one .npy an array, manifest.json (see base/files.py)
~/.cache/minillm/tokens/<name>.lock   while a process makes them

The name is a digest of everything that the arrays depend on, so nothing in a folder is ever out of date. A folder is
whole or absent, and its checksums are compared before it is used. XDG_CACHE_HOME takes the place of ~/.cache.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.json_door import read_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ABOUT = "about.json"
MOST_BYTES = 1 << 28  # of it
UNUSED_DAYS = 30  # what no run has opened for so long is deleted when something new is kept


class Arrays(NamedTuple):
    """arrays: by name. about: what else is known, of the kinds that JSON has. where: they are kept, in words."""

    arrays: dict[str, np.ndarray]
    about: dict
    where: str = ""


def kept_arrays(key: dict, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that were kept under this key; if there are none, those that `make` makes, which are then kept.

    key: everything that they depend on, of the kinds that JSON has. Processes that want the same wait for the first.
    Where nothing can be written, `where` says why, and the arrays are in memory.
    """
    written = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(written.encode()).hexdigest()[:32]
    try:
        folder = _home() / name
        found = _read(folder, written)
        if found:
            return found
        with _turn(folder) as is_first:
            found = _read(folder, written)  # another process may have been quicker
            if found:
                return found
            if is_first:
                return _keep(folder, written, make())
        why = "the process that was to do it ended before"
    except OSError as problem:
        why = f"{problem.filename or folder}: {problem.strerror or problem}"
    return make()._replace(where=_not_kept(why))


def _home() -> Path:
    """The folder of all that is kept. Raises OSError if the user has none."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise FileNotFoundError(0, "this user has no home folder", "~") from None
    return cache / "minillm" / "tokens"


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Whether this process is the one to make the folder. If another is, its end is waited for.

    The system unlocks the file when a process ends, however it ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with lock.open("ab") as file:
        if _is_locked_by_another(file):
            if os.environ.get("RANK", "0") == "0":
                print("another process tokenizes the same data; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)  # those who wait have it open


def _is_locked_by_another(file) -> bool:
    """Whether another process has the lock; else this one has it from now on."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network disks have no locks: then two processes do the same work
        return False
    return False


def _read(folder: Path, written: str) -> Arrays | None:
    """What the folder holds, if it is whole and was kept under this key. Raises PermissionError if it may not be read.

    written: the key as a text.
    """
    if not folder.is_dir() or files.verify_folder(folder):
        return None
    try:
        about = read_object(folder / ABOUT, MOST_BYTES)
        names = about.need("arrays", list[str])
        if about.need("key", str) != written:
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names}
    except (UserError, ValueError):  # a whole folder, but none of ours
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # it was used now
    return Arrays(arrays, about.need("about", dict), f"kept in {folder}")


def _keep(folder: Path, written: str, made: Arrays) -> Arrays:
    """Writes the folder; returns what it holds, or what was made if it cannot be written."""
    if not all(len(array) for array in made.arrays.values()):
        return made  # what is empty cannot be mapped
    _delete_leftovers(folder)
    try:
        files.write_folder(folder, partial(_fill, written, made))
    except UserError as problem:
        return made._replace(where=_not_kept(str(problem).partition(";")[0]))
    return _read(folder, written) or made


def _fill(written: str, made: Arrays, folder: Path) -> None:
    for name, array in made.arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    about = {"key": written, "arrays": list(made.arrays), "about": made.about}
    (folder / ABOUT).write_text(json.dumps(about))


def _delete_leftovers(folder: Path) -> None:
    """Deletes what a process that was killed had begun to write, and what was not used for long."""
    long_ago = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.parent.iterdir():
        is_ours_begun = path.name.startswith(f"{folder.name}.") and path.suffix != ".lock"
        with contextlib.suppress(OSError):  # another process deletes it too
            if is_ours_begun or path.stat().st_mtime < long_ago:
                files.discard(path)


def _not_kept(why: str) -> str:
    return f"not kept for the next start ({why}); XDG_CACHE_HOME can name another folder"
