"""Compile what a GPU would be given, without a GPU: `python tests/kernels/offline.py ARCH [WORD]`.

Every host function of the kernels is called with tensors of the meta device, and each launch it makes is compiled
for the asked architecture by Triton's own path, arguments specialized as they would be. For each a line of JSON:
what it was, its registers, spilled bytes, shared memory, and what the code uses. Needs Triton without its interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.shared import launch
from tests.kernels import shipped

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """What Triton asks of a driver in order to compile, and no more."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (spills) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", result.stdout)
    assert usage, result.stdout + result.stderr
    return {"registers": int(usage[1]), "stack": int(usage[2])}


def warnings(ptx: str, architecture: int) -> list[str]:
    """ptxas's warnings that matrix products were serialized or register hints ignored (C7508 to C7517)."""
    tool = TOOLS / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        command = [tool, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "kernel.cubin"]
        result = subprocess.run(command, capture_output=True, text=True)
    return sorted(set(re.findall(r"C75(?:0[89]|1[0-7])", result.stderr)))


def has_large_products(asm: dict) -> bool:
    """Whether there is a product of 16-bit matrices with at least the 64 rows that wgmma computes at a time.

    Gluon's products are wgmma or nothing, and have no form from before Triton chose.
    """
    products = re.findall(r"tt\.dot .*?: tensor<(\d+)x\d+xb?f16>", asm.get("ttir", ""))
    gluon = "ttir" not in asm and "warp_group_dot " in asm["ttgir"]
    return gluon or any(int(rows) >= 64 for rows in products)


def unfenced_products(ptx: str) -> int:
    """How many asynchronous products stand behind a wait for `cp.async` with no proxy fence in between.

    Where tiles come by descriptors (`cp.async.bulk`) none needs it: what `cp.async` copies there is no tile.
    """
    copied = False
    n_unfenced = 0
    for line in ptx.splitlines():
        if "fence.proxy.async" in line:
            copied = False
        elif "cp.async.wait_group" in line:
            copied = True
        elif copied and re.search(r"wgmma\.mma_async|tcgen05\.mma", line):
            n_unfenced += 1
    return 0 if "cp.async.bulk.tensor" in ptx else n_unfenced


def main(architecture: int, word: str = "") -> None:
    driver.set_active(Driver(architecture))
    launch.architecture = lambda device: architecture
    launch.multiprocessors = lambda device: 132
    seen = set()
    for name, call in shipped.calls(architecture):
        if word not in name:
            continue
        launches = []
        launch.run = lambda kernel, grid, *a, launches=launches, **k: launches.append((kernel, grid, a, k))
        call()
        for kernel, grid, arguments, options in launches:
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            ptx = compiled.asm["ptx"]
            row = {
                "call": name,
                "kernel": kernel.fn.__name__,
                **resources(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "large_products": has_large_products(compiled.asm),
                "wgmma": "wgmma.mma_async" in ptx,
                "tma": "cp.async.bulk.tensor" in ptx,
                "unfenced": unfenced_products(ptx),
                "warnings": warnings(ptx, architecture) if "wgmma" in ptx else [],
                "options": {k: v for k, v in options.items() if isinstance(v, int)},
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
