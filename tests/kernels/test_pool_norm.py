"""pool_norm's kernels against fp64 and the reference: outputs, gradients, and what must never happen at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tli_kernels import launch, pool_norm, reference
from torch import Tensor

from tests.support.fidelity import DEVICE, assert_faithful

pytestmark = pytest.mark.slow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-6
# node 0 is in more words and word 3 has more nodes than a program reads at a time; also a word of one node, an empty one, one that
# holds a node twice, and the same word twice; nodes 7 and 9 are in no word
WORDS = [[0, 1, 2], [8], [], [0, 1, 2, 3, 4, 5], [0, 6], [0, 6], [1, 0, 1], [0]]
NODES = 10

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
norms = pytest.mark.parametrize("norm", [False, True], ids=["raw", "rms"])


def csr(words: list[list[int]]) -> tuple[Tensor, Tensor]:
    indptr = np.cumsum([0, *(len(word) for word in words)])
    return torch.tensor(indptr, device=DEVICE), torch.tensor([node for word in words for node in word], dtype=torch.int64, device=DEVICE)


def draw(nodes: int, width: int, dtype: torch.dtype = torch.float32, norm: bool = True, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """States, and for the norm a weight in bf16, as checkpoints have it."""
    generator = torch.Generator().manual_seed(seed)
    states, weight = torch.randn(nodes, width, generator=generator), torch.rand(width, generator=generator) + 0.5
    return states.to(DEVICE, dtype), weight.to(DEVICE, torch.bfloat16) if norm else None


def direction(words: list[list[int]], width: int, seed: int = 1) -> Tensor:
    return torch.randn(len(words), width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(op, states: Tensor, words: list[list[int]], weight: Tensor | None, dunits: Tensor, eps=EPS, **options) -> tuple[Tensor, Tensor]:
    """The unit rows, and the gradient to the states."""
    states = states.detach().requires_grad_()
    units = op(states, *csr(words), weight, eps, **options)
    return units.detach(), torch.autograd.grad(units, states, dunits.to(units.dtype))[0]


def by_loops(states: Tensor, indptr: Tensor, indices: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The definition, word by word, in the dtype of the states."""
    tokens, rows = states, []
    if weight is not None:
        tokens = tokens / (tokens.pow(2).mean(dim=1, keepdim=True) + eps).sqrt() * weight.to(tokens.dtype)
    for begin, end in zip(indptr.tolist()[:-1], indptr.tolist()[1:], strict=True):
        mean = tokens[indices[begin:end]].sum(dim=0) / max(1, end - begin)
        length = mean.detach().norm()
        rows.append(mean / 1e-12 if length < 1e-12 else mean / mean.norm())
    return torch.stack(rows)


def assert_as_near_as_the_reference(states: Tensor, words: list[list[int]], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    dunits = direction(words, states.shape[1])
    truth = run(by_loops, states.double(), words, weight, dunits)
    eager = run(reference.pool_norm, states, words, weight, dunits)
    got = run(pool_norm.pool_norm, states, words, weight, dunits)
    for mine, plain, true, what in zip(got, eager, truth, ("units", "dstates"), strict=True):
        assert_faithful(mine, plain, true, states.shape[1], what)
    return got


def same_bits(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))


@norms
@dtypes
@pytest.mark.parametrize("width", [5, 576, 1025])
def test_units_and_gradient_are_as_near_to_the_truth_as_the_references(width, dtype, norm):
    states, weight = draw(NODES, width, dtype, norm)
    units, dstates = assert_as_near_as_the_reference(states, WORDS, weight)
    assert not units[2].any()
    assert not dstates[[7, 9]].any()


@pytest.mark.parametrize("width", [2, 127, 768, 1023, 2048, 2560, 4096, 8191, 8192])
def test_every_width_is_as_near_to_the_truth_as_the_references(width):
    words = [[0, 1], [0, 2, 3, 4, 5], []]
    states, weight = draw(6, width, torch.bfloat16)
    assert_as_near_as_the_reference(states, words, weight)


def test_one_dimension_leaves_a_sign_and_no_gradient():
    states, _ = draw(NODES, 1)
    units, dstates = run(pool_norm.pool_norm, states, WORDS, None, direction(WORDS, 1))
    held = [len(word) > 0 for word in WORDS]
    torch.testing.assert_close(units[held].abs(), torch.ones_like(units[held]))
    assert dstates.abs().max() < 1e-5


