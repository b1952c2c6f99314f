"""loss = mean_i max(0, margin - u_i·v_i + max_{j allowed, j ≠ i} u_i·v_j), and its gradients to u and v.

    forward    each block of u·vᵀ gives the largest allowed cosine of its rows and the first column that has it; the first of the largest
               over all blocks is h_i, the hardest negative of row i, if row i adds to the loss; else h_i = -1
    backward   du_i = (v_{h_i} - v_i)/B where h_i ≥ 0,  dv_j = (Σ_{i: h_i = j} u_i - [h_j ≥ 0]·u_j)/B

Among equally hard negatives the first counts. False negatives are -inf before any maximum. Never in memory: the cosines; the forward
holds a maximum and a column for each row of a block (8·B²/64 bytes at most), the backward nothing: the program of some columns finds
them in h and sums their rows by a matmul with zeros and ones, so there are no atomics, and each sum has one order.
Saved: source, target and h [B]. Cosines have an error of about 2⁻²¹ (cosines.py), and so have the rows that are summed.

Source: TLI (arXiv 2506.15415).

Letters: B batch (pairs), D width, E edges (false negatives); u source, v target; m rows and n columns of u·vᵀ.
"""

import torch
import triton
import triton.language as tl
from tli_kernels import launch
from tli_kernels.cosines import UNIT_SCALE, check, load_parts, operands, scaled_cosines, swizzled
from torch import Tensor
from torch.autograd.function import once_differentiable

