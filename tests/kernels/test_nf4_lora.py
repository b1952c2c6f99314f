"""lora_linear and linear by every way against fp64: outputs, every gradient, the edges, and the dropout's two faces."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tli_kernels import launch, nf4_lora, reference, shapes
from tli_kernels.nf4_weight import NF4Weight

from tests.support.fidelity import DEVICE, assert_faithful, poisoned

pytestmark = pytest.mark.slow

ALWAYS, CAPABILITY = launch.ALWAYS, launch.capability(DEVICE)
WAYS = {"decode": (ALWAYS, ALWAYS), "dequantise": (0, ALWAYS), "cublas": (0, 0), "resident": (0, ALWAYS), "resident-cublas": (0, 0)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TWINS = sorted({shapes.twin(size) for size in shapes.weights().values()})


@contextlib.contextmanager
def way(name: str):
    """Take one way whatever the number of rows."""
    launch.use(CAPABILITY, launch.Dispatch(*WAYS[name]))
    try:
        yield
    finally:
        launch.use(CAPABILITY, None)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Operands:
    """Random operands of one product, and the same by the reference in any dtype."""

    def __init__(self, m, n, k, r, dtype, nested=True, bias=True, dropout=0.0, quantised=True, seed=0):
        packed = NF4Weight.quantise(normal(n, k, seed=seed) / k**0.5, nested=nested).to(DEVICE)
        self.held = reference.dequantise(packed, dtype)
        self.weight = packed if quantised else self.held
        self.x, self.dy = normal(m, k, seed=1).to(DEVICE, dtype), normal(m, n, seed=2).to(DEVICE, dtype)
        self.a, self.b = (normal(r, k, seed=3) / k**0.5).to(DEVICE), normal(n, r, seed=4).to(DEVICE)
        self.bias = normal(n, seed=5).to(DEVICE, dtype) if bias else None
        self.dropout = dropout

    def leaves(self, dtype=None) -> list[torch.Tensor]:
        x, a, b = self.x, self.a, self.b
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]

    def fused(self) -> list[torch.Tensor]:
        x, a, b = self.leaves()
        y = nf4_lora.lora_linear(x, self.weight, a, b, 0.7, self.bias, self.dropout, seed=2**40 + 12345)
        return [y, *torch.autograd.grad(y, (x, a, b), self.dy)]

    def plain(self, dtype=None) -> list[torch.Tensor]:
        x, a, b = self.leaves(dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = reference.lora_linear(x, self.held.to(x.dtype), a, b, 0.7, bias, self.dropout, seed=2**40 + 12345)
        return [y, *torch.autograd.grad(y, (x, a, b), self.dy.to(x.dtype))]

    def check(self, results=None) -> None:
        (m, k), n, r = self.x.shape, len(self.held), len(self.a)
        terms = {"y": k + r, "dx": n + r, "dA": m + n, "dB": m + k}
        for (name, count), got, eager, truth in zip(terms.items(), results or self.fused(), self.plain(), self.plain(torch.float64)):
            assert_faithful(got, eager, truth, count, name)


CASES = [
    # m, r, nested, bias, dropout; each with its own size in turn
    (1, 16, True, True, 0.0),
    (5, 1, False, False, 0.3),
    (67, 33, True, False, 0.1),
]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "m{}-r{}".format(*CASES[i]))
def test_every_way_is_the_formula_with_its_gradients(name, dtype, case):
    m, r, nested, bias, dropout = CASES[case]
    n, k = TWINS[(case + list(WAYS).index(name) + list(DTYPES).index(dtype)) % len(TWINS)]
    with way(name), poisoned():
        Operands(m, n, k, r, DTYPES[dtype], nested, bias, dropout, quantised=not name.startswith("resident")).check()


@pytest.mark.parametrize("size", TWINS, ids=lambda size: "n{}-k{}".format(*size))
def test_the_named_shapes_by_the_dispatch_that_holds(size):
    for m in (16, 65):
        Operands(m, *size, 16, torch.bfloat16, dropout=0.1).check()


@pytest.mark.parametrize("name", ["decode", "dequantise"])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(3, 1, 64, 1), (2, 127, 128, 64), (2, 129, 64, 129), (130, 7, 64, 2), (1, 257, 192, 256), (3, 1023, 1088, 5)]
)
def test_edges(name, m, n, k, r):
    with way(name), poisoned():
        Operands(m, n, k, r, torch.float16, dropout=0.2).check()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 67), (1025, 31)])
def test_resident_weights_may_have_any_number_of_features(n, k):
    x, weight, a, b = normal(9, k), normal(n, k, seed=1), normal(3, k, seed=2), normal(n, 3, seed=3)
    x, weight, a, b = (tensor.to(DEVICE) for tensor in (x, weight, a, b))
    with way("resident"), poisoned():
        got = nf4_lora.lora_linear(x, weight, a, b, 0.7)
    args = [tensor.double() for tensor in (x, weight, a, b)]
    assert_faithful(got, reference.lora_linear(x, weight, a, b, 0.7), reference.lora_linear(*args, 0.7), k)


@pytest.mark.parametrize("name", ["decode", "dequantise", "cublas"])
def test_no_rows_give_no_rows_and_zero_gradients(name):
    with way(name), poisoned():
        y, dx, da, db = Operands(0, 100, 128, 4, torch.bfloat16, dropout=0.1).fused()
    assert y.shape == (0, 100)
    assert dx.shape == (0, 128)
    assert not da.any()
    assert not db.any()


@pytest.mark.parametrize("name", ["decode", "dequantise", "cublas"])
def test_linear_is_the_product_alone(name):
    operands = Operands(9, 100, 128, 1, torch.bfloat16)
    x, _, _ = operands.leaves()
    with way(name), poisoned():
        y = nf4_lora.linear(x, operands.weight, operands.bias)
        (dx,) = torch.autograd.grad(y, x, operands.dy)
    x64, held = x.detach().double().requires_grad_(), operands.held
    truth = reference.linear(x64, held.double(), operands.bias.double())
    eager = reference.linear(x, held, operands.bias)
    assert_faithful(y, eager, truth, 128, "y")
    (dx_truth,), (dx_eager,) = torch.autograd.grad(truth, x64, operands.dy.double()), torch.autograd.grad(eager, x, operands.dy)
    assert_faithful(dx, dx_eager, dx_truth, 100, "dx")


def test_dropout_is_the_reference_mask_forward_and_backward():
    size = 128
    eye, nothing = torch.eye(size, device=DEVICE), torch.zeros(size, size, device=DEVICE)
    ones = torch.ones(70, size, device=DEVICE, requires_grad=True)
    a = eye.clone().requires_grad_()
    # with W = 0 and A = B = 1, y is s·kept(x)/(1 - p) and dx is s·kept(1)/(1 - p)
    y = nf4_lora.lora_linear(ones, nothing, a, eye, 1.0, dropout=0.25, seed=77)
    dx, da = torch.autograd.grad(y.sum(), (ones, a))
    mask = reference.keep_mask(77, 70, size, 0.25, DEVICE)
    assert torch.equal(y != 0, mask)
    assert torch.equal(dx != 0, mask)
    torch.testing.assert_close(da, (mask.sum(0) / 0.75).expand(size, size))
    assert mask.float().mean().item() == pytest.approx(0.75, abs=0.02)


def test_dropout_is_drawn_anew_by_seed_and_alike_by_every_way():
    operands = Operands(40, 100, 128, 8, torch.float32, dropout=0.5)
    results = {}
    for name in ("decode", "dequantise", "cublas"):
        with way(name):
            results[name] = operands.fused()
    for name in ("dequantise", "cublas"):
        for got, same in zip(results[name], results["decode"]):
            torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-4)
    first = nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7, dropout=0.5, seed=1)
    assert not torch.equal(first, nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7, dropout=0.5, seed=2))


def test_a_seed_in_memory_is_read_when_the_kernels_run():
    operands, seed = Operands(40, 100, 128, 8, torch.float32, dropout=0.5), torch.tensor([2**40 + 12345], device=DEVICE)

    def drawn(seed):
        x, a, b = operands.leaves()
        y = nf4_lora.lora_linear(x, operands.weight, a, b, 0.7, dropout=0.5, seed=seed)
        return y, *torch.autograd.grad(y, (x, a, b), operands.dy)

    for ours, number in zip(drawn(seed), drawn(2**40 + 12345), strict=True):
        assert torch.equal(ours, number)
    seed += 1
    for ours, number in zip(drawn(seed), drawn(2**40 + 12346), strict=True):
        assert torch.equal(ours, number)


def test_the_same_bits_twice():
    operands = Operands(70, 100, 256, 16, torch.float16, dropout=0.1)
    for one, other in zip(operands.fused(), operands.fused()):
        assert torch.equal(one, other)


def test_dx_is_not_computed_where_x_needs_none(monkeypatch):
    operands = Operands(5, 100, 128, 4, torch.float32)
    _, a, b = operands.leaves()
    y = nf4_lora.lora_linear(operands.x, operands.weight, a, b, 0.7)
    launched, run = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *rest, **options: (launched.append(kernel.fn.__name__), run(kernel, *rest, **options))
    )
    da, db = torch.autograd.grad(y, (a, b), operands.dy)
    assert sorted(launched) == ["_down_kernel", "_outer_kernel", "_outer_kernel"]
    operands.bias = None
    operands.check([y, operands.plain()[1], da, db])


@settings(deadline=None, max_examples=10)
@given(rows=st.integers(1, 40), cut=st.integers(1, 40), seed=st.integers(0, 9))
def test_rows_do_not_know_of_each_other_and_x_comes_in_linearly(rows, cut, seed):
    operands = Operands(rows, 65, 64, 3, torch.float32, bias=False, seed=seed)
    y = nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7)
    fewer = nf4_lora.lora_linear(operands.x[:cut], operands.weight, operands.a, operands.b, 0.7)
    torch.testing.assert_close(y[:cut], fewer, rtol=1e-5, atol=1e-5)
    other = normal(rows, 64, seed=50 + seed).to(DEVICE)
    both = nf4_lora.lora_linear(2 * operands.x - other, operands.weight, operands.a, operands.b, 0.7)
    apart = 2 * y - nf4_lora.lora_linear(other, operands.weight, operands.a, operands.b, 0.7)
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["decode", "resident"])
def test_a_nan_stays_in_its_row(name):
    operands = Operands(6, 100, 128, 4, torch.float16, quantised=name == "decode")
    operands.x[2, 7] = torch.nan
    with way(name):
        y = nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3, 4, 5]].isnan().any()


def test_x_may_have_strides_and_more_dimensions():
    operands = Operands(12, 100, 128, 4, torch.float32)
    expected = nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7)
    wide = torch.full((12, 300), torch.nan, device=DEVICE)
    wide[:, :128] = operands.x
    for x in (wide[:, :128], operands.x.t().contiguous().t(), operands.x.view(3, 4, 128)):
        got = nf4_lora.lora_linear(x, operands.weight, operands.a, operands.b, 0.7)
        assert got.shape == (*x.shape[:-1], 100)
        torch.testing.assert_close(got.view(12, 100), expected)


def test_rows_beyond_two_to_the_31_elements():
    # three rows 2^30 elements apart; only their pages are ever touched
    operands = Operands(3, 64, 64, 2, torch.float16)
    far = torch.empty(2 * 2**30 + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (2**30, 1))
    far.copy_(operands.x)
    expected, operands.x = operands.plain(), far
    for got, plain in zip(operands.fused(), expected):
        torch.testing.assert_close(got, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="16 million programs: minutes on a GPU's neighbour, hours in the interpreter")
@pytest.mark.parametrize("name", ["decode", "dequantise", "cublas"])
def test_a_result_beyond_two_to_the_31_elements(name):
    rows = 2**21 + 3
    operands = Operands(5, 1024, 64, 2, torch.bfloat16)
    x = operands.x.repeat(rows // 5 + 1, 1)[:rows].requires_grad_()
    with way(name):
        y = nf4_lora.lora_linear(x, operands.weight, operands.a, operands.b, 0.7)
        expected = nf4_lora.lora_linear(operands.x, operands.weight, operands.a, operands.b, 0.7)
    torch.testing.assert_close(y[-5:], expected.repeat(2, 1)[rows % 5 :][:5], rtol=1e-2, atol=1e-2)


def test_one_buffer_serves_layers_of_any_size():
    small, large = Operands(5, 64, 64, 2, torch.float32), Operands(5, 128, 192, 2, torch.float32)
    with way("dequantise"):
        nf4_lora._buffers.clear()
        for operands in (small, large, small):
            operands.check()
    assert [buffer.numel() for buffer in nf4_lora._buffers.values()] == [128 * 192]


def test_errors_name_what_must_hold_what_was_got_and_what_to_do():
    operands = Operands(4, 100, 128, 3, torch.float32)
    x, weight, a, b = operands.x, operands.weight, operands.a, operands.b

    def raises(match, *args, **named):
        return pytest.raises(ValueError, match=match), args, named

    held = operands.held
    for context, args, named in (
        raises("^lora_linear: x must be float32, bfloat16 or float16, got torch.float64; convert it$", x.double(), weight, a, b, 1.0),
        raises("^lora_linear: x must be .* got .*; check both$", x[:, :64], weight, a, b, 1.0),
        raises("^lora_linear: lora_a must be .R, 128. and lora_b .100, R., R at least 1, got ", x, weight, a[:2], b, 1.0),
        raises("^lora_linear: lora_a must be ", x, weight, a[:0], b[:, :0], 1.0),
        raises("^lora_linear: dropout must be in .0, 1., got 1.0; choose another$", x, weight, a, b, 1.0, dropout=1.0),
        raises("^lora_linear: the bias must be contiguous .100., got ", x, weight, a, b, 1.0, bias=torch.zeros(99, device=DEVICE)),
        raises("^lora_linear: the weight must be torch.float32 as x is, got torch.float16; ", x, held.half(), a, b, 1.0),
        raises("^lora_linear: the weight must lie row by row, got ", x, held.t().contiguous().t(), a, b, 1.0),
        raises("^lora_linear: all tensors must be on one device, got ", x, weight, a.to("meta"), b, 1.0),
    ):
        with context:
            nf4_lora.lora_linear(*args, **named)
