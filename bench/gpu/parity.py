"""Are the kernels right on this GPU? What ``bench.gpu`` asks before it times anything.

The rule is the tests': an op may be twice as far from the truth, fp64, as plain PyTorch in the same dtype is, plus rounding. Every size
that is timed is checked, by every way and with every gradient, with memory full of NaN beforehand so that what nothing wrote shows.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tli_kernels import nf4, reference
from tli_kernels.nf4_weight import NF4Weight
from torch import Tensor

from bench.gpu.cases import TEMPERATURE, WAYS, Case, Dequantise, Loss, Product
from bench.gpu.operands import SCALE, BenchDevice, bitsandbytes, edges, paths, quant_state, units
from bench.gpu.timing import free, reason
from tli.commands import tune
from tli.runtime import ops

SEED = 2**40 + 12345


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the checks are that no timed case gives a size to.

    elements:  a little more than this many elements in one tensor
    eager:     up to so many pairs plain PyTorch has the memory for B×B
    block:     rows at a time of what is computed without B×B
    """

    elements: int = 2**31
    eager: int = 16384
    block: int = 4096


class Checks:
    """Collects what was checked; nothing here raises, but that the time is up."""

    def __init__(self):
        self.rows: list[dict] = []
        self.finished = False

    @property
    def failures(self) -> list[dict]:
        return [row for row in self.rows if not row["passed"]]

    def faithful(self, what: str, fused: Tensor, eager: Tensor, truth: Tensor, terms: int) -> None:
        """max |fused - truth| <= 2 max |eager - truth| + eps·sqrt(terms)·max |truth|, eps of fp32; NaN never passes."""
        if fused.shape != truth.shape or fused.dtype != eager.dtype:
            self.holds(what, False, f"{tuple(fused.shape)} of {fused.dtype}, expected {tuple(truth.shape)} of {eager.dtype}")
            return
        error, allowed = (_farthest(tensor, truth) for tensor in (fused, eager))
        rounding = torch.finfo(torch.float32).eps * max(1, terms) ** 0.5 * truth.abs().max().item()
        passed = error <= 2 * allowed + rounding
        self.rows.append({"check": what, "passed": passed, "error": error, "eager_error": allowed, "rounding": rounding})

    def holds(self, what: str, condition: bool, detail: str = "") -> None:
        """A condition, with what was seen where it does not hold."""
        self.rows.append({"check": what, "passed": bool(condition), **({} if condition else {"detail": detail})})

    def equal(self, what: str, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
        """The same bits."""
        differ = sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))
        self.holds(what, all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"{differ} elements differ")

    def record(self) -> dict:
        """What is kept of it: how many, every failure and note, and for each result of each op the check that came closest to one."""
        closest: dict[str, dict] = {}
        for row in self.rows:
            if "error" in row:
                result = f"{row['check'].split(',')[0].split(' ')[0]}: {row['check'].split(': ')[-1]}"
                used = row["error"] / max(2 * row["eager_error"] + row["rounding"], 1e-300)
                if not used <= closest.get(result, {"of_allowed": -1.0})["of_allowed"]:
                    closest[result] = {"result": result, "of_allowed": used, **row}
        notes = [row for row in self.rows if "note" in row]
        kept = {"failures": self.failures, "notes": notes, "closest": list(closest.values())}
        return {"finished": self.finished, "checks": len(self.rows), **kept}

    @contextlib.contextmanager
    def about(self, what: str) -> Iterator[None]:
        """What goes wrong below is a failure of this check, and the next one is made."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            self.holds(what, False, reason(error))
            error.__traceback__ = None
            free()


def check(checks: Checks, bench_device: BenchDevice, cases: list[Case], sizes: Sizes) -> None:
    """Make every check, for these cases."""
    for size, nested in dict.fromkeys(((case.n, case.k), case.nested) for case in cases if isinstance(case, Dequantise)):
        with checks.about(f"dequantise {list(size)} nested {nested}"):
            check_dequantise(checks, bench_device, size, nested)
    # forward is checked with backward
    products = dict.fromkeys(dataclasses.replace(case, backward=True) for case in cases if isinstance(case, Product))
    for case in products:
        with checks.about(str(case)):
            check_product(checks, bench_device, case, bench_device.dtype)
    for case, dtype in edge_products(bench_device):
        with checks.about(f"{case}, {dtype}"):
            check_product(checks, bench_device, case, dtype, bias=True)
            check_linear(checks, bench_device, case, dtype)
    for op, pairs, width in dict.fromkeys((case.op, case.pairs, case.width) for case in cases if isinstance(case, Loss)):
        for name, one in (("pool_norm", check_pool_norm), ("infonce", functools.partial(check_infonce, sizes=sizes))):
            if name in op and not any(row["check"].startswith(f"{name} {pairs} x {width}") for row in checks.rows):
                with checks.about(f"{name} {pairs} x {width}"):
                    one(checks, bench_device, pairs, width)
                free()
    for one in (check_hinge, check_nan, check_same_bits):
        with checks.about(one.__name__):
            one(checks, bench_device)
    for one in (check_large_products, check_large_dequantise):
        with checks.about(one.__name__):
            one(checks, bench_device, sizes.elements)
        free()


def edge_products(bench_device: BenchDevice) -> list[tuple[Product, torch.dtype]]:
    """Odd sizes in all three dtypes."""
    if bench_device.rehearsal:
        return [(Product("edge", 65, 64, rows=5, rank=3, dropout=0.2), torch.float16)]
    prime = Product("edge", 129, 192, rows=67, rank=33, dropout=0.2, nested=True)
    single = Product("edge", 1000, 64, rows=1, rank=1)
    return [*((prime, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)), (single, torch.bfloat16)]


def check_dequantise(checks: Checks, bench_device: BenchDevice, size: tuple[int, int], nested: bool) -> None:
    """Bit for bit what the reference gives, and bitsandbytes: on the CPU, or here where its own two differ."""
    bnb = bitsandbytes().functional
    weight = bench_device.weight(size, nested)
    scales = weight.nested_absmax if nested else weight.absmax
    # a huge, a tiny and an empty block
    scales[: min(3, len(scales))] = torch.tensor([1e30, 1e-30, 0.0], device=scales.device)[: len(scales)]
    on_cpu = weight.to("cpu")
    # the interpreter does not know bf16
    for dtype in (torch.float16, torch.float32, *([] if bench_device.rehearsal else [torch.bfloat16])):
        what = f"dequantise {list(size)} nested {nested} {dtype}"
        poison(bench_device)
        got = nf4.dequantise(weight, dtype)
        cpu = bnb.dequantize_4bit(on_cpu.codes.view(-1, 1), quant_state(on_cpu, dtype)).to(got.device)
        here = bnb.dequantize_4bit(weight.codes.view(-1, 1), quant_state(weight, dtype))
        checks.equal(f"{what}, as the reference", (got,), (reference.dequantise(weight, dtype),))
        # its fp16 on a CPU was seen to differ from its own on a GPU: then there is one of the two to agree with
        alike = torch.equal(got, cpu) or (torch.equal(got, here) and not torch.equal(cpu, here))
        differ = f"{int((got != cpu).sum())} elements differ from its CPU, {int((got != here).sum())} here"
        checks.holds(f"{what}, as bitsandbytes", alike, differ)
        if not torch.equal(cpu, here):
            checks.rows[-1]["note"] = f"bitsandbytes itself differs from its CPU in {int((cpu != here).sum())} elements"


def _operands(bench_device: BenchDevice, case: Product, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, A and B, and the gradient to y."""
    x, dy = bench_device.normal(case.rows, case.k, dtype=dtype, seed=1), bench_device.normal(case.rows, case.n, dtype=dtype, seed=2)
    a = bench_device.normal(case.rank, case.k, dtype=torch.float32, seed=3) / case.k**0.5
    return [x, a, bench_device.normal(case.n, case.rank, dtype=torch.float32, seed=4)], dy


