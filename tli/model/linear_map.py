"""Closed-form linear maps that carry two languages' word vectors into one space.

Sources: Mikolov et al. 2013 (arXiv 1309.4168) for a map between languages, Conneau et al. 2018 (arXiv 1710.04087) for Procrustes, Faruqui
and Dyer 2014 ("Improving vector space word representations using multilingual correlation") for CCA. NumPy and SciPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

# vectors of source words and of target words, [B, D] each; row i of one translates row i of the other
Sides = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """Both languages' vectors into a space where translations are near: ``(x - mean) @ matrix`` of each side.

    source_mean, target_mean      float64 [D]
    source_matrix, target_matrix  float64 [D, K]
    """

    source_mean: np.ndarray
    target_mean: np.ndarray
    source_matrix: np.ndarray
    target_matrix: np.ndarray

    def __call__(self, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (source - self.source_mean) @ self.source_matrix, (target - self.target_mean) @ self.target_matrix


def fit_centred(source: np.ndarray, target: np.ndarray) -> LinearMap:
    """No map, but each language's own mean taken off; vectors of trained pairs, float64 [B, D], as for all that fit."""
    return LinearMap(source.mean(0), target.mean(0), np.eye(source.shape[1]), np.eye(target.shape[1]))


def fit_procrustes(source: np.ndarray, target: np.ndarray) -> LinearMap:
    """The orthogonal matrix Q with the least ``|S Q - T|``, of centred vectors."""
    from scipy.linalg import orthogonal_procrustes

    means = source.mean(0), target.mean(0)
    rotation, _ = orthogonal_procrustes(source - means[0], target - means[1])
    return LinearMap(*means, rotation, np.eye(target.shape[1]))


def fit_ridge(source: np.ndarray, target: np.ndarray) -> Callable[[float], LinearMap]:
    """For a shrinkage s the matrix W with the least ``|S W - T|² + s·mean(eigenvalues of S'S)·|W|²``, of centred vectors."""
    means = source.mean(0), target.mean(0)
    centred = source - means[0]
    values, vectors = np.linalg.eigh(centred.T @ centred)
    rotated = vectors.T @ (centred.T @ (target - means[1]))

    def at(shrinkage: float) -> LinearMap:
        return LinearMap(*means, vectors @ (rotated / (values + shrinkage * values.mean())[:, None]), np.eye(target.shape[1]))

    return at


def fit_cca(source: np.ndarray, target: np.ndarray) -> Callable[[float], LinearMap]:
    """For a shrinkage s the canonical directions of both sides, each times the root of its correlation.

    Covariances are shrunk towards a multiple of the identity, ``(1 - s)·C + s·mean(eigenvalues of C)·I``, without which as many dimensions
    as pairs would correlate perfectly.
    """
    means = source.mean(0), target.mean(0)
    centred = [side - mean for side, mean in zip((source, target), means)]
    (x_values, x_axes), (y_values, y_axes) = (np.linalg.eigh(side.T @ side / len(side)) for side in centred)
    # along the principal axes a covariance is shrunk, and its root taken, number by number
    cross = x_axes.T @ (centred[0].T @ centred[1]) @ y_axes / len(source)

    def at(shrinkage: float) -> LinearMap:
        x_scale, y_scale = (1 / np.sqrt((1 - shrinkage) * np.maximum(v, 0) + shrinkage * v.mean()) for v in (x_values, y_values))
        left, correlations, right = np.linalg.svd(x_scale[:, None] * cross * y_scale, full_matrices=False)
        roots = np.sqrt(correlations)
        return LinearMap(*means, (x_axes * x_scale) @ (left * roots), (y_axes * y_scale) @ (right.T * roots))

    return at
