"""What ``bench.gpu`` times: each case is one problem, and its variants solve that problem on the same operands.

A variant is made by a function of its own, so that one that cannot run does not keep the others from it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tli_kernels import launch, nf4, reference, shapes
from torch import Tensor

from bench.gpu.operands import SCALE, BenchDevice, bitsandbytes, copied, edges, layers, paths, quant_state, units
from tli.commands import tune
from tli.runtime import ops

# what each name in the record stands for
LEGEND = {
    "ours": "nf4.dequantise into a buffer that is there",
    "bitsandbytes": "dequantize_4bit into a buffer that is there",
    "copy": "a copy on the device that moves as many bytes as the case must",
    "dispatch": "nf4_lora by the table of launch.py",
    **dict.fromkeys(tune.WAYS, "nf4_lora by this way whatever the number of rows"),
    "resident, Triton": "nf4_lora on 16-bit weights, Triton's product",
    "resident, cuBLAS": "nf4_lora on 16-bit weights, cuBLAS's product and one kernel that adds the low-rank term",
    "peft": "peft's LoRA layer over bitsandbytes' Linear4bit as peft makes it: adapters in fp32, no autocast",
    "peft, autocast": "the same under torch.autocast, as transformers' Trainer runs it in bf16",
    "eager, dequantised": "bitsandbytes' dequantize_4bit, F.linear and addmm; adapters in fp32, cast in each call",
    "eager, resident": "F.linear on 16-bit weights and addmm; adapters in fp32, cast in each call",
    "fused": "our kernels",
    "eager": "reference.py, fp32 products in full precision, as is torch's default",
    "eager, tf32": "reference.py, fp32 products in TF32: faster, and not as precise as ours",
    "compiled": "torch.compile of reference.py, sizes fixed",
    "again": "the case's own subject a second time: what a ratio is when nothing differs",
}
PEFT = ("peft", "peft, autocast")
WAYS = {**tune.WAYS, "resident, Triton": (0, ops.ALWAYS), "resident, cuBLAS": (0, 0)}
ROWS = (1, 16, 32, 64, 128, 256, 1024, 4096, 16384)
RANK, TEMPERATURE = 16, 0.1
LOSSES = ("pool_norm + infonce", "infonce", "pool_norm")


@dataclasses.dataclass(frozen=True)
class KernelVariant:
    """A way to solve a case.

    call:    solve it on copy i, modulo the number of copies; returns the results, always in the case's order
    bytes:   what it must move at least, each input read once and each result written once
    flops:   what it must compute at least
    around:  the context that a row of calls is made in
    """

    call: Callable[[int], tuple[Tensor, ...]]
    bytes: int
    flops: int = 0
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


Makers = dict[str, Callable[[], KernelVariant]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; ``ours`` is the variant that the others are compared with."""

    name: str

    op = ""
    ours = ""
    # whether the results of all variants must be close
    comparable = True
    measures_memory = False

    def facts(self) -> dict:
        """What the record says of it."""
        return {"op": self.op, **dataclasses.asdict(self)}

    def makers(self, bench_device: BenchDevice) -> Makers:
        """A function that makes each variant."""
        raise NotImplementedError

    def input_bytes(self, bench_device: BenchDevice) -> int:
        """Bytes of one copy of the tensors that it is given."""
        return 0

    def __str__(self) -> str:
        sizes = (f"{name} {value}" for name, value in self.facts().items() if name not in ("op", "name"))
        return ", ".join([*dict.fromkeys((self.op, self.name)), *sizes])


