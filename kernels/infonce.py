"""loss = 1/(2B) Σ_i [ log Σ_j exp(s_ij) + log Σ_j exp(s_ji) - 2·s_ii ],  s = u·vᵀ/τ, and its gradients to u, v and τ.

    forward    each block of s gives the maxima of its rows and columns and their sums of exp(s - maximum), without the diagonal;
               from those of all blocks and s_ii: the maximum m_i, the logarithm l_i of Σ_j exp(s_ij - m_i), and m'_j, l'_j of column j
    backward   w_ij = exp(s_ij - m_i - l_i) + exp(s_ij - m'_j - l'_j) - 2·[i = j]
               du = w·v / (2Bτ),  dv = wᵀ·u / (2Bτ),  dτ = -Σ_i u_i·du_i / τ

False negatives are -inf in s before any maximum, in both directions. Never in memory: s, its exponentials and B×B gradients. The forward
holds two numbers for each row and column of a block, of 4,096 columns at a time; the backward recomputes s and holds w for squares of
4,096 pairs at a time: never more than 64 MiB for any B. Saved: source, target, and s_ii, m, l, m' and l' of each pair [5, B].

The diagonal logit is added to the sums in the last step, and maxima and logarithms are kept apart: otherwise the small loss of a well
separated pair would be lost in 1 + small, and a logarithm in a large maximum. Cosines, w·v and wᵀ·u have an error of about 2⁻²¹
(cosines.py); all sums are fp32 and have one order: the same bits each time.

Source: van den Oord et al. 2018 (arXiv 1807.03748), symmetric as in CLIP (arXiv 2103.00020); log-sum-exp by parts: Milakov and
Gimelshein 2018 (arXiv 1805.02867).

Letters: B batch (pairs), D width, E edges (false negatives); u source, v target, w weights; m rows and n columns of s.
"""

import torch
import triton
import triton.language as tl
from tli_kernels import checks, launch
from tli_kernels.cosines import UNIT_SCALE, add_product, check, load_parts, operands, scaled_cosines, split_hi_lo, swizzled
from torch import Tensor
from torch.autograd.function import once_differentiable

# weights are at most 2: scaled to fp16's largest range, so that few of their low parts are subnormal
_WEIGHT_SCALE = tl.constexpr(2.0**14)


@triton.jit
def _number(x, LOADED: tl.constexpr):
    # A number, or the value of a tensor of one element
    if LOADED:
        x = tl.load(x).to(tl.float32)
    return x


@triton.jit
def _store_sums(ptrs, s, lower, mask, AXIS: tl.constexpr):
    # Maxima and sums of exp(s - maximum) along an axis; if all are -inf the sum is 0, not NaN
    maximum = tl.max(s, axis=AXIS)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(ptrs, maximum, mask=mask)
    tl.store(ptrs + lower, tl.sum(tl.exp(s - tl.expand_dims(finite, AXIS)), axis=AXIS), mask=mask)


