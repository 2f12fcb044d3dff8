"""Block sizes of attention's kernels: one small table, read off the compiled code of each architecture.

A row is head size, padded to a power of two → (BLOCK_M queries, BLOCK_N keys, warps, stages). What decides:

- Nothing may spill: a block's accumulators, (BLOCK_M or BLOCK_N) × D fp32, take D / (2 · warps / (rows / 16))
  registers a thread, of 255, and the backward kernel for keys has two of them.
- Hopper multiplies 64 rows with four warps (wgmma), so 128 rows take eight. At head sizes 64 and 128 its forward blocks
  were the best of those measured on an H100 with an earlier, throw-away version, and so were the queries' backward; the
  others are unmeasured, and the kernels of today have not run on a GPU yet.
- What threads fetch by addresses of their own ("ampere": sm_80, and tensors that the copy engine cannot read) takes
  registers for the addresses, so its blocks are smaller at 128; so are those of kernels with a window, documents or a
  soft cap ("more").
- Stages are what shared memory holds: 163 KB a block on sm_80, 227 on sm_90 and sm_100, 99 on sm_86, sm_89, sm_120.
- fp32 is multiplied without tensor cores, from registers.
"""

import torch

from kernels.shared import launch

Row = tuple[int, int, int, int]
TABLES: dict[str, dict[str, dict[int, Row]]] = {
    "forward": {
        "hopper": {
            16: (128, 128, 8, 3), 32: (128, 128, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2),
        },
        "blackwell": {64: (128, 128, 8, 2)},
        "ampere": {128: (128, 32, 8, 3)},
        "small": {
            16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1),
        },
        "fp32": {16: (64, 32, 8, 1), 32: (64, 32, 8, 1), 64: (64, 32, 8, 1), 128: (32, 16, 4, 1), 256: (16, 16, 8, 1)},
    },
    "keys": {  # backward: walks over queries for a block of keys
        "hopper": {
            16: (64, 128, 8, 2), 32: (64, 128, 8, 2), 64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2),
        },
        "hopper more": {128: (32, 128, 8, 2)},
        "blackwell": {64: (64, 128, 4, 2), 256: (32, 64, 4, 2)},
        "ampere": {16: (64, 64, 4, 2), 128: (32, 64, 8, 2)},
        "small": {
            16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 8, 2), 128: (32, 64, 8, 1), 256: (16, 32, 4, 1),
        },
        "fp32": dict.fromkeys((16, 32, 64, 128, 256), (16, 16, 8, 1)),
    },
    "queries": {  # backward: walks over keys for a block of queries
        "hopper": {
            16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2),
        },
        "ampere": {128: (64, 32, 8, 2)},
        "small": {
            16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (64, 64, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1),
        },
        "fp32": dict.fromkeys((16, 32, 64, 128, 256), (16, 16, 8, 1)),
    },
}  # fmt: skip


def attention_settings(
    kernel: str, head_size: int, dtype: torch.dtype, device: torch.device, *, tma: bool, more: bool
) -> dict:
    """Settings of a kernel, "forward", "keys" or "queries".

    tma: the copy engine fetches the tiles. more: there is a window, documents or a soft cap.
    """
    if launch.INTERPRETED:
        return dict(launch.settings(f"attention_{kernel}", (), device, {"BLOCK_M": 64, "BLOCK_N": 64}))
    width = max(16, launch.next_power_of_2(head_size))
    tables = TABLES[kernel]

    # In which tables to look, one after the other.
    if dtype == torch.float32:
        names = ["fp32"]
    elif launch.shared_memory(device) < 128 << 10:
        names = ["small"]
    else:
        own = "blackwell"
        if not tma:
            own = "ampere"
        elif launch.architecture(device) == 90:
            own = "hopper"
        names = [f"{own} more", own, "hopper"] if more else [own, "hopper"]
    row = next(tables[name][width] for name in names if width in tables.get(name, ()))
    default = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), row, strict=True))
    return launch.settings(f"attention_{kernel}", (width, dtype, tma, more), device, default)
