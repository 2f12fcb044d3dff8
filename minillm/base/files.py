"""Files and folders that are whole or absent, however the process that writes them ends.

Everything is written to a scratch name first and gets its own by one rename, after its bytes have reached the disk. A
folder gets a manifest.json with the size and SHA-256 of each file, by which it can be verified.

A folder may come from elsewhere, or be shared. So nothing is written through a link that lies in it: a new file is
always made new (`O_EXCL`) under a name that nobody can foresee, and one that is written on is no link (`O_NOFOLLOW`).
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from minillm.base.contents import Contents
from minillm.base.errors import UserError
from minillm.base.json_door import file_size, read_object

try:
    import resource
except ImportError:  # Windows
    resource = None

MANIFEST = "manifest.json"
SCRATCH = re.compile(r"(?P<name>.+)\.tmp-(?P<pid>\d+)-[0-9a-f]{8}")  # a name of `scratch_name`
VISIBLE_S = 60.0  # seconds after which a network disk shows everybody what one machine wrote
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space left, or a quota or size limit reached


def scratch_name(path: Path) -> Path:
    """A name beside `path` that nobody can foresee; the process in it tells whether it is still being written."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A context with a scratch path to write to before renaming it to `path`.

    Whatever goes wrong, nothing is left of it in the end, and an OSError becomes a `UserError`.
    """
    scratch = scratch_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
    except OSError as problem:
        raise UserError(why_not_written(path, scratch, problem)) from None
    finally:
        discard(scratch)


def why_not_written(path: Path, scratch: Path, problem: OSError) -> str:
    """What to tell of a file or folder that could not be written; scratch: what there is of it so far."""
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if home.is_file():
        return f"{path}: cannot be written: {home} is a file; choose another --out"
    if problem.errno not in FULL:
        return f"{path}: cannot be written: {problem.strerror or problem}; fix that or choose another --out"

    # no space: say how much was written, how much is free, and whether earlier checkpoints are safe
    files = _files(scratch).values() if scratch.is_dir() else ()
    n_bytes = sum(file.stat().st_size for file in files)
    n_free = shutil.disk_usage(home).free
    message = (
        f"{path}: writing failed after {n_bytes:,} bytes: {problem.strerror} ({n_free:,} bytes free there); "
        "free space or choose another --out"
    )
    if any(home.glob("step-????????")):
        message += "; earlier checkpoints are untouched"
    return message


def discard(path: Path) -> None:
    """Delete a file, link or folder, if it is there and can be deleted."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def create(path: Path) -> BinaryIO:
    """A new file, open for writing. One that had the name stays whole for those who read it: it only loses the name."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_own(path: Path) -> BinaryIO:
    """A run's own file, open for reading and appending, made if it is missing. Unbuffered.

    Raises `UserError` for a link, by which another file would be changed, and for what is no file (a pipe, a folder).
    """
    with writing(path):
        refuse_link(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # each exists on some systems
            flags |= getattr(os, name, 0)
        return open(os.open(path, flags, 0o666), "a+b", buffering=0)  # noqa: PTH123  (a handle is no path)


def is_lost(path: Path, file: BinaryIO) -> bool:
    """Whether an open file has lost its name: it was deleted or moved, or another has the name now."""
    if os.name == "nt":
        return False  # Windows keeps the name of a file that is open
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a network disk that does not answer now
        return False


def refuse_link(path: Path) -> None:
    """Raise `UserError` if the name belongs to a link, or to something that is neither file nor folder."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link, through which nothing is written; delete it or choose another --out")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is neither a file nor a folder, so it is left alone; choose another --out")


