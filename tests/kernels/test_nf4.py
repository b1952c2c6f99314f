"""NF4 weights: bitsandbytes' bytes in and out, and dequantised to its very bits."""

import json
import re

import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.stats import norm
from tli_kernels import launch, nf4, reference, shapes
from tli_kernels.nf4_weight import BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight

from tests.support.fidelity import DEVICE, poisoned

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMPLEMENTATIONS = [nf4.dequantise, reference.dequantise]
TABLE, DYNAMIC = bitsandbytes.get_4bit_type("nf4", device="cpu"), bitsandbytes.create_dynamic_map()
# the interpreter takes each size's small twin
SIZES = sorted({size if DEVICE.type == "cuda" else shapes.twin(size) for size in shapes.weights().values()})
# of blocks: one, primes, and the edges of a program's 64 and of a nested scale's 256
BLOCKS = [(1, 64), (2, 64), (1, 192), (7, 64), (13, 320), (61, 64), (1, 64 * 67), (127, 64), (1, 64 * 257), (1023, 64), (1025, 64)]

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
levels = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
implementations = pytest.mark.parametrize("dequantise", IMPLEMENTATIONS, ids=["fused", "reference"])


def random_weight(n: int, k: int, nested: bool, seed: int = 0, magnitude: float = 1.0) -> NF4Weight:
    """Any bytes and any scales: none of what a real weight's statistics would spare."""
    generator = torch.Generator().manual_seed(seed)
    blocks = n * k // BLOCKSIZE
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator)
    if not nested:
        return NF4Weight(codes, magnitude * torch.rand(blocks, generator=generator), TABLE, (n, k), torch.float32)
    numbers = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    units = magnitude * torch.rand(-(-blocks // NESTED_BLOCKSIZE), generator=generator)
    offset = magnitude * torch.rand((), generator=generator)
    return NF4Weight(codes, numbers, TABLE, (n, k), torch.float32, units, DYNAMIC, offset)


def by_bitsandbytes(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own result on the CPU."""
    second = None
    if weight.nested:
        second = bitsandbytes.QuantState(weight.nested_absmax, code=weight.nested_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    state = bitsandbytes.QuantState(weight.absmax, weight.shape, weight.code, BLOCKSIZE, "nf4", dtype, weight.offset, second)
    return bitsandbytes.dequantize_4bit(weight.codes.view(-1, 1), state)


def expected(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' result, but bf16 numbers below the normal ones rounded: its AVX-512 conversion makes zeros of them."""
    result = by_bitsandbytes(weight, dtype)
    if dtype == torch.bfloat16:
        single = by_bitsandbytes(weight, torch.float32)
        result = torch.where(single.abs() < torch.finfo(dtype).tiny, single.to(dtype), result)
    return result


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.cpu(), want.cpu()
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    # there are many NaN, and nobody minds which
    assert torch.equal(got.isnan(), want.isnan())
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.nan_to_num(0.0).view(integer), want.nan_to_num(0.0).view(integer))


def code_book() -> torch.Tensor:
    """code = quantiles of N(0, 1), evenly spaced in probability from 0.9677083 to 1/2 on each side, over the largest.

    Seven values below zero, zero itself and eight above. Computed with is the table that a weight brings; this is its definition.

    Returns:
        fp32 [16], rising from -1 to 1. Source: QLoRA (arXiv 2305.14314), section 3 and appendix E.
    """
    # in single precision throughout, like whoever made the table: in fp64 ten of the values come out one to six units off
    above, below = (norm.ppf(torch.linspace(0.9677083, 0.5, steps).numpy()) for steps in (9, 8))
    values = torch.tensor([*-below[:-1], 0.0, *above[-2::-1]], dtype=torch.float32)
    return values / values.max()


def test_the_code_book_is_its_definition():
    assert torch.equal(code_book(), TABLE)
    # evenly spaced probabilities on each side of an exact zero, in fp64: the table is off by the last digit of 1.0 at most
    above, below = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1]), norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    exact = np.sort(np.concatenate([-below, [0.0], above])) / above.max()
    assert np.abs(exact - TABLE.double().numpy()).max() <= 2.0**-23
    assert TABLE[7] == 0.0


