"""``lora_linear`` on a CPU, through the faster of torch's two matmul libraries instead of its default.

    y  = x·Wᵀ + b + s·(kept(x)·Aᵀ)·Bᵀ             the low-rank term is added into y, not beside it
    dx = dy·W + s·kept((dy·B)·A)                  and into dx
    dA = s·(dy·B)ᵀ·kept(x),  dB = s·dyᵀ·(kept(x)·Aᵀ)

kept(x) is x with dropped elements set to zero; s includes 1/(1 - dropout). An NF4 weight stays packed: each matmul decodes a few of its
rows at a time, forward and backward, which costs time and takes an eighth of the memory.

The library is a ``Matmul`` that the caller measured (tli/runtime/cpu.py), because the CPU's name does not tell which is faster:

    onednn   torch's own oneDNN operator. On an AMD EPYC with AVX-512 2.2 times as fast as MKL in fp32 and, with bf16 products, twice
             as fast again; with AVX2 alone as fast as MKL, and with neither a third of it; it refuses bf16 below AVX-512 (bench/LOG.md)
    torch    F.linear: MKL in fp32, oneDNN or a plain loop in 16 bits

Either may compute in fp32 from 16-bit operands and round the result once: on a CPU without 16-bit products torch's own loop takes 50 to
1,000 times as long. Both read W and Wᵀ in place, so nothing is repacked or held twice.

Saved for backward: x, W, A, B and kept(x)·Aᵀ [M, R]. In bf16 a matmul sums in fp32 and rounds once.

Letters: M rows, K in-features, N out-features, R rank.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tli_kernels.nf4_weight import BLOCKSIZE, NF4Weight, bitsandbytes_functional
from tli_kernels.reference import block_scales, dequantise, keep_mask
from tli_kernels.token_table import TokenTable
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16 MB of decoded weights
_DECODED_NUMBERS = 1 << 22


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b by the oneDNN operator that torch.compile uses; raises where this build or CPU does not have it."""
    if not torch.backends.mkldnn.enabled:
        # the operator itself does not check
        raise RuntimeError("oneDNN is switched off")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


LIBRARIES: dict[str, Callable[..., Tensor]] = {"onednn": _by_onednn, "torch": F.linear}


@dataclasses.dataclass(frozen=True)
class Matmul:
    """x·Wᵀ + b for x [M, K] and W [N, K] of any strides, by one of ``LIBRARIES``.

    in_float32: operands are multiplied in fp32, and the result is rounded to their dtype
    """

    library: str = "torch"
    in_float32: bool = False

    @property
    def name(self) -> str:
        """As in reports and kept measurements: ``onednn``, ``torch in float32``."""
        return self.library + " in float32" * self.in_float32

    @classmethod
    def named(cls, name: str) -> "Matmul":
        """The matmul of this name; raises ``ValueError`` for an unknown one."""
        library, _, wide = name.partition(" ")
        if library not in LIBRARIES or wide not in ("", "in float32"):
            raise ValueError(f"matmul: the library must be one of {', '.join(LIBRARIES)}, got {name!r}; measure it anew")
        return cls(library, bool(wide))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return LIBRARIES[self.library](x, weight, bias)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a product of operands in ``dtype``."""
        return torch.float32 if self.in_float32 else dtype


# what every torch has
PLAIN = Matmul()


def _forward(x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None, matmul: Matmul, dtype: torch.dtype) -> Tensor:
    """x·Wᵀ + b, [M, N] in x's dtype; W in ``dtype``, or decoded to it a few rows at a time, or its products looked up."""
    if isinstance(weight, TokenTable):
        return weight.lookup(x).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if not isinstance(weight, NF4Weight):
        return matmul(x, weight.to(x.dtype), bias)
    y = x.new_empty(len(x), weight.shape[0])
    for rows, part in _decoded_parts(weight, dtype):
        y[:, rows] = matmul(x, part.to(x.dtype), None if bias is None else bias[rows])
    return y


def _backward(dy: Tensor, weight: Tensor | NF4Weight, matmul: Matmul, dtype: torch.dtype) -> Tensor:
    """dy·W, [M, K]; W as for ``_forward``."""
    if not isinstance(weight, NF4Weight):
        return matmul(dy, weight.to(dy.dtype).t())
    dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
    for rows, part in _decoded_parts(weight, dtype):
        dx += matmul(dy[:, rows].contiguous(), part.to(dy.dtype).t())
    return dx.to(dy.dtype)


