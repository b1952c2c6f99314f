"""Kernel launches: one function that starts every kernel, and the block and warp configurations, chosen by rule.

Because ``run`` is the only place that starts a kernel, the compile check can call the real ops on meta tensors under ``recording`` and
see every kernel with the arguments, blocks and warps that a GPU would get.

No GPU is queried at import.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# the generations that the kernels are compiled for (compile_check.py): Turing to Blackwell
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its arguments by position, and constants, warps and stages by name."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    options: dict


_pretended: int | None = None
_recorded: list[Launch] | None = None


def run(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first tensor; an empty grid starts nothing."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, whatever the tensors are on
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Collect launches in place of starting them, as if on a GPU of this compute capability (90 for 9.0)."""
    global _pretended, _recorded
    before = _pretended, _recorded
    _pretended, _recorded = capability, []
    try:
        yield _recorded
    finally:
        _pretended, _recorded = before


def capability(device: torch.device) -> int:
    """The compute capability of a device as one number: 90 for 9.0; without a GPU (the interpreter) 80."""
    if _pretended is not None:
        return _pretended
    return _of_gpu(device) if device.type == "cuda" else 80


@functools.cache
def _of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclasses.dataclass(frozen=True)
class PoolNorm:
    """Blocks of ``pool_norm``: ``nodes`` of a word at a time forward, ``words`` of a node backward, in rows of ``columns``."""

    columns: int
    nodes: int
    words: int
    warps: int


