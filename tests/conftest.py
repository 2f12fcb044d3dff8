"""Without a GPU kernels run on the CPU through Triton's interpreter, which must be asked for before it is imported."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # of `pytest -n`: one process a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """torch.compile forgets what earlier tests compiled: it looks through their guards, and fails where they differ."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
