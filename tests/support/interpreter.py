"""Triton's interpreter, mended for bf16 so that kernels can be tested in the dtype that they are used in.

Up to triton 3.7 it keeps bf16 as 16-bit integers: ``tl.dot`` multiplies the bit patterns, and casts round a half up without
carrying (triton-lang/triton issue 11584, which its maintainers closed as not supported). On a GPU nothing of this applies.
"""

import numpy as np
import torch


def mend_bfloat16() -> None:
    """Give the interpreter bf16 products in fp32 and casts that round to nearest even."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, kind):
        old, new = source.dtype.scalar, kind.scalar
        if new == tl.bfloat16 and old != tl.bfloat16:
            return handle(_rounded(source.data), new)
        if old == tl.bfloat16 and new != tl.bfloat16:
            return cast(self, handle(_widened(source.data), tl.float32), kind)
        return cast(self, source, kind)

    def create_dot(self, a, b, *rest):
        a, b = (handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    # the other casts go through cast_impl
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = lambda self, source, kind, rounding: cast_impl(self, source, kind)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    single = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return single.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