def _solved(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor | None = None) -> tuple[Tensor, ...]:
    """The result and the gradients to the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = function(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, gradient))


def check_product(checks: Checks, bench_device: BenchDevice, case: Product, dtype: torch.dtype, bias: bool = False) -> None:
    """``nf4_lora`` by every way, and its three gradients."""
    weight = bench_device.weight((case.n, case.k), case.nested)
    held = reference.dequantise(weight, dtype)
    leaves, dy = _operands(bench_device, case, dtype)
    added = bench_device.normal(case.n, dtype=dtype, seed=5) if bias else None

    def plain(kind: torch.dtype) -> tuple[Tensor, ...]:
        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            bias = None if added is None else added.to(kind)
            return reference.lora_linear(x, held.to(kind), a, b, SCALE, bias, case.dropout, SEED)

        return _solved(function, [leaf.to(kind) if kind == torch.float64 else leaf for leaf in leaves], dy.to(kind))

    truth, eager = plain(torch.float64), plain(dtype)
    terms = {"y": case.k + case.rank, "dx": case.n + case.rank, "dA": case.rows + case.n, "dB": case.rows + case.k}
    for way, limits in WAYS.items():
        operand = held if way.startswith("resident") else weight
        with checks.about(f"{case}, {dtype}, {way}"), ops.override_dispatch(bench_device.device, *limits):
            poison(bench_device)
            got = _solved(lambda *leaves: ops.fused().lora_linear(*_with(leaves, operand), SCALE, added, case.dropout, SEED), leaves, dy)  # noqa: B023
            for (name, count), *results in zip(terms.items(), got, eager, truth, strict=True):
                checks.faithful(f"{case}, {dtype}, {way}: {name}", *results, count)


def _with(leaves: tuple[Tensor, ...], weight: NF4Weight | Tensor) -> tuple:
    return leaves[0], weight, *leaves[1:]


def check_linear(checks: Checks, bench_device: BenchDevice, case: Product, dtype: torch.dtype) -> None:
    """``linear`` by every way, and its gradient."""
    weight = bench_device.weight((case.n, case.k), case.nested)
    held = reference.dequantise(weight, dtype)
    (x, _, _), dy = _operands(bench_device, case, dtype)
    truth = _solved(lambda x: reference.linear(x, held.double()), [x.double()], dy.double())
    eager = _solved(lambda x: reference.linear(x, held), [x], dy)
    for way, limits in WAYS.items():
        operand = held if way.startswith("resident") else weight
        with ops.override_dispatch(bench_device.device, *limits):
            poison(bench_device)
            got = _solved(lambda x: ops.fused().linear(x, operand), [x], dy)  # noqa: B023
        for name, count, *results in zip(("y", "dx"), (case.k, case.n), got, eager, truth, strict=True):
            checks.faithful(f"linear {case}, {dtype}, {way}: {name}", *results, count)


def check_pool_norm(checks: Checks, bench_device: BenchDevice, pairs: int, width: int) -> None:
    """Unit rows and the gradient to the states, with the norm and without it."""
    indptr, indices, nodes = paths(2 * pairs, bench_device.device)
    transposed = reference.transpose_paths(indptr, indices, nodes)
    states, dunits = bench_device.normal(nodes, width, seed=5), bench_device.normal(2 * pairs, width, dtype=torch.float32, seed=7)
    lengths = indptr.diff()
    word = torch.repeat_interleave(torch.arange(2 * pairs, device=indptr.device), lengths)
    for norm_weight in (None, bench_device.normal(width, dtype=torch.float32, seed=6) * 0.1 + 1):

        def exact(states: Tensor, norm_weight=norm_weight) -> Tensor:
            tokens = states
            if norm_weight is not None:
                tokens = tokens / (tokens.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * norm_weight.double()
            sums = tokens.new_zeros(2 * pairs, width).index_add(0, word, tokens[indices])
            return F.normalize(sums / lengths.clamp(min=1)[:, None], dim=-1, eps=reference.UNIT_EPS)

        def by(impl, norm_weight=norm_weight) -> tuple[Tensor, ...]:
            return _solved(lambda states: impl.pool_norm(states, indptr, indices, norm_weight, 1e-6, transposed), [states], dunits)

        truth, eager = _solved(exact, [states.double()], dunits.double()), by(reference)
        poison(bench_device)
        with ops.override_dispatch(bench_device.device, 0, 0):
            got = by(ops.fused())
        norm = "without the norm" if norm_weight is None else "with the norm"
        for name, *results in zip(("units", "dstates"), got, eager, truth, strict=True):
            checks.faithful(f"pool_norm {pairs} x {width} {norm}: {name}", *results, width)


def check_infonce(checks: Checks, bench_device: BenchDevice, pairs: int, width: int, sizes: Sizes) -> None:
    """The loss and its gradients to both sides and to the temperature; the truth comes in blocks of rows."""
    source, target = (side.detach() for side in units(bench_device, pairs, width))
    temperature = torch.tensor(TEMPERATURE, device=bench_device.device)
    false_negatives = edges(pairs, bench_device.device)
    leaves = [source, target, temperature]
    truth = streamed(*(leaf.double() for leaf in leaves), false_negatives, sizes.block)
    if pairs <= sizes.eager:
        eager = _solved(lambda *leaves: reference.infonce(*leaves, false_negatives), leaves)
    else:
        eager = streamed(*leaves, false_negatives, sizes.block)
    poison(bench_device)
    with ops.override_dispatch(bench_device.device, 0, 0):
        got = _solved(lambda *leaves: ops.fused().infonce(*leaves, false_negatives), leaves)
    for name, *results in zip(("loss", "dsource", "dtarget", "dtemperature"), got, eager, truth, strict=True):
        checks.faithful(f"infonce {pairs} x {width}: {name}", *results, pairs + width)


def streamed(source: Tensor, target: Tensor, temperature: Tensor, false_negatives: Tensor, block: int) -> tuple[Tensor, ...]:
    """infonce and its gradients by plain PyTorch in the dtype of its input, ``block`` rows of s at a time."""
    pairs = len(source)
    own = (source * target).sum(1) / temperature
    row_lse, column_lse = own.new_empty(pairs), own.new_full((pairs,), float("-inf"))

    def rows() -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, pairs, block):
            some = slice(first, min(pairs, first + block))
            s = source[some] @ target.t() / temperature
            inside = false_negatives[(false_negatives[:, 0] >= some.start) & (false_negatives[:, 0] < some.stop)]
            s[inside[:, 0] - some.start, inside[:, 1]] = float("-inf")
            yield some, s

    for some, s in rows():
        row_lse[some] = s.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, s.logsumexp(0))
    loss = ((row_lse - own) + (column_lse - own)).mean() / 2
    dsource, dtarget, dtemperature = torch.empty_like(source), torch.zeros_like(target), torch.zeros_like(temperature)
    for some, s in rows():
        weights = (s - row_lse[some, None]).exp() + (s - column_lse).exp()
        weights[:, some].diagonal().sub_(2)
        weights /= 2 * pairs * temperature
        dsource[some] = weights @ target
        dtarget += weights.t() @ source[some]
        dtemperature -= (weights * s.masked_fill(s == float("-inf"), 0.0)).sum()
    return loss, dsource, dtarget, dtemperature


def check_hinge(checks: Checks, bench_device: BenchDevice) -> None:
    """The paper's loss and its gradients."""
    pairs, width = (9, 32) if bench_device.rehearsal else (257, 768)
    # of strangers: the loss of pairs that are alike is a small difference of large cosines, on which the rule says little
    source, target = (F.normalize(bench_device.normal(pairs, width, dtype=torch.float32, seed=seed), dim=-1) for seed in (9, 10))
    false_negatives = edges(pairs, bench_device.device)
    own = torch.arange(pairs, device=bench_device.device)

    def exact(u: Tensor, v: Tensor) -> Tensor:
        cosines = u @ v.t()
        kept = torch.ones_like(cosines, dtype=torch.bool)
        kept[false_negatives[:, 0], false_negatives[:, 1]] = kept[own, own] = False
        hardest = cosines.masked_fill(~kept, float("-inf")).amax(1)
        return (0.4 - cosines.diagonal() + hardest).clamp(min=0).mean()

    truth = _solved(exact, [source.double(), target.double()])
    eager = _solved(lambda u, v: reference.hinge(u, v, 0.4, false_negatives), [source, target])
    poison(bench_device)
    with ops.override_dispatch(bench_device.device, 0, 0):
        got = _solved(lambda u, v: ops.fused().hinge(u, v, 0.4, false_negatives), [source, target])
    for name, *results in zip(("loss", "dsource", "dtarget"), got, eager, truth, strict=True):
        checks.faithful(f"hinge {pairs} x {width}: {name}", *results, pairs + width)


