"""Files and folders under kills, full disks and damage: whole or absent."""

import errno
import hashlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from minillm.base import files
from minillm.base.errors import UserError
from minillm.base.process import RunLock
from minillm.checkpoint import run_folder
from minillm.training import metrics


def fill_with(text: str):
    def fill(folder: Path) -> None:
        (folder / "resume").mkdir()
        (folder / "model.safetensors").write_text(text * 1000)
        (folder / "resume" / "state.json").write_text(json.dumps({"text": text}))

    return fill


def content(folder: Path) -> str:
    """What `fill_with` wrote, both files agreeing."""
    text = json.loads((folder / "resume" / "state.json").read_text())["text"]
    assert (folder / "model.safetensors").read_text() == text * 1000
    return text


@pytest.fixture
def saved(tmp_path):
    for step in (10, 20, 30):
        files.write_folder(tmp_path / run_folder.step_name(step), fill_with(str(step)))
    return tmp_path


def in_child(work) -> int:
    """Run `work` in a forked child; its exit status (0, or that of its os._exit), negative if killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_written_folder_verifies_and_holds_its_manifest(saved):
    folder = saved / "step-00000020"
    assert files.verify_folder(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert list(manifest) == ["model.safetensors", "resume/state.json"]
    assert manifest["model.safetensors"]["size"] == 2000
    # printf '20%.0s' {1..1000} | sha256sum
    assert manifest["model.safetensors"]["sha256"].startswith("b9db6ef157120787")
    assert [run_folder.step_of(f) for f in run_folder.step_folders(saved)] == [10, 20, 30]


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    def fill(folder):
        (folder / "a").write_text("a")
        (folder / "a").chmod(0o600)  # as safetensors leaves its files

    old = os.umask(0o022)
    try:
        files.write_folder(tmp_path / "step-1", fill)
    finally:
        os.umask(old)
    assert (tmp_path / "step-1" / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("there_before", ["nothing", "whole", "damaged"])
def test_killed_at_every_file_operation_of_a_save(tmp_path, there_before):
    """The process ends before its first, second, … file operation; the next start finds the old or the new."""
    outcomes = set()
    for moment in range(1000):
        home = tmp_path / str(moment)
        files.write_folder(home / "step-1", fill_with("first"))
        target = home / "step-2"
        if there_before != "nothing":
            files.write_folder(target, fill_with("old"))
        if there_before == "damaged":
            (target / "model.safetensors").write_text("x")

        def save(home=home, target=target, left=moment):
            def end_when_due(event, arguments):
                nonlocal left
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
                    if left == 0:
                        os._exit(9)
                    left -= 1

            sys.addaudithook(end_when_due)  # sees each operation just before it is done
            files.write_folder(target, fill_with("new"))

        status = in_child(save)
        run_folder.clean_stale(home)
        assert {path.name for path in home.iterdir()} <= {"step-1", "step-2"}
        newest = run_folder.newest_checkpoint(home, log=lambda line: None)
        outcomes.add(found := content(newest))
        assert (
            found in {"nothing": ("first", "new"), "whole": ("old", "new"), "damaged": ("first", "new")}[there_before]
        )
        if status == 0:
            assert found == "new" and moment > 15
            break
        assert status == 9
    assert len(outcomes) == 2


def test_killed_at_ten_random_moments_of_a_loop_that_saves(tmp_path):
    """Signal 9 from outside; all that stands under a step's name is whole, and nothing acknowledged is lost."""
    rng, acknowledged = random.Random(0), -1
    for _ in range(10):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_folder.clean_stale(tmp_path)
            newest = run_folder.newest_checkpoint(tmp_path)
            step = run_folder.step_of(newest) if newest else 0
            while True:  # the first save replaces a checkpoint that is there
                files.write_folder(tmp_path / run_folder.step_name(step), fill_with(f"{step:4}" * 200))
                os.write(writer, step.to_bytes(4, "little"))
                run_folder.prune(tmp_path, 2)
                step += 1
        os.close(writer)
        assert len(os.read(reader, 4)) == len(os.read(reader, 4)) == 4  # one that was there again, and the next
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while word := os.read(reader, 4):
            acknowledged = int.from_bytes(word, "little")
        os.close(reader)
        run_folder.clean_stale(tmp_path)
        for folder in run_folder.step_folders(tmp_path):
            assert files.verify_folder(folder) == []
            assert content(folder) == f"{run_folder.step_of(folder):4}" * 200
        assert run_folder.step_of(run_folder.newest_checkpoint(tmp_path)) >= acknowledged
    assert run_folder.step_of(run_folder.newest_checkpoint(tmp_path)) >= 10  # each process came at least one further


