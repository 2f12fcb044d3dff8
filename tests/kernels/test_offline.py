"""What is shipped compiles for the GPUs people have, without spills, within their shared memory, by wgmma on sm_90.

Nothing here needs a GPU: `offline.py` compiles in processes of its own, outside the interpreter.
"""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

from kernels.shared import launch, proxy_fence
from tests.kernels import offline

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)
# Bytes of stack that are known to be needed, by call or kernel: fp32 has no tensor cores, and wide heads take all
# registers; of the Hopper backward's few bytes see its file.
SPILLS = {"attention float32 256 backward": 176, "attention float32 128 backward": 8, "backward_sm90": 40}
SPILLS |= {"attention float32 64 backward": 8, "attention float32 128": 8}
LEAST = 0
if triton.__version__.startswith("3.6."):  # some more there: once a program, and not in a loop
    SPILLS |= {"attention float32 256 backward": 200, "attention float32 128 backward": 16, "attention float32 128": 40}
    SPILLS |= {"attention causal 128": 24}  # on sm_100
    SPILLS, LEAST = SPILLS | {"_product": 72}, 8
elif not triton.__version__.startswith("3.8."):  # block sizes were not chosen with it: all compiles and fits
    SPILLS, LEAST = {}, 256
FOLDER = Path(__file__).parent


@functools.cache
def compiled() -> dict[int, list[dict]]:
    """Every kernel of every architecture: compiled once, two processes at a time."""

    def one(architecture: int) -> list[dict]:
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, FOLDER / "offline.py", str(architecture)]
        told = subprocess.run(command, capture_output=True, text=True, env=outside | {"OMP_NUM_THREADS": "1"})
        assert told.returncode == 0, told.stderr[-3000:]
        return [json.loads(line) for line in told.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(one, ARCHITECTURES), strict=True))


def name(kernel: dict) -> str:
    return f"{kernel['call']}: {kernel['kernel']} {kernel['options']}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_everything_fits(architecture):
    kernels = compiled()[architecture]
    assert len(kernels) > 20
    limit = launch.SHARED_MEMORY[architecture]
    assert {name(k): k["shared"] for k in kernels if k["shared"] > limit} == {}
    known = {name(k): SPILLS.get(k["call"], SPILLS.get(k["kernel"], LEAST)) for k in kernels}
    assert {name(k): k["stack"] for k in kernels if k["stack"] > known[name(k)]} == {}


def test_products_behind_unfenced_copies_are_counted():
    copy, fence, product = "cp.async.wait_group 1;\n", "fence.proxy.async.shared::cta;\n", "wgmma.mma_async.sync …;\n"
    assert offline.unfenced_products(copy + fence + product) == 0
    assert offline.unfenced_products(copy + product + product) == 2
    assert offline.unfenced_products(fence + copy + product + fence + product) == 1
    assert offline.unfenced_products(copy + "tcgen05.mma.cta_group::1 …;\n") == 1
    assert offline.unfenced_products("cp.async.bulk.tensor.2d …;\n" + copy + product) == 0


@pytest.mark.slow
# `minillm.ops` takes no kernels on datacenter Blackwell with a Triton that leaves out the fence
@pytest.mark.parametrize("architecture", [90] if proxy_fence.LEFT_OUT_BY_TRITON else [90, 100, 103])
def test_copies_are_fenced_from_the_products_that_read_them(architecture):
    assert {name(k): k["unfenced"] for k in compiled()[architecture] if k["unfenced"]} == {}


@pytest.mark.slow
def test_matrix_kernels_use_wgmma_on_hopper_and_none_is_serialized():
    kernels = compiled()[90]
    matrix = [k for k in kernels if k["large_products"]]
    assert matrix
    assert [name(k) for k in matrix if not k["wgmma"]] == []
    # C7517, from Triton 3.6: one more wait before a product's registers are read, where it was to be anyway
    assert [name(k) for k in kernels if set(k["warnings"]) - {"C7517"}] == []
