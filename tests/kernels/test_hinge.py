"""The streaming hinge against the definition in fp64: loss and both gradients, in each precision that a launch configuration can choose."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fidelity import DEVICE, assert_faithful

pytest.importorskip("triton")

from tli_kernels import launch, reference
from tli_kernels.hinge import hinge

pytestmark = pytest.mark.slow

NO_SAME = torch.zeros(0, 2, dtype=torch.int64)


def units(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def words(pairs: int, width: int, seed: int = 0, apart: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Source words and translations so far apart that some rows are active and some are not."""
    source = units(pairs, width, seed)
    return source, torch.nn.functional.normalize(source + apart * units(pairs, width, seed + 1), dim=1)


def some_same(pairs: int, seed: int = 0, often: float = 0.05) -> torch.Tensor:
    forbidden = torch.rand(pairs, pairs, generator=torch.Generator().manual_seed(seed)) < often
    return forbidden.fill_diagonal_(False).nonzero()


def definition(source, target, margin, false_negatives):
    """Looks for the first of the hardest row by row."""
    forbidden = [{i} for i in range(len(source))]
    for i, j in false_negatives.tolist():
        forbidden[i].add(j)
    rows, hardest = [], []
    for i, cosines in enumerate((source @ target.T).tolist()):
        allowed = [j for j in range(len(cosines)) if j not in forbidden[i]]
        if allowed:
            rows.append(i)
            hardest.append(max(allowed, key=lambda j, row=cosines: (row[j], -j)))
    excess = margin - (source[rows] * target[rows]).sum(1) + (source[rows] * target[hardest]).sum(1)
    return torch.relu(excess).sum() / len(source)


def run(op, source, target, false_negatives, dtype, device=DEVICE, margin=0.4):
    source, target = (x.to(device, dtype).requires_grad_() for x in (source.detach(), target.detach()))
    loss = op(source, target, margin, false_negatives.to(device))
    loss.backward(torch.full_like(loss, 1.75))
    return loss.detach(), source.grad, target.grad


def assert_all_faithful(source, target, false_negatives, dtype=torch.float32):
    source, target = source.to(dtype).double(), target.to(dtype).double()
    fused = run(hinge, source, target, false_negatives, dtype)
    eager = run(reference.hinge, source, target, false_negatives, dtype)
    truth = run(definition, source, target, false_negatives, torch.float64, "cpu")
    pairs, width = source.shape
    for what, *values in zip(("loss", "dsource", "dtarget"), fused, eager, truth):
        assert_faithful(*values, pairs + width, what)


def blocks(m: int, n: int, k: int) -> launch.Blocks:
    return launch.Blocks((("M", m), ("N", n), ("K", k)), 4, 1)


OWN = launch.contrast, launch.gather
# few programs, as each takes the interpreter its time
COARSE = launch.Contrast("split", blocks(128, 128, 64), blocks(16, 16, 16)), ("split", blocks(128, 128, 64))
# small blocks, so that a small batch has several of each
PRECISIONS = {
    "hi_lo": (launch.Contrast("hi_lo", blocks(32, 16, 32), blocks(16, 16, 16)), ("split", blocks(32, 64, 16))),
    "split": (launch.Contrast("split", blocks(16, 32, 64), blocks(16, 16, 16)), ("split", blocks(16, 32, 32))),
    "fp32": (launch.Contrast("fp32", blocks(32, 32, 16), blocks(16, 16, 16)), ("fp32", blocks(32, 32, 16))),
}


def choose(monkeypatch, contrast: launch.Contrast, gather: tuple[str, launch.Blocks]) -> None:
    monkeypatch.setattr(launch, "contrast", lambda capability, pairs: contrast)
    monkeypatch.setattr(launch, "gather", lambda capability: gather)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    if DEVICE.type == "cpu":
        choose(monkeypatch, *COARSE)


@pytest.fixture
def _own(monkeypatch):
    """The configurations that launch.py really chooses, in the interpreter, too."""
    monkeypatch.setattr(launch, "contrast", OWN[0])
    monkeypatch.setattr(launch, "gather", OWN[1])


@pytest.fixture(params=PRECISIONS)
def _way(request, monkeypatch):
    choose(monkeypatch, *PRECISIONS[request.param])


