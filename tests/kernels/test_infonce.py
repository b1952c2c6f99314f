"""infonce against the definition in fp64: loss and every gradient, in each precision that a launch configuration can choose."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.fidelity import DEVICE, assert_faithful

pytest.importorskip("triton")

from tli_kernels import infonce as kernels
from tli_kernels import launch, reference
from tli_kernels.infonce import infonce

pytestmark = pytest.mark.slow


def units(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def words(pairs: int, width: int, seed: int = 0, apart: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Source words and their translations, which are as alike as trained ones are."""
    source = units(pairs, width, seed)
    return source, torch.nn.functional.normalize(source + apart * units(pairs, width, seed + 1), dim=1)


def some_same(pairs: int, seed: int = 0, often: float = 0.05) -> torch.Tensor:
    """Forbidden (i, j), i ≠ j, sorted; more than one for some rows and none for others."""
    forbidden = torch.rand(pairs, pairs, generator=torch.Generator().manual_seed(seed)) < often
    return forbidden.fill_diagonal_(False).nonzero()


def definition(source, target, temperature, false_negatives):
    """With log(1 + Σ_{j≠i} exp(s_ij - s_ii)), as even fp64 loses a small loss in log Σ_j exp(s_ij) - s_ii."""
    logits = source @ target.T / temperature
    own, itself = logits.diagonal(), torch.arange(len(logits))
    # exp of it is 0 in any sum, and unlike -inf it has gradients where a row has nothing else
    others = logits.index_put(
        (torch.cat([false_negatives[:, 0], itself]), torch.cat([false_negatives[:, 1], itself])), logits.new_tensor(-1e30)
    )
    return sum(torch.logaddexp(torch.zeros_like(own), others.logsumexp(axis) - own).mean() for axis in (0, 1)) / 2


def run(op, source, target, temperature, false_negatives, dtype, device=DEVICE):
    """Loss and gradients to source, target and temperature, for an upstream gradient that is not 1."""
    source, target = (x.to(device, dtype).requires_grad_() for x in (source.detach(), target.detach()))
    temperature = torch.tensor(
        temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
    ).requires_grad_()
    loss = op(source, target, temperature, false_negatives.to(device))
    loss.backward(torch.full_like(loss, 1.75))
    return loss.detach(), source.grad, target.grad, temperature.grad


def assert_all_faithful(source, target, temperature, false_negatives, dtype=torch.float32):
    # the truth of the numbers that are given, not of those before rounding
    source, target = source.to(dtype).double(), target.to(dtype).double()
    fused = run(infonce, source, target, temperature, false_negatives, dtype)
    eager = run(reference.infonce, source, target, temperature, false_negatives, dtype)
    truth = run(definition, source, target, torch.tensor(temperature).item(), false_negatives, torch.float64, "cpu")
    pairs, width = source.shape
    for what, *values in zip(("loss", "dsource", "dtarget", "dtemperature"), fused, eager, truth):
        assert_faithful(*values, pairs + width, what)


def blocks(m: int, n: int, k: int) -> launch.Blocks:
    return launch.Blocks((("M", m), ("N", n), ("K", k)), 4, 2)


OWN = launch.contrast
# few programs, as each takes the interpreter its time
COARSE = launch.Contrast("split", blocks(128, 128, 64), blocks(128, 64, 128))
# small blocks and sides, so that a small batch has several of each
PRECISIONS = {
    "hi_lo": launch.Contrast("hi_lo", blocks(32, 32, 32), blocks(32, 32, 32), side=32),
    "hi_lo-whole": launch.Contrast("hi_lo", blocks(16, 32, 32), blocks(32, 64, 16)),
    "split": launch.Contrast("split", blocks(32, 16, 64), blocks(16, 32, 32), side=32),
    "fp32": launch.Contrast("fp32", blocks(32, 32, 32), blocks(32, 32, 16), side=32),
}


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(launch, "contrast", lambda capability, pairs: COARSE)


@pytest.fixture
def _own(monkeypatch):
    """The configurations that launch.py really chooses, in the interpreter, too."""
    monkeypatch.setattr(launch, "contrast", OWN)


@pytest.fixture(params=PRECISIONS)
def way(request, monkeypatch) -> launch.Contrast:
    monkeypatch.setattr(launch, "contrast", lambda capability, pairs: PRECISIONS[request.param])
    return PRECISIONS[request.param]


SHAPES = [(1, 16), (2, 1), (5, 67), (5, 576), (127, 16), (128, 64), (129, 67), (257, 16)]


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize(("pairs", "width"), SHAPES, ids=[f"B{b}-D{d}" for b, d in SHAPES])
def test_loss_and_gradients_are_the_definitions(pairs, width, temperature):
    assert_all_faithful(*words(pairs, width), temperature, some_same(pairs))


