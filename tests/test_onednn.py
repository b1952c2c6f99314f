"""The CPU's linear layers from packed NF4: the reference's numbers, and no dequantised weight that outlives its product."""

import gc

import pytest
import torch
from fidelity import assert_faithful
from tli_kernels import onednn, reference
from tli_kernels.nf4_weight import NF4Weight

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
SHAPES = [(64, 128), (192, 576), (257, 64), (1, 64)]


def packed(size: tuple[int, int], nested: bool) -> NF4Weight:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    return NF4Weight.quantise(weight, nested=nested)


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_decoding_is_the_references_to_the_last_bit(size, nested, dtype):
    weight = packed(size, nested)
    decoded = torch.cat([part for _, part in onednn._decoded_parts(weight, dtype)])
    assert torch.equal(decoded, reference.dequantise(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", ["full", "nf4"])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("size", SHAPES[:2], ids=lambda size: f"{size[0]}x{size[1]}")
def test_outputs_and_gradients_are_as_faithful_as_the_references(size, dropout, rows, held, dtype):
    generator = torch.Generator().manual_seed(1)
    weight, (n, k) = packed(size, False), size
    numbers = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / width**0.5
        for name, shape, width in (("x", (rows, k), 1), ("a", (8, k), k), ("b", (n, 8), 8), ("bias", (n,), 1), ("dy", (rows, n), 1))
    }

    # what all three read is what the narrow one can hold
    numbers = {name: value.to(dtype).double() for name, value in numbers.items()}

    def run(op, held, dtype, factors):
        x, a, b = (numbers[name].to(kind).requires_grad_() for name, kind in (("x", dtype), ("a", factors), ("b", factors)))
        y = op(x, held, a, b, 0.5, numbers["bias"].to(dtype), dropout, 3)
        y.backward(numbers["dy"].to(dtype))
        return y, x.grad, a.grad, b.grad

    dense = reference.dequantise(weight, dtype)
    results = zip(
        run(onednn.nf4_lora, weight if held == "nf4" else dense, dtype, torch.float32),
        run(reference.nf4_lora, dense, dtype, torch.float32),
        run(reference.nf4_lora, dense.double(), torch.float64, torch.float64),
        strict=True,
    )
    for what, (got, eager, truth) in zip(("y", "dx", "da", "db"), results, strict=True):
        assert_faithful(got, eager, truth, max(n, k), what)


def test_no_decoded_weight_is_kept_for_the_backward_pass():
    weight = packed((192, 576), False)
    x = torch.randn(4, 576, requires_grad=True)
    a, b = torch.randn(8, 576, requires_grad=True), torch.randn(192, 8, requires_grad=True)
    y = onednn.linear(onednn.nf4_lora(x, weight, a, b, 1.0), packed((64, 192), True))
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.shape in ((192, 576), (64, 192))]
    assert alive == []
    y.sum().backward()
    assert x.grad.any()
