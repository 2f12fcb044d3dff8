"""`pytest docs/course/checks/bigram.py` looks at docs/course/exercises/bigram.py; `--solutions` at our own answers."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # for lesson 14, before another lesson's check imports triton
COURSE = Path(__file__).parents[1]
sys.path.insert(0, str(COURSE))  # where the experiments find what they share


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--solutions", action="store_true", help="check the solutions in place of your answers")


def load(path: Path) -> ModuleType:
    """A file of the course as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest) -> ModuleType:
    """What was filled in: the file in exercises/ that has the name of the check."""
    folder = "solutions" if request.config.getoption("--solutions") else "exercises"
    return load(COURSE / folder / request.path.name)


@pytest.fixture(scope="module")
def experiment(request: pytest.FixtureRequest) -> ModuleType:
    """The script of the lesson."""
    return load(COURSE / request.path.name)


@pytest.fixture(scope="session")
def small_corpus() -> Path:
    """The corpus of `--quick`."""
    import lesson

    return Path(lesson.corpus(quick=True))