def check_nan(checks: Checks, bench_device: BenchDevice) -> None:
    """A NaN comes through, and stays where it belongs."""
    case = Product("nan", 128, 64, rows=6, rank=4)
    weight, (x, a, b) = bench_device.weight((128, 64), False), _operands(bench_device, case, bench_device.dtype)[0]
    x[2, 7] = torch.nan
    held = reference.dequantise(weight, bench_device.dtype)
    for way, limits in WAYS.items():
        with ops.override_dispatch(bench_device.device, *limits):
            nan = ops.fused().lora_linear(x, held if way.startswith("resident") else weight, a, b, SCALE).isnan()
        checks.holds(f"nan in row 2 of 6, {way}", nan[2].all() and nan.sum() == 128, f"{int(nan.sum())} of 128")
    indptr, indices, nodes = paths(16, bench_device.device)
    states = bench_device.normal(nodes, 64)
    states[indices[0]] = torch.nan
    with ops.override_dispatch(bench_device.device, 0, 0):
        nan = ops.fused().pool_norm(states, indptr, indices).isnan().all(1)
    holds = torch.stack([(indices[begin:end] == indices[0]).any() for begin, end in zip(indptr[:-1], indptr[1:])])
    checks.equal("nan in the words that hold the node and in no other", (nan,), (holds,))
    source, target = (side.detach().clone() for side in units(bench_device, 8, 64))
    source[3] = torch.nan
    with ops.override_dispatch(bench_device.device, 0, 0):
        loss = ops.fused().infonce(source, target, TEMPERATURE, edges(8, bench_device.device))
    checks.holds("nan in a word's vector is a nan in the loss", loss.isnan(), str(loss))