@implementations
@dtypes
@pytest.mark.parametrize("place", ["even", "odd"])
def test_every_byte_gives_its_high_half_first(dequantise, dtype, place):
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(2)
    codes[place == "even" :: 2] = 0x5A
    # a table that tells all numbers apart, and not bitsandbytes': a weight's own is the one that counts
    table = torch.arange(16.0) - 3
    weight = NF4Weight(codes, torch.ones(16), table, (4, 256), torch.float32).to(DEVICE)
    want = [float(half - 3) for byte in codes.tolist() for half in (byte >> 4, byte & 15)]
    assert dequantise(weight, dtype).flatten().tolist() == want


SCALES = {"1e-30": 1e-30, "1e30": 1e30, "denormal": 1e-40, "least": 1.4e-45, "zero": 0.0, "largest": 3.4e38, "inf": np.inf, "nan": np.nan}


@implementations
@dtypes
@levels
# the interpreter's arithmetic is numpy's, which warns
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_no_scale_is_too_small_or_too_large(dequantise, dtype, nested, scale):
    codes = torch.arange(256, dtype=torch.uint8).repeat(32)
    if nested:
        # all 256 numbers, and an ordinary nested block beside the adversarial one
        numbers, units = torch.arange(256, dtype=torch.uint8), torch.tensor([scale])
        weights = [NF4Weight(codes, numbers, TABLE, (256, 64), torch.float32, units, DYNAMIC, torch.tensor(x)) for x in (0.0, scale, 0.5)]
    else:
        absmax = torch.rand(256, generator=torch.Generator().manual_seed(0))
        absmax[::2] = scale
        weights = [NF4Weight(codes, absmax, TABLE, (256, 64), torch.float32)]
    for weight in weights:
        assert_same_bits(dequantise(weight.to(DEVICE), dtype), expected(weight, dtype))


@dtypes
@levels
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_the_named_shapes_are_dequantised_to_the_bits_of_bitsandbytes(size, nested, dtype):
    weight = random_weight(*size, nested)
    want = expected(weight, dtype)
    assert_same_bits(nf4.dequantise(weight.to(DEVICE), dtype), want)
    assert_same_bits(reference.dequantise(weight, dtype), want)


@levels
@pytest.mark.parametrize("size", BLOCKS, ids=lambda size: "{}x{}".format(*size))
def test_any_number_of_blocks_is_written_whole_and_nothing_else(size, nested):
    weight, dtype = random_weight(*size, nested), torch.float16
    guard, count = 128, size[0] * size[1]
    memory = torch.full((guard + count + guard,), torch.nan, dtype=dtype, device=DEVICE)
    out = memory[guard : guard + count].view(size)
    with poisoned():
        fresh = nf4.dequantise(weight.to(DEVICE), dtype)
    assert nf4.dequantise(weight.to(DEVICE), dtype, out=out) is out
    assert_same_bits(out, expected(weight, dtype))
    assert_same_bits(fresh, out)
    assert memory[:guard].isnan().all()
    assert memory[guard + count :].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's stores are watched")
@pytest.mark.parametrize("size", [(1, 64), (67, 64), (13, 640)], ids=lambda size: "{}x{}".format(*size))
def test_each_element_is_written_once(size, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    written, store = [], InterpreterBuilder.create_masked_store

    def watched(self, ptrs, value, mask, *rest):
        written.append(ptrs.data[mask.data])
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched)
    out = nf4.dequantise(random_weight(*size, True), torch.bfloat16)
    addresses = np.sort(np.concatenate(written).astype(np.int64))
    assert np.array_equal(addresses, out.data_ptr() + 2 * np.arange(out.numel()))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the next test has the memory")