@pytest.mark.parametrize(("pairs", "width"), [(1, 1), (32, 16), (40, 67)], ids=["B1-D1", "B32-D16", "B40-D67"])
@pytest.mark.usefixtures("way")
def test_every_way_of_walking_gives_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), 0.07, some_same(pairs))


@pytest.mark.parametrize(("pairs", "width"), [(31, 67), (129, 16)], ids=["B31-D67", "B129-D16"])
@pytest.mark.usefixtures("_own")
def test_the_real_configurations_give_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), 0.07, some_same(pairs))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="takes the interpreter minutes")
@pytest.mark.parametrize(("pairs", "width"), [(64, 4096), (1000, 4096), (2049, 576), (8229, 96)], ids=["B64", "B1000", "B2049", "B8229"])
def test_batches_of_real_size_give_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), 0.07, some_same(pairs, often=0.001))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("many", [False, True], ids=["one-square", "many-squares"])
def test_16_bit_words_get_16_bit_gradients(dtype, many, monkeypatch):
    if many:
        monkeypatch.setattr(launch, "contrast", lambda capability, pairs: PRECISIONS["split"])
    assert_all_faithful(*words(40, 40), 0.07, some_same(40), dtype)


def test_unrelated_words():
    assert_all_faithful(units(60, 16, 1), units(60, 16, 2), 0.07, some_same(60))


def test_a_row_whose_others_are_all_forbidden_has_no_loss_of_its_own():
    pairs = 40
    forbidden = torch.rand(pairs, pairs, generator=torch.Generator().manual_seed(0)) < 0.1
    forbidden[7], forbidden[:, 3] = True, True
    false_negatives = forbidden.fill_diagonal_(False).nonzero()
    source, target = words(pairs, 32)
    assert_all_faithful(source, target, 0.07, false_negatives)
    _, statistics = kernels._forward(source.to(DEVICE).float(), target.to(DEVICE).float(), 0.07, false_negatives.to(DEVICE).contiguous())
    own, row_maximum, row_log, column_maximum, column_log = statistics
    assert row_maximum[7] == own[7]
    assert column_maximum[3] == own[3]
    # row 7's and column 3's loss is 0, no other
    assert row_log[7] == 0
    assert column_log[3] == 0
    assert (row_log > 0).sum() == (column_log > 0).sum() == pairs - 1


def test_everything_forbidden_is_no_loss_and_no_gradient():
    false_negatives = (~torch.eye(20, dtype=torch.bool)).nonzero()
    for value in run(infonce, *words(20, 32), 0.07, false_negatives, torch.float32):
        assert not value.any()


def test_duplicates_that_nobody_forbade_count_as_negatives():
    source, target = words(30, 16)
    source[1], target[1] = source[0], target[0]
    source[20], target[29] = source[0], target[0]
    assert_all_faithful(source, target, 0.05, torch.zeros(0, 2, dtype=torch.int64))
    everything = infonce(source.to(DEVICE).float(), target.to(DEVICE).float(), 0.05, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE))
    without = infonce(source.to(DEVICE).float(), target.to(DEVICE).float(), 0.05, torch.tensor([[0, 1], [1, 0]], device=DEVICE))
    assert everything > without + 0.01


def test_large_logits_do_not_underflow():
    # every word's cosines lie so far below 1 that a fixed maximum of 1/τ would leave nothing of a row
    source, target = units(50, 64, 1), -units(50, 64, 1)
    fixed = torch.exp((source @ target.T).float() / 0.005 - 1 / 0.005)
    assert (fixed.sum(1) == 0).any()
    assert_all_faithful(source, target, 0.005, some_same(50))
    assert_all_faithful(*words(50, 64, apart=0.1), 0.005, some_same(50))


def test_a_pair_that_stands_out_keeps_its_small_loss():
    # 1 + 1e-9 is 1 in fp32, log of it 0
    source = torch.eye(16)
    fused = infonce(source.to(DEVICE), source.to(DEVICE), 1 / 24, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE))
    assert fused.item() == pytest.approx(math.log1p(15 * math.exp(-24)), rel=1e-5)


def test_collapsed_words_give_the_logarithm_of_the_batch():
    collapsed = torch.full((50, 8), 8**-0.5)
    loss, *gradients, dtemperature = run(infonce, collapsed, collapsed, 0.07, torch.zeros(0, 2, dtype=torch.int64), torch.float32)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)
    # a sum of differences of logits of 1/τ, over τ
    assert dtemperature.abs() < 1e-6 / 0.07**2