def own_folder(path: Path) -> Path:
    """The folder, made if it is missing. Raises `UserError` for a link, which would lead elsewhere."""
    with writing(path):
        refuse_link(path)
        path.mkdir(exist_ok=True)
    return path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # Windows cannot sync a folder, and need not
    handle = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> dict[str, Path]:
    """Every file under `folder` by its relative name, sorted; the manifest itself left out."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST, None)
    return dict(sorted(files.items()))


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes. Raises `UserError` for what is no file, such as a pipe."""
    file_size(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(file: Path) -> dict:
    """A file's entry in a manifest."""
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def write_json_atomically(path: str | Path, value, most_bytes: float = math.inf) -> None:
    """Write `value` as JSON: a reader sees the old file or the new one, whole. Raises `UserError` naming the path.

    most_bytes: as many as the reader takes; a larger file is not written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    n_bytes = len(text.encode())
    if n_bytes > most_bytes:
        raise UserError(f"{path}: {n_bytes:,} bytes, more than are read (at most {most_bytes:,}); give fewer files")
    write_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Make the file `path` appear whole or not at all; write(scratch) writes it at first to another, empty file.

    A link of this name gives way to the file; what it led to stays as it is. Raises `UserError` naming the path.
    """
    path = Path(path)
    with writing(path) as scratch:
        if not path.is_symlink():
            refuse_link(path)  # /dev/null
        scratch.open("xb").close()
        write(scratch)
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` appear whole, with a manifest, or not at all.

    fill(folder): writes the files into the folder it is given. A folder that exists already is replaced, and
    stays on the disk until the new one is whole. Raises `UserError` with path and bytes when the disk is full,
    read-only or the like; in every case of failure the old content stays, and nothing else.
    """
    path = Path(path)
    with writing(path) as scratch:
        scratch.mkdir()
        fill(scratch)
        complete(scratch, path)


def complete(scratch: Path, path: Path, described: dict[str, dict] | None = None) -> None:
    """Give a folder that is filled its manifest and, once all of it has reached the disk, its name `path`.

    described: entries of the manifest for files that are on the disk already; all others are read here. Raises
    `UserError` if one of them, which another machine may have written, is not to be seen in time.
    """
    # the manifest, once all files have reached the disk
    described = described or {}
    for name in described:
        wait_for(scratch / name)
    files = dict(sorted((_files(scratch) | {name: scratch / name for name in described}).items()))
    manifest_file = scratch / MANIFEST
    manifest_file.touch()
    for file in files.values():  # safetensors makes files that only their owner may read
        file.chmod(manifest_file.stat().st_mode)
    others = {name: file for name, file in files.items() if name not in described}
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock: one core per file
        list(pool.map(sync, others.values()))
        entries = dict(zip(others, pool.map(_describe, others.values()), strict=True)) | described
    manifest = {"format": 1, "files": {name: entries[name] for name in files}}
    manifest_file.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(manifest_file)

    # the folders, then the new name
    for folder in scratch.rglob("*"):
        if folder.is_dir():
            sync(folder)
    sync(scratch)
    _put_in_place(scratch, path)


def _put_in_place(scratch: Path, path: Path) -> None:
    """Rename a whole folder to `path`, in place of the one that may have this name."""
    # A rename cannot replace a folder that has files, so the old one is first renamed to a name from which
    # run_folder.clean_stale restores it, should we be killed between the two renames.
    old = path.with_name(path.name + ".old")
    if path.exists() and verify_folder(path):
        shutil.rmtree(path)  # damaged: worth less than an older one that may still have the other name
    elif path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    scratch.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify_folder(path: str | Path, part: int = 0, parts: int | None = 1) -> list[str]:
    """What is wrong with a folder that `write_folder` wrote, a line each; empty if every file is as it was written.

    Files added later are allowed, except weights (*.safetensors and their index), which a loader might read. Raises
    PermissionError for a file that may not be read, since that is not damage.

    part, parts: compare the bytes of one part of the files, of so many whose sizes are about equal; parts None: compare
    sizes only.
    """
    path = Path(path)

    # what the manifest says
    try:
        files = read_object(path / MANIFEST).need("files", dict[str, dict])
        entries = {name: Contents(entry, f"{path / MANIFEST}: {name:.80}") for name, entry in files.items()}
        expected = {
            name: (entry.need("size", int, at_least=0), entry.need("sha256", str)) for name, entry in entries.items()
        }
    except UserError as problem:
        return [f"{MANIFEST} cannot be read ({problem})"]

    # which files are missing, and which were added
    present = _files(path)
    for name in expected:
        if name not in present:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                next((path / name).parent.iterdir(), None)  # PermissionError: what may not be listed is not missing
    problems = [f"{name} is missing" for name in expected if name not in present]
    for name in present:
        if name not in expected and name.endswith((".safetensors", ".safetensors.index.json")):
            problems.append(f"{name} was added")

    # whether the others are the same bytes
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))
    read_here = set(by_size[part::parts]) if parts else set()

    def compare(name: str) -> str | None:
        size_expected, sha256_expected = expected[name]
        try:
            size = present[name].stat().st_size
            if size != size_expected:
                return f"{name} has {size:,} bytes instead of {size_expected:,}"
            if name in read_here and sha256(present[name]) != sha256_expected:
                return f"{name} differs from its checksum"
        except PermissionError:
            raise
        except (OSError, UserError) as problem:  # a bad sector, or another process has changed the folder
            return f"{name} cannot be read ({getattr(problem, 'strerror', None) or problem})"
        return None

    with ThreadPoolExecutor() as pool:
        results = pool.map(compare, [name for name in expected if name in present])
        return problems + [problem for problem in results if problem]


def wait_for(path: Path, seconds: float = VISIBLE_S) -> None:
    """Wait until a file or folder that another machine has made is to be seen here: network disks take seconds.

    Raises `UserError` if it is not, which mostly means that the machines do not share the disk.
    """
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path}: was made by another process, and is not to be seen on {socket.gethostname()} after "
                f"{seconds:.0f} s; --out must lie on a disk that all machines share"
            )
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            next(path.parent.iterdir(), None)  # lets a client of NFS ask the server again


def refuse_existing(out: str | Path) -> None:
    """Raise `UserError` if the place where a command is to write is taken already."""
    if Path(out).exists():
        raise UserError(f"--out {out}: is there already; choose another or delete it")


def check_file(out: Path) -> None:
    """Refuse, before the work whose result it is to hold, a file that could not be written."""
    if out.is_dir() and not out.is_symlink():
        raise UserError(f"--out {out}: is a folder; give the name of a file")
    with writing(out) as scratch:
        scratch.open("xb").close()


def memory_bytes() -> float:
    """The machine's memory with its swap, or this container's share of it; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    totals = [line.split() for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))]  # name, KiB, unit
    n_bytes = sum(1024 * int(kib) for _, kib, *_ in totals)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
        n_bytes = min(n_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return n_bytes


def check_writable(path: str | Path, bytes_needed: int, largest_file: int = 0) -> None:
    """Refuse, before the first step, a run's folder that cannot hold its checkpoints.

    bytes_needed: for all checkpoints kept at once, beyond those there now; largest_file: bytes.
    Raises `UserError` if the folder cannot be written, has too little space or allows no file so large.
    """
    with writing(Path(path) / "probe") as probe:
        probe.open("xb").close()
        free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise UserError(
            f"{path}: {free:,} bytes free, but the checkpoints will need {bytes_needed:,}; "
            "free space, lower --keep_last or choose another --out"
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
    if 0 <= limit < largest_file:
        raise UserError(
            f"{path}: a checkpoint has a file of {largest_file:,} bytes, but the limit on a file is {limit:,}; "
            "raise it (ulimit -f unlimited)"
        )
