"""tanh for all kernels with a soft cap, cap · tanh(x / cap), since Triton has none.

By the hardware's exponential, tanh x = 1 − 2 / (exp(2 x) + 1), which no overflow makes wrong. It is off by 10⁻⁷ of 1,
not of tanh x: by 3 · 10⁻⁶ in every score at a cap of 30. Where numbers of 16 bits are rounded a hundredfold more, that
is enough. In fp32, numbers below 0.6 take five terms of Lambert's continued fraction,
x / (1 + x² / (3 + x² / (5 + x² / (7 + x² / 9)))), off by 10⁻⁹; others tanh |x| = (1 − e) / (1 + e), e = exp(−2 |x|).
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