def pool_norm(width: int) -> PoolNorm:
    """A whole row in registers, a warp for every 512 columns; several rows, so that their loads overlap.

    At most 128 registers or so. With twice as many warps ptxas aims at 64, and spills one or two on some generations.
    """
    columns = 1 << (width - 1).bit_length()
    nodes = 4 if columns <= 4096 else 2
    return PoolNorm(columns, nodes, words=nodes // 2, warps=min(16, max(1, columns // 512)))


# nf4_lora


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How a product is computed, by its number of rows M.

    decode_rows  an NF4 weight is decoded inside the product up to this many rows, and dequantised once above
    fused_rows   the product is Triton's, the low-rank term in its epilogue, up to this many rows; above it is cuBLAS's
    """

    decode_rows: int
    fused_rows: int


ALWAYS = 1 << 62
# 7.5: Triton makes no tensor-core products there, cuBLAS does. 9.0: measured on an H100 (bench/LOG.md, 2026-11-27): at 128 rows decoding
# was never the slower. The others are reasoned, not measured: python -m tli.tune measures
_DISPATCH = {75: Dispatch(0, 0)} | dict.fromkeys(CAPABILITIES[1:], Dispatch(decode_rows=64, fused_rows=ALWAYS))
_DISPATCH[90] = Dispatch(decode_rows=128, fused_rows=ALWAYS)
_chosen: dict[int, Dispatch] = {}


def dispatch(capability: int) -> Dispatch:
    """The dispatch for a compute capability: the one given to ``use``, or the table's for the newest generation not newer."""
    return _chosen.get(capability) or _DISPATCH[max((known for known in _DISPATCH if known <= capability), default=75)]


def use(capability: int, dispatch: Dispatch | None) -> None:
    """Override the dispatch for a compute capability; None goes back to the table."""
    _chosen.pop(capability, None)
    if dispatch is not None:
        _chosen[capability] = dispatch


# streaming multiprocessors of a common card of each generation, used without a GPU
_PROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


def _processors(device: torch.device) -> int:
    if device.type == "cuda" and _pretended is None:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _PROCESSORS[capability(device)]


def tiles(*sides: tuple[int, int]) -> int:
    """How many tiles cover a result, from each side's length and block."""
    return math.prod(-(-length // block) for length, block in sides)


def split(terms: int, least: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Split-K: the number of parts of a sum and the terms of each, so that there are two programs per multiprocessor.

    Each part but the last is a multiple of ``least``, so short sums and large results are not split.
    """
    wanted = max(1, 2 * _processors(device) // max(1, tiles))
    per_part = -(-terms // (least * wanted)) * least
    return max(1, -(-terms // max(1, per_part))), max(1, per_part)


# tensor cores need sides of at least 16; more would cost registers that a large tile does not have
_RANK_STEP = 16


@dataclasses.dataclass(frozen=True)
class Product:
    """Tiles of a product: result [block_p, block_m], sum by block_q; the low-rank term by the smallest step."""

    block_m: int
    block_p: int
    block_q: int
    group: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_P": self.block_p, "BLOCK_Q": self.block_q, "BLOCK_R": _RANK_STEP}
        # NF4 scales are a product and a sum, each rounded, as in bitsandbytes
        return {**blocks, "GROUP": self.group, **_compiler_options(self), "enable_fp_fusion": False}


def product(capability: int, rows: int, nf4: bool, bytes_per_element: int) -> Product:
    """The tiles of a product; an NF4 weight's tiles are multiples of its block of 64 both ways."""
    if bytes_per_element == 4:
        return Product(block_m=32, block_p=64, block_q=64, group=8, num_warps=4, num_stages=1)
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if nf4 or rows <= 64:
        # with more warps each needs fewer registers; but the Hopper and Blackwell forms are issued by four warps together
        warps = 4 if nf4 or few < 64 or capability in (90, 100) else 8
        # 10.0's compiler, left alone, spills 16 bytes of the resident weight's form for more blocks at a time
        limit = 232 if capability == 100 else _enough(capability)
        return Product(few, block_p=64, block_q=64, group=8, num_warps=warps, num_stages=3, max_registers=limit)
    if capability in (90, 100):
        return Product(block_m=256 if rows > 1024 else 128, block_p=128, block_q=64, group=8, num_warps=8, num_stages=3)
    # these may have 99 KB of shared memory
    return Product(block_m=128, block_p=128, block_q=32, group=8, num_warps=8, num_stages=3)


def _enough(capability: int) -> int | None:
    """Register limit of a thread.

    By default the compiler maximises occupancy, and spills one or two registers for it. The forms of 9.0 and 10.0 keep their
    accumulators elsewhere and need no limit.
    """
    return None if capability in (90, 100) else 232


def _compiler_options(config) -> dict:
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **limit}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles of a small kernel by the letters of their sides."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    def __getitem__(self, letter: str) -> int:
        return dict(self.blocks)[letter]

    def options(self) -> dict:
        return {**{f"BLOCK_{letter}": size for letter, size in self.blocks}, **_compiler_options(self)}


def down(capability: int, rank: int, bytes_per_element: int) -> Blocks:
    """The tiles of kept(x)·Aᵀ: memory-bound, so few rows. Without tensor cores (7.5, fp32) tiles are small, to fit in registers."""
    if capability < 80 or bytes_per_element == 4:
        return Blocks((("M", 32), ("R", 16), ("Q", 32)), num_stages=1)
    return Blocks((("M", 64), ("R", _rank_block(rank, 32)), ("Q", 64)), num_stages=3, max_registers=_enough(capability))


def finish(capability: int, rows: int, bytes_per_element: int) -> Blocks:
    """The tiles of the kernel that adds to a product; without tensor cores (7.5, fp32) they are small, to fit in registers."""
    if capability < 80 or bytes_per_element == 4:
        return Blocks((("P", 32), ("M", 32), ("R", _RANK_STEP)), num_stages=1)
    return Blocks((("P", 64), ("M", 16 if rows <= 16 else 64), ("R", _RANK_STEP)), max_registers=_enough(capability))


def outer(capability: int, rank: int) -> Blocks:
    """The tiles of a factor's gradient."""
    if capability < 80:
        return Blocks((("C", 32), ("R", 16), ("M", 16)), num_stages=1)
    return Blocks((("C", 64), ("R", _rank_block(rank, 64)), ("M", 32)))


def _rank_block(rank: int, largest: int) -> int:
    return min(largest, max(_RANK_STEP, 1 << (rank - 1).bit_length()))


def dequantise() -> Blocks:
    """64 scales with 64 elements each: each of 128 threads reads 16 bytes, with full occupancy on 8.0, 9.0 and 10.0."""
    return Blocks((("S", 64),))


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Blocks and precision of infonce and hinge for B pairs.

    precision:  of the matmuls: "hi_lo" (fp16 parts split beforehand), "split" (split while loading), "fp32" (no tensor cores)
    cosines:    a block of u·vᵀ: rows M, columns N, depth K along D
    gradients:  a block of du or dv: words M, columns of D N, depth K along the other side's words
    side:       columns whose statistics, and rows and columns whose weights infonce holds at a time; below 32,768
    """

    precision: str
    cosines: Blocks
    gradients: Blocks
    side: int = 4096

    def padded(self, size: int) -> int:
        """The size rounded up so that no block reaches beyond it."""
        largest = max(blocks[letter] for blocks in (self.cosines, self.gradients) for letter in "MNK")
        return -(-size // largest) * largest


def contrast(capability: int, pairs: int) -> Contrast:
    """Small batches: small blocks, so that many programs share the work. Large ones: operands split once, as each is read many times."""
    if capability < 80:
        large = _depth(64, 64, 16, 8, 1)
        return Contrast("fp32", _depth(32, 32, 32, 4, 1) if pairs <= 512 else large, large)
    if pairs <= 1024:
        wide = _depth(64, 64, 32, 4, 3)
        small = _depth(16, 16, 64, 2, 4) if pairs <= 128 else _depth(32, 32, 32, 4, 4) if pairs <= 512 else wide
        return Contrast("split", small, wide)
    if capability == 90:
        large = _depth(128, 128, 64, 8, 3)
        return Contrast("hi_lo", large, large)
    if capability == 100:
        # with 128 columns of cosines their sums run out of registers
        return Contrast("hi_lo", _depth(128, 64, 64, 8, 3), _depth(128, 128, 64, 8, 2))
    # these may have 99 KiB of shared memory, and spill with 128 columns; 12.0 spills with the others' gradients, too
    large = _depth(128, 64, 32, 8, 3)
    if capability >= 120:
        return Contrast("hi_lo", dataclasses.replace(large, max_registers=_enough(capability)), _depth(64, 128, 32, 8, 3))
    return Contrast("hi_lo", large, large)


def gather(capability: int) -> tuple[str, Blocks]:
    """The precision of the hinge's gradient, as in ``Contrast``, and its blocks: words M, columns of D N, depth K along the rows."""
    return ("fp32", _depth(64, 64, 16, 8, 1)) if capability < 80 else ("split", _depth(64, 64, 64, 4, 1))


def _depth(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Blocks:
    return Blocks((("M", m), ("N", n), ("K", k)), num_warps, num_stages)
