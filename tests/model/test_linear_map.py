"""Closed-form maps against what defines them: a minimum that no other matrix undercuts, correlations that scikit-learn and SciPy find."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.linear_model import Ridge

from tli.model.linear_map import fit_cca, fit_centred, fit_procrustes, fit_ridge


def related(seed: int, pairs: int = 200, width: int = 6, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(pairs, width)) @ generator.normal(size=(width, width)) + 3
    return source, source @ generator.normal(size=(width, width)) + noise * generator.normal(size=(pairs, width)) - 1


def test_centring_takes_each_languages_mean_off():
    source, target = related(0)
    mapped = fit_centred(source, target)(source, target)
    np.testing.assert_allclose([side.mean(0) for side in mapped], 0, atol=1e-12)
    np.testing.assert_allclose(mapped[0], source - source.mean(0))


def test_procrustes_finds_a_rotation_again_and_is_orthogonal():
    source, _ = related(1)
    rotation = scipy.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    linear = fit_procrustes(source, source @ rotation + 5)
    np.testing.assert_allclose(linear.source_matrix, rotation, atol=1e-10)
    mapped, target = linear(source, source @ rotation + 5)
    np.testing.assert_allclose(mapped, target, atol=1e-9)
    noisy = fit_procrustes(*related(3)).source_matrix
    np.testing.assert_allclose(noisy @ noisy.T, np.eye(6), atol=1e-10)


def test_procrustes_is_scipys():
    source, target = related(7)
    expected, _ = scipy.linalg.orthogonal_procrustes(source - source.mean(0), target - target.mean(0))
    np.testing.assert_allclose(fit_procrustes(source, target).source_matrix, expected, atol=1e-10)


def test_where_divide_and_conquer_gives_up_qr_iteration_goes_on(monkeypatch):
    source, target = related(8)
    expected = [fit_procrustes(source, target), fit_cca(source, target)(0.1)]

    def gives_up(*arguments, **options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", gives_up)
    for one, other in zip([fit_procrustes(source, target), fit_cca(source, target)(0.1)], expected):
        first, second = (linear(source, target) for linear in (one, other))
        np.testing.assert_allclose(first[0] @ first[1].T, second[0] @ second[1].T, atol=1e-8)


@pytest.mark.parametrize("shrinkage", [0.03, 0.9])
def test_ridge_is_scikit_learns(shrinkage):
    source, target = related(4)
    linear = fit_ridge(source, target)(shrinkage)
    penalty = shrinkage * np.linalg.eigvalsh((source - source.mean(0)).T @ (source - source.mean(0))).mean()
    theirs = Ridge(penalty).fit(source, target)
    np.testing.assert_allclose(linear(source, target)[0] + target.mean(0), theirs.predict(source), rtol=1e-8)


def test_cca_is_the_generalised_eigenproblem():
    source, target = related(5, noise=2.0)
    x, y = source - source.mean(0), target - target.mean(0)
    shrinkage, n = 0.2, len(x)
    covariances = [(1 - shrinkage) * c + shrinkage * np.trace(c) / len(c) * np.eye(len(c)) for c in (x.T @ x / n, y.T @ y / n)]
    cross = x.T @ y / n
    squared = scipy.linalg.eigh(cross @ np.linalg.solve(covariances[1], cross.T), covariances[0], eigvals_only=True)[::-1]
    linear = fit_cca(source, target)(shrinkage)
    # of directions scaled by the root of their correlation: A' C A = diag(correlation), and A' cross B = diag(correlation²)
    first, second = linear.source_matrix, linear.target_matrix
    for matrix, covariance in ((first, covariances[0]), (second, covariances[1])):
        np.testing.assert_allclose(matrix.T @ covariance @ matrix, np.diag(np.sqrt(squared)), atol=1e-10)
    np.testing.assert_allclose(first.T @ cross @ second, np.diag(squared), atol=1e-10)


def test_cca_of_more_dimensions_than_pairs_has_an_answer():
    source, target = np.random.default_rng(6).normal(size=(2, 10, 40))
    mapped = fit_cca(source, target)(0.1)(source, target)
    assert all(np.isfinite(side).all() for side in mapped)