@dataclasses.dataclass(frozen=True)
class Dequantise(Case):
    """An NF4 weight [n, k] into 16 bits."""

    n: int
    k: int
    nested: bool

    op = "dequantise"
    ours = "ours"

    def makers(self, bench_device: BenchDevice) -> Makers:
        first = bench_device.weight((self.n, self.k), self.nested)
        total = first.nbytes + self.n * self.k * bench_device.dtype.itemsize
        weights = [first, *(copied(first) for _ in range(bench_device.copies(total) - 1))]
        outs = [torch.empty(self.n, self.k, dtype=bench_device.dtype, device=bench_device.device) for _ in weights]

        def ours() -> KernelVariant:
            return KernelVariant(lambda i: (nf4.dequantise(weights[i % len(weights)], bench_device.dtype, out=outs[i % len(outs)]),), total)

        def theirs() -> KernelVariant:
            bnb = bitsandbytes().functional
            packed = [(weight.codes.view(-1, 1), quant_state(weight, bench_device.dtype)) for weight in weights]

            def call(i: int) -> tuple[Tensor, ...]:
                # it has no such thing on a CPU
                out = None if bench_device.rehearsal else outs[i % len(outs)]
                return (bnb.dequantize_4bit(*packed[i % len(packed)], out=out),)

            return KernelVariant(call, total)

        def copy() -> KernelVariant:
            halves = [torch.empty(2, total // 2, dtype=torch.uint8, device=bench_device.device).random_() for _ in weights]

            def call(i: int) -> tuple[Tensor, ...]:
                halves[i % len(halves)][1].copy_(halves[i % len(halves)][0])
                return ()

            return KernelVariant(call, total)

        return {"ours": ours, "bitsandbytes": theirs, "copy": copy}


@dataclasses.dataclass(frozen=True)
class Product(Case):
    """``nf4_lora`` with a weight [n, k] on ``rows`` rows; backward, with the gradients to x, A and B."""

    n: int
    k: int
    rows: int
    rank: int = RANK
    dropout: float = 0.0
    nested: bool = False
    backward: bool = False

    op = "nf4_lora"
    ours = "dispatch"

    @property
    def comparable(self) -> bool:
        # each draws its own mask
        return self.dropout == 0.0

    def makers(self, bench_device: BenchDevice) -> Makers:
        held = layers(bench_device, (self.n, self.k), self.rank, self.nested)
        x = bench_device.normal(self.rows, self.k, seed=1, grad=self.backward)
        dy = bench_device.normal(self.rows, self.n, seed=2) if self.backward else None
        variant = functools.partial(self._variant, bench_device, dy)
        table = dataclasses.astuple(launch.dispatch(launch.capability(bench_device.device)))

        def ours(limits: tuple[int, int], resident: bool) -> KernelVariant:
            weights = held.resident if resident else held.packed

            def product(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
                a, b = held.factors[i % len(held.factors)]
                return ops.fused().lora_linear(x, weights[i % len(weights)], a, b, SCALE, dropout=self.dropout, seed=1), (x, a, b)

            return variant(product, weights[0].nbytes, around=lambda: ops.override_dispatch(bench_device.device, *limits))

        def peft(autocast: bool) -> KernelVariant:
            modules = held.peft(self.dropout)

            def product(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
                layer = modules[i % len(modules)]
                with torch.autocast(bench_device.device.type, torch.bfloat16, enabled=autocast):
                    y = layer(x)
                return y, (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

            return variant(product, held.packed[0].nbytes)

        def eager(weight_at: Callable[[int], Tensor], weight_bytes: int) -> KernelVariant:
            def product(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
                a, b = held.factors[i % len(held.factors)]
                low = F.linear(F.dropout(x, self.dropout), a.to(x.dtype))
                return torch.addmm(F.linear(x, weight_at(i)), low, b.to(x.dtype).t(), alpha=SCALE), (x, a, b)

            return variant(product, weight_bytes)

        def dequantised() -> KernelVariant:
            bnb = bitsandbytes().functional
            packed = [(weight.codes.view(-1, 1), quant_state(weight, bench_device.dtype)) for weight in held.packed]
            return eager(lambda i: bnb.dequantize_4bit(*packed[i % len(packed)]), held.packed[0].nbytes)

        def resident() -> KernelVariant:
            return eager(lambda i: held.resident[i % len(held.resident)], held.resident[0].nbytes)

        return {
            "dispatch": lambda: ours(table, False),
            **{way: functools.partial(ours, limits, way.startswith("resident")) for way, limits in WAYS.items()},
            "peft": lambda: peft(False),
            "peft, autocast": lambda: peft(True),
            "eager, dequantised": dequantised,
            "eager, resident": resident,
        }

    def _variant(
        self, bench_device: BenchDevice, dy: Tensor | None, product, weight_bytes: int, around=contextlib.nullcontext
    ) -> KernelVariant:
        def forward(i: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (product(i)[0],)

        def both(i: int) -> tuple[Tensor, ...]:
            y, leaves = product(i)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        width, low = self.n + self.k, self.rank * (self.n + self.k)
        moved, computed = self.rows * width * bench_device.dtype.itemsize + 4 * low, 2 * self.rows * (self.n * self.k + low)
        if dy is None:
            return KernelVariant(forward, weight_bytes + moved, computed, around)
        # dx = dy·W, and of the low rank dy·B, u·A, uᵀ·x and dyᵀ·t; x, dy and both factors are read, dx and the gradients written
        moved += self.rows * (width + self.k) * bench_device.dtype.itemsize + 8 * low
        computed += 2 * self.rows * (self.n * self.k + 2 * low)
        return KernelVariant(both, 2 * weight_bytes + moved, computed, around)


@dataclasses.dataclass(frozen=True)
class Loss(Case):
    """``pool_norm``, ``infonce``, or one after the other, forward and backward; ``name`` is the op's, pairs of two words each.

    compiled:  beside torch.compile in place of eager in TF32
    """

    pairs: int
    width: int
    compiled: bool = False

    ours = "fused"
    measures_memory = True

    @property
    def op(self) -> str:
        return self.name

    def makers(self, bench_device: BenchDevice) -> Makers:
        operands, problem, gradient = self._problem(bench_device)
        others = bench_device.copies(sum(each.nbytes for each in operands), most=400) - 1
        copies = [operands, *([each.detach().clone().requires_grad_() for each in operands] for _ in range(others))]
        moved, computed = self._floors(operands)

        def solve(function: Callable[..., Tensor], around=contextlib.nullcontext) -> KernelVariant:
            def call(i: int) -> tuple[Tensor, ...]:
                leaves = copies[i % len(copies)]
                result = function(*leaves)
                return (result.detach(), *torch.autograd.grad(result, leaves, gradient))

            return KernelVariant(call, moved, computed, around)

        def plain(*leaves: Tensor) -> Tensor:
            return problem(reference, *leaves)

        def compiled() -> KernelVariant:
            if bench_device.rehearsal:
                raise RuntimeError("torch.compile is no part of a rehearsal: it takes a minute")
            # a size that was compiled before counts towards the limit of recompilations, and beyond it runs eagerly
            torch._dynamo.reset()
            return solve(torch.compile(plain, dynamic=False))

        makers = {
            "fused": lambda: solve(functools.partial(problem, ops.fused()), lambda: ops.override_dispatch(bench_device.device, 0, 0)),
            "eager": lambda: solve(plain),
        }
        return {**makers, "compiled": compiled} if self.compiled else {**makers, "eager, tf32": lambda: solve(plain, _tf32)}

    def _problem(self, bench_device: BenchDevice) -> tuple[list[Tensor], Callable[..., Tensor], Tensor | None]:
        """The tensors that want gradients, the problem as a function of an implementation and of these, and the gradient that comes in."""
        if self.name == "infonce":
            source, target = units(bench_device, self.pairs, self.width)
            false_negatives = edges(self.pairs, bench_device.device)
            return [source, target], lambda impl, u, v: impl.infonce(u, v, TEMPERATURE, false_negatives), None
        indptr, indices, nodes = paths(2 * self.pairs, bench_device.device)
        states = bench_device.normal(nodes, self.width, seed=5, grad=True)
        norm_weight = bench_device.normal(self.width, dtype=torch.float32, seed=6) * 0.1 + 1
        transposed = reference.transpose_paths(indptr, indices, nodes)

        def pooled(impl, states: Tensor) -> Tensor:
            return impl.pool_norm(states, indptr, indices, norm_weight, 1e-6, transposed)

        if self.name == "pool_norm":
            return [states], pooled, bench_device.normal(2 * self.pairs, self.width, dtype=torch.float32, seed=7)
        false_negatives = edges(self.pairs, bench_device.device)
        return [states], lambda impl, states: impl.infonce(*pooled(impl, states).chunk(2), TEMPERATURE, false_negatives), None

    def _floors(self, operands: list[Tensor]) -> tuple[int, int]:
        """Bytes to move and operations to make: states, units and their gradients; s = u·vᵀ once, and du and dv of it."""
        rows = 2 * self.pairs * self.width * 4
        # operands are read forward, their gradients are written
        moved, computed = 2 * sum(each.nbytes for each in operands), 0
        if self.name != "infonce":
            # the units are written, and they, their gradients and the states are read backward
            moved += operands[0].nbytes + 3 * rows
        if self.name != "pool_norm":
            computed = 6 * self.pairs**2 * self.width
            # both passes read the units, and their gradients are written, if they are not operands themselves
            moved += rows if self.name == "infonce" else 3 * rows
        return moved, computed

    def input_bytes(self, bench_device: BenchDevice) -> int:
        """The leaves and the rows that come in as a gradient; the few bytes of paths and edges are left out."""
        if self.name == "infonce":
            return 2 * self.pairs * self.width * 4
        states = paths(2 * self.pairs, "meta")[2] * self.width * bench_device.dtype.itemsize
        return states + (2 * self.pairs * self.width * 4 if self.name == "pool_norm" else 0)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def chosen(every_shape: bool) -> list[Case]:
    """All cases, those that a goal is about first: what the time does not reach is at the end."""
    weights = shapes.weights()
    llama = {name: size for name, size in weights.items() if name.startswith("llama-3-8b/")}
    others = {name: size for name, size in weights.items() if name not in llama}
    q_proj, mixed = "llama-3-8b/q_proj", (1, 64, 4096)
    widest = (65536, 768)
    cases: list[Case] = [Dequantise(name, *size, nested) for name, size in llama.items() for nested in (False, True)]
    cases += [Product(q_proj, *llama[q_proj], rows, backward=backward) for backward in (False, True) for rows in ROWS]
    cases += [Loss("pool_norm + infonce", pairs, 4096) for pairs in (64, 128, 256, 512, 1024)]
    cases += [Loss(name, *widest) for name in ("infonce", "pool_norm + infonce")]
    for name, size in llama.items():
        if name != q_proj:
            cases += [Product(name, *size, rows, backward=backward) for backward in (False, True) for rows in ROWS]
    cases += [Product(q_proj, *llama[q_proj], rows, dropout=0.05, backward=backward) for backward in (False, True) for rows in ROWS]
    cases += [Loss(name, pairs, 4096) for name in ("infonce", "pool_norm") for pairs in (64, 256, 1024)]
    cases += [Loss(name, pairs, 768) for name in ("infonce", "pool_norm + infonce") for pairs in (64, 1024, 4096, 16384, 32768)]
    cases += [Loss("pool_norm", pairs, 768) for pairs in (1024, 16384, 65536)]
    for change in ({"rank": 64}, {"nested": True}):
        cases += [Product(q_proj, *llama[q_proj], rows, backward=backward, **change) for backward in (False, True) for rows in mixed]
    cases += [Loss(name, *size, compiled=True) for size in ((1024, 4096), (16384, 768), (64, 4096)) for name in LOSSES]
    cases += [Loss(name, *widest, compiled=True) for name in ("infonce", "pool_norm + infonce")]
    if every_shape:
        cases += [Dequantise(name, *size, nested) for name, size in others.items() for nested in (False, True)]
        for name, size in others.items():
            cases += [Product(name, *size, rows, backward=backward) for backward in (False, True) for rows in (*mixed, 16384)]
    return cases


def rehearsed() -> list[Case]:
    """A toy of each kind, for Triton's interpreter."""
    size = (128, 64)
    cases: list[Case] = [Dequantise("toy", *size, nested) for nested in (False, True)]
    cases += [Product("toy", *size, rows=3, dropout=0.05, nested=True), Product("toy", *size, rows=20, backward=True)]
    return cases + [Loss("pool_norm + infonce", 3, 64), Loss("pool_norm", 3, 64), Loss("infonce", 3, 64, compiled=True)]
