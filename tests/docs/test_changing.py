"""Every change on the page "How to change it" applies to the project as it is, and its command runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.test_adding_an_option import copy_of_the_project

PAGE = launch.ROOT / "docs" / "en" / "changing.md"
CHANGES = {}  # heading → (diff, command)
for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
    found = re.search(r"```diff\n(.*?)```.*?```\n(.*?)\n```", section, re.DOTALL)
    if found:
        CHANGES[section.partition("\n")[0]] = found.groups()
SCRIPT = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]

# what makes a command of the page small: its script → options
SMALL_RUN = "--batch_size 8 --seq_len 64 --eval_every 0 --device cpu --dtype float32 --steps 2"
SMALL = {
    "train_pretrain.py": f"{launch.SMALL} --steps 2 --data bins",
    "train_sft.py": f"{SMALL_RUN} --init_from base",
    "train_dpo.py": f"{SMALL_RUN} --init_from base --data pairs.jsonl",
    "minillm": "--tokenizer bins",
    "tests/kernels/test_relu2.py": "",
}
ROWS = [{"instruction": f"Where is Tom {i}?", "output": f"In house {i}."} for i in range(40)]
TALKS = [{"dialog": [f"Where is Tom {i}?", "In the house.", "And Ann?", "On the hill."]} for i in range(40)]
PAIRS = [{"prompt": f"Where is Tom {i}?", "chosen": "In the house.", "rejected": "The old cat."} for i in range(40)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    how = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return subprocess.run([sys.executable, "-P", *command], **how)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with token bins, rows, and a base model of two steps."""
    folder = tmp_path_factory.mktemp("start")
    launch.write_corpus(folder / "bins")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "talks.jsonl", TALKS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    script = launch.ROOT / "train_pretrain.py"
    env = {**os.environ, "PYTHONPATH": str(launch.ROOT), "OMP_NUM_THREADS": "1"}
    options = f"{launch.SMALL} --steps 2 --max_seq_len 64 --data bins --out base".split()
    subprocess.run([sys.executable, script, *options], cwd=folder, env=env, check=True, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_applies_and_its_command_runs(name, start, tmp_path):
    diff, command = CHANGES[name]
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    copy_of_the_project(tmp_path, [])
    for file in ("tests/__init__.py", "tests/kernels/__init__.py", "tests/kernels/check.py", "tests/conftest.py"):
        if (launch.ROOT / file).exists():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(launch.ROOT / file, tmp_path / file)
    (tmp_path / "change.diff").write_text(diff, encoding="utf-8")
    subprocess.run(["git", "apply", "change.diff"], cwd=tmp_path, check=True)

    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    if words[0] == "pytest":
        words = ["-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", *words[1:]]
    else:
        words = words[1:]  # without "python"
    script = next(word for word in words if word in SMALL)
    words += SMALL[script].split()
    if script == "train_sft.py" and "--data" not in words:
        words += ["--data", "rows.jsonl"]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"step 2/2|tokens, |1 passed", done.stdout), done.stdout


@pytest.mark.slow
def test_a_script_of_ones_own_goes_on_as_if_it_had_not_stopped(tmp_path):
    usual = 'out="out/mine", steps=200, '
    assert usual in SCRIPT
    small = 'out=sys.argv[1], steps=int(sys.argv[2]), seq_len=32, batch_size=4, schedule="constant", device="cpu", '
    (tmp_path / "mine.py").write_text(SCRIPT.replace(usual, small), encoding="utf-8")
    for out, n_steps in (("straight", 4), ("stopped", 2), ("stopped", 4)):
        command = [sys.executable, "mine.py", out, str(n_steps)]
        env = {**os.environ, "PYTHONPATH": str(launch.ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "weights from stopped/step-00000002" in done.stdout
    assert launch.tensors(tmp_path / "stopped", 4) == launch.tensors(tmp_path / "straight", 4)
    assert launch.losses(tmp_path / "stopped") == launch.losses(tmp_path / "straight")

    other = (tmp_path / "mine.py").read_text(encoding="utf-8").replace("100_000", "90_000")
    (tmp_path / "mine.py").write_text(other, encoding="utf-8")
    command[-1] = "6"
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "was made with another data" in done.stderr
