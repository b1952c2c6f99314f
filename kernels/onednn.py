"""The CPU's way of ``nf4_lora`` in fp32 and bf16: oneDNN's products in place of the default BLAS, one pass each way.

    y  = x·Wᵀ + b + s·(kept(x)·Aᵀ)·Bᵀ             the low-rank term is added into y, not beside it
    dx = dy·W + s·kept((dy·B)·A)                  likewise
    dA = s·(dy·B)ᵀ·kept(x),  dB = s·dyᵀ·(kept(x)·Aᵀ)

kept(x) is x with the elements that dropout takes set to zero; s has 1/(1 - dropout) in it. A weight in NF4 stays packed: each product
decodes a few of its rows at a time, forward and backward, which costs time and holds an eighth of the memory.

torch's CPU build multiplies 32-bit matrices with MKL, which takes its slower path on processors that are not Intel's.
oneDNN, in the same build, does not: on an AMD EPYC with AVX-512 it is 2.2 times as fast, and in bf16, which that processor has
products for, twice as fast again (bench/LOG.md). It takes W and Wᵀ as they lie in memory, so nothing is packed and nothing is held
twice. What is saved: x, W, A, B and kept(x)·Aᵀ [M, R]. In bf16 all sums of a product are fp32, rounded once to what it gives.

Letters: M rows, K in-features, N out-features, R rank.
"""

from collections.abc import Iterator

import torch
from tli_kernels.nf4_weight import BLOCKSIZE, NF4Weight, bitsandbytes_functional
from tli_kernels.reference import block_scales, keep_mask
from tli_kernels.token_table import TokenTable
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16 MB of decoded weights
_DECODED_NUMBERS = 1 << 22


def available() -> bool:
    """Whether this build of torch has oneDNN and its linear product (an operator of torch's own compiler)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b for x [M, K] and W [N, K] of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _forward(x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, [M, N]; W plain, or decoded a few rows at a time, or the products known."""
    if isinstance(weight, TokenTable):
        return weight.looked_up(x)
    if not isinstance(weight, NF4Weight):
        return _product(x, weight, bias)
    y = x.new_empty(len(x), weight.shape[0])
    for rows, part in _decoded_parts(weight, x.dtype):
        y[:, rows] = _product(x, part, None if bias is None else bias[rows])
    return y


def _backward(dy: Tensor, weight: Tensor | NF4Weight) -> Tensor:
    """dy·W, [M, K]; likewise."""
    if not isinstance(weight, NF4Weight):
        return _product(dy, weight.t())
    dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
    for rows, part in _decoded_parts(weight, dy.dtype):
        dx += _product(dy[:, rows].contiguous(), part.t())
    return dx.to(dy.dtype)


def _decoded_parts(weight: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a packed weight, decoded in fp32 and rounded to ``dtype``, as many at a time as fit into a processor's cache."""
    outputs, inputs = weight.shape
    scales, step = block_scales(weight), max(1, _DECODED_NUMBERS // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        first, last = rows.start * inputs, rows.stop * inputs
        codes, shape = weight.codes[first // 2 : last // 2], torch.Size((rows.stop - rows.start, inputs))
        yield rows, _decode(codes, scales[first // BLOCKSIZE : last // BLOCKSIZE], weight.code, shape, dtype)


def _decode(codes: Tensor, scales: Tensor, code: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers by bitsandbytes' AVX-512 loop: equal to ``reference.dequantise`` to the last bit, and six times as fast.

    (But that in bf16 it makes zeros of numbers below 2⁻¹²⁶.)
    """
    functional = bitsandbytes_functional()
    state = functional.QuantState(scales, shape=shape, code=code, blocksize=BLOCKSIZE, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(codes[:, None], state)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # frozen, and packed or plain: none of autograd's tensors
        ctx.weight = weight
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _backward(dy.contiguous(), ctx.weight) if ctx.needs_input_grad[0] else None, None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scale, bias, dropout, seed):
        low_rank = _product(_kept(x, _mask(x, dropout, seed)), lora_a.to(x.dtype))
        ctx.weight = weight
        ctx.save_for_backward(x, lora_a, lora_b, low_rank)
        # what survives dropout is scaled up: with the rest of the low-rank path
        ctx.scale, ctx.dropout, ctx.seed = scale / (1.0 - dropout), dropout, seed
        return _forward(x, weight, bias).addmm_(low_rank, lora_b.to(x.dtype).t(), alpha=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b, low_rank = ctx.saved_tensors
        dy, a, b = dy.contiguous(), lora_a.to(x.dtype), lora_b.to(x.dtype)
        d_low_rank, mask = _product(dy, b.t()), _mask(x, ctx.dropout, ctx.seed)
        da = _product(d_low_rank.t(), _kept(x, mask).t()).to(lora_a.dtype).mul_(ctx.scale)
        db = (dy.t() @ low_rank).to(lora_b.dtype).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _backward(dy, ctx.weight)
            if mask is None:
                dx.addmm_(d_low_rank, a, alpha=ctx.scale)
            else:
                dx.addcmul_(_product(d_low_rank, a.t()), mask, value=ctx.scale)
        return dx, None, da, db, None, None, None, None


def _mask(x: Tensor, dropout: float, seed: Tensor | int) -> Tensor | None:
    # a product of two dtypes would take six times as long
    return keep_mask(seed, *x.shape, dropout, dtype=x.dtype) if dropout > 0.0 else None


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + b with W and b frozen; arguments and result as of ``reference.linear``."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def nf4_lora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias on a CPU; arguments and result as of ``reference.nf4_lora``."""
    rows = x.reshape(-1, x.shape[-1])
    return _LoRALinear.apply(rows, weight, lora_a, lora_b, scale, bias, dropout, seed).view(*x.shape[:-1], weight.shape[0])
