"""Blocks of u·vᵀ to nearly fp32 precision on tensor cores, false negatives at -inf: the building block of infonce and hinge.

A matmul of fp32 matrices is three fp16 matmuls, on tensor cores of every generation. Each number x·2⁸ is split into hi + lo in fp16, and
hi·hi + hi·lo + lo·hi has an error of about 2⁻²¹·|x|·|y|. Tensor cores truncate their running sums instead of rounding them, so each step
of the depth starts from zero and is added in fp32, rounded. For unit rows: |x| > 255 overflows to NaN, never to a wrong number.
Where Triton has no tensor cores (capability 7.5) the matmuls are plain fp32.

Source: Ootomo and Yokota 2022 (arXiv 2203.03341) for split products and for sums outside of the tensor cores.

Letters: B batch (pairs), D width, E edges (false negatives); u source, v target; m rows and n columns of u·vᵀ.
"""

import torch
import triton
import triton.language as tl
from tli_kernels import checks, launch
from torch import Tensor

# a power of two that keeps the low parts of unit rows out of fp16's subnormal range
UNIT_SCALE = tl.constexpr(2.0**8)


@triton.jit
def split_hi_lo(x):
    # fp32 as hi + lo in fp16
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def load_parts(x_ptrs, lower, mask, PRECISION: tl.constexpr):
    # x·2⁸ in the parts that are multiplied; "hi_lo" parts lie ready in padded memory, the low ones ``lower`` further on
    if PRECISION == "hi_lo":
        hi, lo = tl.load(x_ptrs), tl.load(x_ptrs + lower)
    else:
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) * UNIT_SCALE
        if PRECISION == "split":
            hi, lo = split_hi_lo(x)
        else:
            hi, lo = x, x
    return hi, lo


@triton.jit
def add_product(acc, x_hi, x_lo, y_hi, y_lo, PRECISION: tl.constexpr):
    # acc + x·y, the new part summed from zero
    if PRECISION == "fp32":
        part = tl.dot(x_hi, y_hi, input_precision="ieee")
    else:
        part = tl.dot(x_lo, y_hi)
        part = tl.dot(x_hi, y_lo, part)
        part = tl.dot(x_hi, y_hi, part)
    return acc + part


@triton.jit
def forbidden_range(false_negatives_ptr, edges, rows):
    # Where each row's false negatives begin and end, by binary search in the sorted first column of [E, 2]
    begin = tl.zeros_like(rows).to(tl.int64)
    end = begin
    size = edges
    while size > 0:
        step = (size + 1) // 2
        begin = tl.where(tl.load(false_negatives_ptr + 2 * (begin + step - 1)) < rows, begin + step, begin)
        end = tl.where(tl.load(false_negatives_ptr + 2 * (end + step - 1)) <= rows, end + step, end)
        size = size // 2
    return begin, end


@triton.jit
def scaled_cosines(
    source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, offs_m, offs_n, scale, B, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # u·vᵀ·scale for some rows and columns; -inf for false negatives and out of range
    mask_m, mask_n = offs_m < B, offs_n < B
    offs_d = tl.arange(0, BLOCK_K)
    u_ptrs = source_ptr + offs_m.to(tl.int64)[:, None] * stride + offs_d[None, :]
    v_ptrs = target_ptr + offs_n.to(tl.int64)[None, :] * stride + offs_d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_K):
        mask_d = offs_d < D - d
        u_hi, u_lo = load_parts(u_ptrs + d, lower, mask_m[:, None] & mask_d[None, :], PRECISION)
        v_hi, v_lo = load_parts(v_ptrs + d, lower, mask_n[None, :] & mask_d[:, None], PRECISION)
        acc = add_product(acc, u_hi, u_lo, v_hi, v_lo, PRECISION)
    s = tl.where(mask_m[:, None] & mask_n[None, :], acc * (scale / (UNIT_SCALE * UNIT_SCALE)), float("-inf"))
    begin, end = forbidden_range(false_negatives_ptr, edges, offs_m)
    first, last = tl.min(offs_n, axis=0), tl.max(offs_n, axis=0)
    for k in range(0, tl.max(end - begin, axis=0).to(tl.int32)):
        column = tl.load(false_negatives_ptr + 2 * (begin + k) + 1, mask=begin + k < end, other=-1).to(tl.int32)
        # most blocks of a large batch contain no false negative
        if tl.max(((column >= first) & (column <= last)).to(tl.int32), axis=0) > 0:
            s = tl.where(column[:, None] == offs_n[None, :], float("-inf"), s)
    return s


