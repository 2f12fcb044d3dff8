"""Where modules are missing that only Linux or Unix has: all that can work does, and what cannot says so in a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = ("triton", "fcntl", "resource")  # macOS has no triton, Windows none of them
IMPORT_ALL = """
import importlib, pkgutil
import data, minillm
names = [m.name for package in (minillm, data) for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
names += ["train_pretrain", "train_sft", "train_reward", "train_dpo", "train_ppo", "train_grpo"]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


@pytest.fixture
def without(tmp_path):
    """Runs Python where the modules of MISSING cannot be imported."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env)

    return run


def test_all_but_the_kernels_can_be_imported(without):
    done = without("-c", IMPORT_ALL)
    assert done.returncode == 0 and int(done.stdout) > 150, done.stderr


@pytest.mark.parametrize(
    "words", [("-m", "kernels.bench", "--check"), ("-m", "kernels.tune", "rms_norm"), ("docs/course/blocks.py",)]
)
def test_what_needs_kernels_says_so_in_a_line(without, words):
    done = without(*words)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "kernels need triton, which is for Linux: no triton here" in done.stderr
