"""Collapse: what a batch's spread is, and which runs are said to collapse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tli.training import collapse


def units(pairs: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(2 * pairs, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("pairs", "width"), [(2, 3), (31, 64), (100, 7)])
def test_the_spread_is_its_definition(pairs, width):
    embeddings = units(pairs, width)
    source, target = embeddings.double().numpy()[:pairs], embeddings.double().numpy()[pairs:]
    cosines = source @ target.T
    mismatched = cosines[~np.eye(pairs, dtype=bool)].mean()
    eigenvalues = np.linalg.eigvalsh(np.cov(embeddings.double().numpy().T, bias=True))
    found = collapse.spread(embeddings).double().numpy()
    np.testing.assert_allclose(found, [mismatched, eigenvalues.sum() ** 2 / (eigenvalues**2).sum()], rtol=1e-4, atol=1e-6)


def test_words_that_are_all_one_have_no_rank():
    one = F.normalize(torch.ones(8, 5), dim=-1)
    mismatched, rank = collapse.spread(one).tolist()
    assert mismatched == pytest.approx(1.0)
    assert 0 <= rank < 1.5


def history(steps: int, loss, cosine, rank) -> tuple[list[float], list[tuple[float, float]]]:
    """A run in which each of the three goes evenly from its first value over the second to the last."""
    at = np.linspace(0, 1, steps)
    losses, cosines, ranks = (np.interp(at, np.linspace(0, 1, len(values)), values).tolist() for values in (loss, cosine, rank))
    return losses, list(zip(cosines, ranks))


CHANCE = 4.844


@pytest.mark.parametrize(
    ("loss", "cosine", "rank", "chance"),
    [
        # to one point, as raw token states go; and under a loss without a chance
        ((5.1, 4.84, 4.84), (0.82, 0.99, 0.99), (7, 24, 5), CHANCE),
        ((0.4, 0.4), (0.3, 0.95), (60, 40, 5), None),
    ],
)
def test_a_collapse_is_said_with_what_to_do(loss, cosine, rank, chance):
    losses, spreads = history(100, loss, cosine, rank)
    said = collapse.alarm(losses, spreads, 100, chance)
    assert said.startswith("at step 100 the words collapse: mismatched pairs have a mean cosine of 0.9")
    assert "lower --lr" in said
    assert ("where chance is 4.844" in said) == (chance is not None)
    # a run too young to tell
    assert collapse.alarm(losses[:15], spreads[:15], 100, chance) is None


@pytest.mark.parametrize(
    ("loss", "cosine", "rank"),
    [
        # what learns may pass through alike words and a loss at chance, if their rank stays; and through a fall of rank
        ((5.1, 4.84, 4.82), (0.71, 0.9, 0.89), (9, 47, 42)),
        ((5.1, 4.84, 4.84), (0.71, 0.72, 0.73), (40, 47, 5)),
        ((5.1, 4.84, 3.1), (0.5, 0.9), (60, 40, 20)),
    ],
)
def test_no_other_run_is_said_to_collapse(loss, cosine, rank):
    losses, spreads = history(100, loss, cosine, rank)
    assert not any(collapse.alarm(losses[:step], spreads[:step], 100, CHANCE) for step in range(1, 101))
