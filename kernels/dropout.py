"""Counter-based dropout: ``reference.keep_mask`` in Triton, element by element, so that no mask is stored.

    key   = mix(mix(row ^ seed's low half) ^ seed's high half) + mix(column ^ salt)         modulo 2³²
    kept  = (the two multiplications of mix, of key), read as signed, >= dropout·2³² - 2³¹

Row and column keys are mixed once for a tile's sides; an element costs a sum, two multiplications and two shifts.
Source: the mixer lowbias32 (C. Wellons, hash-prospector, public domain).
"""

import triton
import triton.language as tl
from tli_kernels import reference
from torch import Tensor

_MIX_1, _MIX_2, _COLUMN_SALT = (tl.constexpr(getattr(reference, name)) for name in ("_MIX_1", "_MIX_2", "_COLUMN_SALT"))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def row_keys(offs_m, seed_ptr):
    # of the rows of x; the seed is in them
    seed = tl.load(seed_ptr)
    return _mix(_mix(offs_m.to(tl.uint32) ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))


@triton.jit
def column_keys(offs_k):
    # of the columns of x
    return _mix(offs_k.to(tl.uint32) ^ _COLUMN_SALT)


@triton.jit
def keep(keys, threshold):
    # whether an element survives, from its row's key plus its column's
    x = (keys ^ (keys >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x.to(tl.int32, bitcast=True) >= threshold


def parameters(dropout: float, seed: Tensor | None) -> tuple[Tensor | None, int]:
    """A kernel's arguments: the seed's tensor, and the least signed number that is kept."""
    return (seed, int(dropout * 2.0**32) - (1 << 31)) if dropout > 0 else (None, 0)