@st.composite
def tries(draw) -> tuple[list[list[int]], int]:
    """Words over three letters as paths through their trie, each from some depth on, and the number of nodes."""
    texts = draw(st.lists(st.text("abc", max_size=6), min_size=1, max_size=6))
    prefixes = sorted({text[: n + 1] for text in texts for n in range(len(text))})
    first = draw(st.integers(0, 1))
    return [[prefixes.index(text[: n + 1]) for n in range(first, len(text))] for text in texts], len(prefixes)


@settings(deadline=None, max_examples=20)
@given(trie=tries(), width=st.sampled_from([8, 32, 33]), norm=st.booleans(), seed=st.integers(0, 99))
def test_words_of_a_trie_are_unit_rows_and_near_the_truth(trie, width, norm, seed):
    words, nodes = trie
    units, _ = assert_as_near_as_the_reference(draw(nodes, width, norm=norm, seed=seed)[0], words, draw(1, width, norm=norm)[1])
    lengths = units.double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([float(len(word) > 0) for word in words], device=DEVICE).double(), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=12)
@given(trie=tries(), norm=st.booleans(), data=st.data())
def test_the_order_of_words_orders_the_rows_and_nothing_else(trie, norm, data):
    words, nodes = trie
    order = data.draw(st.permutations(range(len(words))))
    states, weight = draw(nodes, 33, norm=norm)
    dunits = direction(words, 33)
    units, dstates = run(pool_norm.pool_norm, states, words, weight, dunits)
    moved, dmoved = run(pool_norm.pool_norm, states, [words[i] for i in order], weight, dunits[order])
    assert torch.equal(moved, units[order])
    # a node's words are summed in the order in which they come: equal to rounding only
    torch.testing.assert_close(dmoved, dstates, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=12)
@given(trie=tries(), norm=st.booleans(), data=st.data())
def test_nodes_in_no_word_change_no_bit_even_when_they_are_nan(trie, norm, data):
    words, nodes = trie
    places = sorted(data.draw(st.sets(st.integers(0, nodes + 4), min_size=nodes, max_size=nodes)))
    states, weight = draw(nodes, 33, norm=norm)
    dunits = direction(words, 33)
    padded = torch.full((nodes + 5, 33), float("nan"), device=DEVICE)
    padded[places] = states
    units, dstates = run(pool_norm.pool_norm, padded, [[places[node] for node in word] for word in words], weight, dunits)
    assert same_bits((units, dstates[places]), run(pool_norm.pool_norm, states, words, weight, dunits))
    padding = np.setdiff1d(np.arange(nodes + 5), places).tolist()
    assert torch.equal(dstates[padding], torch.zeros(5, 33, device=DEVICE))


@norms
def test_every_run_gives_the_same_bits_with_the_transposed_paths_and_without(norm):
    states, weight = draw(NODES, 576, torch.bfloat16, norm)
    dunits = direction(WORDS, 576)
    once = run(pool_norm.pool_norm, states, WORDS, weight, dunits)
    assert same_bits(run(pool_norm.pool_norm, states, WORDS, weight, dunits), once)
    transposed = reference.transpose_paths(*csr(WORDS), NODES)
    assert same_bits(run(pool_norm.pool_norm, states, WORDS, weight, dunits, transposed=transposed), once)


@settings(deadline=None, max_examples=50)
@given(nodes=st.integers(0, 6), data=st.data())
def test_transposed_paths_list_the_words_of_each_node_in_their_order(nodes, data):
    words = data.draw(st.lists(st.lists(st.integers(0, nodes - 1), max_size=4) if nodes else st.just([]), max_size=5))
    node_indptr, found = reference.transpose_paths(*csr(words), nodes)
    expected = [[number for number, word in enumerate(words) for other in word if other == node] for node in range(nodes)]
    assert [found[begin:end].tolist() for begin, end in zip(node_indptr.tolist()[:-1], node_indptr.tolist()[1:], strict=True)] == expected
    assert len(found) == node_indptr[-1] == sum(map(len, words))


