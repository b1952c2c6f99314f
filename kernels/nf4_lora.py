"""y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias, W in NF4 or in 16 bits, and the gradients to x, A and B.

Forward and backward have the same structure, so four kernels serve both:

    down      t  = kept(x)·Aᵀ                          u  = dy·B
    product   y  = x·Wᵀ + s·t·Bᵀ + bias                dx = dy·W + s·kept(u·A)
    finish    the sum of the parts of a split product, and the low-rank term of a cuBLAS product
    outer     dA = s·uᵀ·kept(x)                        dB = s·dyᵀ·t

kept(x) is x with dropped elements set to zero, recomputed wherever it is needed as ``reference.keep_mask``'s function of (seed, row,
column); s includes 1/(1 - dropout). Never in memory: the mask, kept(x), W in fp32, and, with few rows, W in 16 bits. A weight takes one
of three paths, chosen by ``launch.dispatch``: NF4 decoded tile by tile inside the product; NF4 dequantised into a buffer that all layers
share; or 16 bits, if the caller holds it so. A ``TokenTable`` already contains x·Wᵀ. Saved: x, A, B, t (fp32) and W itself.
Products are in x's dtype with fp32 sums; t and u are fp32. A sum that is split over programs is added up in a fixed order: no atomics,
the same bits each time. Source: Hu et al. 2021 (arXiv 2106.09685), Dettmers et al. 2023 (arXiv 2305.14314).

Letters: M rows, K in-features, N out-features, R rank; in the kernels Q is the length of the sum and P that of the result: K and N
forward, N and K backward. Products are computed transposed, [P, M] = W·xᵀ, so that the long side feeds the tensor cores even if M is 16.
"""

import torch
import triton
import triton.language as tl
from tli_kernels import checks, launch, nf4
from tli_kernels.dropout import column_keys, keep, parameters, row_keys
from tli_kernels.nf4 import NF4Weight, block_scales, decode
from tli_kernels.token_table import TokenTable
from torch import Tensor
from torch.autograd.function import once_differentiable

# not specialised: they differ from call to call, or make no load wider
_CHANGING = ["M", "R", "parts", "threshold"]