def test_an_error_while_filling_leaves_nothing(saved):
    def fill(folder):
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.write_folder(saved / "step-00000040", fill)
    assert [path.name for path in saved.iterdir() if "40" in path.name] == []


def test_notes_beside_a_model_are_no_damage(saved):
    (saved / "step-00000030" / "README.md").write_text("my best model")
    assert files.verify_folder(saved / "step-00000030") == []


def test_a_manifest_cannot_point_outside(saved):
    folder = saved / "step-00000030"
    (saved / "outside").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside"] = files._describe(saved / "outside")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert files.verify_folder(folder) == ["../outside is missing"]


def test_what_cannot_be_read_is_damage(saved, monkeypatch):
    def broken(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sha256", broken)
    assert "model.safetensors cannot be read (Input/output error)" in files.verify_folder(saved / "step-00000030")


def refused(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_limit_on_file_size_names_path_and_bytes(saved):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # writing beyond fails with EFBIG
    try:
        early = refused(lambda: files.check_writable(saved, 1, largest_file=5000))
        files.check_writable(saved, 1, largest_file=4096)
        late = refused(lambda: files.write_folder(saved / "step-00000040", fill_with("12345")))
        row = refused(lambda: files.write_json_atomically(saved / "a.json", "x" * 5000))
        log = metrics.MetricsLog(saved / "metrics.jsonl")
        refused(lambda: log.write({"step": 1, "text": "x" * 5000}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "5,000" in early and "4,096" in early and "ulimit" in early
    assert "step-00000040" in late and "4,096 bytes" in late and os.strerror(errno.EFBIG) in late
    assert str(saved / "a.json") in row
    checkpoints = {folder.name for folder in run_folder.step_folders(saved)}
    assert {path.name for path in saved.iterdir()} == checkpoints | {"metrics.jsonl"}
    assert run_folder.newest_checkpoint(saved) == saved / "step-00000030"


def test_a_full_disk_names_path_and_keeps_the_checkpoint_before(saved):
    def fill(folder):
        (folder / "model.safetensors").symlink_to("/dev/full")
        (folder / "model.safetensors").write_text("x")

    line = refused(lambda: files.write_folder(saved / "step-00000030", fill))
    assert os.strerror(errno.ENOSPC) in line and line.endswith("earlier checkpoints are untouched")
    assert content(run_folder.newest_checkpoint(saved)) == "30"
    assert len(list(saved.iterdir())) == 3
    assert "earlier" not in refused(lambda: files.write_folder(saved / "new" / "step-00000030", fill))


def test_too_little_space_is_said_before_the_first_step(tmp_path):
    files.check_writable(tmp_path / "new", 1)
    assert list((tmp_path / "new").iterdir()) == []
    assert f"{1 << 60:,}" in refused(lambda: files.check_writable(tmp_path, 1 << 60))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("")
    for work in (
        lambda: files.check_writable(tmp_path / "out" / "run", 1),
        lambda: RunLock(tmp_path / "out" / "run"),
        lambda: files.write_folder(tmp_path / "out" / "step-1", fill_with("x")),
        lambda: files.write_json_atomically(tmp_path / "out" / "a.json", 1),
        lambda: metrics.MetricsLog(tmp_path / "out" / "metrics.jsonl"),
    ):
        line = refused(work)
        assert f"{tmp_path / 'out'} is a file; choose another --out" in line and "free" not in line


def test_a_folder_that_may_not_be_written_is_no_full_disk(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = refused(lambda: files.check_writable(tmp_path / "run", 1))
    assert "run/probe: cannot be written: Permission denied; fix that or choose another --out" in line
    assert "free" not in line and "checkpoints" not in line


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    files.write_file(tmp_path / "new" / "one", lambda path: path.write_text("whole"))
    assert (tmp_path / "new" / "one").read_text() == "whole"

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        files.write_file(tmp_path / "new" / "one", fail)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["one"] and (tmp_path / "new/one").read_text() == "whole"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child without rights")
def test_a_folder_that_may_not_be_listed_is_not_called_damaged(tmp_path, monkeypatch):
    files.write_folder(tmp_path / "step", fill_with("x"))
    assert files.verify_folder(tmp_path / "step") == []
    (tmp_path / "step" / "resume").chmod(0o300)
    monkeypatch.chdir(tmp_path)  # pytest's folders above may be closed to others
    tmp_path.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            files.verify_folder("step")
        except PermissionError as problem:
            status = 0 if problem.filename.endswith("resume") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ---- folders from elsewhere, folders that are shared


@pytest.fixture
def outside(tmp_path) -> Path:
    """A file that a link may lead to; after the test it is as it was."""
    file = tmp_path / "outside"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine"


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path, outside):
    for name, target in (("to a file", outside), ("dangling", tmp_path / "nowhere"), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(target)
        files.write_json_atomically(tmp_path / name, {"ours": 1})
        assert json.loads((tmp_path / name).read_text()) == {"ours": 1} and not (tmp_path / name).is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_nobody_can_foresee_where_a_file_is_written(tmp_path, outside, monkeypatch):
    """In a shared folder another user may have put links under names that a scratch file could have."""
    for name in ("a.tmp-", f"a.tmp-{os.getpid()}"):
        (tmp_path / name).symlink_to(outside)
    assert files.scratch_name(tmp_path / "a") != files.scratch_name(tmp_path / "a")
    files.write_json_atomically(tmp_path / "a", 1)

    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "01234567")  # and if somebody could
    guessed = files.scratch_name(tmp_path / "a")
    for write in (
        lambda: files.write_json_atomically(tmp_path / "a", 2),
        lambda: files.write_folder(tmp_path / "a", fill_with("x")),
    ):
        guessed.symlink_to(outside)
        with pytest.raises(UserError, match="exists"):
            write()
        guessed.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
@pytest.mark.parametrize("opened", [RunLock, metrics.MetricsLog], ids=["lock", "metrics.jsonl"])
def test_a_run_writes_on_its_own_files_alone(tmp_path, outside, kind, opened):
    path = tmp_path / "run" / ("lock" if opened is RunLock else "metrics.jsonl")
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)  # waits for a reader, or fills one
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(UserError, match=path.name):
        opened(path.parent if opened is RunLock else path)
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "lock").write_text("my notes about locks")
    with pytest.raises(UserError, match="was not written by a run"):
        RunLock(tmp_path)
    assert (tmp_path / "lock").read_text() == "my notes about locks"


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A curve drawn by root to /dev/null would take its place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        files.write_json_atomically(tmp_path / "pipe", 1)
    assert (tmp_path / "pipe").is_fifo()


def test_discarding_a_link_leaves_what_it_leads_to(tmp_path, outside):
    (tmp_path / "folder").mkdir()
    for target in (outside, tmp_path / "folder"):
        (tmp_path / "link").symlink_to(target)
        files.discard(tmp_path / "link")
        assert target.exists() and not (tmp_path / "link").is_symlink()


def test_a_folder_is_verified_in_parts_that_together_are_all_of_it(saved):
    folder = saved / "step-00000030"
    for path in folder.rglob("*"):
        if path.is_file() and path.name != files.MANIFEST:
            data = path.read_bytes()
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    all_of_it = files.verify_folder(folder)
    in_parts = [files.verify_folder(folder, part, 3) for part in range(3)]
    assert len(all_of_it) > 1
    assert sorted(problem for part in in_parts for problem in part) == sorted(all_of_it)
    assert max(map(len, in_parts)) < len(all_of_it)
    assert files.verify_folder(folder, parts=None) == []  # sizes and names are as they were
    (folder / "manifest.json").unlink()
    assert files.verify_folder(folder, parts=None) != []


def test_what_is_described_already_is_not_read_again(tmp_path, monkeypatch):
    """A file of another rank, which has hashed it; the rest is hashed here."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "mine").write_bytes(b"mine")
    (scratch / "theirs").write_bytes(b"theirs")
    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda file: read.append(file.name) or sha256(file))
    entry = {"size": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
    files.complete(scratch, tmp_path / "step", {"theirs": entry})
    assert read == ["mine"] and files.verify_folder(tmp_path / "step") == [] and not scratch.exists()


@pytest.mark.parametrize("comes", [True, False])
def test_a_described_file_that_is_not_to_be_seen_yet_is_waited_for(tmp_path, monkeypatch, comes):
    """Before, it was left out of the manifest, so that a checkpoint without it seemed to be whole."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "mine").write_bytes(b"mine")
    monkeypatch.setattr(files, "wait_for", partial(files.wait_for, seconds=10.0 if comes else 0.2))
    timer = threading.Timer(0.5, (scratch / "theirs").write_bytes, [b"theirs"])
    described = {"theirs": {"size": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}}
    if comes:
        timer.start()
        files.complete(scratch, tmp_path / "step", described)
        manifest = json.loads((tmp_path / "step" / files.MANIFEST).read_text())
        assert list(manifest["files"]) == ["mine", "theirs"] and files.verify_folder(tmp_path / "step") == []
    else:
        with pytest.raises(UserError, match=r"theirs: was made by another process, and is not to be seen on"):
            files.complete(scratch, tmp_path / "step", described)
        assert not (tmp_path / "step").exists()
