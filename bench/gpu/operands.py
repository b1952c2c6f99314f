"""What the cases of ``bench.gpu`` are made of: where they run, weights and layers in copies, words, and unit rows. All random, all seeded.

Whatever would still be in the GPU's cache from one call to the next is there in several copies, which the calls take in turn.
"""

import dataclasses
import functools
import logging

import torch
import torch.nn.functional as F
from tli_kernels import reference
from tli_kernels.nf4_weight import NF4Weight
from torch import Tensor, nn

SCALE = 2.0
_MOST_COPIES = 64


@dataclasses.dataclass(frozen=True)
class BenchDevice:
    """Where the cases run.

    dtype:       of activations and of 16-bit weights
    cold_bytes:  what the calls must walk through before they come back to the same bytes: three times the GPU's cache
    rehearsal:   whether this is Triton's interpreter
    """

    device: torch.device
    dtype: torch.dtype
    cold_bytes: int
    rehearsal: bool = False

    def copies(self, size: int, most: int = _MOST_COPIES) -> int:
        """How many copies of ``size`` bytes keep the cache cold, up to ``most``."""
        return min(most, max(1, -(-self.cold_bytes // size)))

    def normal(self, *size: int, dtype: torch.dtype | None = None, seed: int = 0, grad: bool = False) -> Tensor:
        """Random numbers of N(0, 1)."""
        if self.device.type == "meta":
            return torch.empty(size, dtype=dtype or self.dtype, device="meta", requires_grad=grad)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)

    def weight(self, size: tuple[int, int], nested: bool) -> NF4Weight:
        """A random weight [N, K], packed by bitsandbytes."""
        if self.device.type == "meta":
            blocks = size[0] * size[1] // 64
            empty = functools.partial(torch.empty, device="meta")
            second = (empty(-(-blocks // 256)), empty(256), empty(())) if nested else ()
            scales = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
            return NF4Weight(empty(32 * blocks, dtype=torch.uint8), scales, empty(16), size, torch.bfloat16, *second)
        return NF4Weight.quantise(self.normal(*size, dtype=torch.float32) / size[1] ** 0.5, nested=nested)


class Layers:
    """Copies of one linear layer with its adapter, in each of the forms that the variants take."""

    def __init__(self, bench_device: BenchDevice, size: tuple[int, int], rank: int, nested: bool):
        (n, k), self.bench_device, self.size, self.nested = size, bench_device, size, nested
        first = bench_device.weight(size, nested)
        self.packed = [first, *(copied(first) for _ in range(bench_device.copies(first.nbytes) - 1))]
        a, b = bench_device.normal(rank, k, dtype=torch.float32, seed=3) / k**0.5, bench_device.normal(n, rank, dtype=torch.float32, seed=4)
        self.factors = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for _ in self.packed]
        self._peft: dict[float, list[nn.Module]] = {}

    @functools.cached_property
    def resident(self) -> list[Tensor]:
        if self.bench_device.device.type == "meta":
            return [torch.empty(self.size, dtype=self.bench_device.dtype, device="meta")]
        first = reference.dequantise(self.packed[0], self.bench_device.dtype)
        return [first, *(first.clone() for _ in range(self.bench_device.copies(first.nbytes) - 1))]

    def peft(self, dropout: float) -> list[nn.Module]:
        """peft's LoRA layer over bitsandbytes' Linear4bit, of the same bytes."""
        if dropout not in self._peft:
            # the copies of one dropout are enough
            self._peft = {dropout: [self._peft_layer(*operands, dropout) for operands in zip(self.packed, self.factors)]}
        return self._peft[dropout]

    def _peft_layer(self, weight: NF4Weight, factors: tuple[Tensor, Tensor], dropout: float) -> nn.Module:
        bnb = bitsandbytes()
        import peft

        holder, (n, k), bench_device = nn.Module(), self.size, self.bench_device
        kind = {"quant_type": "nf4", "compress_statistics": self.nested}
        # on the meta device it takes no memory, and the weight is replaced
        holder.layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=bench_device.dtype, device="meta", **kind)
        state = quant_state(weight, bench_device.dtype)
        codes = weight.codes.view(-1, 1)
        holder.layer.weight = bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, module=holder.layer, **kind)
        holder.layer.quant_state = state
        holder.is_loaded_in_4bit = True
        rank = len(factors[0])
        config = peft.LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=dropout, target_modules=["layer"])
        layer = peft.get_peft_model(holder, config).base_model.model.layer.train()
        with torch.no_grad():
            for own, value in zip((layer.lora_A["default"].weight, layer.lora_B["default"].weight), factors):
                own.copy_(value)
        return layer


@functools.lru_cache(maxsize=1)
def layers(bench_device: BenchDevice, size: tuple[int, int], rank: int, nested: bool) -> Layers:
    # the next case often has the same ones
    return Layers(bench_device, size, rank, nested)


def forget() -> None:
    """Let go of the operands that the last case left for the next one."""
    layers.cache_clear()


def paths(words: int, device: torch.device | str) -> tuple[Tensor, Tensor, int]:
    """Random words of one to five nodes, of which the first is shared by four words on average: indptr, indices, and the nodes.

    That is 2.25 nodes a word; a trie of Llama-3's tokens of Swahili-English pairs has 2.1.
    """
    # drawn on the CPU, so that every device gets the same
    generator, shared = torch.Generator().manual_seed(8), max(1, words // 4)
    lengths = torch.randint(1, 6, (words,), generator=generator)
    indptr = F.pad(lengths.cumsum(0), (1, 0))
    first = torch.zeros(int(indptr[-1]), dtype=torch.bool)
    first[indptr[:-1]] = True
    # its own nodes are a word's alone
    indices = shared - 1 + (~first).cumsum(0)
    indices[first] = torch.randint(shared, (words,), generator=generator)
    return indptr.to(device), indices.to(device), shared + int((~first).sum())


def units(bench_device: BenchDevice, pairs: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit rows of two sides that know of each other, so that neither loss nor gradients are those of noise alone."""
    source = bench_device.normal(pairs, width, dtype=torch.float32, seed=9)
    target = source + bench_device.normal(pairs, width, dtype=torch.float32, seed=10)
    return tuple(F.normalize(side, dim=-1).requires_grad_() for side in (source, target))


def edges(pairs: int, device: torch.device | str) -> Tensor:
    """Every eighth pair means the same as the next one, both ways: int64 [E, 2], sorted."""
    first = torch.arange(0, pairs - 1, 8)
    both = torch.stack([torch.stack([first, first + 1], dim=1), torch.stack([first + 1, first], dim=1)], dim=1)
    return both.view(-1, 2).to(device)


def copied(weight: NF4Weight) -> NF4Weight:
    """The same weight elsewhere in memory."""
    fields = ((field.name, getattr(weight, field.name)) for field in dataclasses.fields(weight))
    return dataclasses.replace(weight, **{name: value.clone() for name, value in fields if isinstance(value, Tensor)})


def quant_state(weight: NF4Weight, dtype: torch.dtype):
    """bitsandbytes' view of the same bytes; ``dtype`` is what it dequantises to."""
    state = bitsandbytes().functional.QuantState
    second = None
    if weight.nested:
        second = state(absmax=weight.nested_absmax, code=weight.nested_code, blocksize=256, dtype=torch.float32)
    return state(weight.absmax, weight.shape, weight.code, weight.blocksize, "nf4", dtype, weight.offset, second)


def bitsandbytes():
    # it announces at import that an optional package is absent
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
