"""W = code[q] · scale: dequantise an NF4 weight, as a kernel and as functions for other kernels.

    W_nk = code[q_nk] · scale_b,  b = (n·K + k) // 64
    scale_b = absmax_b                                                      one level of scales, fp32
    scale_b = nested_code[absmax_b] · nested_absmax_{b // 256} + offset     nested: absmax_b is an 8-bit number

Everything is computed in fp32, each step rounded as in bitsandbytes (enable_fp_fusion=False at launch: a product and a sum must not be
fused), and rounded once to the output's dtype. One pass: each element reads 0.5 bytes of codes and 4/64 (nested: 1/64) of scales, and is
written; never in memory: fp32 scales of a nested weight, W in fp32.
Source: QLoRA (arXiv 2305.14314), bitsandbytes. The packed weight itself is in nf4_weight.py.

Letters: N out-features, K in-features, q 4-bit numbers, S scales (one for each block b of 64 elements).
"""

import torch
import triton
import triton.language as tl
from tli_kernels import checks, launch
from tli_kernels.nf4_weight import BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight
from torch import Tensor

_BLOCKSIZE, _NESTED_BLOCKSIZE = tl.constexpr(BLOCKSIZE), tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def decode(nibbles, code_ptr):
    # code[q] in fp32 for a tile of int32 numbers from 0 to 15, by a gather from a copy of the table in shared memory. In a pipelined
    # loop a load from the table would become one asynchronous copy of 4 bytes per element, and selects take twice the instructions.
    # The copy is made and waited for in each call: interleave first, then decode once.
    table = tl.load(code_ptr + tl.arange(0, 16))
    return tl.gather(table, tl.reshape(nibbles, (nibbles.numel,)), 0).reshape(nibbles.shape)


@triton.jit
def block_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, NESTED: tl.constexpr):
    # scale_b in fp32 for a tile of int64 block numbers; where the mask is off, any number
    scales = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if NESTED:
        units = tl.load(nested_absmax_ptr + blocks // _NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scales = tl.load(nested_code_ptr + scales.to(tl.int32)) * units + tl.load(offset_ptr)
    return scales


@triton.jit
def _dequantise_kernel(
    codes_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, w_ptr, blocks,
    NESTED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program computes the elements of BLOCK_S consecutive blocks, across rows of W
    HALF: tl.constexpr = _BLOCKSIZE // 2
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < blocks
    packed = tl.load(codes_ptr + offs_s[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=mask_s[:, None], other=0).to(tl.int32)
    scales = block_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, offs_s, mask_s, NESTED)
    w = decode(tl.interleave(packed >> 4, packed & 15), code_ptr) * scales[:, None]  # [BLOCK_S, 64]
    w_ptrs = w_ptr + offs_s[:, None] * _BLOCKSIZE + tl.arange(0, _BLOCKSIZE)[None, :]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=mask_s[:, None])


def dequantise(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W = code[q] · scale, dequantised in one pass.

    Args:
        weight:  the packed weight [N, K]
        dtype:   bf16, fp16 or fp32
        out:     [N, K] contiguous, of this dtype and on the weight's device, to write to; or None

    Returns:
        [N, K] in ``dtype``: out, if given. Without gradients. Bit for bit what bitsandbytes gives on a CPU in each of the three dtypes,
        except for bf16 results below 2⁻¹²⁶: they are rounded like all others; bitsandbytes flushes them to zero on some CPUs.
    """
    checks.require_device("dequantise", weight.codes, out)
    floats = (torch.bfloat16, torch.float16, torch.float32)
    checks.require(dtype in floats, "dequantise", f"dtype must be one of {', '.join(map(str, floats))}", lambda: dtype, "choose one")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    fits = out.shape == weight.shape and out.dtype == dtype and out.is_contiguous()
    must = f"out must be contiguous {list(weight.shape)} of {dtype}"
    checks.require(fits, "dequantise", must, lambda: f"{list(out.shape)} of {out.dtype}, strides {out.stride()}", "pass another or none")
    blocks, config = weight.absmax.numel(), launch.dequantise()
    grid = (launch.tiles((blocks, config["S"])),)
    launch.run(_dequantise_kernel, grid, *weight.pointers, out, blocks, NESTED=weight.nested, **config.options(), enable_fp_fusion=False)
    return out
