"""tanh for all kernels with a soft cap, cap · tanh(x / cap), since Triton has none.

With the hardware's exponential, tanh x = 1 − 2 / (exp(2 x) + 1), which stays right on overflow. Its absolute error is
10⁻⁷, so 3 · 10⁻⁶ in a score at a cap of 30: enough for 16-bit numbers, whose rounding is a hundred times larger. In
fp32, numbers below 0.6 take five terms of Lambert's continued fraction, x / (1 + x² / (3 + x² / (5 + x² / (7 + x² /
9)))), with an error of 10⁻⁹; others take tanh |x| = (1 − e) / (1 + e), e = exp(−2 |x|).
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh of x in fp32; EXACT: with a relative error of a few 10⁻⁷ everywhere."""
    if EXACT:
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        far = (1.0 - e) / (1.0 + e)
        square = x * x
        near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
        t = tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))
    else:
        t = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return t