@triton.jit
def _weight_tile(
    w_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, rows, first, mask_rows, K,
    NF4: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # W[rows, first : first + COLUMNS]; rows are int64, first is a multiple of 64
    if NF4:
        offs_byte = first // 2 + tl.arange(0, COLUMNS // 2)
        mask = mask_rows[:, None] & (offs_byte < K // 2)[None, :]
        packed = tl.load(w_ptr + rows[:, None] * (K // 2) + offs_byte[None, :], mask=mask, other=0).to(tl.int32)
        tile = decode(tl.interleave(packed >> 4, packed & 15), code_ptr)
        offs_block = first // 64 + tl.arange(0, COLUMNS // 64)
        mask = mask_rows[:, None] & (offs_block < K // 64)[None, :]
        blocks = rows[:, None] * (K // 64) + offs_block[None, :]
        scales = block_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, NESTED)
        tile = tl.reshape(tile, (ROWS, COLUMNS // 64, 64)) * scales[:, :, None]
        return tl.reshape(tile, (ROWS, COLUMNS)).to(DTYPE)
    offs_k = first + tl.arange(0, COLUMNS)
    mask = mask_rows[:, None] & (offs_k < K)[None, :]
    return tl.load(w_ptr + rows[:, None] * K + offs_k[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _low_rank_tile(
    low_ptr, f_ptr, bias_ptr, offs_p, offs_m, mask_p, mask_m, R, stride_fp, stride_fr, scale, seed_ptr, threshold,
    LOW_RANK: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # s·kept(F·lowᵀ) + bias: the initial value of a tile of y, so that one accumulator is enough
    tile = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    if LOW_RANK:
        for first in range(0, R, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask = (offs_r < R)[:, None] & mask_m[None, :]
            low = tl.load(low_ptr + offs_m[None, :] * R + offs_r[:, None], mask=mask, other=0.0)
            mask = mask_p[:, None] & (offs_r < R)[None, :]
            f = tl.load(f_ptr + offs_p[:, None] * stride_fp + offs_r[None, :] * stride_fr, mask=mask, other=0.0)
            tile = tl.dot(f.to(DTYPE), low.to(DTYPE), tile, input_precision="ieee")
        if DROPOUT:
            keys = column_keys(offs_p)[:, None] + row_keys(offs_m, seed_ptr)[None, :]
            tile = tl.where(keep(keys, threshold), tile, 0.0)
        tile *= scale
    if BIAS:
        tile += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[:, None]
    return tile


@triton.jit(do_not_specialize=_CHANGING)
def _down_kernel(
    x_ptr, f_ptr, low_ptr, M, Q, R, stride_xm, stride_fr, stride_fq, per_split, seed_ptr, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    # Each program computes one part of the sum of one tile of low: low[split, m, r] = sum over its q of kept(x)[m, q]·F[r, q]
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    if DROPOUT:
        keys = row_keys(offs_m, seed_ptr)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(tl.program_id(2) * per_split, min(Q, (tl.program_id(2) + 1) * per_split), BLOCK_Q):
        offs_q = first + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < Q
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_q[None, :], mask=mask_m[:, None] & mask_q[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep(keys[:, None] + column_keys(offs_q)[None, :], threshold), x, 0.0).to(x_ptr.dtype.element_ty)
        f_ptrs = f_ptr + offs_r[None, :].to(tl.int64) * stride_fr + offs_q[:, None].to(tl.int64) * stride_fq
        f = tl.load(f_ptrs, mask=mask_r[None, :] & mask_q[:, None], other=0.0)
        low = tl.dot(x, f.to(x_ptr.dtype.element_ty), low, input_precision="ieee")
    low_ptrs = low_ptr + (split * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(low_ptrs, low, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def _product_kernel(
    x_ptr, w_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, low_ptr, f_ptr, bias_ptr, y_ptr,
    M, P, Q, stride_xm, per_split, R, stride_fp, stride_fr, scale, seed_ptr, threshold,
    NF4: tl.constexpr, NESTED: tl.constexpr, BACKWARD: tl.constexpr, SPLIT: tl.constexpr, LOW_RANK: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Each program computes one tile of y, or with SPLIT one part of the sum of one tile: y[m, p] = sum over its q of x[m, q]·W[p, q];
    # BACKWARD, W is walked by its other side: y is dx, x is dy, and the sum runs over W's rows
    tiles_m, tiles_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)
    tile = tl.program_id(0)
    # GROUP columns of tiles at a time, so that neighbouring programs share the cache
    group = tile // (GROUP * tiles_m)
    width = min(tiles_p - group * GROUP, GROUP)
    tile_p = group * GROUP + tile % (GROUP * tiles_m) % width
    offs_m = (tile % (GROUP * tiles_m) // width).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = tile_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_m, mask_p = offs_m < M, offs_p < P
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    y = _low_rank_tile(
        low_ptr, f_ptr, bias_ptr, offs_p, offs_m, mask_p, mask_m, R, stride_fp, stride_fr, scale, seed_ptr, threshold,
        LOW_RANK, BIAS, DROPOUT, BLOCK_P, BLOCK_M, BLOCK_R, DTYPE,
    )  # fmt: skip
    for first in range(tl.program_id(1) * per_split, min(Q, (tl.program_id(1) + 1) * per_split), BLOCK_Q):
        offs_q = first + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < Q
        x = tl.load(x_ptr + offs_m[None, :] * stride_xm + offs_q[:, None], mask=mask_q[:, None] & mask_m[None, :], other=0.0)
        if BACKWARD:
            w = _weight_tile(
                w_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, offs_q.to(tl.int64), tile_p * BLOCK_P,
                mask_q, P, NF4, NESTED, BLOCK_Q, BLOCK_P, DTYPE,
            )  # fmt: skip
            w = tl.trans(w)
        else:
            w = _weight_tile(
                w_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, offs_p, first,
                mask_p, Q, NF4, NESTED, BLOCK_P, BLOCK_Q, DTYPE,
            )  # fmt: skip
        y = tl.dot(w, x, y, input_precision="ieee")
    mask = mask_p[:, None] & mask_m[None, :]
    if SPLIT:
        tl.store(y_ptr + (tl.program_id(1).to(tl.int64) * M + offs_m)[None, :] * P + offs_p[:, None], y, mask=mask)
    else:
        tl.store(y_ptr + offs_m[None, :] * P + offs_p[:, None], y.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def _finish_kernel(
    part_ptr, low_ptr, f_ptr, bias_ptr, y_ptr, M, P, parts, R, stride_fp, stride_fr, scale, seed_ptr, threshold,
    LOW_RANK: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Each program computes one tile of y: the sum of its parts, the low-rank term and the bias
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_p, mask_m = offs_p < P, offs_m < M
    mask = mask_p[:, None] & mask_m[None, :]
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    y = _low_rank_tile(
        low_ptr, f_ptr, bias_ptr, offs_p, offs_m, mask_p, mask_m, R, stride_fp, stride_fr, scale, seed_ptr, threshold,
        LOW_RANK, BIAS, DROPOUT, BLOCK_P, BLOCK_M, BLOCK_R, DTYPE,
    )  # fmt: skip
    for part in range(0, parts):
        y += tl.load(part_ptr + (part * M + offs_m)[None, :] * P + offs_p[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m[None, :] * P + offs_p[:, None], y.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=_CHANGING)
def _outer_kernel(
    low_ptr, x_ptr, grad_ptr, M, C, R, stride_xm, stride_gs, stride_gc, stride_gr, per_split, scale,
    seed_ptr, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Each program computes one part of the sum of one tile of a factor's gradient: s·sum over its m of kept(x)[m, c]·low[m, r]
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_c, mask_r = offs_c < C, offs_r < R
    keys = column_keys(offs_c)
    grad = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in range(tl.program_id(2) * per_split, min(M, (tl.program_id(2) + 1) * per_split), BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        x = tl.load(x_ptr + offs_m[None, :] * stride_xm + offs_c[:, None], mask=mask_c[:, None] & mask_m[None, :], other=0.0)
        if DROPOUT:
            kept = keep(keys[:, None] + row_keys(offs_m, seed_ptr)[None, :], threshold)
            x = tl.where(kept, x, 0.0).to(x_ptr.dtype.element_ty)
        low = tl.load(low_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        grad = tl.dot(x, low.to(x_ptr.dtype.element_ty), grad, input_precision="ieee")
    grad_ptrs = grad_ptr + split * stride_gs + offs_c[:, None] * stride_gc + offs_r[None, :] * stride_gr
    tl.store(grad_ptrs, scale * grad, mask=mask_c[:, None] & mask_r[None, :])


def _down(x: Tensor, factor: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """kept(x)·Fᵀ for F [R, Q] of any strides: fp32 [M, R]."""
    (rows, terms), rank = x.shape, factor.shape[0]
    config = launch.down(launch.capability(x.device), rank, x.element_size())
    tiles = launch.tiles((rows, config["M"]), (rank, config["R"]))
    splits, per_split = launch.split(terms, 4 * config["Q"], tiles, x.device)
    parts = x.new_empty((splits, rows, rank), dtype=torch.float32)
    launch.run(
        _down_kernel, (triton.cdiv(rows, config["M"]), triton.cdiv(rank, config["R"]), splits),
        x, factor, parts, rows, terms, rank, x.stride(0), *factor.stride(), per_split, *parameters(dropout, seed),
        DROPOUT=dropout > 0, **config.options(),
    )  # fmt: skip
    # added up here, once: every tile of the kernels that read it would do so again
    return parts[0] if splits == 1 else parts.sum(0)


def _product(
    x: Tensor, weight: NF4Weight | TokenTable | Tensor, backward: bool, low: Tensor | None = None, factor: Tensor | None = None,
    scale: float = 1.0, bias: Tensor | None = None, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ (backward: x·W) + s·kept(low·Fᵀ) + bias for F [P, R] of any strides, computed as ``launch.dispatch`` says."""
    (rows, terms), length = x.shape, weight.shape[1 if backward else 0]
    dispatch = launch.dispatch(launch.capability(x.device))
    nf4_in_loop = isinstance(weight, NF4Weight) and rows <= dispatch.decode_rows
    if isinstance(weight, NF4Weight) and not nf4_in_loop:
        weight = nf4.dequantise(weight, x.dtype, out=_buffer(weight.shape, x))
    known = isinstance(weight, TokenTable)
    by_cublas = not nf4_in_loop and rows > (dispatch.decode_rows if x.dtype == torch.float32 else dispatch.fused_rows)
    y = weight.lookup(x) if known else x.new_empty((rows, length))
    rank, strides = (1, (0, 0)) if low is None else (low.shape[1], factor.stride())
    adding = (rank, *strides, scale, *parameters(dropout, seed))
    flags = {"LOW_RANK": low is not None, "BIAS": bias is not None and not by_cublas, "DROPOUT": dropout > 0}
    if known:
        parts = y[None]
    elif by_cublas:
        sides = x, weight if backward else weight.t()
        parts = (torch.mm(*sides, out=y) if bias is None else torch.addmm(bias, *sides, out=y))[None]
    else:
        config = launch.product(launch.capability(x.device), rows, nf4_in_loop, x.element_size())
        tiles = launch.tiles((rows, config.block_m), (length, config.block_p))
        splits, per_split = launch.split(terms, 4 * config.block_q, tiles, x.device)
        parts = y[None] if splits == 1 else x.new_empty((splits, rows, length), dtype=torch.float32)
        # where the sum is split, finish adds the low-rank term and the bias, so the kernel needs one build for all of them
        whole = splits == 1
        launch.run(
            _product_kernel, (tiles, splits), x, *(weight.pointers if nf4_in_loop else (weight,) * 6),
            *((low, factor, bias) if whole else (None, None, None)), parts, rows, length, terms, x.stride(0), per_split,
            *(adding if whole else (1, 0, 0, 1.0, None, 0)), NF4=nf4_in_loop, NESTED=nf4_in_loop and weight.nested, BACKWARD=backward,
            SPLIT=not whole, **(flags if whole else dict.fromkeys(flags, False)), **config.options(),
        )  # fmt: skip
    if len(parts) > 1 or ((known or by_cublas) and low is not None):
        config = launch.finish(launch.capability(x.device), rows, x.element_size())
        grid = (triton.cdiv(length, config["P"]), triton.cdiv(rows, config["M"]))
        launch.run(_finish_kernel, grid, parts, low, factor, bias, y, rows, length, len(parts), *adding, **flags, **config.options())
    return y


def _outer(low: Tensor, x: Tensor, scale: float, dropout: float, seed: Tensor | None, transposed: bool = False) -> Tensor:
    """s·lowᵀ·kept(x): fp32 [R, C], or transposed [C, R]."""
    (rows, rank), columns = low.shape, x.shape[1]
    config = launch.outer(launch.capability(x.device), rank)
    tiles = launch.tiles((columns, config["C"]), (rank, config["R"]))
    splits, per_split = launch.split(rows, 4 * config["M"], tiles, x.device)
    grads = x.new_empty((splits, columns, rank) if transposed else (splits, rank, columns), dtype=torch.float32)
    part, by_column, by_rank = grads.stride() if transposed else (grads.stride(0), 1, columns)
    launch.run(
        _outer_kernel, (triton.cdiv(columns, config["C"]), triton.cdiv(rank, config["R"]), splits),
        low, x, grads, rows, columns, rank, x.stride(0), part, by_column, by_rank, per_split, scale, *parameters(dropout, seed),
        DROPOUT=dropout > 0, **config.options(),
    )  # fmt: skip
    return grads[0] if splits == 1 else grads.sum(0)


_buffers: dict[tuple, Tensor] = {}


def _buffer(shape: torch.Size, like: Tensor) -> Tensor:
    """A buffer for one dequantised weight, shared by all layers: each product has finished with it before the next one begins."""
    if like.device.type == "meta":
        return like.new_empty(shape)
    # on another stream the next product may begin earlier
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.device.type == "cuda" else 0
    key = (like.device, like.dtype, stream)
    if key not in _buffers or _buffers[key].numel() < shape.numel():
        _buffers[key] = like.new_empty(shape.numel())
    return _buffers[key][: shape.numel()].view(shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # frozen, and possibly packed: not a tensor for autograd to save
        ctx.weight = weight
        return _product(x, weight, False, bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _product(_rows(dy), ctx.weight, True) if ctx.needs_input_grad[0] else None, None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scale, bias, dropout, seed):
        low = _down(x, lora_a, dropout, seed)
        ctx.save_for_backward(x, lora_a, lora_b, low)
        # the low-rank path is scaled up for dropout
        ctx.weight, ctx.scale, ctx.dropout, ctx.seed = weight, scale / (1.0 - dropout), dropout, seed
        return _product(x, weight, False, low, lora_b, ctx.scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b, low = ctx.saved_tensors
        dy = _rows(dy)
        d_low = _down(dy, lora_b.t(), 0.0, None)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, ctx.weight, True, d_low, lora_a.t(), ctx.scale, None, ctx.dropout, ctx.seed)
        da = _outer(d_low, x, ctx.scale, ctx.dropout, ctx.seed)
        db = _outer(low, dy, ctx.scale, 0.0, None, transposed=True)
        return dx, None, da.to(lora_a.dtype), db.to(lora_b.dtype), None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """x as [M, features] with a last stride of 1, as the kernels read it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(where: str, x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None) -> None:
    operand = weight.codes if isinstance(weight, NF4Weight) else weight.products if isinstance(weight, TokenTable) else weight
    checks.require_device(where, x, operand, bias)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    checks.require(x.dtype in dtypes, where, "x must be float32, bfloat16 or float16", lambda: x.dtype, "convert it")
    fits = x.ndim > 0 and len(weight.shape) == 2 and x.shape[-1] == weight.shape[1]
    checks.require(fits, where, "x must be [..., K] for a weight [N, K]", lambda: (tuple(x.shape), tuple(weight.shape)), "check both")
    if not isinstance(weight, NF4Weight | TokenTable):
        checks.require(weight.dtype == x.dtype, where, f"the weight must be {x.dtype} as x is", lambda: weight.dtype, "convert one of them")
        checks.require(weight.is_contiguous(), where, "the weight must lie row by row", weight.stride, "make it contiguous, once")
    if bias is not None:
        fits = tuple(bias.shape) == (weight.shape[0],) and bias.is_contiguous()
        checks.require(fits, where, f"the bias must be contiguous [{weight.shape[0]}]", lambda: tuple(bias.shape), "check it")


def linear(x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias with W and bias frozen; as ``reference.linear``."""
    _check("linear", x, weight, bias)
    return _Linear.apply(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | TokenTable,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias.

    Args:
        x:        [..., K] bf16, fp16 or fp32
        weight:   [N, K] frozen: a contiguous tensor in x's dtype, an ``NF4Weight`` or a ``TokenTable``
        lora_a:   [R, K] cast to x's dtype
        lora_b:   [N, R] cast to x's dtype
        scale:    s, alpha/R or alpha/sqrt(R)
        bias:     [N] or None
        dropout:  probability that an element of x is dropped from the low-rank path; the rest is scaled up
        seed:     of ``reference.keep_mask``, one per call and step; a tensor is read when the kernels run, as a CUDA graph needs it

    Returns:
        [..., N] in x's dtype, sums in fp32 and rounded once; dA and dB are summed in fp32, dx rounded once. A NaN in a row of x is
        a NaN in that row of y. No gradient to weight and bias; dx is not computed where x needs none.

    Raises:
        ValueError: tensors of other devices, dtypes or shapes than these.
    """
    _check("lora_linear", x, weight, bias)
    checks.require_device("lora_linear", x, lora_a, lora_b)
    rank, (out_features, in_features) = lora_a.shape[0], weight.shape
    fits = rank > 0 and tuple(lora_a.shape) == (rank, in_features) and tuple(lora_b.shape) == (out_features, rank)
    shapes = f"lora_a must be [R, {in_features}] and lora_b [{out_features}, R], R at least 1"
    checks.require(fits, "lora_linear", shapes, lambda: (tuple(lora_a.shape), tuple(lora_b.shape)), "use factors made for this weight")
    checks.require(0.0 <= dropout < 1.0, "lora_linear", "dropout must be in [0, 1)", lambda: dropout, "choose another")
    if dropout > 0 and not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    y = _LoRALinear.apply(_rows(x), weight, lora_a, lora_b, scale, bias, dropout, seed)
    return y.view(*x.shape[:-1], out_features)
