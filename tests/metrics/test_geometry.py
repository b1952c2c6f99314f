"""Measures of whole sets against their definitions: loops, all permutations, eigenvalues."""

import itertools

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch

from tli.metrics.geometry import centred, geometry, standardised


def vectors(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels and H = I - 11'/n."""
    n = len(x)
    h = np.eye(n) - np.full((n, n), 1 / n)

    def hsic(first, second):
        return np.trace(first @ h @ second @ h) / (n - 1) ** 2

    of_x, of_y = x @ x.T, y @ y.T
    return hsic(of_x, of_y) / np.sqrt(hsic(of_x, of_x) * hsic(of_y, of_y))


@pytest.mark.parametrize(("rows", "width"), [(7, 30), (30, 7), (12, 12)], ids=str)
def test_cka_is_the_kernels_alignment_whichever_form_is_smaller(rows, width):
    x = vectors(rows, width, 0)
    y = 0.5 * x + vectors(rows, width, 1) + 3
    assert geometry(x, y).cka == pytest.approx(cka_by_definition(x.numpy(), y.numpy()), rel=1e-10)


@pytest.mark.parametrize("width", [3, 20])
def test_cka_by_chance_is_its_mean_over_all_ways_to_pair_the_words(width):
    x, y = vectors(6, width, 2), vectors(6, width, 3)
    every = [cka_by_definition(x.numpy(), y.numpy()[list(order)]) for order in itertools.permutations(range(6))]
    assert geometry(x, y).cka_chance == pytest.approx(np.mean(every), rel=1e-10)
    # the reason why it must be shown: with few words and many dimensions chance is far from 0
    assert geometry(vectors(6, 20, 2), vectors(6, 20, 3)).cka_chance > 0.5


def test_a_rotated_stretched_and_moved_language_has_a_cka_of_one():
    x = vectors(40, 8, 4)
    rotation = torch.linalg.qr(vectors(8, 8, 5)).Q
    assert geometry(x, 3 * x @ rotation + 7).cka == pytest.approx(1, rel=1e-10)


def iso_score_by_definition(points: np.ndarray) -> float:
    """Rudman et al. 2022, algorithm 1, step by step."""
    width = points.shape[1]
    turned = (points - points.mean(0)) @ np.linalg.eigh(np.cov(points.T))[1]
    diagonal = np.diag(np.cov(turned.T))
    normalised = np.sqrt(width) * diagonal / np.linalg.norm(diagonal)
    defect = np.linalg.norm(normalised - 1) / np.sqrt(2 * (width - np.sqrt(width)))
    share = (width - defect**2 * (width - np.sqrt(width))) ** 2 / width**2
    return (width * share - 1) / (width - 1)


@pytest.mark.parametrize(("rows", "width"), [(60, 9), (8, 25)], ids=str)
def test_iso_score_is_the_published_algorithm(rows, width):
    x, y = vectors(rows, width, 6) * torch.linspace(0.1, 3, width), vectors(rows, width, 7)
    expected = (iso_score_by_definition(x.numpy()) + iso_score_by_definition(y.numpy())) / 2
    assert geometry(x, y).iso_score == pytest.approx(expected, rel=1e-8)


def test_iso_score_runs_from_a_line_to_a_ball():
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.ones(1, 6)
    cross = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    assert geometry(line, line).iso_score == pytest.approx(0, abs=1e-12)
    assert geometry(cross, cross).iso_score == pytest.approx(1, rel=1e-12)


def test_the_mean_cosine_of_random_words_is_that_of_all_pairs_of_words():
    x, y = vectors(5, 4, 8) + 1, vectors(5, 4, 9)
    words = torch.cat([x, y]).numpy()
    every = [1 - scipy.spatial.distance.cosine(a, b) for a, b in itertools.permutations(words, 2)]
    assert geometry(x, y).random_cosine == pytest.approx(np.mean(every), rel=1e-10)


def test_centred_and_standardised_vectors_are_numpys():
    x = (vectors(30, 6, 10) * torch.tensor([1, 1, 50, 1, 1, 0.01], dtype=torch.float64) + 4).float()
    np.testing.assert_allclose(centred(x).numpy(), x.double().numpy() - x.double().numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(standardised(x).numpy(), scipy.stats.zscore(x.double().numpy()), rtol=1e-8)


def test_a_dimension_without_variation_stays_zero():
    x = vectors(10, 4, 11)
    x[:, 2] = 0.1
    assert (standardised(x)[:, 2] == 0).all()
    assert standardised(x).isfinite().all()


def test_words_that_are_all_alike_have_no_shape():
    alike = vectors(1, 5, 12).float().expand(9, 5)
    found = geometry(alike, vectors(9, 5, 13))
    assert found.cka == found.cka_chance == 0
    assert (centred(alike) == 0).all()
    assert (standardised(alike) == 0).all()
    assert geometry(alike, alike).random_cosine == pytest.approx(1)