def check_same_bits(checks: Checks, bench_device: BenchDevice) -> None:
    """Twice the same, with every gradient."""
    pairs, width = (3, 32) if bench_device.rehearsal else (1024, 768)
    case = Product("bits", 65, 64, rows=3, rank=4) if bench_device.rehearsal else Product("bits", 4096, 4096, rows=1000)
    weight, (leaves, dy) = bench_device.weight((case.n, case.k), True), _operands(bench_device, case, bench_device.dtype)
    held = reference.dequantise(weight, bench_device.dtype)
    indptr, indices, nodes = paths(2 * pairs, bench_device.device)
    states, dunits = bench_device.normal(nodes, width), bench_device.normal(2 * pairs, width, dtype=torch.float32)
    sides, false_negatives = list(units(bench_device, pairs, width)), edges(pairs, bench_device.device)
    problems: dict[str, tuple] = {
        f"nf4_lora, {way}": (
            functools.partial(
                lambda operand, *leaves: ops.fused().lora_linear(*_with(leaves, operand), SCALE, None, 0.1, SEED),
                held if way.startswith("resident") else weight,
            ),
            leaves,
            dy,
            limits,
        )
        for way, limits in WAYS.items()
    }
    problems["pool_norm"] = (lambda states: ops.fused().pool_norm(states, indptr, indices), [states], dunits, (0, 0))
    problems["infonce"] = (lambda u, v: ops.fused().infonce(u, v, TEMPERATURE, false_negatives), sides, None, (0, 0))
    problems["hinge"] = (lambda u, v: ops.fused().hinge(u, v, 0.4, false_negatives), sides, None, (0, 0))
    for name, (function, operands, gradient, limits) in problems.items():
        with checks.about(f"the same bits twice: {name}"), ops.override_dispatch(bench_device.device, *limits):
            checks.equal(f"the same bits twice: {name}", *(_solved(function, operands, gradient) for _ in range(2)))