@norms
@pytest.mark.parametrize(
    ("words", "nodes"),
    [([[0]], 1), ([], 3), ([], 0), ([[], []], 0), ([[], [], []], 4)],
    ids=["one-node", "no-words", "nothing", "no-nodes", "all-empty"],
)
def test_the_smallest_batches(words, nodes, norm, monkeypatch):
    poison(monkeypatch)
    states, weight = draw(nodes, 33, norm=norm)
    units, dstates = run(pool_norm.pool_norm, states, words, weight, direction(words, 33))
    expected = run(reference.pool_norm, states, words, weight, direction(words, 33))
    torch.testing.assert_close(units, expected[0])
    torch.testing.assert_close(dstates, expected[1])


def poison(monkeypatch) -> None:
    """Make new memory NaN: what a kernel does not write cannot pass for zero."""
    empty = torch.empty

    def poisoned(*args, **options) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@norms
@dtypes
def test_every_element_is_written(dtype, norm, monkeypatch):
    states, weight = draw(NODES, 1025, dtype, norm)
    expected = run(pool_norm.pool_norm, states, WORDS, weight, direction(WORDS, 1025))
    poison(monkeypatch)
    assert same_bits(run(pool_norm.pool_norm, states, WORDS, weight, direction(WORDS, 1025)), expected)
    assert not any(result.isnan().any() for result in expected)


LAYOUTS = {
    "rows-of-a-wider-matrix": lambda states: torch.cat([states, states], dim=1)[:, : states.shape[1]],
    "rows-from-an-odd-place": lambda states: torch.cat([states[:, :3], states, states[:, :2]], dim=1)[:, 3:-2],
    "every-other-column": lambda states: states.repeat_interleave(2, dim=1)[:, ::2],
    "columns": lambda states: states.t().contiguous().t(),
}


@norms
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_no_bit(layout, norm):
    states, weight = draw(NODES, 64, torch.bfloat16, norm)
    dunits = direction(WORDS, 64)
    placed = layout(states)
    assert not placed.is_contiguous()
    placed_weight = weight.repeat_interleave(2)[::2] if norm else None
    got = run(pool_norm.pool_norm, placed, WORDS, placed_weight, dunits.t().contiguous().t())
    assert same_bits(got, run(pool_norm.pool_norm, states, WORDS, weight, dunits))


def test_one_row_spread_over_all_nodes():
    row, weight = draw(1, 64)
    spread = row.expand(NODES, 64)
    assert same_bits(
        run(pool_norm.pool_norm, spread, WORDS, weight, direction(WORDS, 64)),
        run(pool_norm.pool_norm, spread.contiguous(), WORDS, weight, direction(WORDS, 64)),
    )


@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30), (2, 2**31)], ids=["rows-past-2^31", "a-stride-past-2^31"])
def test_offsets_past_32_bits(rows, stride):
    try:
        # never touched but for the rows: on a CPU this takes no memory
        buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4 GB of address space, or of GPU memory")
    states, weight = draw(rows, 64, torch.float16)
    far = buffer.as_strided((rows, 64), (stride, 1)).copy_(states)
    words = [[0, rows - 1], [rows - 1]]
    assert same_bits(
        run(pool_norm.pool_norm, far, words, weight, direction(words, 64)),
        run(pool_norm.pool_norm, states, words, weight, direction(words, 64)),
    )


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_a_norm_without_epsilon():
    # 1/sqrt(0) stands wherever there is no state: after a word's last node, and where a node is in no word
    states, weight = draw(NODES, 33)
    dunits = direction(WORDS, 33)
    got = run(pool_norm.pool_norm, states, WORDS, weight, dunits, eps=0.0)
    for mine, other in zip(got, run(reference.pool_norm, states, WORDS, weight, dunits, eps=0.0), strict=True):
        torch.testing.assert_close(mine, other)