@triton.jit(do_not_specialize=["edges", "column", "size", "B", "row_blocks", "column_blocks"])
def _statistics_kernel(
    source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, temperature, own_ptr, rows_ptr, columns_ptr,
    column, size, B, D, row_blocks, column_blocks,
    LOADED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Each program computes the maxima and sums of the rows and columns of a block of s, of the ``size`` columns from ``column`` on
    row_block, column_block = swizzled(tl.program_id(0), row_blocks, column_blocks, GROUP)
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = column + at_n
    s = scaled_cosines(
        source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, offs_m, offs_n, 1.0 / _number(temperature, LOADED), B, D,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    diagonal = offs_m[:, None] == offs_n[None, :]
    first = column + column_block * BLOCK_N
    own = tl.sum(tl.where(diagonal, s, 0.0), axis=1)
    tl.store(own_ptr + offs_m, own, mask=(offs_m >= first) & (offs_m < first + BLOCK_N) & (offs_m < B))
    s = tl.where(diagonal, float("-inf"), s)
    row_ptrs = rows_ptr + column_block.to(tl.int64) * B + offs_m
    _store_sums(row_ptrs, s, column_blocks.to(tl.int64) * B, offs_m < B, 1)
    column_ptrs = columns_ptr + row_block.to(tl.int64) * size + at_n
    _store_sums(column_ptrs, s, row_blocks.to(tl.int64) * size, at_n < size, 0)


@triton.jit
def _combined(parts_ptr, parts, offs_b, size, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    # The maxima and sums of some rows (or columns) of s from those of its blocks: [2, parts, size]
    maximum = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        offs_p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < parts)[:, None] & (offs_b < size)[None, :]
        ptrs = parts_ptr + offs_p[:, None] * size + offs_b[None, :]
        maxima = tl.load(ptrs, mask=mask, other=float("-inf"))
        totals = tl.load(ptrs + parts.to(tl.int64) * size, mask=mask, other=0.0)
        new = tl.maximum(maximum, tl.max(maxima, axis=0))
        finite = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(maximum - finite) + tl.sum(totals * tl.exp(maxima - finite[None, :]), axis=0)
        maximum = new
    return maximum, total


@triton.jit(do_not_specialize=["parts", "size", "lower"])
def _merge_kernel(parts_ptr, merged_ptr, parts, size, lower, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    # Each program computes the maxima and sums of a block of rows (or columns) from those of their parts
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    maximum, total = _combined(parts_ptr, parts, offs_b, size, BLOCK_B, BLOCK_P)
    tl.store(merged_ptr + offs_b, maximum, mask=offs_b < size)
    tl.store(merged_ptr + lower + offs_b, total, mask=offs_b < size)


@triton.jit
def _with_own(maximum, total, own):
    # The maximum m and log Σ_j exp(s_ij - m) of a row (or column), with the diagonal logit added
    gap = maximum - own
    less = tl.exp(-tl.abs(gap))
    rest = tl.where(gap > 0.0, total - 1.0 + less, total * less)
    # log1p(rest), corrected for the rounding of 1 + rest
    whole = 1.0 + rest
    kept = tl.where(whole == 1.0, 1.0, whole - 1.0)
    return tl.maximum(maximum, own), tl.where(whole == 1.0, rest, tl.log(whole) * (rest / kept))


@triton.jit(do_not_specialize=["row_parts", "column_parts", "B"])
def _losses_kernel(
    statistics_ptr, rows_ptr, columns_ptr, sums_ptr, row_parts, column_parts, B, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    # Each program computes the maxima and logarithms of a block of pairs, both ways, and these pairs' part of the loss
    pid = tl.program_id(0).to(tl.int64)
    offs_b = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    ptrs = statistics_ptr + offs_b
    own = tl.load(ptrs, mask=mask_b, other=0.0)
    maximum, total = _combined(rows_ptr, row_parts, offs_b, B, BLOCK_B, BLOCK_P)
    row_maximum, row_log = _with_own(maximum, total, own)
    maximum, total = _combined(columns_ptr, column_parts, offs_b, B, BLOCK_B, BLOCK_P)
    column_maximum, column_log = _with_own(maximum, total, own)
    tl.store(ptrs + B, row_maximum, mask=mask_b)
    tl.store(ptrs + B * 2, row_log, mask=mask_b)
    tl.store(ptrs + B * 3, column_maximum, mask=mask_b)
    tl.store(ptrs + B * 4, column_log, mask=mask_b)
    loss = (row_maximum - own) + row_log + (column_maximum - own) + column_log
    tl.store(sums_ptr + pid, tl.sum(tl.where(mask_b, loss, 0.0), axis=0) / (2.0 * B))


@triton.jit
def _lack(loss):
    # 1 - exp(-loss), one minus the pair's probability: by series where the difference would be all rounding
    series = loss * (1.0 - loss / 2.0 * (1.0 - loss / 3.0 * (1.0 - loss / 4.0 * (1.0 - loss / 5.0))))
    return tl.where(loss < 0.125, series, 1.0 - tl.exp(-loss))


@triton.jit(do_not_specialize=["edges", "row", "column", "B"])
def _weights_kernel(
    source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, temperature, statistics_ptr, weights_ptr, row, column, B, D, side,
    LOADED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Each program computes a block of the square of weights w [side, side] from (row, column) on
    at_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_n = row + at_m, column + at_n
    mask_m, mask_n = offs_m < B, offs_n < B
    s = scaled_cosines(
        source_ptr, target_ptr, stride, lower, false_negatives_ptr, edges, offs_m, offs_n, 1.0 / _number(temperature, LOADED), B, D,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    ptrs_m, ptrs_n = statistics_ptr + offs_m, statistics_ptr + offs_n
    maximum_m = tl.load(ptrs_m + B, mask=mask_m, other=0.0)
    log_m = tl.load(ptrs_m + B * 2, mask=mask_m, other=0.0)
    maximum_n = tl.load(ptrs_n + B * 3, mask=mask_n, other=0.0)
    log_n = tl.load(ptrs_n + B * 4, mask=mask_n, other=0.0)
    w = tl.exp(s - maximum_m[:, None] - log_m[:, None]) + tl.exp(s - maximum_n[None, :] - log_n[None, :])
    own = tl.load(ptrs_m, mask=mask_m, other=0.0)
    column_loss = tl.load(ptrs_m + B * 3, mask=mask_m, other=0.0) - own + tl.load(ptrs_m + B * 4, mask=mask_m, other=0.0)
    own_w = -_lack(maximum_m - own + log_m) - _lack(column_loss)
    w = tl.where(offs_m[:, None] == offs_n[None, :], own_w[:, None], w) * _WEIGHT_SCALE
    # a square has fewer than 2³¹ weights
    w_ptrs = weights_ptr + at_m[:, None] * side + at_n[None, :]
    if PRECISION == "fp32":
        tl.store(w_ptrs, w)
    else:
        w_hi, w_lo = split_hi_lo(w)
        tl.store(w_ptrs, w_hi)
        tl.store(w_ptrs + side * side, w_lo)


@triton.jit
def _add_gradient(
    weights_ptr, stride_m, stride_k, x_ptr, stride, lower, dx_ptr, scale, row, column, B, D, side,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # dx[row + m] (+)= scale·Σ_k w[m, k]·x[column + k] for a block of m and D, and what was added
    at_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.minimum(side, B - column), BLOCK_K):
        at_k = k + tl.arange(0, BLOCK_K)
        w_ptrs = weights_ptr + at_m[:, None] * stride_m + at_k[None, :] * stride_k
        w_hi = tl.load(w_ptrs)
        if PRECISION == "fp32":
            w_lo = w_hi
        else:
            w_lo = tl.load(w_ptrs + side * side)
        offs_k = column + at_k
        x_ptrs = x_ptr + offs_k.to(tl.int64)[:, None] * stride + offs_d[None, :]
        x_hi, x_lo = load_parts(x_ptrs, lower, (offs_k < B)[:, None] & mask_d[None, :], PRECISION)
        acc = add_product(acc, w_hi, w_lo, x_hi, x_lo, PRECISION)
    offs_m = row + at_m
    mask = (offs_m < B)[:, None] & mask_d[None, :]
    dx_ptrs = dx_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    added = acc * scale
    dx = added
    if column > 0:
        dx += tl.load(dx_ptrs, mask=mask, other=0.0)
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return added


@triton.jit(do_not_specialize=["row", "column", "B"])
def _gradients_kernel(
    source_ptr, target_ptr, stride, lower, temperature, dloss_ptr, weights_ptr, dsource_ptr, dtarget_ptr, dtemperature_ptr,
    row, column, B, D, side,
    LOADED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Each program computes what the square of weights from (row, column) on adds to a block of du and to dτ, or to a block of dv
    tau = _number(temperature, LOADED)
    scale = tl.load(dloss_ptr) / (2.0 * B * tau) / (_WEIGHT_SCALE * UNIT_SCALE)
    if tl.program_id(2) == 1:
        _add_gradient(
            weights_ptr, 1, side, source_ptr, stride, lower, dtarget_ptr, scale, column, row, B, D, side,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        du = _add_gradient(
            weights_ptr, side, 1, target_ptr, stride, lower, dsource_ptr, scale, row, column, B, D, side,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        if dtemperature_ptr is not None:
            offs_m = row + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            u_ptrs = source_ptr + offs_m.to(tl.int64)[:, None] * stride + offs_d[None, :]
            u, u_lo = load_parts(u_ptrs, lower, (offs_m < B)[:, None] & (offs_d < D)[None, :], PRECISION)
            if PRECISION != "fp32":
                u = u.to(tl.float32) + u_lo.to(tl.float32)
            share = tl.sum(u * du) / (-UNIT_SCALE * tau)
            tl.store(dtemperature_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), share)


def _forward(source: Tensor, target: Tensor, temperature: float | Tensor, false_negatives: Tensor) -> tuple[Tensor, Tensor]:
    pairs, width = source.shape
    config = launch.contrast(launch.capability(source.device), pairs)
    side, row_parts = min(config.side, pairs), triton.cdiv(pairs, config.cosines["M"])
    strips = triton.cdiv(pairs, side)
    statistics = source.new_empty(5, pairs, dtype=torch.float32)
    rows = statistics.new_empty(2, triton.cdiv(side, config.cosines["N"]), pairs)
    columns = statistics.new_empty(2, row_parts, side)
    all_rows, all_columns = (statistics.new_empty(2, parts, pairs) if strips > 1 else None for parts in (strips, 1))
    arguments = operands(source, target, config)
    for strip in range(strips):
        column, size = strip * side, min(side, pairs - strip * side)
        column_parts = triton.cdiv(size, config.cosines["N"])
        launch.run(
            _statistics_kernel, (row_parts * column_parts,), *arguments, false_negatives, len(false_negatives), temperature,
            statistics, rows, columns, column, size, pairs, width, row_parts, column_parts,
            LOADED=isinstance(temperature, Tensor), GROUP=8, PRECISION=config.precision,
            **config.cosines.options(),
        )  # fmt: skip
        if strips > 1:
            merging = {"BLOCK_B": 128, "BLOCK_P": 8, "num_warps": 4}
            merged_rows, merged_columns = all_rows[0, strip], all_columns[0, 0, column:]
            launch.run(_merge_kernel, (triton.cdiv(pairs, 128),), rows, merged_rows, column_parts, pairs, strips * pairs, **merging)
            launch.run(_merge_kernel, (triton.cdiv(size, 128),), columns, merged_columns, row_parts, size, pairs, **merging)
    if strips > 1:
        rows, columns, column_parts, row_parts = all_rows, all_columns, strips, 1
    # one program for a batch of common size: no sum over programs
    block, warps = (1024, 8) if pairs <= 1024 else (128, 4)
    sums = statistics.new_empty(triton.cdiv(pairs, block))
    launch.run(
        _losses_kernel, (len(sums),), statistics, rows, columns, sums, column_parts, row_parts, pairs,
        BLOCK_B=block, BLOCK_P=4, num_warps=warps,
    )  # fmt: skip
    return (sums[0] if len(sums) == 1 else sums.sum()), statistics


def _backward(
    dloss: Tensor, source: Tensor, target: Tensor, temperature: float | Tensor, false_negatives: Tensor, statistics: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    pairs, width = source.shape
    config = launch.contrast(launch.capability(source.device), pairs)
    side = min(config.side, config.padded(pairs))
    squares = range(0, pairs, side)
    loaded, whole = isinstance(temperature, Tensor), config.precision == "fp32"
    weights = source.new_empty(1 if whole else 2, side, side, dtype=torch.float32 if whole else torch.float16)
    # the sum over several squares is in fp32
    gradients = [x.new_empty(x.shape, dtype=x.dtype if len(squares) == 1 else torch.float32) for x in (source, target)]
    weights_grid = (side // config.cosines["M"], side // config.cosines["N"])
    grid = (triton.cdiv(width, config.gradients["N"]), side // config.gradients["M"], 2)
    dtemperature = statistics.new_empty(len(squares), len(squares), *grid[:2]) if learns else None
    arguments = operands(source, target, config)
    for i, row in enumerate(squares):
        for j, column in enumerate(squares):
            launch.run(
                _weights_kernel, weights_grid, *arguments, false_negatives, len(false_negatives), temperature, statistics, weights,
                row, column, pairs, width, side, LOADED=loaded, PRECISION=config.precision, **config.cosines.options(),
            )  # fmt: skip
            launch.run(
                _gradients_kernel, grid, *arguments, temperature, dloss, weights, *gradients, dtemperature[i, j] if learns else None,
                row, column, pairs, width, side, LOADED=loaded, PRECISION=config.precision, **config.gradients.options(),
            )  # fmt: skip
    dsource, dtarget = (gradient.to(x.dtype) for gradient, x in zip(gradients, (source, target)))
    return dsource, dtarget, dtemperature.sum() if learns else None


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, target, temperature, false_negatives):
        source, target, false_negatives = source.contiguous(), target.contiguous(), false_negatives.contiguous()
        loss, statistics = _forward(source, target, temperature, false_negatives)
        learned = isinstance(temperature, Tensor)
        ctx.save_for_backward(source, target, false_negatives, statistics, temperature if learned else None)
        ctx.temperature = None if learned else temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        source, target, false_negatives, statistics, temperature = ctx.saved_tensors
        learns = ctx.needs_input_grad[2]
        tau = ctx.temperature if temperature is None else temperature
        dsource, dtarget, dtemperature = _backward(dloss, source, target, tau, false_negatives, statistics, learns)
        return dsource, dtarget, dtemperature.to(temperature.dtype).view(temperature.shape) if learns else None, None


def infonce(source: Tensor, target: Tensor, temperature: float | Tensor, false_negatives: Tensor) -> Tensor:
    """½ Σ over both directions of mean_i [ log Σ_{j allowed} exp(u_i·v_j / τ) - u_i·v_i / τ ], streaming.

    Args:
        source:           fp32, bf16 or fp16 [B, D] unit rows
        target:           fp32, bf16 or fp16 [B, D] unit rows; row i belongs to source row i
        temperature:      τ, a number or a tensor of one element
        false_negatives:  int64 [E, 2] ordered (i, j), i ≠ j, sorted by i; checked on a CPU only, as reading the values
                          would synchronise with a GPU

    Returns:
        fp32 scalar; gradients to source, target and a tensor temperature in their own dtypes. Cosines have an error of about
        2⁻²¹, sums are fp32, results are equal bit for bit between runs. NaN, or a number above 255, in the unit rows gives NaN.
        Source: van den Oord et al. 2018 (arXiv 1807.03748).
    """
    learned = isinstance(temperature, Tensor)
    check("infonce", source, target, false_negatives, *([temperature] if learned else []))
    one = not learned or temperature.numel() == 1
    checks.require(one, "infonce", "temperature must be one number", lambda: tuple(temperature.shape), "pass a tensor of one element")
    return _InfoNCE.apply(source, target, temperature if learned else float(temperature), false_negatives)