def check_large_products(checks: Checks, bench_device: BenchDevice, elements: int) -> None:
    """y and its gradient of more than 2³¹ elements, decoded, dequantised and by cuBLAS: rows that repeat give results that repeat."""
    case = Product("large", 64 if bench_device.rehearsal else 1024, 64, rows=5, rank=2)
    weight, (leaves, dy) = bench_device.weight((case.n, case.k), False), _operands(bench_device, case, bench_device.dtype)
    times = elements // (case.n * case.rows) + 1

    def farthest() -> list[tuple[str, float]]:
        def function(*leaves: Tensor) -> Tensor:
            return ops.fused().lora_linear(*_with(leaves, weight), SCALE)

        few = _solved(function, leaves, dy)
        many = _solved(function, [leaves[0].repeat(times, 1), *leaves[1:]], dy.repeat(times, 1))
        # few rows are multiplied by other tiles than many
        far = [(got.view(times, case.rows, -1) - one).abs().amax() / one.abs().amax() for got, one in zip(many[:2], few)]
        return list(zip(("y", "dx"), (each.item() for each in far)))

    for way, limits in tune.WAYS.items():
        with checks.about(f"{elements} elements, {way}"), ops.override_dispatch(bench_device.device, *limits):
            for name, error in farthest():
                checks.holds(f"{elements} elements, {way}: {name}", error < 0.02, f"a relative difference of {error:.2g}")
        free()