@norms
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-13, 1e-12, 1e-6, 1e15, 1e17])
def test_huge_and_tiny_states(scale, norm):
    states, weight = draw(NODES, 33, norm=norm)
    # apart, because a word's gradient goes with one over its length
    for words in (WORDS[:1], WORDS[2:4]):
        units, dstates = assert_as_near_as_the_reference(states * scale, words, weight)
        assert units.isfinite().all()
        assert dstates.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@norms
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_stays_where_it_belongs(value, norm):
    states, weight = draw(NODES, 33, norm=norm)
    dunits = direction(WORDS, 33)
    clean_units, clean_dstates = run(pool_norm.pool_norm, states, WORDS, weight, dunits)
    states[6, 20] = value
    units, dstates = run(pool_norm.pool_norm, states, WORDS, weight, dunits)
    holding = torch.tensor([6 in word for word in WORDS], device=DEVICE)
    assert torch.equal(units[~holding], clean_units[~holding])
    # as the reference: a NaN anywhere in a word is NaN everywhere in its row; an infinite length leaves NaN at its cause alone
    assert torch.equal(units.isnan(), reference.pool_norm(states, *csr(WORDS), weight, EPS).isnan())
    assert units[holding][:, 20].isnan().all()
    # the words that hold node 6 hold node 0 too: their gradient is lost, the other nodes' is not
    lost = torch.tensor([node in (0, 6) for node in range(NODES)], device=DEVICE)
    assert torch.equal(dstates[~lost], clean_dstates[~lost])
    assert dstates[lost].isnan().any(dim=1).all()


def test_a_gradient_with_nan_reaches_its_words_nodes_and_no_other():
    states, weight = draw(NODES, 33)
    dunits = direction(WORDS, 33)
    _, clean = run(pool_norm.pool_norm, states, WORDS, weight, dunits)
    dunits[1, 3] = float("nan")
    _, dstates = run(pool_norm.pool_norm, states, WORDS, weight, dunits)
    assert dstates[8].isnan().all()
    others = [node for node in range(NODES) if node != 8]
    assert torch.equal(dstates[others], clean[others])


