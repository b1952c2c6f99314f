"""The losses by blocks of rows: against fp64 whatever the size of a block, and never a tensor of B × B."""

import pytest
import torch
from tli_kernels import blocked, reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.test_infonce import definition, some_same, words
from tests.support.fidelity import assert_faithful


def run(op, source, target, option, false_negatives, dtype=torch.float32):
    source, target = (x.to(dtype).requires_grad_() for x in (source, target))
    loss = op(source, target, option, false_negatives)
    loss.backward(torch.full_like(loss, 1.75))
    return loss.detach(), source.grad, target.grad


def hinge_definition(source, target, margin, false_negatives):
    cosines = source @ target.T
    costs = []
    for i in range(len(source)):
        strangers = [j for j in range(len(source)) if j != i and [i, j] not in false_negatives.tolist()]
        costs.append((margin - cosines[i, i] + max(cosines[i, j] for j in strangers)).clamp(min=0))
    return torch.stack(costs).mean()


DEFINITIONS = {"infonce": (definition, 0.07), "hinge": (hinge_definition, 0.4)}


@pytest.mark.parametrize("numbers", [1, 120, 1500], ids=lambda n: f"block {n}")
@pytest.mark.parametrize("pairs", [2, 41, 64], ids=lambda n: f"B={n}")
@pytest.mark.parametrize("name", DEFINITIONS)
def test_loss_and_gradients_are_the_definitions(name, pairs, numbers, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", numbers)
    if pairs**2 <= numbers:
        pytest.skip("one block is the reference")
    source, target = words(pairs, 24)
    # with two pairs a forbidden one leaves a row without a negative, which the hinge's own tests are about
    false_negatives = some_same(pairs) if pairs > 2 else torch.empty(0, 2, dtype=torch.int64)
    definition, option = DEFINITIONS[name]
    source, target = source.float().double(), target.float().double()
    by_blocks = run(getattr(blocked, name), source, target, option, false_negatives)
    eager = run(getattr(reference, name), source, target, option, false_negatives)
    truth = run(definition, source, target, option, false_negatives, torch.float64)
    for what, got, plain, true in zip(("dU", "dV"), by_blocks[1:], eager[1:], truth[1:], strict=True):
        assert_faithful(got, plain, true, pairs, f"{name} {what}")
    # one number may be nearer by luck: what rounding a cosine does to it is the measure
    assert abs(by_blocks[0] - truth[0]) <= torch.finfo(torch.float32).eps / option


def test_the_temperatures_gradient_is_the_definitions(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", 100)
    source, target = (x.float() for x in words(41, 24))
    false_negatives = some_same(41)

    def of(op, dtype):
        temperature = torch.tensor(0.07, dtype=dtype, requires_grad=True)
        op(source.to(dtype), target.to(dtype), temperature, false_negatives).backward()
        return temperature.grad

    assert_faithful(of(blocked.infonce, torch.float32), of(reference.infonce, torch.float32), of(definition, torch.float64), 41 * 41)


def test_a_row_without_a_negative_costs_nothing(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", 4)
    source, target = (x.float() for x in words(3, 8))
    false_negatives = torch.tensor([[0, 1], [0, 2]])
    plain = run(reference.hinge, source, target, 0.4, false_negatives)
    for got, expected in zip(run(blocked.hinge, source, target, 0.4, false_negatives), plain, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_nothing_is_ever_b_by_b(name, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", 512 * 16)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    arguments = *words(512, 8), DEFINITIONS[name][1], some_same(512, often=0.001)
    with Largest() as seen:
        run(getattr(blocked, name), *arguments)
    assert 512 * 8 <= seen.numbers <= 512 * 16


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_small_batch_is_the_references_to_the_last_bit(name):
    option = DEFINITIONS[name][1]
    arguments = *words(33, 16), option, some_same(33)
    for got, expected in zip(run(getattr(blocked, name), *arguments), run(getattr(reference, name), *arguments), strict=True):
        assert torch.equal(got, expected)
