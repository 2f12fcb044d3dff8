"""Corrections to Triton's interpreter, which computes with the bit patterns of bfloat16 as if they were integers.

Found in triton 3.6 and 3.8: `tl.dot` multiplies the patterns, casts to bf16 truncate, and arithmetic on bf16 values
is silently wrong. Here products and casts are right, and arithmetic on bf16 raises: kernels widen after loading.
And triton 3.6 uses an array of one number as an int, which numpy refuses since 2.4. `launch` applies these corrections
if TRITON_INTERPRET=1.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot
_binary_op = interpreter.InterpreterBuilder.binary_op
_patch_lang_tensor = interpreter._patch_lang_tensor


def widen(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns of bfloat16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 → uint16 patterns of bfloat16, to nearest, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def convert_float(data, source, target, rounding_mode):
    if source == tl.bfloat16 and target == tl.float32:
        return widen(data)
    if source == tl.float32 and target == tl.bfloat16:
        return narrow(data)
    if source == tl.float32 and target == tl.float16:
        with np.errstate(over="ignore"):
            return data.astype(np.float16)  # to nearest, as the hardware does
    return _convert_float(data, source, target, rounding_mode)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar == tl.bfloat16:
        a = interpreter.TensorHandle(widen(a.data), tl.float32)
        b = interpreter.TensorHandle(widen(b.data), tl.float32)
    return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def binary_op(self, lhs, rhs, op):
    assert tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar), "arithmetic on bf16: widen it after loading"
    return _binary_op(self, lhs, rhs, op)


def patch_lang_tensor(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def correct() -> None:
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.binary_op = binary_op
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.get_bf16 = lambda self, value: interpreter.TensorHandle(
        narrow(np.array([value], dtype=np.float32)), tl.bfloat16
    )
