"""The CPU's linear layers by each library, from packed NF4, too: the reference's numbers, and no decoded weight that is kept."""

import dataclasses
import functools
import gc
import sys

import pytest
import torch
from tli_kernels import cpu, reference
from tli_kernels.cpu import Matmul
from tli_kernels.nf4_weight import NF4Weight

from tests.support.fidelity import assert_faithful
from tli.runtime import cpu as processor

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
    decoded = torch.cat([part for _, part in cpu._decoded_parts(weight, dtype)])
    assert torch.equal(decoded, reference.dequantise(weight, dtype))


@pytest.mark.parametrize("matmul", [Matmul("onednn"), Matmul("torch"), Matmul("torch", in_float32=True)], ids=lambda matmul: matmul.name)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("held", ["full", "nf4"])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("size", SHAPES[:2], ids=lambda size: f"{size[0]}x{size[1]}")
def test_outputs_and_gradients_are_as_faithful_as_the_references(size, dropout, rows, held, dtype, matmul):
    if not processor.runs(matmul, str(dtype).removeprefix("torch.")):
        pytest.skip("this processor has no such product")
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
        run(functools.partial(cpu.lora_linear, matmul=matmul), weight if held == "nf4" else dense, dtype, torch.float32),
        run(reference.lora_linear, dense, dtype, torch.float32),
        run(reference.lora_linear, dense.double(), torch.float64, torch.float64),
        strict=True,
    )
    for what, (got, eager, truth) in zip(("y", "dx", "da", "db"), results, strict=True):
        assert_faithful(got, eager, truth, max(n, k), what)


def test_a_weight_with_a_table_of_its_own_is_decoded_by_that_table():
    weight = packed((64, 128), False)
    own = dataclasses.replace(weight, code=torch.linspace(-1.0, 1.0, 16))
    decoded = torch.cat([part for _, part in cpu._decoded_parts(own, torch.float32)])
    assert torch.equal(decoded, reference.dequantise(own, torch.float32))
    assert not torch.equal(decoded, reference.dequantise(weight, torch.float32))


@pytest.mark.parametrize("broken", ["absent", "raises", "wrong"])
def test_a_decoder_that_fails_its_try_is_not_taken(monkeypatch, broken):
    def fails(*_):
        raise RuntimeError("illegal instruction set")

    def wrong(weight, dtype):
        return reference.dequantise(weight, dtype) + 1

    if broken == "absent":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
        cpu._bitsandbytes_table.cache_clear()
    else:
        monkeypatch.setattr(cpu, "_decode_by_bitsandbytes", {"raises": fails, "wrong": wrong}[broken])
    cpu.nf4_decoder.cache_clear()
    try:
        assert cpu.nf4_decoder().name == "plain PyTorch"
        weight = NF4Weight(
            torch.arange(256, dtype=torch.uint8).repeat(16), torch.ones(128), torch.linspace(-1, 1, 16), (64, 128), torch.float32
        )
        assert torch.equal(
            torch.cat([part for _, part in cpu._decoded_parts(weight, torch.float32)]), reference.dequantise(weight, torch.float32)
        )
    finally:
        cpu.nf4_decoder.cache_clear()
        cpu._bitsandbytes_table.cache_clear()


@pytest.mark.parametrize("name", ["onednn", "torch", "onednn in float32"])
def test_a_matmul_has_a_name_to_be_found_by(name):
    assert Matmul.named(name).name == name
    with pytest.raises(ValueError, match="the library must be one of onednn, torch, got 'mkl'"):
        Matmul.named("mkl")


def test_no_decoded_weight_is_kept_for_the_backward_pass():
    weight = packed((192, 576), False)
    x = torch.randn(4, 576, requires_grad=True)
    a, b = torch.randn(8, 576, requires_grad=True), torch.randn(192, 8, requires_grad=True)
    y = cpu.linear(cpu.lora_linear(x, weight, a, b, 1.0), packed((64, 192), True))
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.shape in ((192, 576), (64, 192))]
    assert alive == []
    y.sum().backward()
    assert x.grad.any()