def _decoded_parts(weight: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a packed weight, decoded in fp32 and rounded to ``dtype``, ``_DECODED_NUMBERS`` at a time."""
    outputs, inputs = weight.shape
    scales, step = block_scales(weight), max(1, _DECODED_NUMBERS // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        first, last = rows.start * inputs, rows.stop * inputs
        shape = torch.Size((rows.stop - rows.start, inputs))
        part = NF4Weight(weight.codes[first // 2 : last // 2], scales[first // BLOCKSIZE : last // BLOCKSIZE], weight.code, shape, dtype)
        yield rows, nf4_decoder().decode(part, dtype)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A function that dequantises a packed weight with one level of scales, [N, K] on a CPU, to a dtype."""

    name: str
    decode: Callable[[NF4Weight, torch.dtype], Tensor]


@functools.cache
def nf4_decoder() -> Decoder:
    """bitsandbytes' decoder if it is installed, runs on this CPU, equals the reference bit for bit and is faster; else the reference."""
    plain, theirs = Decoder("plain PyTorch", dequantise), Decoder("bitsandbytes", _decode_by_bitsandbytes)
    # a library built for another CPU may raise anything
    with contextlib.suppress(Exception):
        codes = torch.arange(256, dtype=torch.uint8).repeat(512)
        scales = torch.linspace(0.01, 1.0, 2 * len(codes) // BLOCKSIZE)
        small = NF4Weight(codes, scales, _bitsandbytes_table(), torch.Size((256, 1024)), torch.float32)
        decoders = (plain, theirs)
        bits = [[decoder.decode(small, dtype) for dtype in (torch.float32, torch.bfloat16)] for decoder in decoders]
        plain_s, their_s = (min(_seconds(decoder, small) for _ in range(5)) for decoder in decoders)
        if all(map(torch.equal, *bits)) and their_s < plain_s:
            return theirs
    return plain


def _seconds(decoder: Decoder, weight: NF4Weight) -> float:
    began = time.perf_counter()
    decoder.decode(weight, torch.bfloat16)
    return time.perf_counter() - began


@functools.cache
def _bitsandbytes_table() -> Tensor:
    return bitsandbytes_functional().get_4bit_type("nf4", device="cpu")


def _decode_by_bitsandbytes(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Dequantise by bitsandbytes' AVX-512 loop: equal to ``reference.dequantise`` bit for bit, and six times as fast.

    (Except that in bf16 it flushes numbers below 2⁻¹²⁶ to zero, and has only its own table.)
    """
    if not torch.equal(weight.code, _bitsandbytes_table()):
        return dequantise(weight, dtype)
    functional = bitsandbytes_functional()
    state = functional.QuantState(weight.absmax, shape=weight.shape, code=weight.code, blocksize=BLOCKSIZE, quant_type="nf4", dtype=dtype)
    return functional.dequantize_4bit(weight.codes[:, None], state)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, matmul):
        # frozen, and possibly packed: not a tensor for autograd to save
        ctx.weight, ctx.matmul = weight, matmul
        return _forward(x.to(matmul.computes_in(x.dtype)), weight, bias, matmul, x.dtype).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        wide = dy.to(ctx.matmul.computes_in(dy.dtype)).contiguous()
        return _backward(wide, ctx.weight, ctx.matmul, dy.dtype).to(dy.dtype), None, None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scale, bias, dropout, seed, matmul):
        rows = x.to(matmul.computes_in(x.dtype))
        low_rank = matmul(_kept(rows, _mask(rows, dropout, seed)), lora_a.to(rows.dtype))
        ctx.weight, ctx.matmul = weight, matmul
        ctx.save_for_backward(x, lora_a, lora_b, low_rank)
        # the low-rank path is scaled up for dropout
        ctx.scale, ctx.dropout, ctx.seed = scale / (1.0 - dropout), dropout, seed
        y = _forward(rows, weight, bias, matmul, x.dtype)
        return y.addmm_(low_rank, lora_b.to(rows.dtype).t(), alpha=ctx.scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b, low_rank = ctx.saved_tensors
        matmul, dtype = ctx.matmul, low_rank.dtype
        wide, rows, a, b = dy.to(dtype).contiguous(), x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        d_low_rank, mask = matmul(wide, b.t()), _mask(rows, ctx.dropout, ctx.seed)
        da = matmul(d_low_rank.t(), _kept(rows, mask).t()).to(lora_a.dtype).mul_(ctx.scale)
        db = (wide.t() @ low_rank).to(lora_b.dtype).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _backward(wide, ctx.weight, matmul, x.dtype)
            if mask is None:
                dx.addmm_(d_low_rank, a, alpha=ctx.scale)
            else:
                dx.addcmul_(matmul(d_low_rank, a.t()), mask, value=ctx.scale)
            dx = dx.to(x.dtype)
        return dx, None, da, db, None, None, None, None, None


def _mask(x: Tensor, dropout: float, seed: Tensor | int) -> Tensor | None:
    # a product of two dtypes would take six times as long
    return keep_mask(seed, *x.shape, dropout, dtype=x.dtype) if dropout > 0.0 else None


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def linear(x: Tensor, weight: Tensor | NF4Weight | TokenTable, bias: Tensor | None = None, matmul: Matmul = PLAIN) -> Tensor:
    """y = x·Wᵀ + b with W and b frozen, through ``matmul``; else as ``reference.linear``."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, matmul).view(*x.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | TokenTable,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
    matmul: Matmul = PLAIN,
) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ + bias on a CPU, through ``matmul``; else as ``reference.lora_linear``."""
    rows = x.reshape(-1, x.shape[-1])
    return _LoRALinear.apply(rows, weight, lora_a, lora_b, scale, bias, dropout, seed, matmul).view(*x.shape[:-1], weight.shape[0])