SHAPES = [(1, 16), (2, 1), (5, 67), (5, 576), (127, 16), (128, 64), (129, 67), (257, 16)]


@pytest.mark.parametrize(("pairs", "width"), SHAPES, ids=[f"B{b}-D{d}" for b, d in SHAPES])
def test_loss_and_gradients_are_the_definitions(pairs, width):
    assert_all_faithful(*words(pairs, width), some_same(pairs))


@pytest.mark.parametrize(("pairs", "width"), [(1, 1), (32, 16), (70, 67)], ids=["B1-D1", "B32-D16", "B70-D67"])
@pytest.mark.usefixtures("_way")
def test_every_way_of_walking_gives_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), some_same(pairs))


@pytest.mark.parametrize(("pairs", "width"), [(31, 67), (129, 16)], ids=["B31-D67", "B129-D16"])
@pytest.mark.usefixtures("_own")
def test_the_real_configurations_give_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), some_same(pairs))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="takes the interpreter minutes")
@pytest.mark.parametrize(("pairs", "width"), [(64, 4096), (1000, 4096), (2049, 576)], ids=["B64", "B1000", "B2049"])
def test_batches_of_real_size_give_the_definition(pairs, width):
    assert_all_faithful(*words(pairs, width), some_same(pairs, often=0.001))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_words_get_16_bit_gradients(dtype):
    assert_all_faithful(*words(40, 40), some_same(40), dtype)