def check_large_dequantise(checks: Checks, bench_device: BenchDevice, elements: int) -> None:
    """A weight of more than 2³¹ elements: its first and last rows."""
    k = 4096 if elements > 4096 * 16 else 64
    n = elements // k + 5
    generator = torch.Generator(bench_device.device).manual_seed(0)
    codes = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=bench_device.device, generator=generator)
    absmax = torch.rand(n * k // 64, device=bench_device.device, generator=generator)
    code = bench_device.weight((64, 64), False).code
    got = nf4.dequantise(NF4Weight(codes, absmax, code, (n, k), bench_device.dtype), bench_device.dtype)
    for name, some in (("first", slice(0, 8)), ("last", slice(n - 8, n))):
        few = NF4Weight(
            codes[some.start * k // 2 : some.stop * k // 2],
            absmax[some.start * k // 64 : some.stop * k // 64],
            code,
            (8, k),
            bench_device.dtype,
        )
        checks.equal(f"dequantise {elements} elements: {name} rows", (got[some],), (reference.dequantise(few, bench_device.dtype),))


def poison(bench_device: BenchDevice) -> None:
    """Leave NaN in the memory that the next tensors get."""
    if bench_device.device.type != "cuda":
        return
    # what is freed here is the only free memory then, of both of the allocator's kinds
    torch.cuda.empty_cache()
    nan = [torch.full((size,), torch.nan, device=bench_device.device) for size in (1 << 28, *[1 << 16] * 32)]
    del nan


def _farthest(tensor: Tensor, truth: Tensor) -> float:
    return (tensor.double() - truth).abs().max().item() if truth.numel() else 0.0