@settings(deadline=None, max_examples=10)
@given(pairs=st.integers(1, 40), width=st.integers(1, 20), seed=st.integers(0, 99), temperature=st.sampled_from([0.02, 0.1, 1.0]))
def test_permuting_the_pairs_permutes_the_gradients(pairs, width, seed, temperature):
    source, target = words(pairs, width, seed)
    forbidden = torch.zeros(pairs, pairs, dtype=torch.bool)
    forbidden[tuple(some_same(pairs, seed, 0.2).T)] = True
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    before = run(infonce, source, target, temperature, forbidden.nonzero(), torch.float32)
    after = run(infonce, source[order], target[order], temperature, forbidden[order][:, order].nonzero(), torch.float32)
    expected = before[0], before[1][order], before[2][order], before[3]
    for one, other in zip(after, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 / temperature)


@settings(deadline=None, max_examples=10)
@given(pairs=st.integers(1, 40), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_swapping_the_languages_swaps_the_gradients(pairs, width, seed):
    source, target = words(pairs, width, seed)
    false_negatives = some_same(pairs, seed, 0.2)
    swapped = false_negatives.flip(1)[false_negatives[:, 1].argsort(stable=True)]
    loss, dsource, dtarget, dtemperature = run(infonce, source, target, 0.1, false_negatives, torch.float32)
    for one, other in zip((loss, dtarget, dsource, dtemperature), run(infonce, target, source, 0.1, swapped, torch.float32)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 300.0], ids=["nan", "inf", "no-unit-row"])
@pytest.mark.parametrize("side", [0, 1], ids=["source", "target"])
def test_what_cannot_be_multiplied_is_not_hidden(way, side, bad):
    pair = [x.float() for x in words(40, 20)]
    pair[side][33, 5] = bad
    loss, *gradients, _ = run(infonce, *pair, 0.07, some_same(40), torch.float32)
    if bad == 300.0 and way.precision == "fp32":
        assert loss.isfinite()
    else:
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in gradients)


def test_strided_words_and_pairs_are_read_where_they_lie():
    source, target = (x.float().to(DEVICE) for x in words(21, 24))
    false_negatives = some_same(21).to(DEVICE)
    expected = run(infonce, source, target, 0.07, false_negatives, torch.float32)
    wide = torch.full((21, 96), math.nan, device=DEVICE)
    wide[:, ::4], wide[:, 1::4] = source, target
    strided = wide[:, ::4].requires_grad_(), wide[:, 1::4].requires_grad_()
    loss = infonce(*strided, torch.tensor([0.07], device=DEVICE), false_negatives.T.contiguous().T)
    gradients = torch.autograd.grad(loss, strided, torch.full_like(loss, 1.75).expand(()))
    for one, other in zip((loss, *gradients), expected):
        assert torch.equal(one, other)