@settings(deadline=None, max_examples=20)
@given(pairs=st.integers(1, 40), seed=st.integers(0, 999), often=st.sampled_from([0.0, 0.2, 0.9]))
def test_of_equally_hard_negatives_the_first_gets_the_gradient(pairs, seed, often):
    # cosines of 0 and 1 alone, so ties are exact in every arithmetic; several columns share each row's hardest
    letters = torch.randint(0, 4, (2, pairs), generator=torch.Generator().manual_seed(seed))
    source, target = torch.eye(4, dtype=torch.float64)[letters]
    false_negatives = some_same(pairs, seed, often)
    truth = run(definition, source, target, false_negatives, torch.float64, "cpu")
    for op in (hinge, reference.hinge):
        for one, other in zip(run(op, source, target, false_negatives, torch.float32), truth):
            torch.testing.assert_close(one.double().cpu(), other, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("_way")
def test_ties_between_blocks_of_columns_go_to_the_first():
    source, target = torch.eye(2)[torch.zeros(70, dtype=torch.int64)], torch.eye(2)[torch.ones(70, dtype=torch.int64)]
    target[[11, 13, 35, 69]] = source[0]
    _, _, dtarget = run(hinge, source, target, NO_SAME, torch.float32)
    # each row pushes its own target away; 69 rows pull 11, and row 11 pulls 13
    expected = -torch.ones(70)
    expected[11] += 69
    expected[13] += 1
    torch.testing.assert_close(dtarget[:, 0].cpu() * 70 / 1.75, expected)


def test_rows_without_negatives_and_rows_that_are_content_add_nothing():
    pairs = 30
    forbidden = torch.zeros(pairs, pairs, dtype=torch.bool)
    forbidden[7], forbidden[:, 3] = True, True
    false_negatives = forbidden.fill_diagonal_(False).nonzero()
    source, target = words(pairs, 32)
    assert_all_faithful(source, target, false_negatives)
    _, dsource, dtarget = run(hinge, source, target, false_negatives, torch.float32)
    assert not dsource[7].any()
    assert dsource.any(dim=1).sum() > 0
    # nobody may choose column 3, so only its own row moves it
    torch.testing.assert_close(dtarget[3].cpu().double(), -source[3] * 1.75 / pairs, rtol=1e-5, atol=1e-7)
    for value in run(hinge, torch.eye(pairs), torch.eye(pairs), NO_SAME, torch.float32):
        assert not value.any()
    for value in run(hinge, source, target, (~torch.eye(pairs, dtype=torch.bool)).nonzero(), torch.float32):
        assert not value.any()


def test_duplicates_that_nobody_forbade_are_the_hardest():
    source, target = words(30, 16, apart=0.01)
    target[1] = target[0]
    assert_all_faithful(source, target, NO_SAME)
    loss, *_ = run(hinge, source, target, NO_SAME, torch.float32)
    forbidden, *_ = run(hinge, source, target, torch.tensor([[0, 1], [1, 0]]), torch.float32)
    assert loss > forbidden + 0.2 / 30


@settings(deadline=None, max_examples=10)
@given(pairs=st.integers(1, 40), width=st.integers(2, 20), seed=st.integers(0, 99))
def test_permuting_the_pairs_permutes_the_gradients(pairs, width, seed):
    source, target = words(pairs, width, seed)
    forbidden = torch.zeros(pairs, pairs, dtype=torch.bool)
    forbidden[tuple(some_same(pairs, seed, 0.2).T)] = True
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    before = run(hinge, source, target, forbidden.nonzero(), torch.float32)
    after = run(hinge, source[order], target[order], forbidden[order][:, order].nonzero(), torch.float32)
    for one, other in zip(after, (before[0], before[1][order], before[2][order])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["source", "target"])
@pytest.mark.usefixtures("_way")
def test_what_is_no_number_is_not_hidden(side, bad):
    pair = [x.float() for x in words(40, 20)]
    pair[side][33, 5] = bad
    loss, *_ = run(hinge, *pair, some_same(40), torch.float32)
    assert loss.isnan() if math.isnan(bad) else not loss.isfinite()


def test_strided_words_are_read_where_they_lie():
    source, target = (x.float().to(DEVICE) for x in words(21, 24))
    expected = run(hinge, source, target, some_same(21), torch.float32)
    wide = torch.full((21, 96), math.nan, device=DEVICE)
    wide[:, ::4], wide[:, 1::4] = source, target
    for one, other in zip(run(hinge, wide[:, ::4], wide[:, 1::4], some_same(21), torch.float32), expected):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_way")
def test_two_runs_give_the_same_bits_whatever_lies_in_memory(monkeypatch):
    arguments = *words(70, 40), some_same(70), torch.float32
    expected = run(hinge, *arguments)

    def poisoned(empty):
        def made(*arguments, **kind):
            x = empty(*arguments, **kind)
            return x.fill_(math.nan if x.is_floating_point() else 2**30)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for one, other in zip(run(hinge, *arguments), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("capability", launch.CAPABILITIES)
@pytest.mark.usefixtures("_own")
def test_nothing_of_a_large_batch_is_larger_than_its_words(capability, monkeypatch):
    pairs, width, sizes = 65536, 768, []
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: sizes.append((x := empty(*a, **k)).nbytes) or x)
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: sizes.append((x := empty_like(*a, **k)).nbytes) or x)
    source, target = (torch.empty(pairs, width, device="meta", requires_grad=True) for _ in range(2))
    with launch.recording(capability) as launches:
        torch.autograd.grad(hinge(source, target, 0.4, torch.empty(100, 2, dtype=torch.int64, device="meta")), (source, target))
    assert len(launches) <= 5
    # both gradients are among them
    assert sum(size == 4 * pairs * width for size in sizes) >= 2
    assert max(sizes) <= 2 * 4 * pairs * width
    assert 2 * 4 * pairs * width + sum(sizes) < 2e9


@pytest.mark.parametrize("edges", [0, 50])
@pytest.mark.usefixtures("_own")
def test_a_common_batch_takes_two_launches_and_one_back(edges):
    source, target = (torch.empty(64, 4096, device="meta", requires_grad=True) for _ in range(2))
    with launch.recording(90) as launches:
        hinge(source, target, 0.4, torch.empty(edges, 2, dtype=torch.int64, device="meta")).backward()
    assert [one.kernel.__name__ for one in launches] == ["_hardest_kernel", "_excess_kernel", "_gradients_kernel"]


def test_wrong_arguments_are_named():
    words, false_negatives = torch.zeros(4, 8, device=DEVICE), NO_SAME.to(DEVICE)
    with pytest.raises(ValueError, match=r"hinge: source and target must be \[B, D\] of one shape.*, got \(4, 8\) and \(5, 8\); "):
        hinge(words, torch.zeros(5, 8, device=DEVICE), 0.4, false_negatives)
    with pytest.raises(ValueError, match="hinge: source and target must be float32, bfloat16 or float16, got torch.int64"):
        hinge(words.long(), words, 0.4, false_negatives)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="hinge: false_negatives must hold .* sorted by i, got "):
            hinge(words, words, 0.4, torch.tensor([[2, 1], [0, 1]]))