@triton.jit
def swizzled(pid, row_blocks, column_blocks, GROUP: tl.constexpr):
    # Which block a program computes: programs that run together share few rows and columns, which stay in the L2 cache
    first = pid // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = pid % (GROUP * column_blocks)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["B"])
def _split_hi_lo_kernel(x_ptr, hi_lo_ptr, B, D, stride, lower, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    # Each program computes the two fp16 parts of a block of x·2⁸, zeros outside x
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_m[:, None] * D + offs_d[None, :]
    hi, lo = load_parts(x_ptrs, 0, (offs_m < B)[:, None] & (offs_d < D)[None, :], "split")
    hi_lo_ptrs = hi_lo_ptr + offs_m[:, None] * stride + offs_d[None, :]
    tl.store(hi_lo_ptrs, hi, mask=(offs_d < stride)[None, :])
    tl.store(hi_lo_ptrs + lower, lo, mask=(offs_d < stride)[None, :])


def operands(source: Tensor, target: Tensor, config: launch.Contrast) -> tuple[Tensor, Tensor, int, int]:
    """What the kernels read: source and target or their fp16 parts, the stride of a row and the distance to the low parts."""
    pairs, width = source.shape
    if config.precision != "hi_lo":
        return source, target, width, 0
    # padded, so that no block reaches beyond them
    rows, stride = config.padded(pairs), config.padded(width)
    hi_lo = source.new_empty(2, 2, rows, stride, dtype=torch.float16)
    grid = (rows // 16, triton.cdiv(stride, 256))
    for x, parts in zip((source, target), hi_lo):
        launch.run(_split_hi_lo_kernel, grid, x, parts, pairs, width, stride, rows * stride, BLOCK_M=16, BLOCK_D=256, num_warps=4)
    return hi_lo[0], hi_lo[1], stride, rows * stride


def check(where: str, source: Tensor, target: Tensor, false_negatives: Tensor, *others: Tensor) -> None:
    """Check the arguments of infonce and hinge."""
    checks.require_device(where, source, target, false_negatives, *others)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    must = "source and target must be float32, bfloat16 or float16"
    checks.require({source.dtype, target.dtype} <= set(kinds), where, must, lambda: f"{source.dtype} and {target.dtype}", "convert them")
    fit = source.ndim == 2 and source.shape == target.shape and 0 not in source.shape
    must = "source and target must be [B, D] of one shape, B and D at least 1"
    checks.require(fit, where, must, lambda: f"{tuple(source.shape)} and {tuple(target.shape)}", "pass one row for each word of a pair")
    edges = false_negatives.dtype == torch.int64 and false_negatives.ndim == 2 and false_negatives.shape[1] == 2
    checks.require(
        edges,
        where,
        "false_negatives must be int64 [E, 2]",
        lambda: f"{false_negatives.dtype} {tuple(false_negatives.shape)}",
        "pass ordered (i, j)",
    )
    # on a GPU reading the values would synchronise
    if false_negatives.device.type == "cpu" and len(false_negatives) > 0:
        i, j = false_negatives.unbind(1)
        sound = false_negatives.min() >= 0 and false_negatives.max() < len(source) and (i != j).all() and (i.diff() >= 0).all()
        must = "false_negatives must hold (i, j) of two pairs of the batch, sorted by i"
        checks.require(bool(sound), where, must, lambda: false_negatives.tolist()[:8], "sort it and leave out what is not of the batch")
