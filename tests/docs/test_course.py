"""Every lesson of the course runs, its exercises can be solved, and are not solved yet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

MOST_BYTES = 60_000  # of a picture
ROOT = Path(__file__).parents[2]
COURSE = ROOT / "docs" / "course"
LESSONS = sorted(path.stem for path in (COURSE / "checks").glob("*.py") if path.stem != "conftest")
every_lesson = pytest.mark.parametrize("lesson", LESSONS)


def run(*command: str) -> subprocess.CompletedProcess:
    """A command in the repository's folder, as a reader gives it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_a_lesson_has_all_its_parts():
    for folder in (COURSE, COURSE / "exercises", COURSE / "solutions"):
        assert {path.stem for path in folder.glob("*.py")} - {"lesson", "drawings"} == set(LESSONS)
    for language in ("en", "zh"):
        pages = ROOT / "docs" / language / "course"
        names = sorted(path.stem for path in pages.glob("[0-9]*.md"))
        assert {re.sub(r"^\d+-", "", name) for name in names} == set(LESSONS)
        assert re.findall(r"\((\d[\w-]+)\.md\)", (pages / "index.md").read_text(encoding="utf-8")) == names
        suffix = "-zh" if language == "zh" else ""
        for name in names:  # a picture made by docs/course/drawings.py
            picture = f"](../../images/course/{name[3:]}{suffix}.png)\n"
            assert (pages / f"{name}.md").read_text(encoding="utf-8").count(picture) == 1, name


@pytest.mark.slow
@every_lesson
def test_the_experiment_runs(lesson):
    done = run(f"docs/course/{lesson}.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d", done.stdout)  # it prints a score


@pytest.mark.slow
def test_the_exercises_are_solved_by_the_solutions_alone():
    """All lessons in one process, as one who does `pytest docs/course/checks/*.py` has them."""
    check = ("-m", "pytest", "-p", "no:cacheprovider", *(f"docs/course/checks/{lesson}.py" for lesson in LESSONS))
    solved = run(*check, "--solutions")
    assert solved.returncode == 0, solved.stdout
    given = run(*check)
    assert given.returncode == 1 and "passed" not in given.stdout.splitlines()[-1], given.stdout
    failed = set(re.findall(r"^FAILED docs/course/checks/(\w+)\.py", given.stdout, re.MULTILINE))
    assert failed == set(LESSONS), given.stdout


@pytest.mark.slow
def test_every_picture_is_drawn_again_from_the_page_as_it_is(tmp_path):
    """The pictures that the pages show are those that the command draws now: from the same numbers, in small files."""
    done = run("docs/course/drawings.py", "--out", str(tmp_path))
    if "no Chinese font is there" in done.stderr:
        pytest.skip("no Chinese font, and half of the pictures are in Chinese")
    assert done.returncode == 0, done.stderr
    shown = ROOT / "docs" / "images" / "course"
    names = {f"{lesson}{suffix}.png" for lesson in LESSONS for suffix in ("", "-zh")}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shown.iterdir()} == names
    for name in sorted(names):
        old, new = shown / name, tmp_path / name
        assert max(old.stat().st_size, new.stat().st_size) < MOST_BYTES, name
        with Image.open(old) as one, Image.open(new) as other:
            assert one.text["state"] == other.text["state"], f"{name}: run python docs/course/drawings.py"
            assert one.size == other.size and len(other.convert("L").getcolors()) > 10, name


@pytest.mark.slow
def test_an_experiment_whose_reader_has_gone_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has read enough
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "docs/course/policy.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
