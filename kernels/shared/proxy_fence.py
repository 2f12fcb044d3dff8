"""A fence that Triton before 3.7.1 leaves out on Hopper, between copies in the background and products that read them.

Hopper's tensor cores read shared memory by what PTX calls the async proxy. `cp.async`, by which a pipelined load
through pointers gets there, writes by the generic proxy; what is written by one is seen by the other after
`fence.proxy.async` (PTX ISA, "Async proxy"). Without it a product may read what stood there before: seldom, as
pytorch#181248 met it on a B200. Triton puts it there since 3.7.1 (triton#9610), and leaves to descriptors and to stores
from registers what they always had.
"""

import re

import triton
import triton.language as tl

LEFT_OUT_BY_TRITON = [int(n) for n in re.findall(r"\d+", triton.__version__)[:3]] < [3, 7, 1]
LEFT_OUT = tl.constexpr(LEFT_OUT_BY_TRITON and not triton.knobs.runtime.interpret)


@triton.jit
def fence_copies(WGMMA: tl.constexpr):
    """To be called between a load through pointers and the product that reads it, if that is wgmma on Hopper.

    WGMMA: whether the product can be one, which takes 16-bit operands, the first with 64 rows or more. Others read by
    the generic proxy, and a fence would only cost them registers. The pipeline waits where the load stood, and what
    has a side effect stays behind that.
    """
    if LEFT_OUT and WGMMA:  # noqa: SIM102 (known when compiled: without it nothing below is looked at)
        if tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
            tl.inline_asm_elementwise(
                "fence.proxy.async.shared::cta;\n\tmov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
