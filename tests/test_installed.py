"""minillm as `pip install .` brings it, without what lies beside, where a user has a data.py of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch

IMPORT_ALL = """
import importlib, pkgutil, minillm, kernels
for package in (minillm, kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        print(module.name)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """(where the packages are, a user's folder)"""
    installed, users = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("users")
    for package in ("minillm", "kernels"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(launch.ROOT / package, installed / package, ignore=left_out)
    (users / "data.py").write_text("raise SystemExit('this is the data.py of a user')\n", encoding="utf-8")
    return installed, users


def run(folders: tuple[Path, Path], *command: str) -> subprocess.CompletedProcess:
    installed, users = folders
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    how = dict(cwd=users, env=env, capture_output=True, text=True, timeout=300)
    return subprocess.run([sys.executable, *command], **how)


def test_every_module_can_be_imported(folders):
    done = run(folders, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert {"minillm.training.run", "minillm.commands.chat", "kernels.attention.forward"} <= set(done.stdout.split())


@pytest.mark.parametrize("words", ["--help", "chat --help", "eval --help", "bench --help"])
def test_commands_tell_their_options(words, folders):
    done = run(folders, "-m", "minillm", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m minillm")