_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["edges", "B", "row_blocks", "column_blocks"])
def _hardest_kernel(
    source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, own_ptr, largest_ptr, hardest_ptr, B, D, row_blocks, column_blocks,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Each program computes the largest allowed cosine of each row of a block and the first column that has it
    row_block, column_block = swizzled(tl.program_id(0), row_blocks, column_blocks, GROUP)
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    s = scaled_cosines(
        source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, offs_m, offs_n, 1.0, B, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip
    diagonal = offs_m[:, None] == offs_n[None, :]
    first = column_block * BLOCK_N
    own = tl.sum(tl.where(diagonal, s, 0.0), axis=1)
    tl.store(own_ptr + offs_m, own, mask=(offs_m >= first) & (offs_m < first + BLOCK_N) & (offs_m < B))
    s = tl.where(diagonal, float("-inf"), s)
    largest, hardest = tl.max(s, axis=1, return_indices=True, return_indices_tie_break_left=True)
    places = column_block.to(tl.int64) * B + offs_m
    tl.store(largest_ptr + places, largest, mask=offs_m < B)
    tl.store(hardest_ptr + places, first + hardest, mask=offs_m < B)


@triton.jit(do_not_specialize=["parts", "B"])
def _excess_kernel(
    own_ptr, largest_ptr, hardest_ptr, chosen_ptr, sums_ptr, margin, parts, B, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    # Each program computes the hardest negatives of a block of rows from those of each block of columns, and their share of the mean
    pid = tl.program_id(0).to(tl.int64)
    offs_b = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    largest = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    hardest = tl.full((BLOCK_B,), _NO_COLUMN, tl.int32)
    for first in range(0, parts, BLOCK_P):
        offs_p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < parts)[:, None] & mask_b[None, :]
        places = offs_p[:, None] * B + offs_b[None, :]
        part_largest = tl.load(largest_ptr + places, mask=mask, other=float("-inf"))
        part_hardest = tl.load(hardest_ptr + places, mask=mask, other=_NO_COLUMN)
        new = tl.maximum(largest, tl.max(part_largest, axis=0))
        found = tl.min(tl.where(part_largest == new[None, :], part_hardest, _NO_COLUMN), axis=0)
        # earlier parts have the earlier columns
        hardest = tl.where(largest == new, hardest, found)
        largest = new
    excess = margin - tl.load(own_ptr + offs_b, mask=mask_b, other=0.0) + largest
    tl.store(chosen_ptr + offs_b, tl.where(excess > 0.0, hardest, -1), mask=mask_b)
    # tl.maximum would hide NaN
    loss = tl.where(mask_b, tl.where(excess <= 0.0, 0.0, excess), 0.0)
    tl.store(sums_ptr + pid, tl.sum(loss, axis=0) / B)


@triton.jit(do_not_specialize=["B"])
def _gradients_kernel(
    source_ptr, target_ptr, chosen_ptr, dloss_ptr, dsource_ptr, dtarget_ptr, B, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Each program computes a block of du and of dv, for the same pairs
    first = tl.program_id(1) * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = (offs_d < D)[None, :]
    scale = tl.load(dloss_ptr).to(tl.float32) / B
    gathered = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, B, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        columns = tl.load(chosen_ptr + offs_k, mask=offs_k < B, other=-1)
        # in a large batch most blocks of rows chose none of these columns
        if tl.max(((columns >= first) & (columns < first + BLOCK_M)).to(tl.int32), axis=0) > 0:
            u_ptrs = source_ptr + offs_k.to(tl.int64)[:, None] * D + offs_d[None, :]
            u_hi, u_lo = load_parts(u_ptrs, 0, (offs_k < B)[:, None] & mask_d, PRECISION)
            chose = (columns[None, :] == offs_m[:, None]).to(u_hi.dtype)
            if PRECISION == "fp32":
                gathered += tl.dot(chose, u_hi, input_precision="ieee")
            else:
                gathered += tl.dot(chose, u_hi, tl.dot(chose, u_lo))
    column = tl.load(chosen_ptr + offs_m, mask=offs_m < B, other=-1)
    active = (column >= 0)[:, None]
    places = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    v = tl.load(target_ptr + places, mask=active & mask_d, other=0.0).to(tl.float32)
    h = tl.load(target_ptr + column.to(tl.int64)[:, None] * D + offs_d[None, :], mask=active & mask_d, other=0.0).to(tl.float32)
    u = tl.load(source_ptr + places, mask=active & mask_d, other=0.0).to(tl.float32)
    mask = (offs_m < B)[:, None] & mask_d
    tl.store(dsource_ptr + places, ((h - v) * scale).to(dsource_ptr.dtype.element_ty), mask=mask)
    tl.store(dtarget_ptr + places, ((gathered / UNIT_SCALE - u) * scale).to(dtarget_ptr.dtype.element_ty), mask=mask)


def _forward(source: Tensor, target: Tensor, margin: float, false_negatives: Tensor) -> tuple[Tensor, Tensor]:
    pairs, width = source.shape
    config = launch.contrast(launch.capability(source.device), pairs)
    row_blocks, column_blocks = triton.cdiv(pairs, config.cosines["M"]), triton.cdiv(pairs, config.cosines["N"])
    own, chosen = source.new_empty(pairs, dtype=torch.float32), source.new_empty(pairs, dtype=torch.int32)
    largest, hardest = own.new_empty(column_blocks, pairs), chosen.new_empty(column_blocks, pairs)
    launch.run(
        _hardest_kernel, (row_blocks * column_blocks,), *operands(source, target, config), false_negatives, len(false_negatives),
        own, largest, hardest, pairs, width, row_blocks, column_blocks, GROUP=8, PRECISION=config.precision, **config.cosines.options(),
    )  # fmt: skip
    # one program for a batch of common size: no sum over programs
    block, warps = (1024, 8) if pairs <= 1024 else (128, 4)
    sums = own.new_empty(triton.cdiv(pairs, block))
    launch.run(
        _excess_kernel, (len(sums),), own, largest, hardest, chosen, sums, margin, column_blocks, pairs,
        BLOCK_B=block, BLOCK_P=4, num_warps=warps,
    )  # fmt: skip
    return (sums[0] if len(sums) == 1 else sums.sum()), chosen


def _backward(dloss: Tensor, source: Tensor, target: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    pairs, width = source.shape
    dsource, dtarget = torch.empty_like(source), torch.empty_like(target)
    precision, blocks = launch.gather(launch.capability(source.device))
    grid = (triton.cdiv(width, blocks["N"]), triton.cdiv(pairs, blocks["M"]))
    launch.run(
        _gradients_kernel, grid, source, target, chosen, dloss, dsource, dtarget, pairs, width, PRECISION=precision, **blocks.options()
    )
    return dsource, dtarget


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, target, margin, false_negatives):
        source, target = source.contiguous(), target.contiguous()
        loss, chosen = _forward(source, target, margin, false_negatives.contiguous())
        ctx.save_for_backward(source, target, chosen)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *_backward(dloss, *ctx.saved_tensors), None, None


def hinge(source: Tensor, target: Tensor, margin: float, false_negatives: Tensor) -> Tensor:
    """mean_i max(0, margin - u_i·v_i + max_{j allowed, j ≠ i} u_i·v_j): the hardest negative, source to target, streaming.

    Args:
        source:           fp32, bf16 or fp16 [B, D] unit rows
        target:           fp32, bf16 or fp16 [B, D] unit rows; row i belongs to source row i
        margin:           the paper's 0.4
        false_negatives:  int64 [E, 2] ordered (i, j), i ≠ j, sorted by i; checked on a CPU only, as reading the values
                          would synchronise with a GPU

    Returns:
        fp32 scalar; a row without any negative adds 0. Gradients to source and target in their own dtypes; among equally hard
        negatives to the first. Cosines have an error of about 2⁻²¹, sums are fp32, results are equal bit for bit between runs. NaN, or a
        number above 255, in the unit rows gives NaN. Source: TLI (arXiv 2506.15415).
    """
    check("hinge", source, target, false_negatives)
    return _Hinge.apply(source, target, float(margin), false_negatives)