def test_a_number_and_a_tensor_of_it_are_one_temperature():
    source, target = (x.float().to(DEVICE).requires_grad_() for x in words(21, 24))
    false_negatives = some_same(21).to(DEVICE)
    results = []
    for temperature in (0.0625, torch.tensor(0.0625), torch.tensor([0.0625], dtype=torch.float64)):
        temperature = temperature.to(DEVICE) if isinstance(temperature, torch.Tensor) else temperature
        loss = infonce(source, target, temperature, false_negatives)
        results.append((loss, *torch.autograd.grad(loss, (source, target))))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0]))
    learned = torch.tensor([0.0625], dtype=torch.float64, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(infonce(source.detach(), target.detach(), learned, false_negatives), learned)
    assert gradient.shape == (1,)
    assert gradient.dtype == torch.float64
    assert gradient.item() != 0


@pytest.mark.usefixtures("way")
def test_two_runs_give_the_same_bits_whatever_lies_in_memory(monkeypatch):
    arguments = *words(40, 40), 0.07, some_same(40), torch.float32
    expected = run(infonce, *arguments)
    empty = torch.Tensor.new_empty

    def poisoned(self, *size, **kind):
        made = empty(self, *size, **kind)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for one, other in zip(run(infonce, *arguments), expected):
        assert torch.equal(one, other)


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that is made while this is on, views aside."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                # the storage is kept, so that its place in memory is not given to another
                self.made[x.untyped_storage()._cdata] = x.untyped_storage()
        return result

    @property
    def sizes(self) -> list[int]:
        return [storage.nbytes() for storage in self.made.values()]


@pytest.mark.parametrize("capability", launch.CAPABILITIES)
@pytest.mark.usefixtures("_own")
def test_a_large_batch_stays_within_its_memory(capability):
    pairs, width = 65536, 768
    source, target = (torch.empty(pairs, width, device="meta", requires_grad=True) for _ in range(2))
    temperature = torch.empty((), device="meta", requires_grad=True)
    inputs = 2 * pairs * width * 4
    with launch.recording(capability):
        with Allocations() as forward:
            loss = infonce(source, target, temperature, torch.empty(100, 2, dtype=torch.int64, device="meta"))
        with Allocations() as backward:
            torch.autograd.grad(loss, (source, target, temperature))
    statistics = 5 * pairs * 4
    assert inputs + sum(forward.sizes) < 1.4e9
    assert inputs + statistics + sum(backward.sizes) < 1.4e9
    # the gradients are among them, and nothing grows with B·B
    assert sum(backward.sizes) > inputs
    assert max(forward.sizes + backward.sizes) <= inputs


def test_what_is_saved_is_the_words_and_five_numbers_a_pair():
    saved = []
    source, target = (x.float().to(DEVICE).requires_grad_() for x in words(100, 4))
    false_negatives = some_same(100, often=0.01).to(DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        infonce(source, target, 0.07, false_negatives)
    assert sum(x.numel() for x in saved) == 2 * 100 * 4 + false_negatives.numel() + 5 * 100


@pytest.mark.parametrize("edges", [0, 1, 50])
@pytest.mark.parametrize("pairs", [1, 64, 1024])
@pytest.mark.usefixtures("_own")
def test_a_common_batch_takes_two_launches_each_way(pairs, edges):
    source, target = (torch.empty(pairs, 4096, device="meta", requires_grad=True) for _ in range(2))
    with launch.recording(90) as launches, Allocations() as made:
        infonce(source, target, 0.07, torch.empty(edges, 2, dtype=torch.int64, device="meta")).backward()
    assert [one.kernel.__name__ for one in launches] == ["_statistics_kernel", "_losses_kernel", "_weights_kernel", "_gradients_kernel"]
    assert len(made.sizes) < 12


def test_places_in_memory_are_counted_in_64_bits(monkeypatch):
    # rows 2³⁰ elements apart, so the third begins beyond 2³¹: memory that is asked for, but not touched
    far = 2**30
    memory = torch.empty(2 * far + 32, dtype=torch.float16, device=DEVICE)
    apart = [memory.as_strided((3, 16), (far, 1), start) for start in (0, 16)]
    near = [x.half().to(DEVICE) for x in words(3, 16)]
    for one, other in zip(apart, near):
        one.copy_(other)
    dloss, false_negatives = torch.ones((), device=DEVICE), torch.tensor([[0, 1]], device=DEVICE)

    def both_ways(source, target):
        loss, statistics = kernels._forward(source, target, 0.1, false_negatives)
        return loss, *kernels._backward(dloss, source, target, 0.1, false_negatives, statistics, False)[:2]

    expected = both_ways(*near)
    monkeypatch.setattr(kernels, "operands", lambda source, target, config: (*apart, far, 0))
    for one, other in zip(both_ways(*near), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": torch.zeros(4, 8, dtype=torch.float64)},
            "infonce: source and target must be float32, bfloat16 or float16, got torch.float64",
        ),
        (
            {"target": torch.zeros(5, 8)},
            r"infonce: source and target must be \[B, D\] of one shape.*, got \(4, 8\) and \(5, 8\); pass one row",
        ),
        ({"source": torch.zeros(0, 8), "target": torch.zeros(0, 8)}, "B and D at least 1"),
        ({"source": torch.zeros(4, 8, device="meta")}, "infonce: all tensors must be on one device"),
        ({"temperature": torch.zeros((), device="meta")}, "infonce: all tensors must be on one device"),
        ({"temperature": torch.ones(2)}, r"infonce: temperature must be one number, got \(2,\)"),
        (
            {"false_negatives": torch.zeros(3, dtype=torch.int64)},
            r"infonce: false_negatives must be int64 \[E, 2\], got torch.int64 \(3,\)",
        ),
        ({"false_negatives": torch.zeros(1, 2, dtype=torch.int32)}, r"infonce: false_negatives must be int64 \[E, 2\]"),
    ],
    ids=["float64", "shapes", "empty", "devices", "temperature-device", "temperatures", "false-negatives-shape", "false-negatives-dtype"],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "source": torch.zeros(4, 8),
        "target": torch.zeros(4, 8),
        "temperature": 0.1,
        "false_negatives": torch.zeros(0, 2, dtype=torch.int64),
    }
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in {**arguments, **change}.items()}
    with pytest.raises(ValueError, match=message):
        infonce(**moved)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU a look at the pairs would wait for it")
@pytest.mark.parametrize(
    "false_negatives", [[[2, 1], [0, 1]], [[0, 0]], [[0, 4]], [[-1, 0]]], ids=["unsorted", "itself", "beyond", "negative"]
)
def test_forbidden_pairs_must_be_sorted_pairs_of_the_batch(false_negatives):
    with pytest.raises(ValueError, match="infonce: false_negatives must hold .* sorted by i, got "):
        infonce(torch.eye(4), torch.eye(4), 0.1, torch.tensor(false_negatives))