@norms
@pytest.mark.parametrize("node", [-1, NODES, 2**40], ids=["negative", "T", "2^40"])
def test_a_node_that_does_not_exist_is_nan_in_its_word_alone_where_nothing_looks_at_the_paths(node, norm):
    states, weight = draw(NODES, 33, norm=norm)
    states.requires_grad_()
    # past the check, as on a GPU
    units = pool_norm._PoolNorm.apply(states, *csr([[0, node, 2], [0], [3, 4]]), weight, EPS, None, None)
    assert units[0].isnan().all()
    expected = reference.pool_norm(states, *csr([[0], [3, 4]]), weight, EPS)
    torch.testing.assert_close(units[1:], expected)
    dstates = torch.autograd.grad(units[1:].sum(), states)[0]
    assert dstates[[0, 2]].isnan().all()
    torch.testing.assert_close(dstates[3:], torch.autograd.grad(expected.sum(), states)[0][3:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("indptr", "lost"), [([0, 2, 1, 4], [1]), ([0, 2, 3, 9], [2]), ([-3, 2, 3, 4], [0])], ids=str)
def test_a_broken_indptr_is_nan_in_its_word_alone_where_nothing_looks_at_the_paths(indptr, lost):
    states, weight = draw(NODES, 33)
    states.requires_grad_()
    indices = torch.tensor([0, 1, 2, 3], device=DEVICE)
    units = pool_norm._PoolNorm.apply(states, torch.tensor(indptr, device=DEVICE), indices, weight, EPS, None, None)
    assert units.isnan().any(dim=1).nonzero().flatten().tolist() == lost
    units.sum().backward()
    assert torch.equal(states.grad[4:], torch.zeros_like(states[4:]))


@pytest.mark.parametrize(
    ("node_indptr", "words", "times"),
    [([-3, 1, 9, -4], [0, 0], [1, 1, 0]), ([0, 1, 2, 2], [7, -1], [0, 0, 0])],
    ids=["indptr", "words"],
)
def test_what_broken_transposed_paths_name_outside_is_left_out(node_indptr, words, times):
    states = draw(1, 33)[0].expand(3, 33).contiguous().requires_grad_()
    # within a longer list, so that a read outside finds a word
    words = torch.tensor([0] * 8 + words + [0] * 8, device=DEVICE)[8:-8]
    units = pool_norm._PoolNorm.apply(states, *csr([[0, 1]]), None, EPS, torch.tensor(node_indptr, device=DEVICE), words)
    dunits = direction([[0, 1]], 33)
    once = run(pool_norm.pool_norm, states, [[0, 1]], None, dunits)[1][0]
    units.backward(dunits)
    torch.testing.assert_close(states.grad, torch.tensor(times, device=DEVICE)[:, None] * once)


states, weight = torch.zeros(3, 4, device=DEVICE), torch.ones(4, device=DEVICE)
indptr, indices = csr([[0, 1], [2]])
REFUSED = {
    "states-fp64": ({"states": states.double()}, r"states must be fp32, bf16 or fp16 \[T, D\], got float64 \[3, 4\]; "),
    "states-1d": ({"states": states[0]}, r"states must be fp32, bf16 or fp16 \[T, D\], got float32 \[4\]; "),
    "too-wide": ({"states": states.new_zeros(3, 8193)}, r"states must be 1 to 8192 wide, got float32 \[3, 8193\]; use reference"),
    "no-width": ({"states": states[:, :0]}, "states must be 1 to 8192 wide, got "),
    "weight-of-another": ({"norm_weight": weight[:3]}, r"norm_weight must be floats, one for each column of states, got float32 \[3\]; "),
    "weight-integer": ({"norm_weight": weight.long()}, r"norm_weight must be floats, one for each column of states, got int64 \[4\]; "),
    "indptr-int32": ({"indptr": indptr.int()}, r"indptr and indices must be int64 with one dimension, got int32 \[3\]; "),
    "indices-int32": ({"indices": indices.int()}, r"indptr and indices must be int64 with one dimension, got int32 \[3\]; "),
    "indices-2d": ({"indices": indices[None]}, r"indptr and indices must be int64 with one dimension, got int64 \[1, 3\]; "),
    "indptr-empty": ({"indptr": indptr[:0]}, "indptr and indices: the first must have at least the element 0, got "),
    "other-device": ({"states": states.to("meta")}, r"all tensors must be on one device, got \["),
    "transposed-of-another": (
        {"transposed": reference.transpose_paths(indptr, indices, 2)},
        r"transposed must be of these nodes and paths, got int64 \[3\]; use transpose_paths",
    ),
}
REFUSED_WHERE_VALUES_ARE_SEEN = {
    "node-T": ({"indices": indices + 1}, r"indptr and indices: the second must lie in 0..2, got 3; "),
    "node-negative": ({"indices": indices - 1}, r"indptr and indices: the second must lie in 0..2, got -1; "),
    "indptr-falls": (
        {"indptr": indptr.new_tensor([0, 2, 1])},
        r"indptr and indices: the first must rise from 0 to at most 3, got \[0, 2, 1\]; ",
    ),
    "indptr-ends-outside": ({"indptr": indptr + 1}, r"indptr and indices: the first must rise from 0 to at most 3, got \[1, 3, 4\]; "),
    "transposed-word": (
        {"transposed": (indptr.new_tensor([0, 1, 2, 3]), indices.new_tensor([0, 1, 2]))},
        r"transposed: the second must lie in 0..1, got 2; ",
    ),
}


def assert_refused(changed: dict, message: str) -> None:
    options = {"states": states, "indptr": indptr, "indices": indices, "norm_weight": weight, **changed}
    with pytest.raises(ValueError, match=f"^pool_norm: {message}"):
        pool_norm.pool_norm(**options)


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(changed, message):
    assert_refused(changed, message)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU a look at the paths would wait for it")
@pytest.mark.parametrize(("changed", "message"), REFUSED_WHERE_VALUES_ARE_SEEN.values(), ids=REFUSED_WHERE_VALUES_ARE_SEEN)
def test_paths_out_of_range_are_refused(changed, message):
    assert_refused(changed, message)


@norms
def test_one_launch_each_way_and_little_is_kept(norm):
    states, weight = (None if tensor is None else tensor.to("meta") for tensor in draw(NODES, 64, torch.bfloat16, norm))
    paths = [path.to("meta") for path in csr(WORDS)]
    kept = []
    with (
        launch.recording(90) as launches,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x),
    ):
        units = pool_norm.pool_norm(states.requires_grad_(), *paths, weight, EPS)
        assert len(launches) == 1
        units.backward(torch.empty_like(units))
    assert [launched.grid for launched in launches] == [(len(WORDS),), (NODES,)]
    floats = sorted((str(tensor.dtype), *tensor.shape) for tensor in kept if tensor.is_floating_point())
    inputs = [("torch.bfloat16", NODES, 64), ("torch.bfloat16", 64)] if norm else []
    assert floats == [*inputs, ("torch.float32", len(WORDS)), ("torch.float32", len(WORDS), 64)]


def test_states_that_need_no_gradient_get_none():
    states, weight = draw(NODES, 64)
    assert not pool_norm.pool_norm(states, *csr(WORDS), weight.float().requires_grad_(), EPS).requires_grad
