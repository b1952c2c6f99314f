"""The reference ops against brute force in fp64, outputs and gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tli_kernels import cpu, reference

torch.manual_seed(0)


def units(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def random_false_negatives(rows: int, seed: int) -> torch.Tensor:
    """Some ordered pairs i != j, in both directions."""
    generator = np.random.default_rng(seed)
    edges = {tuple(sorted(generator.integers(0, rows, 2))) for _ in range(rows // 2)}
    both = sorted({pair for i, j in edges if i != j for pair in ((i, j), (j, i))})
    return torch.tensor(both, dtype=torch.int64).reshape(-1, 2)


def infonce_by_loops(source, target, temperature, false_negatives):
    """The definition, word by word."""
    forbidden = set(map(tuple, false_negatives.tolist()))
    rows, total = len(source), 0.0
    for asking, answering in ((source, target), (target, source)):
        for i in range(rows):
            logits = [asking[i] @ answering[j] / temperature for j in range(rows) if (i, j) not in forbidden]
            total = total + torch.logsumexp(torch.stack(logits), 0) - asking[i] @ answering[i] / temperature
    return total / (2 * rows)


def hinge_by_loops(source, target, margin, false_negatives):
    forbidden, rows, total = set(map(tuple, false_negatives.tolist())), len(source), (source.sum() + target.sum()) * 0
    for i in range(rows):
        negatives = [source[i] @ target[j] for j in range(rows) if j != i and (i, j) not in forbidden]
        if negatives:
            total = total + torch.relu(margin - source[i] @ target[i] + torch.stack(negatives).max())
    return total / rows


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), seed=st.integers(0, 99), temperature=st.sampled_from([0.01, 0.1, 1.0]))
def test_infonce_is_its_definition_with_gradients(rows, seed, temperature):
    false_negatives = random_false_negatives(rows, seed)
    exact = [
        units(rows, 5, seed).requires_grad_(),
        units(rows, 5, seed + 1000).requires_grad_(),
        torch.tensor(temperature, dtype=torch.float64),
    ]
    exact[2].requires_grad_()
    single = [value.detach().float().requires_grad_() for value in exact]
    expected, got = infonce_by_loops(*exact, false_negatives), reference.infonce(*single, false_negatives)
    expected.backward()
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, true in zip(single, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-3, atol=1e-4 / temperature)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 9), seed=st.integers(0, 99))
def test_the_hinge_is_its_definition_with_gradients(rows, seed):
    false_negatives = random_false_negatives(rows, seed)
    exact = [units(rows, 5, seed).requires_grad_(), units(rows, 5, seed + 1000).requires_grad_()]
    single = [value.detach().float().requires_grad_() for value in exact]
    expected, got = hinge_by_loops(*exact, 0.4, false_negatives), reference.hinge(*single, 0.4, false_negatives)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    got.backward()
    for mine, true in zip(single, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-6)


def test_infonce_of_words_that_nothing_tells_apart_is_the_logarithm_of_the_batch():
    false_negatives = torch.zeros(0, 2, dtype=torch.int64)
    collapsed = torch.ones(50, 8) / math.sqrt(8)
    assert reference.infonce(collapsed, collapsed, 0.07, false_negatives).item() == pytest.approx(math.log(50), rel=1e-6)


def test_losses_are_fp32_whatever_comes_in():
    false_negatives = torch.zeros(0, 2, dtype=torch.int64)
    source, target = units(16, 32, 0).bfloat16(), units(16, 32, 1).bfloat16()
    for loss in (reference.infonce(source, target, 0.1, false_negatives), reference.hinge(source, target, 0.4, false_negatives)):
        assert loss.dtype == torch.float32
    exact = infonce_by_loops(source.double(), target.double(), 0.1, false_negatives)
    torch.testing.assert_close(reference.infonce(source, target, 0.1, false_negatives).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "rms"])
def test_pool_norm_is_its_definition_with_gradients(norm):
    nodes = torch.randn(7, 5, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if norm else None
    # shared nodes, a word of one node, an empty word
    words = [[0, 1, 2], [0, 1], [6], [], [1, 5, 3]]
    indptr = torch.tensor([0, *np.cumsum([len(word) for word in words])])
    indices = torch.tensor([node for word in words for node in word])

    def by_loops(states):
        rows = []
        for word in words:
            tokens = states[word] if word else states[:0]
            if norm:
                tokens = tokens / (tokens.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight
            mean = tokens.sum(dim=0) / max(1, len(word))
            rows.append(mean / max(mean.norm().item(), 1e-12) if not word else mean / mean.norm())
        return torch.stack(rows)

    exact, single = nodes.clone().requires_grad_(), nodes.float().requires_grad_()
    expected = by_loops(exact)
    got = reference.pool_norm(single, indptr, indices, None if weight is None else weight.float(), 1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert not got[3].any()
    direction = torch.randn(5, 5, dtype=torch.float64)
    (expected * direction).sum().backward()
    (got * direction.float()).sum().backward()
    torch.testing.assert_close(single.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert not single.grad[4].any()


IMPLEMENTATIONS = [reference, cpu]


@pytest.mark.parametrize("ops_module", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("rows", [0, 1, 12, 131])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_linear_is_its_formula_and_leaves_the_weight_alone(ops_module, rows, strided):
    x = torch.randn(rows, 14 if strided else 7)[:, :: 2 if strided else 1].requires_grad_()
    weight, bias, direction = torch.randn(5, 7), torch.randn(5), torch.randn(rows, 5)
    y = ops_module.linear(x, weight, bias)
    (dx,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), direction.double() @ weight.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ops_module", IMPLEMENTATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_linear_is_its_formula_with_gradients(ops_module, bias, dropout):
    shapes = {"x": (3, 4, 6), "weight": (5, 6), "lora_a": (2, 6), "lora_b": (5, 2), "bias": (5,)}
    exact = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    kept = reference.keep_mask(9, 12, 6, dropout).double() / (1 - dropout)
    for name in ("x", "lora_a", "lora_b"):
        exact[name].requires_grad_()
    single = {name: value.detach().float().requires_grad_(value.requires_grad) for name, value in exact.items()}
    rows = exact["x"].reshape(12, 6)
    expected = rows @ exact["weight"].T + 0.7 * (rows * kept) @ exact["lora_a"].T @ exact["lora_b"].T
    expected = (expected + exact["bias"] * bias).view(3, 4, 5)
    operands = [single[name] for name in ("x", "weight", "lora_a", "lora_b")]
    got = ops_module.lora_linear(*operands, 0.7, single["bias"] if bias else None, dropout, seed=9)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(3, 4, 5, dtype=torch.float64)
    (expected * direction).sum().backward()
    (got * direction.float()).sum().backward()
    for name in ("x", "lora_a", "lora_b"):
        torch.testing.assert_close(single[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)
    assert single["weight"].grad is None
    # where no input needs it, dx is not computed, and A and B still learn
    still = ops_module.lora_linear(single["x"].detach(), *operands[1:], 0.7, dropout=dropout, seed=9)
    assert [grad.shape for grad in torch.autograd.grad(still.sum(), operands[2:])] == [(2, 6), (5, 2)]


def test_dropout_keeps_what_it_says_and_is_a_function_of_its_seed():
    kept = reference.keep_mask(1, 500, 400, 0.3)
    # 200,000 draws: the rate's standard error is .001
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.005)
    assert kept.float().mean(dim=0).std().item() == pytest.approx(math.sqrt(0.21 / 500), rel=0.2)
    assert torch.equal(kept, reference.keep_mask(1, 500, 400, 0.3))
    agreement = (kept == reference.keep_mask(2, 500, 400, 0.3)).float().mean().item()
    assert agreement == pytest.approx(0.7**2 + 0.3**2, abs=0.01)
    neighbours = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx(0.7**2 + 0.3**2, abs=0.01)