@levels
def test_addresses_go_past_two_to_the_31(nested, monkeypatch):
    """One program in the middle of a weight that no memory has to hold: its addresses are seen, not used."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen, start, load = [], InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_masked_load
    weight, element, tile = random_weight(64, 64, nested), 2**31 + 2**12, 64 * BLOCKSIZE
    small = {weight.code.data_ptr(), DYNAMIC.data_ptr(), *([weight.offset.data_ptr()] if nested else [])}

    def shifted(self, x, y, z):
        self.grid_dim = (2**31, 1, 1)
        return start(self, x + element // tile, y, z)

    def loaded(self, ptrs, mask, other, *rest):
        if int(ptrs.data.min()) in small:
            return load(self, ptrs, mask, other, *rest)
        seen.append(ptrs.data.astype(np.int64))
        return TensorHandle(other.data, other.dtype)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shifted)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", lambda self, ptrs, *rest: seen.append(ptrs.data.astype(np.int64)))
    out = torch.empty(1, dtype=torch.bfloat16)
    launch.run(nf4._dequantise_kernel, (1,), *weight.pointers, out, 2**30, NESTED=nested, BLOCK_S=64)
    block = element // BLOCKSIZE
    blocks = block + np.arange(64)
    want = [weight.codes.data_ptr() + element // 2 + np.arange(tile // 2).reshape(64, -1)]
    want += [weight.absmax.data_ptr() + blocks * weight.absmax.element_size()]
    want += [weight.nested_absmax.data_ptr() + blocks // NESTED_BLOCKSIZE * 4] if nested else []
    want += [out.data_ptr() + 2 * (element + np.arange(tile).reshape(64, -1))]
    assert len(seen) == len(want)
    assert all(np.array_equal(got, addresses) for got, addresses in zip(seen, want))


# takes 6 GB, which a GPU has
@pytest.mark.gpu
@levels
def test_a_weight_of_more_than_two_to_the_31_elements(nested):
    n, k = 2**19 + 4, 4096
    weight = random_weight(n, k, nested)
    out = nf4.dequantise(weight.to(DEVICE), torch.bfloat16)
    for row in (0, 2**19 - 4, 2**19):
        # four rows are 256 scales: one nested block
        blocks = slice(row * k // BLOCKSIZE, (row + 4) * k // BLOCKSIZE)
        second = (weight.nested_absmax[row // 4 : row // 4 + 1], DYNAMIC, weight.offset) if nested else ()
        part = NF4Weight(weight.codes[row * k // 2 : (row + 4) * k // 2], weight.absmax[blocks], TABLE, (4, k), torch.float32, *second)
        assert_same_bits(out[row : row + 4], expected(part, torch.bfloat16))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 9), k=st.integers(0, 5), nested=st.booleans(), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 10**6),
       exponent=st.integers(-45, 39))  # fmt: skip
def test_any_weight_is_its_definition(n, k, nested, dtype, seed, exponent):
    weight = random_weight(n, 64 * k, nested, seed, magnitude=float(np.float32(10.0) ** np.float32(exponent)))
    got = nf4.dequantise(weight.to(DEVICE), DTYPES[dtype])
    # element by element in numpy's fp32: each step rounded, none joined with the next
    codes, absmax, table = weight.codes.numpy(), weight.absmax.numpy(), TABLE.numpy()
    want = np.empty(n * 64 * k, np.float32)
    with np.errstate(all="ignore"):
        for i in range(len(want)):
            block = i // 64
            scale = absmax[block]
            if nested:
                scale = DYNAMIC.numpy()[scale] * weight.nested_absmax.numpy()[block // 256] + weight.offset.numpy()
            want[i] = table[codes[i // 2] >> 4 if i % 2 == 0 else codes[i // 2] & 15] * scale
    assert_same_bits(got, torch.from_numpy(want).to(DTYPES[dtype]).view(n, 64 * k))


@levels
@dtypes
def test_a_weight_is_quantised_saved_and_loaded_as_bitsandbytes_does_it(nested, dtype):
    dense = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype).t()[:192].contiguous().t().requires_grad_()
    assert not dense.is_contiguous()
    mine = NF4Weight.quantise(dense, nested)
    codes, state = bitsandbytes.quantize_4bit(dense.detach().contiguous(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    theirs = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    assert {key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in mine.state_dict().items()} == {
        key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in theirs.items()
    }
    # theirs read by us, and ours, through a file, by them: nothing is lost on either way
    again = NF4Weight.from_state_dict(theirs)
    assert (again.shape, again.dtype, again.nested, again.nbytes) == ((96, 192), dtype, nested, mine.nbytes)
    named = load(save({**mine.state_dict("a.weight"), **again.state_dict("b.weight")}))
    parts = {key.removeprefix("a.weight."): value for key, value in named.items() if key.startswith("a.weight.")}
    loaded = bitsandbytes.QuantState.from_dict(dict(parts), torch.device("cpu"))
    assert {key: value.numpy().tobytes() for key, value in loaded.as_dict(packed=True).items()} == {
        key: value.numpy().tobytes() for key, value in parts.items()
    }
    for weight in (mine, again, NF4Weight.from_state_dict(named, "b.weight")):
        assert_same_bits(nf4.dequantise(weight.to(DEVICE), dtype), bitsandbytes.dequantize_4bit(named["a.weight"], loaded))


def test_bytes_stored_as_numbers_of_another_dtype_are_the_same_bytes():
    dense = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, state = bitsandbytes.quantize_4bit(dense, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    tensors = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    assert codes.dtype == torch.bfloat16
    assert torch.equal(NF4Weight.from_state_dict(tensors).codes, NF4Weight.quantise(dense).codes)


def test_a_weight_moves_whole_and_says_what_it_is():
    weight = random_weight(4, 128, nested=True)
    moved = weight.to("meta")
    assert (moved.device.type, moved.shape, moved.ndim, moved.nested) == ("meta", (4, 128), 2, True)
    assert not moved.is_floating_point()
    # 4-bit numbers, 8-bit scales, one nested scale, two tables and the offset
    assert weight.nbytes == moved.nbytes == 256 + 8 + 4 + 4 * 256 + 4 * 16 + 4
    assert [tensor.data_ptr() for tensor in weight.pointers] == [
        getattr(weight, name).data_ptr() for name in ("codes", "absmax", "nested_absmax", "nested_code", "offset", "code")
    ]
    single = random_weight(4, 128, nested=False)
    assert all(pointer is single.absmax for pointer in single.pointers[1:5])


def test_what_is_launched_is_known_without_memory():
    with launch.recording(90) as launches:
        out = nf4.dequantise(random_weight(130, 64, nested=True).to("meta"), torch.bfloat16)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (130, 64), torch.bfloat16)
    (recorded,) = launches
    assert recorded.grid == (-(-130 // recorded.options["BLOCK_S"]),)
    # a product and a sum, each rounded
    assert recorded.options["enable_fp_fusion"] is False


def broken(**changes):
    """A good nested weight's checkpoint, its packed state changed."""
    tensors = random_weight(4, 128, nested=True).state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(tensors[key].numpy())), **changes}
    return {**tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def fp4():
    codes, state = bitsandbytes.quantize_4bit(torch.ones(4, 128), blocksize=64, quant_type="fp4")
    return {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def without(key: str):
    return {name: tensor for name, tensor in broken().items() if name != key}


def replaced(**fields):
    good = random_weight(4, 128, nested=True)
    names = ("codes", "absmax", "code", "shape", "dtype", "nested_absmax", "nested_code", "offset")
    return NF4Weight(**{**{name: getattr(good, name) for name in names}, **fields})


def dequantised(dtype=torch.float32, **out):
    weight = random_weight(4, 128, nested=False).to(DEVICE)
    return nf4.dequantise(weight, dtype, **{name: tensor.to(DEVICE) for name, tensor in out.items()})


MISTAKES = {
    "fp4": (lambda: NF4Weight.from_state_dict(fp4()), "must hold weight.quant_state.bitsandbytes__nf4, got fp4;"),
    "unpacked": (lambda: NF4Weight.from_state_dict({"weight": torch.ones(4, 128)}), "bitsandbytes__nf4, got none"),
    "blocksize": (lambda: NF4Weight.from_state_dict(broken(blocksize=128)), "blocksize must be 64, got 128"),
    "nested blocksize": (lambda: NF4Weight.from_state_dict(broken(nested_blocksize=64)), "nested_blocksize must be 256, got 64"),
    "dtype name": (lambda: NF4Weight.from_state_dict(broken(dtype="float64")), "dtype must be one of"),
    "no shape": (lambda: NF4Weight.from_state_dict(broken(shape=None)), "shape must be a list of whole numbers, got None"),
    "other sizes": (lambda: NF4Weight.from_state_dict(broken(shape=[8, 128])), "a [8, 128] weight must be contiguous [512], got [256]"),
    "incomplete": (lambda: NF4Weight.from_state_dict(without("weight.nested_absmax")), "got no weight.nested_absmax"),
    "not json": (
        lambda: NF4Weight.from_state_dict({"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        "bitsandbytes__nf4 must be JSON",
    ),
    "codes": (lambda: replaced(codes=torch.zeros(255, dtype=torch.uint8)), "codes of a [4, 128] weight must be contiguous [256], got"),
    "absmax": (lambda: replaced(absmax=torch.zeros(9, dtype=torch.uint8)), "absmax of a [4, 128] weight must be contiguous [8], got [9]"),
    "absmax dtype": (lambda: replaced(absmax=torch.zeros(8)), "absmax must be torch.uint8, got torch.float32"),
    "half nested": (lambda: replaced(offset=None), "nested scales need offset, got None"),
    "offset": (lambda: replaced(offset=torch.zeros(1)), "offset of a [4, 128] weight must be contiguous [], got [1]"),
    "devices": (lambda: replaced(code=TABLE.to("meta")), "all its tensors must be on one device, got ['cpu', 'meta']"),
    "vector": (lambda: NF4Weight.quantise(torch.ones(128)), "must have two dimensions, got [128]"),
    "in-features": (lambda: NF4Weight.quantise(torch.ones(64, 96)), "the in-features must be a multiple of the block size 64, got 96"),
    "quantised dtype": (lambda: NF4Weight.quantise(torch.ones(64, 64, dtype=torch.float64)), "got torch.float64"),
    "result dtype": (lambda: dequantised(torch.int8), "dtype must be one of torch.bfloat16, torch.float16, torch.float32, got torch.int8"),
    "out size": (lambda: dequantised(out=torch.ones(128, 4)), "out must be contiguous [4, 128] of torch.float32, got [128, 4]"),
    "out dtype": (lambda: dequantised(out=torch.ones(4, 128).half()), "out must be contiguous [4, 128] of torch.float32, got [4, 128] of"),
    "out strides": (lambda: dequantised(out=torch.ones(128, 4).t()), "out must be contiguous [4, 128] of torch.float32, got"),
    "out device": (
        lambda: nf4.dequantise(random_weight(4, 128, False), torch.float32, torch.ones(4, 128, device="meta")),
        "all tensors must be on one device, got ['cpu', 'meta']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_said(mistake):
    call, said = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        call()
    assert re.fullmatch(r"[^:]+: [^;]+, got [^;]+; [^;]+", str(raised.value), re.DOTALL), raised.value
